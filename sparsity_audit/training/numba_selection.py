"""The compiled loops of `selection`: integer operations, no branch an entry, on flat arrays of codes."""

from __future__ import annotations

from typing import Final

from numba import njit

from sparsity_audit.compare.numba_generic import OPTIONS

__all__ = ["keep", "zero"]

_CHUNK: Final = 2048


@njit(**OPTIONS)
def keep(now, selected, kept):
    """Entries of `now` that are not selected take the codes of `kept`."""
    for i in range(len(now)):
        bits = -now.dtype.type(selected[i])
        now[i] = kept[i] ^ ((now[i] ^ kept[i]) & bits)


@njit(**OPTIONS)
def zero(now, selected):
    """Entries of `now` that are not selected become code 0; chunks where they are already are not written."""
    none = now.dtype.type(0)
    for first in range(0, len(now), _CHUNK):
        part, chosen = now[first : first + _CHUNK], selected[first : first + _CHUNK]
        stray = none
        for i in range(len(part)):
            stray |= part[i] & ~(-now.dtype.type(chosen[i]))
        if stray != none:
            for i in range(len(part)):
                part[i] &= -now.dtype.type(chosen[i])
