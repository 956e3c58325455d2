"""The device kernel against the reference, on torch's CPU device and, where there is one, on CUDA.

Stands alone: numpy, torch, pytest and the package. On a machine with nothing else installed, from the
repository's root:

    python -m pytest -c /dev/null --rootdir . --confcutdir tests/gpu -p no:cacheprovider -m gpu tests/gpu
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsity_audit.compare import device_kernel
from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.convert import widen
from sparsity_audit.compare.device_kernel import DeviceKernel
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.compare.reference import ReferenceKernel
from sparsity_audit.types import Criterion, DType, common_dtype

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
CRITERIA = tuple(
    Criterion.parse(text)
    for text in ("bitwise", "value", "atol:1e-5", "rel:1e-3", "ulp:2", "atol:2", "rel:0", "atol:1e300")
)
FLOATS = [dtype for dtype in DType if dtype.kind == "float"]


def make_codes(dtype: DType, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Uniform codes, three in ten of them special ones."""
    code = CODE_DTYPE[dtype.itemsize]
    codes = rng.integers(0, 2 ** (8 * dtype.itemsize) - 1, shape, dtype=np.uint64, endpoint=True).astype(code)
    chosen = rng.random(shape) < 0.3
    codes[chosen] = rng.choice(special_codes(dtype), int(chosen.sum()))
    return codes


def special_codes(dtype: DType) -> np.ndarray:
    """Zeros, smallest and largest numbers, infinities, NaNs of several payloads, of both signs."""
    top = 2 ** (8 * dtype.itemsize)
    if dtype.kind != "float":
        return np.array([0, 1, 2, top // 2 - 1, top // 2, top - 1], dtype=np.uint64).astype(
            CODE_DTYPE[dtype.itemsize]
        )
    layout = dtype.layout
    infinity = layout.first_nan - 1 if layout.infinity is None else layout.infinity
    smallest_normal = 1 << layout.mantissa_bits
    sizes = [0, 1, smallest_normal - 1, smallest_normal, infinity - 1, infinity]
    sizes += [layout.first_nan, layout.magnitude_mask]
    signed = [size | sign for size in sizes for sign in (0, layout.sign_mask)]
    return np.array(signed, dtype=np.uint64).astype(CODE_DTYPE[dtype.itemsize])


def make_pair(
    dtype: DType, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A base and a tuned block: half equal, the rest a few codes away or anything."""
    base = make_codes(dtype, shape, rng)
    tuned = base.copy()
    near = rng.random(shape) < 0.4
    step = rng.integers(-12, 13, int(near.sum())).astype(np.uint64)
    tuned[near] = (tuned[near].astype(np.uint64) + step).astype(base.dtype)
    far = rng.random(shape) < 0.2
    tuned[far] = make_codes(dtype, shape, rng)[far]
    return base, tuned


def specs_of(dtype: DType, criteria: tuple[Criterion, ...] = CRITERIA) -> list[KernelSpec]:
    """Every mask criterion at both levels."""
    shrink = 1e-4 if dtype in (DType.F32, DType.F64) else None
    return [
        KernelSpec(
            dtype=dtype, criteria=criteria, mask=mask, level=level, shrink=shrink if level == "full" else None
        )
        for mask in range(len(criteria))
        for level in ("counts", "full")
    ]


def run(kernel, base: np.ndarray, tuned: np.ndarray, spec: KernelSpec, *, blocks=None) -> tuple:
    """Everything a kernel says about a pair that lies at row 1, column 8 of a larger one."""
    rows, cols = base.shape
    acc = Accumulator(spec, rows=rows + 2, cols=cols + 8)
    bits = np.full((rows, (cols + 7) // 8), 0xAA, dtype=np.uint8)
    for row, col in blocks or [(slice(0, rows), slice(0, cols))]:
        part = bits[row, col.start // 8 : (col.stop + 7) // 8]
        packed = np.full(part.shape, 0x55, dtype=np.uint8)
        kernel.compare(
            np.ascontiguousarray(base[row, col]),
            np.ascontiguousarray(tuned[row, col]),
            acc,
            first_row=1 + row.start,
            first_col=8 + col.start,
            bits=packed,
        )
        part[...] = packed
    kernel.finish(acc)
    return acc.view_tally(), acc.axis_counts(), bits.tobytes()


@on_each_device
@pytest.mark.parametrize("dtype", list(DType))
def test_every_count_and_bit_equals_the_reference(dtype, device):
    rng = np.random.default_rng(1)
    for shape in [(5, 13), (1, 1), (3, 0), (0, 5), (1, 40)]:
        base, tuned = make_pair(dtype, shape, rng)
        for spec in specs_of(dtype):
            expected = run(ReferenceKernel(), base, tuned, spec)
            assert run(DeviceKernel(device), base, tuned, spec) == expected, (shape, spec)


@on_each_device
@pytest.mark.parametrize("dtype", list(DType))
def test_every_special_code_against_every_other_equals_the_reference(dtype, device):
    special = special_codes(dtype)
    base, tuned = (np.ascontiguousarray(side) for side in np.meshgrid(special, special))
    for spec in specs_of(dtype)[-6:-1]:
        assert run(DeviceKernel(device), base, tuned, spec) == run(ReferenceKernel(), base, tuned, spec), spec


@on_each_device
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", [(61, 517), (1, 30_011), (30_011, 1)], ids=str)
def test_blocks_larger_than_a_piece_equal_the_numpy_kernel(dtype, shape, device, monkeypatch):
    monkeypatch.setitem(device_kernel._PIECE_BYTES, torch.device(device).type, 1 << 14)
    base, tuned = make_pair(dtype, shape, np.random.default_rng(2))
    for spec in specs_of(dtype)[1:4]:
        assert run(DeviceKernel(device), base, tuned, spec) == run(NumpyKernel(), base, tuned, spec)


@on_each_device
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32, DType.F64, DType.I8, DType.U64])
def test_how_a_pair_is_cut_into_blocks_changes_nothing(dtype, device):
    base, tuned = make_pair(dtype, (12, 96), np.random.default_rng(3))
    spec = specs_of(dtype)[5]
    whole = run(DeviceKernel(device), base, tuned, spec)
    by_rows = [(slice(row, min(row + 5, 12)), slice(0, 96)) for row in (10, 0, 5)]
    by_parts = [(slice(row, row + 1), slice(col, col + 24)) for row in range(12) for col in range(0, 96, 24)]
    assert run(DeviceKernel(device), base, tuned, spec, blocks=by_rows) == whole
    assert run(DeviceKernel(device), base, tuned, spec, blocks=by_parts) == whole


@on_each_device
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64])
def test_numbers_as_training_leaves_them_equal_the_reference(dtype, device):
    rng = np.random.default_rng(4)
    weights = rng.normal(0, 0.02, (25, 40))
    steps = rng.normal(0, 1e-5, weights.shape) * (rng.random(weights.shape) < 0.3)
    sides = [
        torch.from_numpy(side).to(getattr(torch, NATIVE[dtype]))
        for side in (weights, weights + steps - 1e-4 * weights)
    ]
    base, tuned = (
        side.view(INTEGER[dtype.itemsize]).numpy().view(CODE_DTYPE[dtype.itemsize]) for side in sides
    )
    for spec in specs_of(dtype)[2:8:2] + specs_of(dtype)[3:9:2]:
        assert run(DeviceKernel(device), base, tuned, spec) == run(ReferenceKernel(), base, tuned, spec)


NATIVE = {DType.BF16: "bfloat16", DType.F16: "float16", DType.F32: "float32", DType.F64: "float64"}
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@on_each_device
@pytest.mark.parametrize("dtype", list(NATIVE))
def test_tensors_that_live_on_the_device_count_like_numpy_blocks(dtype, device):
    base, tuned = make_pair(dtype, (9, 21), np.random.default_rng(5))
    spec = specs_of(dtype)[3]
    expected = run(ReferenceKernel(), base, tuned, spec)
    kernel, acc = DeviceKernel(device), Accumulator(spec, rows=11, cols=29)
    signed = [torch.from_numpy(side.view(f"i{dtype.itemsize}")).to(device) for side in (base, tuned)]
    resident = [side.view(getattr(torch, NATIVE[dtype])) for side in signed]
    parameter = torch.nn.Parameter(resident[1])
    bits = kernel.compare_tensors(resident[0], parameter, acc, first_row=1, first_col=8, want_bits=True)
    kernel.finish(acc)
    assert bits.device.type == torch.device(device).type
    assert (acc.view_tally(), acc.axis_counts(), bits.cpu().numpy().tobytes()) == expected
    assert kernel.compare_tensors(*resident, acc, first_row=1, first_col=8, want_bits=False) is None


@on_each_device
@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_to_bf16_equals_the_reference(dtype, device):
    rng = np.random.default_rng(6)
    if dtype.itemsize <= 2:
        codes = np.arange(2 ** (8 * dtype.itemsize), dtype=CODE_DTYPE[dtype.itemsize])
        codes = np.concatenate([codes[:: dtype.itemsize**4], special_codes(dtype)])
    else:
        codes = np.concatenate([make_codes(dtype, (1, 800), rng)[0], near_bf16_ties(dtype, rng)])
    got, expected = np.empty(codes.shape, np.uint16), np.empty(codes.shape, np.uint16)
    DeviceKernel(device).to_bf16(codes, dtype, got)
    ReferenceKernel().to_bf16(codes, dtype, expected)
    assert got.tolist() == expected.tolist()


def near_bf16_ties(dtype: DType, rng: np.random.Generator) -> np.ndarray:
    """Codes at and next to halfway points of bf16, subnormal results and overflow included."""
    layout = dtype.layout
    exponents = np.concatenate([np.arange(-140, -118), np.arange(-3, 3), np.arange(125, 129)])
    values = np.ldexp(1 + np.arange(0, 512, 7)[:, None] / 512, exponents).reshape(-1)
    with np.errstate(over="ignore"):
        native = values.astype(np.float32 if dtype is DType.F32 else np.float64)
    codes = native.view(CODE_DTYPE[dtype.itemsize])
    sign = rng.integers(0, 2, len(codes)).astype(codes.dtype) * codes.dtype.type(layout.sign_mask)
    return np.concatenate([codes, codes + codes.dtype.type(1), codes - codes.dtype.type(1)]) | np.tile(
        sign, 3
    )


@on_each_device
@pytest.mark.parametrize("dtype", list(DType))
def test_widening_equals_the_host(dtype, device):
    kernel = DeviceKernel(device)
    codes = np.concatenate([make_codes(dtype, (1, 500), np.random.default_rng(7))[0], special_codes(dtype)])
    signed = codes.view(np.uint8 if dtype.itemsize == 1 else f"i{dtype.itemsize}")
    for other in DType:
        target = common_dtype(dtype, other)
        if target is not None:
            got = kernel.widen_tensor(torch.from_numpy(signed).to(device), dtype, target).cpu().numpy()
            assert got.tobytes() == widen(codes, dtype, target).tobytes(), target


@on_each_device
@pytest.mark.parametrize("count", [0, 1, 7, 20_000])
def test_fingerprints_equal_the_reference(count, device, monkeypatch):
    monkeypatch.setitem(device_kernel._FINGERPRINT_WORDS, torch.device(device).type, 4096)
    words = np.random.default_rng(8).integers(0, 2**64 - 1, count, dtype=np.uint64, endpoint=True)
    words.flags.writeable = False
    for first in (0, 5, 2**61):
        assert DeviceKernel(device).fingerprint(words, first) == ReferenceKernel().fingerprint(words, first)


@on_each_device
def test_counts_stay_on_the_device_until_finish(device):
    base, tuned = make_pair(DType.BF16, (4, 8), np.random.default_rng(9))
    kernel, acc = DeviceKernel(device), Accumulator(specs_of(DType.BF16)[1], rows=4, cols=8)
    kernel.finish(acc)
    assert acc.scratch is None
    kernel.compare(base, tuned, acc, first_row=0, first_col=0, bits=None)
    assert acc.scratch is not None
    assert not acc.changed.any()
    kernel.finish(acc)
    assert acc.scratch is None
    assert acc.changed[0] == np.count_nonzero(base != tuned)
