"""The tensors of one checkpoint file, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsity_audit.types import TensorSpec

__all__ = ["FileContents"]


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
