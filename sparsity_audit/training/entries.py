"""The entries of one parameter that a subnetwork optimizer trains, and how they are read and written.

Contract: three forms. *Compact*: sorted row-major positions, int32, or int64 past 2³¹ − 1. *Dense*: a bool
mask, for a parameter of which most entries are trained. *Whole*: neither, every entry is trained. Work goes
piece by piece, so temporaries stay small; writing never touches the bits of another entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

import torch

from sparsity_audit.masks.encodings import position_dtype
from sparsity_audit.training.fingerprints import fingerprint
from sparsity_audit.training.selection import keep_selected, zero_outside
from sparsity_audit.types import DType

__all__ = ["TrainedEntries"]

# On the CPU a piece and its temporaries stay in cache; elsewhere only memory is bounded.
_PIECE_ENTRIES: Final = {"cpu": 1 << 17}
_DEVICE_PIECE_ENTRIES: Final = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedEntries:
    """See the module docstring.

    Args:
        name: Of the parameter.
        positions: Of the entries in the flat local parameter; compact form.
        selected: bool of the flat local parameter; dense form.
        num_entries: Entries that have optimizer state: the trained ones if compact, else all.
    """

    name: str
    positions: torch.Tensor | None
    selected: torch.Tensor | None
    num_entries: int

    @classmethod
    def choose(cls, name: str, selected: torch.Tensor | None, *, num_local: int, dense_above: float) -> Self:
        """The form that suits a mask's density; no mask means that every entry is trained."""
        if selected is None:
            return cls(name=name, positions=None, selected=None, num_entries=num_local)
        flat = selected.reshape(-1)
        chosen = int(flat.sum())
        if chosen and chosen > dense_above * num_local:
            return cls(name=name, positions=None, selected=flat, num_entries=num_local)
        dtype = torch.int32 if position_dtype(num_local) is DType.I32 else torch.int64
        positions = flat.nonzero().view(-1).to(dtype)
        return cls(name=name, positions=positions, selected=None, num_entries=chosen)

    @property
    def num_bytes(self) -> int:
        """Bytes of positions or mask."""
        return sum(t.numel() * t.element_size() for t in (self.positions, self.selected) if t is not None)

    @property
    def fingerprint(self) -> str:
        """Tells this choice of entries from another; 16 hex digits."""
        chosen = self.positions if self.positions is not None else self.selected
        return f"{0 if chosen is None else fingerprint(chosen):016x}"

    def pieces(self, device: torch.device) -> Iterator[slice]:
        """Runs of entries with state, in order."""
        size = _PIECE_ENTRIES.get(device.type, _DEVICE_PIECE_ENTRIES)
        for first in range(0, self.num_entries, size):
            yield slice(first, min(first + size, self.num_entries))

    def gather(self, flat: torch.Tensor, piece: slice) -> torch.Tensor:
        """A copy of the piece's entries of a flat tensor shaped like the parameter."""
        if self.positions is not None:
            return flat.index_select(0, self.positions[piece])
        return flat[piece].clone()

    def gather_gradient(self, flat: torch.Tensor, piece: slice) -> torch.Tensor:
        """The same of a gradient, zero where the dense form has entries that are not trained."""
        values = self.gather(flat, piece)
        if self.selected is not None:
            zero_outside(values, self.selected[piece])
        return values

    def scatter(self, flat: torch.Tensor, piece: slice, values: torch.Tensor) -> None:
        """Write the piece's trained entries."""
        if self.positions is not None:
            # `scatter_` is the fastest of torch's writes by position, but takes int64 alone.
            flat.scatter_(0, self.positions[piece].long(), values)
        elif self.selected is None:
            flat[piece] = values
        else:
            keep_selected(values, self.selected[piece], flat[piece])
            flat[piece] = values

    def trained(self, flat: torch.Tensor) -> torch.Tensor:
        """A copy of all trained entries."""
        if self.selected is not None:
            return flat[self.selected]
        return self.gather(flat, slice(0, self.num_entries))

    def mask_gradient(self, gradient: torch.Tensor) -> None:
        """Set what is not trained to +0, in place."""
        if self.selected is not None:
            zero_outside(gradient, self.selected.view(gradient.shape))
        elif self.positions is not None:
            flat = gradient.reshape(-1)
            chosen = self.trained(flat)
            flat.zero_()
            for piece in self.pieces(flat.device):
                self.scatter(flat, piece, chosen[piece])
            if not gradient.is_contiguous():
                gradient.copy_(flat.view(gradient.shape))
