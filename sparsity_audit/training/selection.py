"""Choose entry by entry between two tensors, by their bits.

Contract: equals `torch.where` on the integer codes: no arithmetic touches a value, so signs of zero and NaN
payloads survive. torch's CPU `where` branches on every entry and costs several optimizer steps at middling
densities; large contiguous CPU tensors take a compiled loop of integer operations instead, held to
`torch.where` by a test.
"""

from __future__ import annotations

from typing import Final

import torch

from sparsity_audit.training.parameters import codes

__all__ = ["keep_selected", "zero_outside"]

_COMPILED_FROM_ENTRIES: Final = 1 << 15
"""Below this torch is fast enough, and nothing waits for a compiler."""


def keep_selected(now: torch.Tensor, selected: torch.Tensor | None, kept: torch.Tensor) -> None:
    """Give the entries of `now` that are not selected the bits of `kept`, in place; None selects nothing."""
    into, source = codes(now), codes(kept)
    if selected is None:
        into.copy_(source)
    elif _is_for_compiled(into, selected, source):
        from sparsity_audit.training import numba_selection

        numba_selection.keep(*(t.view(-1).numpy() for t in (into, selected, source)))
    else:
        torch.where(selected, into, source, out=into)


def zero_outside(values: torch.Tensor, selected: torch.Tensor | None) -> None:
    """Set the entries that are not selected to +0, in place; None selects nothing."""
    into = codes(values)
    if selected is None:
        into.zero_()
    elif _is_for_compiled(into, selected):
        from sparsity_audit.training import numba_selection

        numba_selection.zero(*(t.view(-1).numpy() for t in (into, selected)))
    else:
        torch.where(selected, into, into.new_zeros(()), out=into)


def _is_for_compiled(*tensors: torch.Tensor) -> bool:
    return tensors[0].numel() >= _COMPILED_FROM_ENTRIES and all(
        t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )
