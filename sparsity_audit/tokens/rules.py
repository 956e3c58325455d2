"""When the intervening model's token is taken: rules that look at what is known before the token is drawn.

Contract: a rule answers for one step of many rows, from the divergence of the two models there, the entropy
of the primary one, the step, and what the row has spent. It never sees a token drawn at this step or later,
so it can be applied while sampling. Rules are frozen values; the same rule on the same signals fires alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from sparsity_audit.errors import UsageError

__all__ = ["Above", "At", "First", "Rule", "Signal", "Signals"]

Signal = Literal["js", "entropy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What is known of one step before a token is drawn.

    Args:
        js: Jensen-Shannon divergence of the two next-token distributions, nats, float[rows]; > 0 exactly
            where the two differ.
        entropy: Entropy of the primary model's distribution, nats, float[rows].
    """

    js: Tensor
    entropy: Tensor


class Rule(Protocol):
    """Decides at which steps the intervening model's token is taken."""

    def fires(self, step: int, signals: Signals, *, rows: Tensor, spent: Tensor) -> Tensor:
        """bool[rows].

        Args:
            step: Position in the completion, from 0.
            signals: Of these rows.
            rows: int64, the rows' numbers in the whole run.
            spent: int64, how often the rule has fired before in each row.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Above:
    """Fires where a signal lies above a threshold, as long as the row's budget lasts.

    With `js` and threshold 0 it fires wherever the two distributions differ, so that the tokens are the
    intervening model's own; with ∞ never, so that they are the primary model's.

    Args:
        signal: Which one.
        threshold: ≥ 0, nats; ∞ allowed.
        budget: Tokens of a completion at most; None for no limit. The first ones above the threshold are
            taken: what comes later is not known.
    """

    signal: Signal
    threshold: float
    budget: int | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.threshold) or self.threshold < 0:
            raise UsageError("threshold", str(self.threshold), expected="a number ≥ 0 in nats, or inf")
        if self.budget is not None and self.budget < 1:
            raise UsageError("budget", str(self.budget), expected="at least 1 token")

    def fires(self, step: int, signals: Signals, *, rows: Tensor, spent: Tensor) -> Tensor:  # noqa: ARG002
        """Above the threshold, with budget left."""
        fired = (signals.js if self.signal == "js" else signals.entropy) > self.threshold
        return fired if self.budget is None else fired & (spent < self.budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """Fires at the first `num` positions of every row, whatever the models say."""

    num: int

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UsageError("first positions", str(self.num), expected="at least 1")

    def fires(self, step: int, signals: Signals, *, rows: Tensor, spent: Tensor) -> Tensor:  # noqa: ARG002
        """At the beginning."""
        return (rows >= 0) & (step < self.num)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class At:
    """Fires at given positions.

    Args:
        positions: bool[all rows, seq]; false beyond its end.
    """

    positions: Tensor

    def fires(self, step: int, signals: Signals, *, rows: Tensor, spent: Tensor) -> Tensor:  # noqa: ARG002
        """Where the row's position is marked."""
        if step >= self.positions.shape[1]:
            return rows < 0
        return self.positions[rows.cpu(), step].to(rows.device)
