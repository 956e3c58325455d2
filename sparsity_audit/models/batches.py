"""Rows of unlike lengths as batches of one shape.

Contract: pure. A batch holds at most a stated number of padded tokens, or one row; rows keep their order
within it, and every row is in exactly one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["pad", "plan_batches"]


def plan_batches(lengths: Sequence[int], *, batch_tokens: int) -> list[list[int]]:
    """Indices of the rows of each batch, rows of like length together, the longest first.

    Args:
        lengths: Tokens of each row.
        batch_tokens: Rows × longest row of a batch at most, unless one row alone is longer.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    room = 0
    for row in order:
        if room == 0:
            batches.append([])
            room = max(1, batch_tokens // max(1, lengths[row]))
        batches[-1].append(row)
        room -= 1
    return [sorted(batch) for batch in batches]


def pad(
    rows: Sequence[Sequence[int]], *, pad_id: int, side: Literal["left", "right"], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows as int64[batch, seq] and bool[batch, seq], true where there is a token."""
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        tokens[number, place] = torch.tensor(row, dtype=torch.int64)
        mask[number, place] = True
    return tokens.to(device), mask.to(device)
