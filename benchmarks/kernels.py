"""CPU kernels against an XOR-read floor, on one thread, in CPU time.

    python benchmarks/kernels.py [--json PATH] [--dtype BF16] [--changed 15] [--rounds 7]

Every round runs each row once over the same streamed data, then the ratio to that round's floor is taken;
the table shows medians. The floor reads both sides as 64-bit words and ORs their XOR. Blocks have the
shape that work units use; both sides together are larger than any cache. `paper code` is what published
scripts do with whole tensors, in torch on one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch

from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.numba_kernel import NumbaKernel
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.types import Criterion, DType

BLOCK = (64, 4096)
CRITERIA = tuple(Criterion.parse(t) for t in ("bitwise", "value", "atol:1e-5"))
BARS = {"counts + bits": 1.25, "all statistics": 3.0}
COLUMNS = f"{'dtype':6} {'changed':>8} {'row':24} {'GB/s':>8} {'ns/entry':>9} {'× floor':>8} {'bar':>6}"
_SMALL_PATTERN = 1 << 22


@numba.njit(nogil=True, cache=True)
def xor_read(a, b):
    found = np.uint64(0)
    for i in range(len(a)):
        found |= a[i] ^ b[i]
    return found


def make_pair(dtype: DType, share: float, num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights like a trained matrix; `share` of them moved by ±1 to ±3 units in the last place."""
    rng = np.random.default_rng(20261121)
    entries = num_bytes // dtype.itemsize
    part = min(_SMALL_PATTERN, entries)
    code = CODE_DTYPE[dtype.itemsize]
    weights = rng.normal(scale=0.02, size=part).astype(np.float32).view(np.uint32)
    base = (weights >> np.uint32(16)).astype(np.uint16) if dtype is DType.BF16 else weights.astype(code)
    step = rng.choice(np.array([-3, -2, -1, -1, -1, 1, 1, 1, 2, 3]), size=part).astype(np.int64)
    moved = (base.astype(np.int64) + np.where(rng.random(part) < share, step, 0)).astype(code)
    shape = (entries // (BLOCK[0] * BLOCK[1]), *BLOCK)
    sides = [np.empty(entries, dtype=code), np.empty(entries, dtype=code)]
    for first in range(0, entries, part):
        for side, pattern in zip(sides, (base, moved), strict=True):
            side[first : first + part] = np.roll(pattern, 4099 * (first // part))[: entries - first]
    return sides[0].reshape(shape), sides[1].reshape(shape)


def compare_all(
    kernel: NumbaKernel | NumpyKernel, level: str, dtype: DType, a: np.ndarray, b: np.ndarray
) -> None:
    """One work unit over all blocks."""
    spec = KernelSpec(
        dtype=dtype, criteria=CRITERIA if level == "full" else CRITERIA[:2], mask=1, level=level
    )  # type: ignore[arg-type]
    acc = Accumulator(spec, rows=a.shape[0] * BLOCK[0], cols=BLOCK[1])
    bits = np.empty((BLOCK[0], BLOCK[1] // 8), dtype=np.uint8)
    for i in range(len(a)):
        kernel.compare(a[i], b[i], acc, first_row=i * BLOCK[0], first_col=0, bits=bits)
    kernel.finish(acc)


def rows_of(
    dtype: DType, a: np.ndarray, b: np.ndarray, *, slow: bool
) -> dict[str, tuple[Callable[[], object], int]]:
    """Row name → (what to time, blocks it covers)."""
    fast, plain = NumbaKernel(), NumpyKernel()
    words_a, words_b = a.reshape(len(a), -1).view(np.uint64), b.reshape(len(b), -1).view(np.uint64)
    few = max(1, len(a) // 16)
    rows: dict[str, tuple[Callable[[], object], int]] = {
        "floor": (lambda: [xor_read(x, y) for x, y in zip(words_a, words_b, strict=True)], len(a)),
        "counts + bits": (lambda: compare_all(fast, "counts", dtype, a, b), len(a)),
        "all statistics": (lambda: compare_all(fast, "full", dtype, a, b), len(a)),
        "fingerprints": (
            lambda: [fast.fingerprint(w, 0) for side in (words_a, words_b) for w in side],
            len(a),
        ),
    }
    if slow:
        view = torch.bfloat16 if dtype is DType.BF16 else torch.float32
        signed = np.int16 if dtype is DType.BF16 else np.int32
        whole_a = torch.from_numpy(a[:few].view(signed)).view(view)
        whole_b = torch.from_numpy(b[:few].view(signed)).view(view)
        rows |= {
            "numpy counts + bits": (lambda: compare_all(plain, "counts", dtype, a[:few], b[:few]), few),
            "numpy all statistics": (lambda: compare_all(plain, "full", dtype, a[:few], b[:few]), few),
            "paper code abs > tol": (lambda: ((whole_a - whole_b).abs() > 1e-5).sum().item(), few),
            "paper code isclose": (
                lambda: (~torch.isclose(whole_a.float(), whole_b.float(), atol=1e-5)).sum().item(),
                few,
            ),
        }
    return rows


def measure(
    dtype: DType, share: float, num_bytes: int, rounds: int, *, slow: bool
) -> list[dict[str, object]]:
    """Medians for one pair."""
    a, b = make_pair(dtype, share, num_bytes)
    rows = rows_of(dtype, a, b, slow=slow)
    for run, _ in rows.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, (run, _) in rows.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    results = []
    for name, (_, blocks) in rows.items():
        entries = blocks * BLOCK[0] * BLOCK[1]
        ratios = [(s / blocks) / (f / len(a)) for s, f in zip(seconds[name], seconds["floor"], strict=True)]
        median = statistics.median(seconds[name])
        results.append(
            {
                "dtype": dtype.label,
                "changed": share,
                "row": name,
                "gb_per_s": 2 * entries * dtype.itemsize / median / 1e9,
                "ns_per_entry": median / entries * 1e9,
                "ratio": statistics.median(ratios),
                "bar": BARS.get(name) if dtype is DType.BF16 and share == 0.15 else None,
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--dtype", action="append", choices=["BF16", "F32"], help="default: both")
    parser.add_argument("--changed", action="append", type=float, help="per cent; default 0, 15, 60, 100")
    parser.add_argument("--megabytes", type=int, default=256, help="per side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fast-only", action="store_true", help="leave numpy and paper code out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(COLUMNS)
    results = []
    for dtype in [DType(d) for d in options.dtype or ("BF16", "F32")]:
        for per_cent in options.changed or (0.0, 15.0, 60.0, 100.0):
            found = measure(
                dtype, per_cent / 100, options.megabytes << 20, options.rounds, slow=not options.fast_only
            )
            for r in found:
                bar = "" if r["bar"] is None else f"≤ {r['bar']}"
                print(
                    f"{r['dtype']:6} {r['changed']:>8.0%} {r['row']:24} {r['gb_per_s']:>8.2f} "
                    f"{r['ns_per_entry']:>9.3f} {r['ratio']:>8.2f} {bar:>6}",
                    flush=True,
                )
            results += found
    if options.json:
        machine = {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "numba": numba.__version__,
            "numpy": np.__version__,
            "torch": torch.__version__,
            "rounds": options.rounds,
            "megabytes_per_side": options.megabytes,
        }
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
