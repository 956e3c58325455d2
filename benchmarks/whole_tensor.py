"""How published analysis scripts count changed weights; a child of benchmarks/diff.py.

    python benchmarks/whole_tensor.py BASE TUNED

Each tensor is loaded whole from both sides, subtracted in its own dtype and compared with an absolute
tolerance. Prints counts, and CPU seconds spent before the first tensor and after.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

TOLERANCE = 1e-5


def main() -> None:
    imported = time.process_time()
    sides = []
    for folder in map(Path, sys.argv[1:3]):
        places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        files = {file: safe_open(folder / file, framework="pt") for file in set(places.values())}
        sides.append({name: files[file] for name, file in places.items()})
    changed = total = 0
    with torch.no_grad():
        for name, file in sides[0].items():
            base, tuned = file.get_tensor(name), sides[1][name].get_tensor(name)
            changed += int(((base - tuned).abs() > TOLERANCE).sum())
            total += base.numel()
    result = {
        "entries": total,
        "changed": changed,
        "cpu_s_imports": imported,
        "cpu_s_compare": time.process_time() - imported,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
