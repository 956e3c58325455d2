"""Every kernel leaves the accumulator that the reference leaves: any dtype, criterion, level and cut.

To hold another kernel to it, add it to KERNELS.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, Kernel, KernelSpec
from sparsity_audit.compare.device_kernel import DeviceKernel
from sparsity_audit.compare.numba_kernel import NumbaKernel
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.compare.reference import ReferenceKernel
from sparsity_audit.stats.exact_sum import add_to_slots, empty_slots, slots_to_int, to_float
from sparsity_audit.types import Criterion, DType

REFERENCE = ReferenceKernel()
KERNELS: list[Kernel] = [NumpyKernel(), NumbaKernel(), DeviceKernel("cpu")]
CRITERIA = tuple(
    Criterion.parse(text)
    for text in (
        "bitwise",
        "value",
        "atol:1e-5",
        "atol:2.5",
        "rel:1e-3",
        "rel:0.3",
        "ulp:2",
        "ulp:9",
        "rel:0",
    )
)
FLOATS = [d for d in DType if d.kind == "float"]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)


def special_codes(dtype: DType) -> np.ndarray:
    """Zeros, subnormals, extremes, infinities, NaN payloads, powers of two; else the ends of the range."""
    top = 2 ** (8 * dtype.itemsize) - 1
    sizes = [0, 1, 2, top // 2, top // 2 - 1]
    if dtype.kind == "float":
        layout = dtype.layout
        one = layout.bias << layout.mantissa_bits
        normal = 1 << layout.mantissa_bits
        sizes += [normal - 1, normal, normal + 1, one, one + 1, one - 1, one + 9, layout.first_nan]
        sizes += [layout.first_nan - 1, layout.first_nan - 2, layout.first_nan - 3]
        sizes += [min(layout.first_nan + 1, top // 2)]
    signed = np.array(sizes + [s + top // 2 + 1 for s in sizes], dtype=np.uint64)
    return signed.astype(CODE_DTYPE[dtype.itemsize])


def make_pair(rng: np.random.Generator, dtype: DType, shape: tuple[int, int], changed: float, special: float):
    """A block like a pair of checkpoints: small steps mostly, some far ones, some special codes."""
    code = CODE_DTYPE[dtype.itemsize]
    top = 2 ** (8 * dtype.itemsize) - 1
    base = rng.integers(0, top, shape, dtype=np.uint64, endpoint=True)
    if dtype.kind == "float" and rng.random() < 0.5:
        near_one = dtype.layout.bias << dtype.layout.mantissa_bits
        spread = 4 << dtype.layout.mantissa_bits
        base = np.uint64(max(near_one - spread, 1)) + base % np.uint64(spread)
        base |= np.where(rng.random(shape) < 0.5, np.uint64(dtype.layout.sign_mask), np.uint64(0))
    step = rng.integers(-12, 13, shape).astype(np.int64).view(np.uint64)
    far = rng.integers(0, top, shape, dtype=np.uint64, endpoint=True)
    moved = np.where(rng.random(shape) < 0.85, base + step, far)
    tuned = np.where(rng.random(shape) < changed, moved, base)
    sides = [base.astype(code), tuned.astype(code)]
    for side in sides:
        chosen = rng.random(shape) < special
        side[chosen] = rng.choice(special_codes(dtype), int(chosen.sum()))
    return sides


def outcome(kernel: Kernel, spec: KernelSpec, blocks, *, rows: int, cols: int):
    """What a kernel leaves after some blocks: tally, axis counts, mask bits of each."""
    acc = Accumulator(spec, rows=rows, cols=cols)
    masks = []
    for base, tuned, row, col in blocks:
        bits = np.full((base.shape[0], (base.shape[1] + 7) // 8), 0xAA, dtype=np.uint8)
        base, tuned = base.copy(), tuned.copy()
        base.flags.writeable = tuned.flags.writeable = False
        kernel.compare(base, tuned, acc, first_row=row, first_col=col, bits=bits)
        masks.append(bits)
    kernel.finish(acc)
    return acc.view_tally(), acc.axis_counts(), masks


def difference(kernel: Kernel, spec: KernelSpec, blocks, *, rows: int, cols: int) -> list[str]:
    """Names of what differs from the reference, with both values."""
    tally, axes, masks = outcome(kernel, spec, blocks, rows=rows, cols=cols)
    true_tally, true_axes, true_masks = outcome(REFERENCE, spec, blocks, rows=rows, cols=cols)
    found = [
        f"{name}: {getattr(tally, name)} is not {getattr(true_tally, name)}"
        for name in tally.__slots__
        if getattr(tally, name) != getattr(true_tally, name)
    ]
    if axes != true_axes:
        found.append("axis counts")
    found += [f"bits of block {i}" for i in range(len(masks)) if not np.array_equal(masks[i], true_masks[i])]
    return found


def spec_of(dtype: DType, level: str, mask: int, criteria=CRITERIA) -> KernelSpec:
    shrink = 1e-4 if level == "full" and dtype in (DType.F32, DType.F64) else None
    return KernelSpec(dtype=dtype, criteria=criteria, mask=mask, level=level, shrink=shrink)  # type: ignore[arg-type]


@each_kernel
@pytest.mark.parametrize("level", ["counts", "full"])
@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.label)
def test_every_criterion_as_mask(kernel, dtype, level):
    rng = np.random.default_rng(7)
    for mask in range(len(CRITERIA)):
        shape = [(3, 21), (1, 70), (2, 64), (1, 1), (5, 3)][mask % 5]
        base, tuned = make_pair(rng, dtype, shape, changed=[0.3, 0.9][mask % 2], special=0.3)
        blocks = [(base, tuned, 1, 8)]
        spec = spec_of(dtype, level, mask)
        assert difference(kernel, spec, blocks, rows=shape[0] + 2, cols=shape[1] + 9) == []


@each_kernel
@pytest.mark.parametrize("level", ["counts", "full"])
@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.label)
def test_all_pairs_of_special_codes(kernel, dtype, level):
    codes = special_codes(dtype)
    base, tuned = (m.copy() for m in np.meshgrid(codes, codes))
    blocks = [(base, tuned, 0, 0)]
    for mask in (0, 1, 2, 6):
        assert difference(kernel, spec_of(dtype, level, mask), blocks, rows=len(codes), cols=len(codes)) == []


@each_kernel
@pytest.mark.parametrize(
    "dtype", [DType.BF16, DType.F16, DType.F32, DType.F64, DType.I32], ids=lambda d: d.label
)
def test_many_blocks_into_one_accumulator(kernel, dtype):
    rng = np.random.default_rng(11)
    blocks = []
    for row, col, shape in [
        (0, 0, (2, 40)),
        (2, 0, (3, 40)),
        (5, 8, (1, 17)),
        (5, 32, (1, 8)),
        (0, 0, (1, 64)),
    ]:
        blocks.append((*make_pair(rng, dtype, shape, changed=0.5, special=0.1), row, col))
    for level in ("counts", "full"):
        assert difference(kernel, spec_of(dtype, level, 1), blocks, rows=6, cols=64) == []


@each_kernel
@pytest.mark.parametrize(
    "dtype", [DType.BF16, DType.F16, DType.F32, DType.F64, DType.U8], ids=lambda d: d.label
)
@pytest.mark.parametrize("changed", [0.0, 0.02, 1.0])
def test_one_long_row_of_odd_width(kernel, dtype, changed):
    rng = np.random.default_rng(13)
    base, tuned = make_pair(rng, dtype, (1, 2 * 2048 + 77), changed=changed, special=0.002)
    spec = spec_of(dtype, "full", 1, CRITERIA[:3])
    assert difference(kernel, spec, [(base, tuned, 0, 0)], rows=1, cols=base.shape[1]) == []


@each_kernel
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32], ids=lambda d: d.label)
def test_more_rows_than_a_byte_counts(kernel, dtype):
    rng = np.random.default_rng(17)
    base, tuned = make_pair(rng, dtype, (600, 2), changed=1.0, special=0.0)
    spec = spec_of(dtype, "full", 0, CRITERIA[:2])
    assert difference(kernel, spec, [(base, tuned, 0, 0)], rows=600, cols=2) == []


@each_kernel
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32, DType.I8, DType.C64], ids=lambda d: d.label)
def test_blocks_without_entries(kernel, dtype, shape):
    nothing = np.zeros(shape, dtype=CODE_DTYPE[dtype.itemsize])
    assert difference(kernel, spec_of(dtype, "full", 1), [(nothing, nothing, 0, 0)], rows=3, cols=5) == []


@each_kernel
@pytest.mark.parametrize("dtype", [DType.F32, DType.F64], ids=lambda d: d.label)
def test_weights_that_shrank_by_decay(kernel, dtype):
    rng = np.random.default_rng(19)
    native = np.float32 if dtype is DType.F32 else np.float64
    base = rng.normal(scale=0.02, size=(4, 90)).astype(native)
    factor = 1 - rng.choice([0.0, 4e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, -1e-4, 0.1], size=base.shape)
    tuned = (base * factor).astype(native)
    base[0, :5] = [0.0, -0.0, np.inf, np.nan, 1e-310 if dtype is DType.F64 else 1e-42]
    code = CODE_DTYPE[dtype.itemsize]
    blocks = [(base.view(code), tuned.view(code), 0, 0)]
    spec = spec_of(dtype, "full", 1)
    assert difference(kernel, spec, blocks, rows=4, cols=90) == []
    assert outcome(kernel, spec, blocks, rows=4, cols=90)[0].decay.within_one_ulp > 20


@each_kernel
@pytest.mark.parametrize("dtype", [DType.F64, DType.F32], ids=lambda d: d.label)
def test_sums_over_the_whole_range_of_exponents(kernel, dtype):
    rng = np.random.default_rng(23)
    fields = dtype.layout.num_exponents
    shape = (2, 300)
    code = CODE_DTYPE[dtype.itemsize]
    base, tuned = (
        (rng.integers(0, fields, shape).astype(np.uint64) << np.uint64(dtype.layout.mantissa_bits))
        | rng.integers(0, 1 << dtype.layout.mantissa_bits, shape).astype(np.uint64)
        for _ in range(2)
    )
    blocks = [(base.astype(code), tuned.astype(code), 0, 0)]
    assert difference(kernel, spec_of(dtype, "full", 1), blocks, rows=2, cols=300) == []


@each_kernel
def test_more_far_pairs_than_any_list_holds(kernel):
    rng = np.random.default_rng(41)
    base = rng.integers(0x3C00, 0x3D00, (10, 4096)).astype(np.uint16)
    tuned = (base + np.uint16(9)) ^ (rng.integers(0, 2, base.shape) << 15).astype(np.uint16)
    spec = spec_of(DType.BF16, "full", 1, CRITERIA[:3])
    assert difference(kernel, spec, [(base, tuned, 0, 0)], rows=10, cols=4096) == []


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32], ids=lambda d: d.label)
def test_tables_folded_before_their_cells_overflow(monkeypatch, dtype):
    monkeypatch.setattr("sparsity_audit.compare.numba_kernel._MAX_TABLE_ENTRIES", 150)
    rng = np.random.default_rng(43)
    blocks = [(*make_pair(rng, dtype, (2, 50), changed=0.5, special=0.1), 2 * i, 0) for i in range(4)]
    assert difference(NumbaKernel(), spec_of(dtype, "full", 1), blocks, rows=8, cols=50) == []


@each_kernel
def test_mask_bits_may_be_a_strided_view(kernel):
    rng = np.random.default_rng(29)
    base, tuned = make_pair(rng, DType.BF16, (3, 64), changed=0.5, special=0.0)
    packed = np.zeros((3, 20), dtype=np.uint8)
    acc = Accumulator(spec_of(DType.BF16, "full", 1), rows=3, cols=64)
    kernel.compare(base, tuned, acc, first_row=0, first_col=0, bits=packed[:, 5:13])
    kernel.finish(acc)
    assert np.array_equal(packed[:, 5:13], np.packbits(base != tuned, axis=1, bitorder="little"))
    assert not packed[:, :5].any()
    assert not packed[:, 13:].any()


@each_kernel
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(FLOATS),
    shape=st.tuples(st.integers(0, 4), st.integers(0, 80)),
    changed=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    mask=st.integers(0, len(CRITERIA) - 1),
    level=st.sampled_from(["counts", "full"]),
)
def test_random_blocks(kernel, seed, dtype, shape, changed, mask, level):
    base, tuned = make_pair(np.random.default_rng(seed), dtype, shape, changed=changed, special=0.05)
    blocks = [(base, tuned, 2, 16)]
    assert difference(kernel, spec_of(dtype, level, mask), blocks, rows=6, cols=96) == []


@each_kernel
def test_one_accumulator_after_another_starts_from_nothing(kernel):
    rng = np.random.default_rng(31)
    for dtype in (DType.BF16, DType.F32):
        for _ in range(2):
            blocks = [(*make_pair(rng, dtype, (2, 50), changed=0.5, special=0.1), 0, 0)]
            assert difference(kernel, spec_of(dtype, "full", 1), blocks, rows=2, cols=50) == []


@each_kernel
@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    words=st.lists(st.integers(0, 2**64 - 1), max_size=70),
    first=st.integers(0, 2**60),
    cut=st.integers(0, 70),
)
def test_fingerprints_equal_the_reference_however_they_are_cut(kernel, words, first, cut):
    array = np.array(words, dtype=np.uint64)
    whole = REFERENCE.fingerprint(array, first)
    assert kernel.fingerprint(array, first) == whole
    head, tail = array[:cut], array[cut:]
    parts = kernel.fingerprint(head, first) + kernel.fingerprint(tail, first + len(head))
    assert parts % 2**64 == whole


@each_kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.label)
def test_rounding_to_bf16_equals_exact_fractions(kernel, dtype):
    code = CODE_DTYPE[dtype.itemsize]
    if dtype.itemsize <= 2:
        codes = np.arange(2 ** (8 * dtype.itemsize), dtype=code)
        codes = codes if dtype is not DType.F16 else codes[:: 5 if kernel is not REFERENCE else 1]
    else:
        codes = np.concatenate([special_codes(dtype), rounding_ties(dtype)])
    expected, found = np.zeros(codes.shape, np.uint16), np.zeros(codes.shape, np.uint16)
    REFERENCE.to_bf16(codes, dtype, expected)
    kernel.to_bf16(codes, dtype, found)
    wrong = np.flatnonzero(expected != found)
    assert [(hex(codes[i]), hex(found[i]), hex(expected[i])) for i in wrong[:4]] == []


def rounding_ties(dtype: DType) -> np.ndarray:
    """Codes at, just above and just below the middle between two bf16 numbers, and random ones."""
    rng = np.random.default_rng(37)
    bf16 = rng.integers(0, 0x7F80, 400).astype(np.uint32)
    bf16[:40] = np.r_[0:20, 0x7F6C:0x7F80]
    low = (bf16 << np.uint32(16)).view(np.float32).astype(np.float64)
    high = ((bf16 + np.uint32(1)) << np.uint32(16)).view(np.float32).astype(np.float64)
    high[np.isinf(high)] = 2.0**128
    middle = (low + high) / 2
    native, code = (np.float32, np.uint32) if dtype is DType.F32 else (np.float64, np.uint64)
    ties = middle.astype(native)
    ties = ties[np.isfinite(ties)]
    around = [ties, np.nextafter(ties, native(0)), np.nextafter(ties, native(np.inf)), -ties]
    # A float64 that float32 would round onto the middle first: rounding twice gets these wrong.
    around += [np.nextafter(np.nextafter(-ties, native(0)), native(0))]
    random = rng.integers(0, 2 ** (8 * dtype.itemsize) - 1, 500, dtype=np.uint64).astype(code)
    return np.concatenate([*(a.astype(native).view(code) for a in around), random])


@each_kernel
def test_rel_below_one_ulp_is_value_on_bf16_for_all_neighbouring_codes(kernel):
    size = np.arange(0x7F81, dtype=np.uint16)
    codes = np.concatenate([size, size | np.uint16(0x8000)])
    base, tuned = codes[:-1].reshape(1, -1).copy(), codes[1:].reshape(1, -1).copy()
    largest = float(np.nextafter(2.0**-8, 0.0))
    criteria = (*CRITERIA[:2], Criterion(kind="rel", parameter=largest), Criterion.parse("rel:0.00390625"))
    acc = Accumulator(spec_of(DType.BF16, "full", 1, criteria), rows=1, cols=base.size)
    kernel.compare(base, tuned, acc, first_row=0, first_col=0, bits=None)
    kernel.finish(acc)
    assert acc.changed[1] == acc.changed[2]
    assert acc.changed[3] < acc.changed[2]


class CallsNegativeZeroChanged(NumpyKernel):
    """A kernel with one rule broken: −0 is a number of its own."""

    def compare(self, base, tuned, acc, *, first_row, first_col, bits):
        super().compare(base, tuned, acc, first_row=first_row, first_col=first_col, bits=bits)
        zeros = acc.spec.dtype.layout.sign_mask
        acc.changed[1] += np.count_nonzero(
            ((base == zeros) & (tuned == 0)) | ((base == 0) & (tuned == zeros))
        )


class DropsTheLastBit(NumpyKernel):
    def compare(self, base, tuned, acc, *, first_row, first_col, bits):
        super().compare(base, tuned, acc, first_row=first_row, first_col=first_col, bits=bits)
        if bits is not None and bits.size:
            bits[-1, -1] = 0


def float_slots(value: float) -> np.ndarray:
    slots = empty_slots()
    add_to_slots(slots, np.array([value]))
    return slots


class SumsInFloat(NumpyKernel):
    def finish(self, acc):
        acc.abs_slots[...] = float_slots(to_float(slots_to_int(acc.abs_slots)))


@pytest.mark.parametrize(
    ("broken", "finding"),
    [
        (CallsNegativeZeroChanged(), "changed"),
        (DropsTheLastBit(), "bits of block 0"),
        (SumsInFloat(), "abs_sum"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_a_broken_rule_is_noticed(broken, finding):
    codes = special_codes(DType.BF16)
    base, tuned = (m.copy() for m in np.meshgrid(codes, codes))
    found = difference(
        broken, spec_of(DType.BF16, "full", 1), [(base, tuned, 0, 0)], rows=len(codes), cols=len(codes)
    )
    assert [f for f in found if f.startswith(finding)]
