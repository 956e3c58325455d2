"""The positions of a set of completions, one row each, as plain columns.

Contract: rows are ordered by sequence and position whatever order chunks came in. A sequence with a position
whose distributions are no numbers is left out whole and listed. Everything about a position is in its row;
the most probable tokens of both models are kept only for the sequences that were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
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
    parts: list[dict[str, np.ndarray]] = []
    tops: list[tuple[np.ndarray, ...]] = []
    broken: list[np.ndarray] = []
    wanted = np.array(sorted(with_tops), dtype=np.int64)
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
        found = divergences(chunk.base, chunk.tuned, tokens, top_k=top_k, top_p=top_p)
        part = _columns(chunk, found)
        parts.append(part)
        broken.append(_array(found.broken))
        kept = np.isin(part["sequence"], wanted)
        if kept.any():
            places = [part["sequence"][kept], part["position"][kept]]
            values = (
                found.top_base.ids,
                found.top_base.logprobs,
                found.top_tuned.ids,
                found.top_tuned.logprobs,
            )
            tops.append((*places, *(_array(value)[kept] for value in values)))
    return _joined(parts, tops, broken)


def _columns(chunk: Chunk, found: Divergences) -> dict[str, np.ndarray]:
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
    return {name: _array(values) for name, values in columns.items()}


def _array(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy()


def _joined(
    parts: Sequence[dict[str, np.ndarray]],
    tops: Iterable[tuple[np.ndarray, ...]],
    broken: Sequence[np.ndarray],
) -> Measured:
    if not parts:
        return Measured(columns={}, tops={}, broken=())
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((columns["position"], columns["sequence"]))
    columns = {name: values[order] for name, values in columns.items()}
    bad = np.concatenate(broken)[order]
    lost = [
        Broken(
            sequence=int(number), position=int(columns["position"][bad & (columns["sequence"] == number)][0])
        )
        for number in np.unique(columns["sequence"][bad])
    ]
    kept = ~np.isin(columns["sequence"], [one.sequence for one in lost])
    return Measured(
        columns={name: values[kept] for name, values in columns.items()},
        tops=_tops_by_sequence(tops, {one.sequence for one in lost}),
        broken=tuple(lost),
    )


def _tops_by_sequence(tops: Iterable[tuple[np.ndarray, ...]], lost: set[int]) -> dict[int, Tops]:
    pieces = list(tops)
    if not pieces:
        return {}
    sequence, position, *values = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.lexsort((position, sequence))
    sequence = sequence[order]
    found = {}
    for number in np.unique(sequence).tolist():
        if number not in lost:
            rows = order[sequence == number]
            parts = [value[rows] for value in values]
            found[number] = Tops(
                base_ids=parts[0], base_logprobs=parts[1], tuned_ids=parts[2], tuned_logprobs=parts[3]
            )
    return found
