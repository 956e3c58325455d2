"""Which tokens moved: the most divergent positions in context, the tokens that carry the divergence, prompts.

Contract: pure; ties are broken by the order of the positions, so that the result is a function of the
columns. Token texts are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_audit.tokens.summary import HIGH

__all__ = ["PromptRow", "ShiftedPosition", "ShiftedToken", "by_prompt", "shifted_positions", "shifted_tokens"]

_CONTEXT = 24
"""Tokens shown before and after a position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedPosition:
    """A position where the models differ much.

    Args:
        prompt: Number of the prompt.
        sample: Number of its completion.
        position: Token of the completion, from 0.
        before: The text before it: the end of the prompt too where the completion is young.
        token: The token that stands there.
        after: The text behind it.
        js: Divergence, nats.
        delta_logprob: log p(tuned) − log p(base) of that token; None where it is infinite.
        base_choice: The base's first choice.
        tuned_choice: The tuned model's.
        tuned_choice_rank: Rank of the latter under the base.
    """

    prompt: int
    sample: int
    position: int
    before: str
    token: str
    after: str
    js: float
    delta_logprob: float | None
    base_choice: str
    tuned_choice: str
    tuned_choice_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedToken:
    """A token over all places where it stands.

    Args:
        token: Its text.
        token_id: Its id.
        positions: How often it stands there.
        mean_js: Mean divergence before it.
        js_share: Its share of all JS of the set.
        above: Share of its positions above `HIGH`.
        delta_logprob: Mean of log p(tuned) − log p(base) where finite; None where nowhere.
    """

    token: str
    token_id: int
    positions: int
    mean_js: float
    js_share: float
    above: float
    delta_logprob: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """The positions of one prompt's completions.

    Args:
        prompt: Number of the prompt.
        sequences: Completions.
        positions: Positions.
        mean_js: Mean divergence.
        max_js: The largest.
        above: Share above `HIGH`.
        argmax_agreement: Share with the same first choice.
        score: Share of right completions, where a task judges them.
    """

    prompt: int
    sequences: int
    positions: int
    mean_js: float
    max_js: float
    above: float
    argmax_agreement: float
    score: float | None


def shifted_positions(
    columns: dict[str, np.ndarray],
    places: Sequence[tuple[int, int]],
    prompts: Sequence[Sequence[int]],
    *,
    num: int,
    decode: Callable[[Sequence[int]], str],
) -> tuple[ShiftedPosition, ...]:
    """The positions with the largest JS, at most one a completion, the largest first.

    Args:
        columns: As `Measured.columns`.
        places: (prompt, sample) of each sequence.
        prompts: Ids of the prompt of each sequence.
        num: How many.
        decode: Ids to text.
    """
    found: list[ShiftedPosition] = []
    seen: set[int] = set()
    starts = np.searchsorted(columns["sequence"], np.arange(len(places) + 1))
    for row in np.argsort(-columns["js"], kind="stable").tolist():
        sequence, position = int(columns["sequence"][row]), int(columns["position"][row])
        if sequence in seen:
            continue
        seen.add(sequence)
        ids = [*prompts[sequence], *columns["token"][starts[sequence] : starts[sequence + 1]].tolist()]
        at = len(prompts[sequence]) + position
        delta = float(columns["logprob_tuned"][row]) - float(columns["logprob_base"][row])
        found.append(
            ShiftedPosition(
                prompt=places[sequence][0],
                sample=places[sequence][1],
                position=position,
                before=decode(ids[max(0, at - _CONTEXT) : at]),
                token=decode([ids[at]]),
                after=decode(ids[at + 1 : at + 1 + _CONTEXT]),
                js=float(columns["js"][row]),
                delta_logprob=delta if np.isfinite(delta) else None,
                base_choice=decode([int(columns["top_base"][row])]),
                tuned_choice=decode([int(columns["top_tuned"][row])]),
                tuned_choice_rank=int(columns["tuned_top_rank_base"][row]),
            )
        )
        if len(found) == num:
            break
    return tuple(found)


def shifted_tokens(
    columns: dict[str, np.ndarray], *, num: int, decode: Callable[[Sequence[int]], str]
) -> tuple[ShiftedToken, ...]:
    """The tokens with the largest share of all JS, the largest first."""
    ids, at = np.unique(columns["token"], return_inverse=True)
    js, total = columns["js"], float(columns["js"].sum())
    counts, sums = np.bincount(at), np.bincount(at, js)
    above = np.bincount(at, js > HIGH)
    with np.errstate(invalid="ignore"):
        delta = columns["logprob_tuned"] - columns["logprob_base"]
    finite = np.isfinite(delta)
    defined, moved = np.bincount(at, finite), np.bincount(at, np.where(finite, delta, 0.0))
    return tuple(
        ShiftedToken(
            token=decode([int(ids[n])]),
            token_id=int(ids[n]),
            positions=int(counts[n]),
            mean_js=float(sums[n] / counts[n]),
            js_share=float(sums[n] / total) if total > 0 else 0.0,
            above=float(above[n] / counts[n]),
            delta_logprob=float(moved[n] / defined[n]) if defined[n] else None,
        )
        for n in np.argsort(-sums, kind="stable")[:num].tolist()
    )


def by_prompt(
    columns: dict[str, np.ndarray], places: Sequence[tuple[int, int]], scores: Sequence[float | None]
) -> tuple[PromptRow, ...]:
    """One row a prompt with at least one position, in order.

    Args:
        columns: As `Measured.columns`.
        places: (prompt, sample) of each sequence, in order.
        scores: Of each sequence, 1 where it is right; None where nothing judges.
    """
    owner = np.array([prompt for prompt, _ in places])[columns["sequence"]]
    found, starts = np.unique(owner, return_index=True)
    agree = columns["top_base"] == columns["top_tuned"]
    rows = []
    for prompt, start, end in zip(found.tolist(), starts, [*starts[1:], len(owner)], strict=True):
        js = columns["js"][start:end]
        sequences = np.unique(columns["sequence"][start:end]).tolist()
        judged = [score for n in sequences if (score := scores[n]) is not None]
        rows.append(
            PromptRow(
                prompt=prompt,
                sequences=len(sequences),
                positions=len(js),
                mean_js=float(js.mean()),
                max_js=float(js.max()),
                above=float((js > HIGH).mean()),
                argmax_agreement=float(agree[start:end].mean()),
                score=sum(judged) / len(judged) if judged else None,
            )
        )
    return tuple(rows)
