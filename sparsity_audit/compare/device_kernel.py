"""The kernel in torch operations, for CUDA devices and (so that it is always tested) for torch's CPU device.

Contract: equals `reference` bit for bit. Counts stay on the device between blocks, in `acc.scratch`, and
come back once, in `finish`. Everything that decides a count is integer arithmetic or one float64
operation; roundings to bf16 are done on the codes, because torch's own casts give other NaNs on some
paths. Device memory is bounded by the block and a fixed number of temporaries of `_PIECE_BYTES`.

Codes of 16 bits and less are counted as histograms (of base codes, and of distinct changed pairs), so
that each statistic is computed once per distinct value; wider ones are judged entry by entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.convert import widen
from sparsity_audit.compare.device_codes import (
    LOW32,
    FloatPairs,
    IntegerPairs,
    Pairs,
    bf16_of_f32,
    bf16_of_f64,
    codes_of,
    f64_of_f32,
    float_of_unsigned,
    integer_values,
    shift_right,
    signed,
    strata_of,
    unsigned,
)
from sparsity_audit.compare.device_counts import (
    DeviceCounts,
    add_at,
    add_decay,
    add_exact,
    add_pairs,
    special_counts,
)
from sparsity_audit.compare.numpy_kernel import NumpyKernel, to_float64
from sparsity_audit.compare.reference import PHI
from sparsity_audit.stats.strata import SPECIAL
from sparsity_audit.types import DType

__all__ = ["DeviceKernel", "num_cuda_devices"]

_MULTIPLIER = 0xD6E8FEB86659FD93 - (1 << 64)
_PACK = 0x0102040810204080
"""Moves bit 0 of byte i to bit 56 + i, without carries: 8i + 7k takes each value once."""

_PIECE_BYTES = {"cuda": 1 << 26, "cpu": 1 << 18}
_FINGERPRINT_WORDS = {"cuda": 1 << 20, "cpu": 1 << 14}


def num_cuda_devices() -> int:
    """CUDA devices that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


class DeviceKernel:
    """See the module docstring; the interface is `accumulate.Kernel`, and the same for resident tensors.

    Args:
        device: `cpu`, `cuda` or `cuda:i`.
    """

    name = "device"

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._tables: dict[tuple[str, DType, DType], torch.Tensor] = {}
        self._word_steps: torch.Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """By name: tables lie on the device of this process."""
        return DeviceKernel, (str(self.device),)

    def fingerprint(self, words: np.ndarray, first_word: int) -> int:
        """Sum of the mixed words, copied to the device."""
        return int(self.fingerprint_tensor(self._upload(words), first_word)) % 2**64

    def fingerprint_tensor(self, words: torch.Tensor, first_word: int) -> torch.Tensor:
        """The same for int64 words on the device; a 0-d int64 there, to be taken modulo 2⁶⁴."""
        size = _FINGERPRINT_WORDS[self.device.type]
        if self._word_steps is None:
            self._word_steps = torch.arange(size, device=self.device) * signed(PHI)
        steps = self._word_steps
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for start in range(0, len(words), size):
            part = words[start : start + size]
            x = steps[: len(part)] + signed((first_word + start + 1) * PHI)
            x ^= part
            x ^= shift_right(x, 32)
            x *= _MULTIPLIER
            x ^= shift_right(x, 29)
            total += x.sum()
        return total

    def to_bf16(self, codes: np.ndarray, dtype: DType, out: np.ndarray) -> None:
        """Round on the device."""
        out[...] = self.to_bf16_tensor(self._upload(codes), dtype).cpu().numpy().view(np.uint16)

    def to_bf16_tensor(self, codes: torch.Tensor, dtype: DType) -> torch.Tensor:
        """The bf16 codes (int16) of float codes on the device, rounded to nearest even."""
        if dtype is DType.BF16:
            return codes
        if dtype is DType.F32:
            return bf16_of_f32(codes)
        if dtype is DType.F64:
            return bf16_of_f64(codes)
        return self._table("bf16", dtype, DType.BF16)[unsigned(codes)]

    def widen_tensor(self, codes: torch.Tensor, dtype: DType, target: DType) -> torch.Tensor:
        """`convert.widen` for codes on the device."""
        if dtype is target:
            return codes
        if dtype is DType.F32 and target is DType.F64:
            return f64_of_f32(codes)
        if dtype.itemsize <= 2:
            return self._table("widen", dtype, target)[unsigned(codes)]
        wide = codes.to(torch.int64)
        return wide & LOW32 if dtype.kind == "uint" else wide

    def compare(
        self,
        base: np.ndarray,
        tuned: np.ndarray,
        acc: Accumulator,
        *,
        first_row: int,
        first_col: int,
        bits: np.ndarray | None,
    ) -> None:
        """Copy both blocks to the device and compare them there."""
        found = self.compare_tensors(
            self._upload(base),
            self._upload(tuned),
            acc,
            first_row=first_row,
            first_col=first_col,
            want_bits=bits is not None,
        )
        if bits is not None and found is not None:
            bits[...] = found.cpu().numpy()

    def compare_tensors(
        self,
        base: torch.Tensor,
        tuned: torch.Tensor,
        acc: Accumulator,
        *,
        first_row: int,
        first_col: int,
        want_bits: bool,
    ) -> torch.Tensor | None:
        """Compare two contiguous (rows, cols) tensors on the device; returns their mask bits there.

        Any torch dtype of the right width is taken as codes of the accumulator's dtype. The call may
        return before the device is done; `finish` waits for it.
        """
        base, tuned = codes_of(base), codes_of(tuned)
        assert base.shape == tuned.shape, (base.shape, tuned.shape)
        assert base.is_contiguous(), base.stride()
        assert tuned.is_contiguous(), tuned.stride()
        assert base.element_size() == tuned.element_size() == acc.spec.dtype.itemsize
        if acc.scratch is None:
            acc.scratch = DeviceCounts.like(acc, self.device)
        counts = acc.scratch
        assert isinstance(counts, DeviceCounts)
        acc.entries += base.numel()
        rows, cols = base.shape
        bits = None
        if want_bits:
            bits = torch.zeros((rows, (cols + 7) // 8), dtype=torch.uint8, device=self.device)
        limit = _PIECE_BYTES[self.device.type] // acc.spec.dtype.itemsize
        for piece in _pieces(rows, cols, limit):
            row, col = first_row + piece[0].start, first_col + piece[1].start
            changed = self._compare_piece(base[piece], tuned[piece], acc.spec, counts, row=row, col=col)
            if bits is not None:
                bits[piece[0], piece[1].start // 8 : (piece[1].stop + 7) // 8] = _packed(changed)
        return bits

    def finish(self, acc: Accumulator) -> None:
        """Bring the counts back from the device."""
        counts = acc.scratch
        if counts is None:
            return
        assert isinstance(counts, DeviceCounts)
        if counts.codes is not None:
            codes = torch.arange(len(counts.codes), device=self.device)
            self._add_base(codes, counts.codes, acc.spec, counts)
        counts.add_to(acc)
        acc.scratch = None

    def _compare_piece(
        self,
        base: torch.Tensor,
        tuned: torch.Tensor,
        spec: KernelSpec,
        counts: DeviceCounts,
        *,
        row: int,
        col: int,
    ) -> torch.Tensor:
        """Count a piece; returns bool (rows, cols): changed under the mask criterion."""
        changed = base != tuned
        if spec.level == "full":
            self._add_all_base(base.reshape(-1), spec, counts)
        flat = torch.nonzero(changed.view(-1)).squeeze(1)
        if len(flat):
            a, b = unsigned(base.reshape(-1)[flat]), unsigned(tuned.reshape(-1)[flat])
            rows_of = flat // base.shape[1] + row if spec.shrink is not None else None
            changed.view(-1)[flat] = self._add_changed(a, b, rows_of, spec, counts)
        if spec.level == "full":
            rows, cols = changed.shape
            counts.rows[row : row + rows] += changed.sum(dim=1)
            counts.cols[col : col + cols] += changed.sum(dim=0)
        return changed

    def _add_all_base(self, codes: torch.Tensor, spec: KernelSpec, counts: DeviceCounts) -> None:
        if counts.codes is not None:
            add_at(counts.codes, unsigned(codes), None)
        else:
            self._add_base(unsigned(codes), None, spec, counts)

    def _add_base(
        self, codes: torch.Tensor, weights: torch.Tensor | None, spec: KernelSpec, counts: DeviceCounts
    ) -> None:
        dtype = spec.dtype
        if dtype.kind == "float":
            add_at(counts.strata, strata_of(codes, dtype), weights)
            special = special_counts(codes, weights, dtype)
            counts.specials += special  # both sides; `_add_changed` corrects the tuned one
        else:
            counts.strata += len(codes) if weights is None else weights.sum()
        if dtype.kind != "opaque":
            value = self._values(codes, dtype)
            square = value * value
            add_exact(counts.base_sq_slots, torch.where(torch.isfinite(square), square, 0.0), weights)

    def _add_changed(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        rows: torch.Tensor | None,
        spec: KernelSpec,
        counts: DeviceCounts,
    ) -> torch.Tensor:
        """Count entries whose codes differ; returns which of them the mask criterion calls changed.

        `rows`, where each entry lies, is needed for the decay test alone.
        """
        if spec.dtype.kind == "opaque":
            counts.changed += len(a)
            if spec.level == "full":
                counts.cells.view(-1)[SPECIAL] += len(a)
            return torch.ones_like(a, dtype=torch.bool)
        pairs = self._pairs(a, b, spec.dtype)
        in_mask = pairs.verdict(spec.criteria[spec.mask])
        if counts.codes is None:
            add_pairs(pairs, None, spec, counts)
            if spec.shrink is not None and rows is not None and isinstance(pairs, FloatPairs):
                add_decay(pairs, rows, spec.shrink, counts)
            return in_mask
        key = ((a << 16) | b).to(torch.int32)
        distinct, weights = torch.unique(key, return_counts=True)
        a, b = (distinct >> 16).to(torch.int64) & 0xFFFF, distinct.to(torch.int64) & 0xFFFF
        add_pairs(self._pairs(a, b, spec.dtype), weights, spec, counts)
        return in_mask

    def _pairs(self, a: torch.Tensor, b: torch.Tensor, dtype: DType) -> Pairs:
        if dtype.kind == "float":
            return FloatPairs(a, b, dtype, x=self._values(a, dtype), y=self._values(b, dtype))
        return IntegerPairs(a, b, dtype)

    def _values(self, codes: torch.Tensor, dtype: DType) -> torch.Tensor:
        """The float64 numbers that int64 codes stand for, correctly rounded."""
        if dtype is DType.F64:
            return codes.view(torch.float64)
        if dtype is DType.F32:
            return codes.to(torch.int32).view(torch.float32).to(torch.float64)
        if dtype.kind == "float":
            return self._table("value", dtype, DType.F64)[codes]
        if dtype is DType.U64:
            return float_of_unsigned(codes)
        return integer_values(codes, dtype).to(torch.float64)

    def _table(self, purpose: str, dtype: DType, target: DType) -> torch.Tensor:
        """What each code of a narrow dtype becomes, computed once by the numpy functions."""
        key = (purpose, dtype, target)
        if key not in self._tables:
            codes = np.arange(1 << (8 * dtype.itemsize), dtype=CODE_DTYPE[dtype.itemsize])
            with np.errstate(invalid="ignore"):  # signalling NaNs become quiet
                if purpose == "value":
                    result = to_float64(codes, dtype).view(np.uint64)
                elif purpose == "widen":
                    result = widen(codes, dtype, target)
                else:
                    result = np.empty(len(codes), dtype=np.uint16)
                    NumpyKernel().to_bf16(codes, dtype, result)
            table = self._upload(result)
            self._tables[key] = table.view(torch.float64) if purpose == "value" else table
        return self._tables[key]

    def _upload(self, codes: np.ndarray) -> torch.Tensor:
        itemsize = codes.dtype.itemsize
        view = codes.view(np.uint8 if itemsize == 1 else f"i{itemsize}")
        # torch warns about arrays that it could write to but must not.
        return torch.from_numpy(view if view.flags.writeable else view.copy()).to(self.device)


def _packed(changed: torch.Tensor) -> torch.Tensor:
    """Bits of bool (rows, cols), packed little-endian along the row, zero tail."""
    rows, cols = changed.shape
    if cols % 8:
        padded = torch.zeros((rows, cols + -cols % 8), dtype=torch.bool, device=changed.device)
        padded[:, :cols] = changed
        changed = padded
    words = changed.view(-1).view(torch.int64)
    return ((words * _PACK) >> 56).to(torch.uint8).view(rows, -1)


def _pieces(rows: int, cols: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Whole rows of at most `limit` entries, or parts of one row cut at multiples of 8."""
    if rows == 0 or cols == 0:
        return
    height, width = max(1, limit // cols), min(cols, limit)
    for row in range(0, rows, height):
        for col in range(0, cols, width):
            yield slice(row, min(row + height, rows)), slice(col, min(col + width, cols))
