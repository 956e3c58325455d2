"""What algorithms work on: the models of a run, what they make of rollouts, batches and losses.

Contract: plain values and pure functions. A `Batch` is cut into minibatches by `select`; all its tensors have
one row a completion. Readings are at the temperature of the rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from sparsity_audit.lab.model import Linear, Llama
from sparsity_audit.lab.rollout import Rollouts

__all__ = ["Actors", "Batch", "Loss", "Reading", "Scored", "entropies", "read", "score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Actors:
    """The models of a run.

    Args:
        policy: What is trained.
        reference: The base as training began; frozen.
        value_head: Hidden state → value, for PPO and A2C. It reads the policy's hidden states without
            sending a gradient back, so that the value loss does not move the policy.
        reward_model: PRIME's implicit reward model, which starts as the base.
    """

    policy: Llama
    reference: Llama
    value_head: Linear | None
    reward_model: Llama | None


class Reading(NamedTuple):
    """One pass over rollouts, teacher-forced: hidden states, logits / temperature, log-probabilities."""

    hidden: Tensor
    logits: Tensor
    logprobs: Tensor


def read(model: Llama, rollouts: Rollouts) -> Reading:
    """What a model makes of each completion token; `logits[b, t]` predict token t."""
    start = rollouts.prompts.shape[1]
    hidden = model.hidden_states(rollouts.tokens[:, :-1], rollouts.attention_mask[:, :-1])[:, start - 1 :]
    logits = model.lm_head(hidden) / rollouts.temperature
    logprobs = logits.log_softmax(-1).gather(-1, rollouts.completions.unsqueeze(-1)).squeeze(-1)
    return Reading(hidden=hidden, logits=logits, logprobs=logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Rollouts as policy and reference see them before the step's first update."""

    rollouts: Rollouts
    policy: Reading
    reference: Reading


@torch.no_grad()
def score(actors: Actors, rollouts: Rollouts) -> Scored:
    """Read rollouts with policy and reference."""
    return Scored(
        rollouts=rollouts, policy=read(actors.policy, rollouts), reference=read(actors.reference, rollouts)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a step trains on.

    Args:
        rollouts: The rows.
        reference: What the reference makes of them.
        advantages: float[rows, seq]; None where the loss has none.
        returns: float[rows, seq], what a value head is fitted to; None without one.
        mismatched: Completions behind other prompts, a row for each row, and what the reference makes of
            them; KTO's alone.
        unit: Rows that stay together in a minibatch: 2 for pairs (chosen, rejected), else 1.
    """

    rollouts: Rollouts
    reference: Reading
    advantages: Tensor | None = None
    returns: Tensor | None = None
    mismatched: tuple[Rollouts, Tensor] | None = None
    unit: int = 1

    @property
    def num_units(self) -> int:
        """Units that minibatches are made of."""
        return len(self.rollouts) // self.unit

    def select(self, units: Tensor) -> Batch:
        """The rows of some units."""
        rows = (units[:, None] * self.unit + torch.arange(self.unit)).reshape(-1)
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = {name: part[rows] if isinstance(part, Tensor) else part for name, part in parts.items()}
        other = self.mismatched
        return Batch(
            **{
                **parts,
                "rollouts": self.rollouts.select(rows),
                "reference": Reading(*(part[rows] for part in self.reference)),
                "mismatched": other and (other[0].select(rows), other[1][rows]),
            }
        )


class Loss(NamedTuple):
    """What a minibatch asks for.

    Args:
        policy: Scalar with gradient; None when nothing in the minibatch has one.
        critic: Scalar for the value head or the reward model; None without one.
        dropped_rows: Rows without any gradient, left out of the pass.
        clipped_share: Share of tokens whose gradient the clip takes away; None without a clip.
        weight_mean: Mean of the divergence weights; None without them.
    """

    policy: Tensor | None
    critic: Tensor | None = None
    dropped_rows: int = 0
    clipped_share: float | None = None
    weight_mean: float | None = None


def entropies(logits: Tensor) -> Tensor:
    """Shannon entropy in nats of softmax(logits), over the last axis."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)
