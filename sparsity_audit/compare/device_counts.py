"""The counts of an accumulator on a device, and how pairs of entries are added to them.

Contract: additions are integer additions, exact in any order. `weights` says how many entries an element
stands for (None: one each), so that distinct codes can be counted instead of entries.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from sparsity_audit.compare.accumulate import Accumulator, KernelSpec
from sparsity_audit.compare.device_codes import LOW32, FloatPairs, Pairs, signed
from sparsity_audit.stats.exact_sum import LOW_BITS
from sparsity_audit.stats.strata import NUM_COLUMNS
from sparsity_audit.types import DType

__all__ = ["DeviceCounts", "add_at", "add_decay", "add_exact", "add_pairs", "special_counts"]

_SIGNIFICAND = (1 << 52) - 1
_SPREAD = {"cuda": 1 << 16, "cpu": 1 << 12}


@dataclass(slots=True, kw_only=True)
class DeviceCounts:
    """The arrays of an `Accumulator` on the device; `codes` is the histogram of narrow base codes."""

    changed: torch.Tensor
    strata: torch.Tensor
    cells: torch.Tensor
    specials: torch.Tensor
    flips: torch.Tensor
    abs_slots: torch.Tensor
    sq_slots: torch.Tensor
    base_sq_slots: torch.Tensor
    max_abs: torch.Tensor
    decay: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    band: torch.Tensor
    outside: torch.Tensor
    codes: torch.Tensor | None

    @classmethod
    def like(cls, acc: Accumulator, device: torch.device) -> DeviceCounts:
        """Zeroed counts for an accumulator."""
        arrays = {}
        for field in dataclasses.fields(cls):
            if field.name != "codes":
                array = getattr(acc, field.name)
                dtype = torch.float64 if array.dtype == np.float64 else torch.int64
                arrays[field.name] = torch.zeros(array.shape, dtype=dtype, device=device)
        spec, codes = acc.spec, None
        if spec.level == "full" and spec.dtype.itemsize <= 2 and spec.dtype.kind != "opaque":
            codes = torch.zeros(1 << (8 * spec.dtype.itemsize), dtype=torch.int64, device=device)
        return cls(**arrays, codes=codes)

    def add_to(self, acc: Accumulator) -> None:
        """Add the counts to the accumulator's arrays."""
        np.maximum(acc.max_abs, self.max_abs.cpu().numpy(), out=acc.max_abs)
        for field in dataclasses.fields(self):
            if field.name not in ("codes", "max_abs"):
                getattr(acc, field.name)[...] += getattr(self, field.name).cpu().numpy()


def add_pairs(pairs: Pairs, weights: torch.Tensor | None, spec: KernelSpec, counts: DeviceCounts) -> None:
    """Count changed entries; `weights` says how many entries each pair stands for."""
    counts.changed += torch.stack([_total(pairs.verdict(c), weights) for c in spec.criteria])
    if spec.level == "counts":
        return
    add_at(counts.cells.view(-1), pairs.strata * NUM_COLUMNS + pairs.column, weights)
    square = pairs.delta * pairs.delta
    usable = pairs.differs & torch.isfinite(square)
    delta = torch.where(usable, pairs.delta, 0.0)
    counts.flips[1] += _total(pairs.differs & ~usable, weights)
    add_exact(counts.abs_slots, delta, weights)
    add_exact(counts.sq_slots, torch.where(usable, square, 0.0), weights)
    counts.max_abs.copy_(torch.maximum(counts.max_abs, delta.max()))
    if isinstance(pairs, FloatPairs):
        counts.flips[0] += _total(pairs.crossing & ~pairs.nan_a & ~pairs.nan_b, weights)
        before, after = (special_counts(codes, weights, spec.dtype) for codes in (pairs.a, pairs.b))
        counts.specials[1] += after - before


def add_decay(pairs: FloatPairs, rows: torch.Tensor, shrink: float, counts: DeviceCounts) -> None:
    """Judge changed fp32 or fp64 entries against a shrink by 1 − `shrink` (see `tally.DecayCounts`)."""
    x, y, layout = pairs.x, pairs.y, pairs.dtype.layout
    judged = pairs.differs & (x != 0) & torch.isfinite(x) & torch.isfinite(y)
    step = torch.where(x > 0, x - y, y - x)
    low, high = 0.5 * shrink * x.abs(), 2.0 * shrink * x.abs()
    band = judged & (low <= step) & (step <= high)
    mirror = judged & (low <= -step) & (-step <= high)
    target = x * (1.0 - shrink)
    code = target.view(torch.int64)
    if pairs.dtype is DType.F32:
        code = target.to(torch.float32).view(torch.int32).to(torch.int64) & LOW32
    ordered = []
    for side in (code, pairs.b):
        size = side & layout.magnitude_mask
        ordered.append(torch.where((side & signed(layout.sign_mask)) != 0, -size, size))
    # Codes so far apart that a difference wraps fail the other of the two comparisons.
    near = judged & (ordered[0] - ordered[1] <= 1) & (ordered[1] - ordered[0] <= 1)
    counts.decay += torch.stack([near.sum(), band.sum(), mirror.sum()])
    add_at(counts.band, rows, band.to(torch.int64))
    add_at(counts.outside, rows, (pairs.differs & ~band).to(torch.int64))


def add_at(table: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None) -> None:
    """table[index] += weights (1 where None), exactly; index and weights int64."""
    # Atomic additions to one address queue up: spread the few hot bins of a small table.
    ratio = _SPREAD[table.device.type] // max(1, len(table))
    copies = 1 << max(0, ratio.bit_length() - 1)
    if weights is None:
        weights = torch.ones((), dtype=torch.int64, device=index.device).expand(len(index))
    if copies == 1:
        table.scatter_add_(0, index, weights)
        return
    index = index * copies + (torch.arange(len(index), device=index.device) & (copies - 1))
    wide = torch.zeros(len(table) * copies, dtype=torch.int64, device=table.device)
    table += wide.scatter_add_(0, index, weights).view(-1, copies).sum(dim=1)


def add_exact(slots: torch.Tensor, values: torch.Tensor, weights: torch.Tensor | None) -> None:
    """`exact_sum.add_to_slots` for finite non-negative float64 values."""
    code = values.view(torch.int64)
    field = code >> 52
    significand = (code & _SIGNIFICAND) | ((field > 0).to(torch.int64) << 52)
    for row, part in enumerate((significand >> LOW_BITS, significand & ((1 << LOW_BITS) - 1))):
        add_at(slots[row], field, part if weights is None else part * weights)


def _total(verdict: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return verdict.sum() if weights is None else (verdict * weights).sum()


def special_counts(codes: torch.Tensor, weights: torch.Tensor | None, dtype: DType) -> torch.Tensor:
    """int64[5]: NaN, infinity, +0, −0, subnormal among float codes."""
    layout = dtype.layout
    size = codes & layout.magnitude_mask
    infinity = -1 if layout.infinity is None else layout.infinity
    verdicts = [
        size >= layout.first_nan,
        size == infinity,
        codes == 0,
        codes == signed(layout.sign_mask) if dtype is DType.F64 else codes == layout.sign_mask,
        (size > 0) & (size < 1 << layout.mantissa_bits),
    ]
    return torch.stack([_total(v, weights) for v in verdicts])
