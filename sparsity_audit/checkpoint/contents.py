"""The tensors of one checkpoint file, whatever its format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparsity_audit.types import TensorSpec

__all__ = ["FileContents", "has_absurd_empty_shape"]

_MAX_SIZES_BESIDE_ZERO = 2**28
"""Product of the other sizes of a tensor without entries; the file does not bound them."""


def has_absurd_empty_shape(shape: Sequence[int]) -> bool:
    """Whether a tensor without entries has rows or columns that counters could not be kept for."""
    return 0 in shape and math.prod(n for n in shape if n) > _MAX_SIZES_BESIDE_ZERO


@dataclass(frozen=True, slots=True, kw_only=True)
class FileContents:
    """What one file contributes to a catalogue.

    Args:
        tensors: Specs by name, without aliases.
        aliases: Further names of tensors that share their storage → the name in `tensors`.
        notes: What was ignored or is unusual.
    """

    tensors: Mapping[str, TensorSpec]
    aliases: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
