"""How two next-token distributions differ: pure functions of natural log-probabilities.

Contract: inputs are float64[n, vocab], rows of `log_softmax`; results are float64[n] or int64[n], each row
a function of its own two rows alone, so that chunks, batches and padding change nothing. Nats throughout.

| case | result |
|---|---|
| equal rows | js, KL exactly 0 |
| −inf on one side (the token cannot occur) | js finite, at most ln 2; KL +inf where the left side has it |
| −inf on both sides | the token counts for nothing |
| disjoint supports | js = ln 2 |
| vocabulary of 1 | js, KL, entropy 0; rank 1 |
| equal probabilities | a rank is 1 + the number of strictly more probable tokens; an argmax, and the cut of a
  top-k or a nucleus, takes the lower id first |
| NaN in a row of either side | every float is NaN, `broken` is true |

Source: Jensen–Shannon divergence, Lin, IEEE Trans. Inf. Theory 37 (1991) 145; per position over the full
vocabulary where 2603.22446 truncates at top-p .7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "LN2",
    "Divergences",
    "Top",
    "divergences",
    "entropy",
    "js_divergence",
    "kl_divergence",
    "nucleus",
    "ranks",
    "top",
    "top_k_overlap",
]

LN2 = math.log(2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """The k most probable tokens of each row, the most probable first, equals by id.

    Args:
        ids: int64[n, k].
        logprobs: float64[n, k].
    """

    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergences:
    """What is known of each position; every field is [n] but the tops.

    Args:
        broken: A distribution is not one: NaN.
        js: Jensen–Shannon divergence, in [0, ln 2].
        js_nucleus: The same after top-p truncation of both; None where none was asked for.
        kl_base_tuned: KL(base‖tuned).
        kl_tuned_base: KL(tuned‖base).
        entropy_base: Of the base's distribution.
        entropy_tuned: Of the tuned model's.
        logprob_base: Of the token that stands there.
        logprob_tuned: The same under the tuned model.
        rank_base: Of that token, 1 for the most probable.
        rank_tuned: The same under the tuned model.
        top_base: The base's most probable tokens.
        top_tuned: The tuned model's.
        tuned_top_rank_base: Rank under the base of the tuned model's first choice.
        tuned_top_logprob_base: Its log-probability under the base.
        top_k_overlap: Share of the k most probable tokens that both have.
    """

    broken: Tensor
    js: Tensor
    js_nucleus: Tensor | None
    kl_base_tuned: Tensor
    kl_tuned_base: Tensor
    entropy_base: Tensor
    entropy_tuned: Tensor
    logprob_base: Tensor
    logprob_tuned: Tensor
    rank_base: Tensor
    rank_tuned: Tensor
    top_base: Top
    top_tuned: Top
    tuned_top_rank_base: Tensor
    tuned_top_logprob_base: Tensor
    top_k_overlap: Tensor


def divergences(
    base: Tensor, tuned: Tensor, tokens: Tensor, *, top_k: int, top_p: float | None = None
) -> Divergences:
    """Everything that is reported of a position.

    Args:
        base: float64[n, vocab], the base's log-probabilities.
        tuned: The same of the tuned model.
        tokens: int64[n], the token that stands there.
        top_k: Tokens of the tops and of their overlap; cut at the vocabulary.
        top_p: Nucleus for `js_nucleus`, in (0, 1].
    """
    top_base, top_tuned = top(base, k=top_k), top(tuned, k=top_k)
    first_tuned = top_tuned.ids[:, 0]
    js_nucleus = None
    if top_p is not None:
        js_nucleus = js_divergence(nucleus(base, top_p=top_p), nucleus(tuned, top_p=top_p))
    return Divergences(
        broken=_broken(base, tuned),
        js=js_divergence(base, tuned),
        js_nucleus=js_nucleus,
        kl_base_tuned=kl_divergence(base, tuned),
        kl_tuned_base=kl_divergence(tuned, base),
        entropy_base=entropy(base),
        entropy_tuned=entropy(tuned),
        logprob_base=_at(base, tokens),
        logprob_tuned=_at(tuned, tokens),
        rank_base=ranks(base, tokens),
        rank_tuned=ranks(tuned, tokens),
        top_base=top_base,
        top_tuned=top_tuned,
        tuned_top_rank_base=ranks(base, first_tuned),
        tuned_top_logprob_base=_at(base, first_tuned),
        top_k_overlap=top_k_overlap(top_base, top_tuned),
    )


def js_divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """float64[n]: Jensen–Shannon divergence, in [0, ln 2]; exactly symmetric, exactly 0 for equal rows.

    With x = (ln q − ln p) / 2 each entry is ½ [(q − p) x − (p + q) ln cosh x]: no logarithm of a mixture is
    subtracted from one nearly equal to it, so that small divergences keep their digits.
    """
    p, q = base.exp(), tuned.exp()
    x = (tuned - base).div_(2)
    size = x.abs()
    log_cosh = (size * -2).exp_().log1p_().add_(size).sub_(LN2)
    entries = (q - p).mul_(x).sub_(log_cosh.mul_(p + q))
    # One of the two cannot occur: (p + q) ln 2. Neither can: x is NaN, though the row is a distribution.
    entries = torch.where(size.isinf(), (p + q) * LN2, entries)
    entries = entries.masked_fill_(base == tuned, 0.0)
    return entries.sum(dim=-1).div_(2).clamp_(min=0.0, max=LN2)


def kl_divergence(left: Tensor, right: Tensor) -> Tensor:
    """float64[n]: KL(left‖right) ≥ 0; +inf where the left has what cannot occur in the right."""
    impossible = left.isneginf()
    entries = left.exp().mul_(left - right).masked_fill_(impossible, 0.0)
    # A probability that underflows to 0 beside an impossible one: 0 · inf. The divergence is infinite still.
    entries = torch.where(right.isneginf() & ~impossible, torch.inf, entries)
    return entries.sum(dim=-1).clamp_(min=0.0)


def entropy(logprobs: Tensor) -> Tensor:
    """float64[n]: −Σ p ln p, in [0, ln vocab]."""
    entries = logprobs.exp().mul_(logprobs).masked_fill_(logprobs.isneginf(), 0.0)
    return -entries.sum(dim=-1).clamp_(max=0.0)


def ranks(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """int64[n]: 1 + the number of strictly more probable tokens."""
    return (logprobs > logprobs.gather(1, tokens[:, None])).sum(dim=1) + 1


def top(logprobs: Tensor, *, k: int) -> Top:
    """The k most probable tokens of each row; among equals the lower id is taken, and stands, first."""
    k = min(k, logprobs.shape[1])
    # NaN compares with nothing: a broken row gets some ids, and `broken` says that they mean nothing.
    clean = logprobs.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    cut = clean.topk(k, dim=1).values[:, -1:]
    above = clean > cut
    at_cut = clean == cut
    room = k - above.sum(dim=1, keepdim=True)
    kept = above | (at_cut & (at_cut.cumsum(dim=1) <= room))
    ids = kept.nonzero()[:, 1].view(-1, k)
    values = clean.gather(1, ids)
    order = values.sort(dim=1, descending=True, stable=True).indices
    ids = ids.gather(1, order)
    return Top(ids=ids, logprobs=logprobs.gather(1, ids))


def top_k_overlap(base: Top, tuned: Top) -> Tensor:
    """float64[n]: share of the k tokens that both tops have, in [0, 1]."""
    shared = (base.ids[:, :, None] == tuned.ids[:, None, :]).any(dim=2)
    return shared.double().mean(dim=1)


def nucleus(logprobs: Tensor, *, top_p: float) -> Tensor:
    """float64[n, vocab]: the fewest most probable tokens that together reach `top_p`, renormalised.

    Args:
        logprobs: Of the whole vocabulary.
        top_p: In (0, 1]; 1 keeps every token that can occur. The most probable token is always kept.
    """
    sorted_logprobs, order = logprobs.sort(dim=1, descending=True, stable=True)
    before = sorted_logprobs.exp().cumsum(dim=1) - sorted_logprobs.exp()
    dropped = before >= top_p if top_p < 1 else torch.zeros_like(before, dtype=torch.bool)
    dropped[:, 0] = False
    kept = sorted_logprobs.masked_fill(dropped, -torch.inf)
    return torch.log_softmax(torch.empty_like(kept).scatter_(1, order, kept), dim=1)


def _at(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(1, tokens[:, None])[:, 0]


def _broken(base: Tensor, tuned: Tensor) -> Tensor:
    return base.isnan().any(dim=1) | tuned.isnan().any(dim=1)
