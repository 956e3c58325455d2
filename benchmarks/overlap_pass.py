"""One overlap pass over masks, as `overlap.py` measures it in a child process.

    python benchmarks/overlap_pass.py MASK MASK… [--base BASE] [--workers 2]

Opens the masks, with --base proves it by its fingerprints and counts by its strata, and prints as JSON what
the pass found and what it took once its kernel was loaded: the smallest tensor is counted before. Nothing
else of `sparsity-audit overlap` runs: no nulls, no report.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.masks.reader import MaskReader, open_mask
from sparsity_audit.passes.base_strata import StrataGrouping
from sparsity_audit.passes.many import count_overlaps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("masks", type=Path, nargs="+")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    masks = [open_mask(path) for path in options.masks]
    with ExitStack() as stack:
        grouping = None
        if options.base is not None:
            like = stack.enter_context(MaskReader(masks[0]))
            base = open_checkpoint(options.base)
            grouping = stack.enter_context(closing(StrataGrouping(like, base, kernel="numba")))
        count = partial(count_overlaps, masks, grouping=grouping, workers=options.workers, kernel="numba")
        tensors = masks[0].tensors
        smallest = min(tensors, key=lambda name: tensors[name].num_entries)
        count({smallest: tensors[smallest]})
        wall, cpu = time.perf_counter(), time.process_time()
        tables = count(tensors)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = {
        "entries": sum(int(table.entries.sum()) for table in tables),
        "changed": [sum(int(table.changed[r].sum()) for table in tables) for r in range(len(masks))],
        "core": [sum(int(table.core[k].sum()) for table in tables) for k in range(len(masks) + 1)],
        "num_strata": sum(len(table.strata) for table in tables),
    }
    print(json.dumps(found | {"count_wall_s": round(wall, 4), "count_cpu_s": round(cpu, 4)}))


if __name__ == "__main__":
    main()
