"""`UnitComparer` for blocks that lie on a device.

Contract: the same tally as `UnitComparer` gives for the same codes; nothing but mask bits, fingerprints
and counts leaves the device.
"""

from __future__ import annotations

import torch

from sparsity_audit.compare.device_kernel import DeviceKernel
from sparsity_audit.compare.pair import PairSpec, UnitComparer
from sparsity_audit.types import View

__all__ = ["DeviceUnitComparer"]


class DeviceUnitComparer(UnitComparer):
    """Feed the blocks of one unit with `add_tensors`, then take its tally.

    Args:
        spec: What is asked.
        kernel: The kernel of the device that holds the blocks.
        rows: Rows of the whole pair.
        cols: Its columns.
        first_entry: Flat position of the unit's first entry; a multiple of 64.
    """

    def __init__(
        self, spec: PairSpec, kernel: DeviceKernel, *, rows: int, cols: int, first_entry: int
    ) -> None:
        super().__init__(spec, kernel, rows=rows, cols=cols, first_entry=first_entry)
        self._device_kernel = kernel
        self._base_print = _DeviceFingerprint(kernel, first_byte=first_entry * spec.base.itemsize)
        self._tuned_print = _DeviceFingerprint(kernel, first_byte=first_entry * spec.tuned.itemsize)

    def add_tensors(
        self, base: torch.Tensor, tuned: torch.Tensor, *, first_row: int, first_col: int, want_bits: bool
    ) -> torch.Tensor | None:
        """Count one block of stored codes (rows, cols); returns its packed mask bits, on the device."""
        kernel, spec = self._device_kernel, self._spec
        self._base_print.add(base)
        self._tuned_print.add(tuned)
        target = self._native.spec.dtype
        bits = kernel.compare_tensors(
            kernel.widen_tensor(base, spec.base, target),
            kernel.widen_tensor(tuned, spec.tuned, target),
            self._native,
            first_row=first_row,
            first_col=first_col,
            want_bits=want_bits and self._mask_view is View.NATIVE,
        )
        if self._served is None:
            return bits
        served_bits = kernel.compare_tensors(
            kernel.to_bf16_tensor(base, spec.base),
            kernel.to_bf16_tensor(tuned, spec.tuned),
            self._served,
            first_row=first_row,
            first_col=first_col,
            want_bits=want_bits and self._mask_view is View.SERVED,
        )
        return bits if served_bits is None else served_bits


class _DeviceFingerprint:
    """Sum of mixed words over consecutive blocks of any length; bytes short of a word are carried over."""

    def __init__(self, kernel: DeviceKernel, *, first_byte: int) -> None:
        self._kernel, self._word = kernel, first_byte // 8
        self._carry = torch.empty(0, dtype=torch.uint8, device=kernel.device)
        self._sum = torch.zeros((), dtype=torch.int64, device=kernel.device)

    def add(self, codes: torch.Tensor) -> None:
        data = codes.reshape(-1).view(torch.uint8)
        if len(self._carry):
            data = torch.cat([self._carry, data])
        whole = len(data) // 8 * 8
        self._add_words(data[:whole])
        self._carry = data[whole:].clone()

    def finish(self) -> int:
        missing = -len(self._carry) % 8
        self._add_words(torch.nn.functional.pad(self._carry, (0, missing)))
        return int(self._sum) % 2**64

    def _add_words(self, data: torch.Tensor) -> None:
        words = data.view(torch.int64)
        self._sum += self._kernel.fingerprint_tensor(words, self._word)
        self._word += len(words)
