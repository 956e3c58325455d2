"""Fingerprints of tensors in memory, equal to those that a comparison of files records.

Contract: Σ mix(word ⊕ position·φ) mod 2⁶⁴ over the stored codes (docs/design/fingerprints.md), computed on
the tensor's device where that is the CPU or a CUDA device and on the CPU otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from sparsity_audit.compare.device_kernel import DeviceKernel
from sparsity_audit.training.parameters import codes

__all__ = ["fingerprint", "stored_forms", "whole_of"]

_CHUNK_BYTES: Final = 1 << 24
_NARROWER: Final = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
}


def fingerprint(tensor: torch.Tensor, entry_ranges: Sequence[tuple[int, int]] | None = None) -> int:
    """The fingerprint of a tensor's codes; of several row-major slices the sum mod 2⁶⁴ of theirs.

    Args:
        tensor: Any shape and dtype.
        entry_ranges: Half-open ranges of entries; None means all of them.
    """
    device = tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")
    kernel = DeviceKernel(str(device))
    flat = codes(tensor.detach().to(device)).reshape(-1)
    ranges = ((0, flat.numel()),) if entry_ranges is None else entry_ranges
    total = 0
    for start, stop in ranges:
        data = flat[start:stop].view(torch.uint8)
        for first in range(0, data.numel(), _CHUNK_BYTES):
            part = data[first : first + _CHUNK_BYTES]
            words = torch.zeros(-(-part.numel() // 8) * 8, dtype=torch.uint8, device=device)
            words[: part.numel()] = part
            total += int(kernel.fingerprint_tensor(words.view(torch.int64), first // 8))
    return total % 2**64


def stored_forms(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor, and the narrower floats it may have been read from: those that hold it without rounding."""
    yield tensor
    for dtype in _NARROWER.get(tensor.dtype, ()):
        narrow = tensor.to(dtype)
        if torch.equal(codes(narrow.to(tensor.dtype)), codes(tensor)):
            yield narrow


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """All entries of a tensor; of a DTensor by a collective operation, so every rank must ask."""
    part: Any = tensor.detach()
    return part.full_tensor() if hasattr(part, "full_tensor") else part
