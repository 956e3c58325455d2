"""Sparse patches: how long they take beside reading and writing the files, how large they are beside others.

    python benchmarks/patch.py --json benchmarks/results/patch.json
    python benchmarks/patch.py --entries 2e7 --repeats 1 --rows speed

Row `speed`: a bf16 pair of `--entries` entries, 1 % and 15 % of which changed. `patch make` is timed against
reading both files and hashing both once with sha256 (what the contract asks for cannot cost less), `patch
apply` against reading the base and writing the result. Each in one process, in turn; wall and CPU seconds,
medians.

Row `sizes`: the recorded runs of `tests/data/addition` and `examples/addition` in bytes: the patch
directory, its payload, other encodings, zstd of the XOR of both checkpoints' bytes (levels 3 and 19), and
the dense checkpoint. Needs the extra `zstd`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, versions

from sparsity_audit import patch_apply, patch_info, patch_make
from sparsity_audit.checkpoint.opening import open_checkpoint

SEED = 20261129
ROOT = Path(__file__).parents[1]
TENSOR = (4096, 4096)


def write_pair(folder: Path, entries: int, density: float) -> None:
    """A base of bf16 codes like a model's, and a tuned side with single codes moved by one."""
    rng = np.random.default_rng([SEED, int(density * 1e6)])
    count = max(entries // (TENSOR[0] * TENSOR[1]), 1)
    header = {
        f"model.layers.{n:04d}.mlp.up_proj.weight": {
            "dtype": "BF16",
            "shape": list(TENSOR),
            "data_offsets": [n * 2 * TENSOR[0] * TENSOR[1], (n + 1) * 2 * TENSOR[0] * TENSOR[1]],
        }
        for n in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    for side in ("base", "tuned"):
        (folder / side).mkdir(parents=True)
        (folder / side / "config.json").write_text("{}")
    with (
        (folder / "base/model.safetensors").open("wb") as base,
        (folder / "tuned/model.safetensors").open("wb") as tuned,
    ):
        for file in (base, tuned):
            file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(count):
            values = rng.standard_normal(TENSOR[0] * TENSOR[1], dtype=np.float32) * 0.02
            codes = (values.view(np.uint32) >> 16).astype(np.uint16)
            base.write(codes.tobytes())
            codes[rng.random(len(codes), dtype=np.float32) < density] += 1
            tuned.write(codes.tobytes())


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def read(path: Path, *, with_hash: bool) -> None:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 22)
        while count := file.readinto(buffer):
            if with_hash:
                digest.update(memoryview(buffer)[:count])


def copy(source: Path, target: Path) -> None:
    buffer = bytearray(1 << 22)
    with source.open("rb", buffering=0) as one, target.open("wb", buffering=0) as other:
        while count := one.readinto(buffer):
            other.write(memoryview(buffer)[:count])


def speed(entries: int, density: float, repeats: int, workers: int, work: Path) -> dict[str, Any]:
    write_pair(work, entries, density)
    base, tuned = work / "base", work / "tuned"
    files = [side / "model.safetensors" for side in (base, tuned)]
    samples: dict[str, list[tuple[float, float]]] = {}
    for number in range(repeats):
        out = work / f"out-{number}"
        out.mkdir()
        calls: dict[str, Callable[[], object]] = {
            "read both": lambda: [read(file, with_hash=False) for file in files],
            "read and hash both": lambda: [read(file, with_hash=True) for file in files],
            "make": lambda o=out: patch_make(base, [tuned], o / "patch", workers=workers),
            "copy base": lambda o=out: copy(files[0], o / "copy"),
            "copy base, hash twice": lambda o=out: (
                copy(files[0], o / "hashed"),
                [read(files[0], with_hash=True) for _ in range(2)],
            ),
            "apply": lambda o=out: patch_apply(base, [o / "patch"], o / "rebuilt", workers=workers),
        }
        for name, call in calls.items():
            samples.setdefault(name, []).append(timed(call))
        assert (out / "rebuilt" / "model.safetensors").read_bytes()[-1000:] == files[1].read_bytes()[-1000:]
    median = {
        name: {
            "wall_s": round(statistics.median(wall for wall, _ in found), 3),
            "cpu_s": round(statistics.median(cpu for _, cpu in found), 3),
        }
        for name, found in samples.items()
    }
    (info,) = patch_info(work / "out-0" / "patch")
    ratios = {
        f"{ours} / {theirs} ({kind[:-2]})": round(median[ours][kind] / median[theirs][kind], 2)
        for ours, theirs in (
            ("make", "read and hash both"),
            ("make", "read both"),
            ("apply", "copy base, hash twice"),
            ("apply", "copy base"),
        )
        for kind in ("wall_s", "cpu_s")
    }
    return {
        "entries": info.num_entries,
        "density": density,
        "workers": workers,
        "repeats": repeats,
        "dense_bytes": info.sizes.dense,
        "patch_bytes": info.sizes.stored,
        "seconds": median,
        "ratios": ratios,
    }


def codes(folder: Path) -> np.ndarray:
    """All entries of a checkpoint, in name order, as bytes."""
    catalogue = open_checkpoint(folder)
    parts = []
    for spec in catalogue.tensors.values():
        with catalogue.files[spec.file].path.open("rb") as file:
            file.seek(spec.extent.start)
            parts.append(np.frombuffer(file.read(spec.extent.num_bytes), dtype=np.uint8))
    return np.concatenate(parts)


def size_row(base: Path, tuned: Path, work: Path) -> dict[str, Any]:
    import zstandard

    xor = (codes(base) ^ codes(tuned)).tobytes()
    (plain,) = patch_make(base, [tuned], work / f"{tuned.name}-none")
    (packed,) = patch_make(base, [tuned], work / f"{tuned.name}-zstd", codec="zstd")
    payload = {
        codec: (work / f"{tuned.name}-{codec}" / "patch.safetensors").stat().st_size
        for codec in ("none", "zstd")
    }
    return {
        "base": str(base.relative_to(ROOT)),
        "tuned": str(tuned.relative_to(ROOT)),
        "update_density": round(plain.update_density or 0.0, 4),
        "dense": plain.sizes.dense,
        "indices_and_values": plain.sizes.indices,
        "mask_and_values": plain.sizes.mask,
        "gaps_and_values": plain.sizes.gaps,
        "best_and_values": plain.sizes.best,
        "patch_payload_file": payload["none"],
        "patch_payload_file_zstd": payload["zstd"],
        "patch_directory": plain.sizes.stored,
        "patch_directory_zstd": packed.sizes.stored,
        "zstd3_of_xor": len(zstandard.ZstdCompressor(level=3).compress(xor)),
        "zstd19_of_xor": len(zstandard.ZstdCompressor(level=19).compress(xor)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=float, default=2e8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", default="speed,sizes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = options.rows.split(",")
    result: dict[str, Any] = {
        "benchmark": "patch",
        "seed": SEED,
        "machine": machine() | versions(["numpy", "zstandard"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "speed" in rows:
            result["speed"] = [
                speed(int(options.entries), density, options.repeats, options.workers, work / f"pair-{n}")
                for n, density in enumerate((0.01, 0.15))
            ]
        if "sizes" in rows:
            data, examples = ROOT / "tests/data/addition", ROOT / "examples/addition"
            pairs = [
                (data / f"base-{dtype}", tuned)
                for dtype in ("bf16", "fp32")
                for tuned in sorted(data.iterdir())
                if dtype in tuned.name and not tuned.name.startswith("base")
            ]
            pairs += [
                (examples / "base", t) for t in sorted(examples.iterdir()) if t.name != "base" and t.is_dir()
            ]
            result["sizes"] = [size_row(base, tuned, work) for base, tuned in pairs]
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if options.json:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
