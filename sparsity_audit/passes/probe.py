"""Look at a fixed sample of a pair before the pass, to learn the shrink that decay would have left.

Contract: at most 64 runs of 1024 entries at fixed, evenly spread positions of the pair, so that the
sample, and with it every result, does not depend on how the pass is cut. Only fp32 and fp64 pairs of equal
dtype are sampled: in narrower dtypes decay of usual size is far below one step of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparsity_audit.align.records import Pair, TensorSlice
from sparsity_audit.checkpoint.ranges import FileRead
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.accumulate import CODE_DTYPE
from sparsity_audit.compare.numpy_kernel import to_float64
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.stats.decay import estimate_shrink
from sparsity_audit.types import ByteRange, DType

__all__ = ["probe_shrinks"]

_RUNS = 64
_RUN_ENTRIES = 1024
_REQUESTS_AT_ONCE = 16
"""Of a store behind a network: the sample is thousands of small reads, where waiting is all the cost."""


def probe_shrinks(base: Catalogue, tuned: Catalogue, pairs: tuple[Pair, ...]) -> tuple[float | None, ...]:
    """The shrink c to test for each pair, or None where none shows in the sample."""
    files = OpenFiles(base), OpenFiles(tuned)
    chosen = [pair for pair in pairs if _is_sampled(pair)]
    try:
        for number, opened in enumerate(files):
            if opened.has_remote:
                parts = [(pair.base, pair.tuned)[number] for pair in chosen]
                opened.expect([read for part in parts for read in _reads(part)], in_flight=_REQUESTS_AT_ONCE)
        return tuple(_probe(pair, *files) for pair in pairs)
    finally:
        for side in files:
            side.close()


def _probe(pair: Pair, base: OpenFiles, tuned: OpenFiles) -> float | None:
    if not _is_sampled(pair):
        return None
    starts = _starts(pair.base.num_entries)
    return estimate_shrink(_values(pair.base, base, starts), _values(pair.tuned, tuned, starts))


def _is_sampled(pair: Pair) -> bool:
    dtype = pair.base.spec.dtype
    return dtype in (DType.F32, DType.F64) and pair.tuned.spec.dtype is dtype and pair.base.num_entries > 0


def _reads(part: TensorSlice) -> Iterator[FileRead]:
    """What the sample reads of a part that lies in one run."""
    spec, first = part.source
    if spec.strides is not None:
        return
    for start in _starts(part.num_entries):
        stop = min(start + _RUN_ENTRIES, part.num_entries)
        places = (spec.extent.start + (first + entry) * spec.dtype.itemsize for entry in (start, stop))
        yield FileRead(spec.file, ByteRange(start=next(places), stop=next(places)))


def _starts(num_entries: int) -> list[int]:
    if num_entries <= _RUNS * _RUN_ENTRIES:
        return list(range(0, num_entries, _RUN_ENTRIES))
    last = num_entries - _RUN_ENTRIES
    return [last * run // (_RUNS - 1) for run in range(_RUNS)]


def _values(part: TensorSlice, files: OpenFiles, starts: list[int]) -> np.ndarray:
    spec, first = part.source
    code = CODE_DTYPE[spec.dtype.itemsize]
    pieces = []
    for start in starts:
        piece = bytearray(min(_RUN_ENTRIES, part.num_entries - start) * spec.dtype.itemsize)
        read_entries(files[spec.file], spec, first + start, memoryview(piece))
        pieces.append(to_float64(np.frombuffer(piece, dtype=code), spec.dtype))
    return np.concatenate(pieces)
