"""Bars of the device kernel, as ratios taken in one run. No result from a GPU is committed yet.

Stands alone: numpy, torch and the package, from the repository's root:

    python -m benchmarks.gpu                                (a CUDA device, a pair of 1.016 B bf16 entries)
    python -m benchmarks.gpu --device cpu --entries 2e6     (the same code, to see that it runs)

Each round measures in turn: copies from page-locked memory to the device (two streams), a copy on the
device, reading both files with the streamer's threads, the whole streamed pass, and the comparison of
tensors that already lie on the device, at levels `counts` and `full`, all with mask bits. Medians of the
rounds. GB/s counts the bytes of both sides; for the device copy, the bytes read and written. The files
are warm. Bars: streamed / page-locked copy ≥ 0.9, resident / device copy ≥ 0.5.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsity_audit.align.records import Alignment, Pair, TensorSlice
from sparsity_audit.checkpoint.store import Catalogue, FileEntry, LocalFile
from sparsity_audit.compare.accumulate import Accumulator, Kernel, KernelSpec, Level
from sparsity_audit.compare.device_kernel import DeviceKernel
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.passes.device_stream import NUM_SLOTS, SLOT_BYTES
from sparsity_audit.passes.execute import run_plan
from sparsity_audit.passes.plan import Plan, default_criteria, make_plan
from sparsity_audit.types import ByteRange, DType, TensorSpec

COLS = 8192
CHANGED_FRAC = 0.15
UNIT_BYTES = 256 << 20
LEVELS: tuple[Level, ...] = ("counts", "full")
BARS = {"streamed": 0.9, "resident": 0.5}
CHECKED_ROWS = 128


class Discard:
    """A sink for mask bits, so that they do come back from the device."""

    def write(self, pair: Pair, *, first_row: int, first_col: int, bits: np.ndarray) -> None:
        """Take them."""


def make_pair(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 codes (int16) of normal weights, and a copy with one in seven a code away."""
    generator = torch.Generator(device=device).manual_seed(0)
    base = torch.empty((rows, COLS), dtype=torch.int16, device=device)
    tuned = torch.empty_like(base)
    for start in range(0, rows, 4096):
        part = base[start : start + 4096]
        weights = torch.randn(part.shape, generator=generator, device=device) * 0.02
        part.copy_(weights.to(torch.bfloat16).view(torch.int16))
        drawn = torch.rand(part.shape, generator=generator, device=device)
        step = (drawn < CHANGED_FRAC / 2).to(torch.int16) - (drawn > 1 - CHANGED_FRAC / 2).to(torch.int16)
        tuned[start : start + 4096] = part + step
    return base, tuned


def write_side(codes: torch.Tensor, path: Path) -> Catalogue:
    with path.open("wb") as file:
        for start in range(0, len(codes), 4096):
            codes[start : start + 4096].cpu().numpy().tofile(file)
    extent = ByteRange(start=0, stop=codes.numel() * 2)
    spec = TensorSpec(name="weight", dtype=DType.BF16, shape=tuple(codes.shape), file=0, extent=extent)
    return Catalogue(
        reference=path.name, resolved=path.name, files=(FileEntry.from_path(path),), tensors={"weight": spec}
    )


def plan_of(base: Catalogue, tuned: Catalogue, level: Level) -> Plan:
    slices = [TensorSlice.whole(side.tensors["weight"]) for side in (base, tuned)]
    pair = Pair(name="weight", base=slices[0], tuned=slices[1], rule="exact")
    totals = {"base": base.num_entries, "tuned": tuned.num_entries}
    alignment = Alignment(pairs=(pair,), skipped=(), leftovers=(), findings=(), totals=totals)
    spec = PairSpec(base=DType.BF16, tuned=DType.BF16, criteria=default_criteria(), level=level)
    return make_plan(base, tuned, alignment, specs=(spec,), unit_bytes=UNIT_BYTES)


def seconds(action: Callable[[], object], device: str) -> float:
    """Wall time of an action, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


class PinnedCopy:
    """Copies page-locked buffers to the device on two streams, again and again."""

    def __init__(self, device: str, num_bytes: int) -> None:
        is_cuda = device != "cpu"
        self.count = max(1, num_bytes // (2 * SLOT_BYTES))
        self.host = [torch.zeros(SLOT_BYTES, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
        self.device = [torch.zeros(SLOT_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
        self.streams = [torch.cuda.Stream(device) if is_cuda else None for _ in range(2)]

    @property
    def num_bytes(self) -> int:
        """Bytes that one call copies."""
        return 2 * self.count * SLOT_BYTES

    def __call__(self) -> None:
        """Queue all copies."""
        for _ in range(self.count):
            for host, target, stream in zip(self.host, self.device, self.streams, strict=True):
                with torch.cuda.stream(stream):
                    target.copy_(host, non_blocking=True)


def read_files(catalogues: list[Catalogue]) -> None:
    """What the streamer's threads do, without a device."""

    def read(file: LocalFile, offset: int) -> None:
        size = min(SLOT_BYTES, file.entry.num_bytes - offset)
        file.read_into(memoryview(bytearray(size)), offset)

    with ThreadPoolExecutor(2 * NUM_SLOTS) as pool:
        files = [LocalFile(side.files[0]) for side in catalogues]
        offsets = range(0, files[0].entry.num_bytes, SLOT_BYTES)
        for future in [pool.submit(read, file, offset) for offset in offsets for file in files]:
            future.result()
        for file in files:
            file.close()


def compare_resident(kernel: DeviceKernel, base: torch.Tensor, tuned: torch.Tensor, level: Level) -> None:
    spec = KernelSpec(dtype=DType.BF16, criteria=default_criteria(), mask=1, level=level)
    acc = Accumulator(spec, rows=len(base), cols=COLS)
    kernel.compare_tensors(base, tuned, acc, first_row=0, first_col=0, want_bits=True)
    kernel.finish(acc)


def verify(kernel: DeviceKernel, base: torch.Tensor, tuned: torch.Tensor) -> int:
    """Entries of the first rows on which the device and numpy were found equal; raises where not."""
    sides = [side[:CHECKED_ROWS].cpu().numpy().view(np.uint16) for side in (base, tuned)]
    spec = KernelSpec(dtype=DType.BF16, criteria=default_criteria(), mask=1, level="full")
    kernels: tuple[Kernel, ...] = (kernel, NumpyKernel())
    results = []
    for each in kernels:
        acc = Accumulator(spec, rows=len(sides[0]), cols=COLS)
        bits = np.zeros((len(sides[0]), COLS // 8), dtype=np.uint8)
        each.compare(sides[0], sides[1], acc, first_row=0, first_col=0, bits=bits)
        each.finish(acc)
        results.append((acc.view_tally(), acc.axis_counts(), bits.tobytes()))
    if results[0] != results[1]:
        raise SystemExit("the device kernel differs from the numpy kernel")
    return sides[0].size


def measure(device: str, rows: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Median GB/s of everything, and the ratios of the bars."""
    kernel = DeviceKernel(device)
    base, tuned = make_pair(rows, device)
    checked = verify(kernel, base, tuned)
    catalogues = [
        write_side(side, folder / name) for side, name in ((base, "base.bin"), (tuned, "tuned.bin"))
    ]
    pair_bytes = 2 * base.numel() * 2
    pinned, target = PinnedCopy(device, pair_bytes), torch.empty_like(base)
    actions: dict[str, tuple[Callable[[], object], int]] = {
        "pinned copy to the device": (pinned, pinned.num_bytes),
        "copy on the device": (partial(target.copy_, base), 2 * base.numel() * 2),
        "reading both files": (partial(read_files, catalogues), pair_bytes),
    }
    for level in LEVELS:
        run = partial(run_plan, plan_of(*catalogues, level), kernel=kernel, bits=Discard())
        actions[f"streamed, {level}"] = (run, pair_bytes)
        actions[f"resident, {level}"] = (partial(compare_resident, kernel, base, tuned, level), pair_bytes)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(repeats + 1):
        for name, (action, _) in actions.items():
            elapsed = seconds(action, device)
            if number:  # the first round warms up
                times[name].append(elapsed)
    rates = {
        name: num_bytes / statistics.median(times[name]) / 1e9 for name, (_, num_bytes) in actions.items()
    }
    floors = {"streamed": rates["pinned copy to the device"], "resident": rates["copy on the device"]}
    return {
        "entries": base.numel(),
        "entries_checked_against_numpy": checked,
        "repeats": repeats,
        "gb_per_s": rates,
        "seconds": times,
        "ratios": {
            f"{what}, {level}": {"ratio": rates[f"{what}, {level}"] / floors[what], "bar": bar}
            for what, bar in BARS.items()
            for level in LEVELS
        },
    }


def describe(device: str) -> dict[str, Any]:
    """The machine and the versions that a result belongs to."""
    facts: dict[str, Any] = {
        "device": device,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if device != "cpu":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "driver": driver_version(),
        }
    return facts


def driver_version() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:INDEX or cpu")
    parser.add_argument("--entries", type=float, default=1.016e9, help="entries of the generated pair")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, after one that warms up")
    parser.add_argument(
        "--folder", type=Path, help="where the pair is written for the run; 2 bytes an entry and side"
    )
    parser.add_argument("--output", type=Path, help="JSON result; for a GPU benchmarks/results/gpu-NAME.json")
    options = parser.parse_args()
    rows = max(CHECKED_ROWS, round(options.entries / COLS))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = describe(options.device) | measure(options.device, rows, options.repeats, Path(folder))
    for name, rate in result["gb_per_s"].items():
        print(f"{name:28} {rate:9.1f} GB/s")
    for name, ratio in result["ratios"].items():
        verdict = "reached" if ratio["ratio"] >= ratio["bar"] else "missed"
        print(f"{name:28} {ratio['ratio']:9.2f} of its floor, bar {ratio['bar']}: {verdict}")
    output = options.output
    if output is None and options.device != "cpu":
        name = result["gpu"].lower().replace(" ", "-")
        output = Path(__file__).parent / "results" / f"gpu-{name}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
