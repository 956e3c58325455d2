"""The positions of a set of completions, one row each, as plain columns.

Contract: rows are ordered by sequence and position whatever order chunks came in. A sequence with a position
whose distributions are no numbers is left out whole and listed. Everything about a position is in its row;
the most probable tokens of both models are kept only for the sequences that were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparsity_audit.models.score import Chunk, Scored, Side, score
from sparsity_audit.tokens.divergence import Divergences, divergences

__all__ = ["COLUMNS", "Broken", "Measured", "Tops", "measure"]

COLUMNS = (
    *("sequence", "position", "token", "js", "js_nucleus", "kl_base_tuned", "kl_tuned_base"),
    *("entropy_base", "entropy_tuned", "logprob_base", "logprob_tuned", "rank_base", "rank_tuned"),
    *("top_base", "top_tuned", "tuned_top_rank_base", "tuned_top_logprob_base", "top_k_overlap"),
)
"""Names of the columns; `js_nucleus` is there only where a nucleus was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tops:
    """The most probable tokens of both models at each position of one sequence.

    Args:
        base_ids: int64[positions, k].
        base_logprobs: float64[positions, k].
        tuned_ids: As of the base.
        tuned_logprobs: As of the base.
    """

    base_ids: np.ndarray
    base_logprobs: np.ndarray
    tuned_ids: np.ndarray
    tuned_logprobs: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A sequence that could not be scored: the first position whose logits are no numbers."""

    sequence: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All positions of a set of sequences.

    Args:
        columns: Name → array over positions, by sequence and position; `COLUMNS` says which.
        tops: Sequence → its most probable tokens, for those asked for.
        broken: Sequences that are left out.
    """

    columns: dict[str, np.ndarray]
    tops: dict[int, Tops]
    broken: tuple[Broken, ...]

    @property
    def num(self) -> int:
        """Positions."""
        return len(self.columns["js"]) if self.columns else 0


def measure(
    base: Side,
    tuned: Side,
    sequences: Sequence[Scored],
    *,
    vocab_size: int,
    top_k: int,
    top_p: float | None,
    with_tops: Collection[int],
    batch_tokens: int,
    chunk_bytes: int,
    on_sequences: Callable[[int], None] = lambda _num: None,
) -> Measured:
    """Score sequences with both models and keep what is known of each position.

    Args:
        base: The base.
        tuned: The tuned model.
        sequences: Prompts with completions of at least one token.
        vocab_size: Ids from 0 that are compared.
        top_k: Of the overlap and of `tops`.
        top_p: Nucleus of `js_nucleus`; None for none.
        with_tops: Sequences whose tops are kept.
        batch_tokens: As for `score`.
        chunk_bytes: As for `score`.
        on_sequences: As for `score`.
    """
    table = _Table(sequences, with_tops)
    for chunk in score(
        base,
        tuned,
        sequences,
        vocab_size=vocab_size,
        batch_tokens=batch_tokens,
        chunk_bytes=chunk_bytes,
        on_sequences=on_sequences,
    ):
        tokens = chunk.token.to(chunk.base.device)
        table.add(chunk, divergences(chunk.base, chunk.tuned, tokens, top_k=top_k, top_p=top_p))
        del chunk  # a chunk holds most of `chunk_bytes`: it must be gone before the next one is made
    return table.measured()


class _Table:
    """Columns of their final length, filled chunk by chunk.

    Small results that stay alive between the large, short-lived arrays of the chunks would leave the heap in
    pieces no later chunk fits in: at a vocabulary of 150,000 the process grew by 4 MB a position.
    """

    def __init__(self, sequences: Sequence[Scored], with_tops: Collection[int]) -> None:
        lengths = np.array([len(one.completion) for one in sequences], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        shown = np.zeros(len(lengths), dtype=bool)
        shown[list(with_tops)] = True
        self._shown = shown
        self._top_starts = np.concatenate([[0], np.cumsum(np.where(shown, lengths, 0))])
        self._columns: dict[str, np.ndarray] = {}
        self._tops: list[np.ndarray] = []
        self._bad = np.zeros(self._starts[-1], dtype=bool)

    def add(self, chunk: Chunk, found: Divergences) -> None:
        """Put a chunk's results where they belong."""
        sequence, position = _array(chunk.sequence), _array(chunk.position)
        rows = self._starts[sequence] + position
        for name, values in _values(chunk, found).items():
            if name not in self._columns:
                self._columns[name] = np.empty(self._starts[-1], dtype=values.dtype)
            self._columns[name][rows] = values
        self._bad[rows] = _array(found.broken)
        kept = self._shown[sequence]
        pairs = (found.top_base.ids, found.top_base.logprobs, found.top_tuned.ids, found.top_tuned.logprobs)
        values = [_array(part) for part in pairs]
        if not self._tops:
            num = self._top_starts[-1]
            self._tops = [np.empty((num, part.shape[1]), dtype=part.dtype) for part in values]
        top_rows = self._top_starts[sequence] + position
        for column, part in zip(self._tops, values, strict=True):
            column[top_rows[kept]] = part[kept]

    def measured(self) -> Measured:
        """What is whole."""
        if not self._columns:
            return Measured(columns={}, tops={}, broken=())
        sequence, position = self._columns["sequence"], self._columns["position"]
        lost = [
            Broken(sequence=number, position=int(position[self._bad & (sequence == number)][0]))
            for number in np.unique(sequence[self._bad]).tolist()
        ]
        gone = [one.sequence for one in lost]
        kept = ~np.isin(sequence, gone)
        return Measured(
            columns={name: values[kept] for name, values in self._columns.items()},
            tops={n: self._tops_of(n) for n in np.flatnonzero(self._shown).tolist() if n not in gone},
            broken=tuple(lost),
        )

    def _tops_of(self, number: int) -> Tops:
        start, end = self._top_starts[number : number + 2]
        parts = [column[start:end] for column in self._tops]
        return Tops(base_ids=parts[0], base_logprobs=parts[1], tuned_ids=parts[2], tuned_logprobs=parts[3])


def _values(chunk: Chunk, found: Divergences) -> dict[str, np.ndarray]:
    columns = {
        "sequence": chunk.sequence,
        "position": chunk.position,
        "token": chunk.token,
        "top_base": found.top_base.ids[:, 0],
        "top_tuned": found.top_tuned.ids[:, 0],
    }
    for name in COLUMNS:
        if name not in columns and getattr(found, name) is not None:
            columns[name] = getattr(found, name)
    return {name: _array(columns[name]) for name in COLUMNS if name in columns}


def _array(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy()
