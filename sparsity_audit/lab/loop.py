"""The training loop: it owns the state, and nothing else does.

Contract: `Training.step` makes one step's data and its epochs · minibatches updates, and says what it saw.
The state between steps is weights, moments and, for expert iteration, the round's data: all randomness
comes from streams named by seed, purpose and step, so a run goes on bit for bit from `state`. A step in
which nothing has a gradient changes no weight, and is counted. A loss or gradient that is not finite stops
the run.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsity_audit.lab.algorithms import algorithm_for
from sparsity_audit.lab.batches import Actors, Batch, Loss, Scored, score
from sparsity_audit.lab.config import TrainConfig
from sparsity_audit.lab.determinism import stream
from sparsity_audit.lab.metrics import StepMetrics, describe
from sparsity_audit.lab.model import Linear, Llama, round_to_bf16
from sparsity_audit.lab.pretrain import NotFiniteError, written_solutions
from sparsity_audit.lab.recipes import Part
from sparsity_audit.lab.rollout import Rollouts, sample
from sparsity_audit.lab.tasks import named_task
from sparsity_audit.lab.update import Learner, UpdateMask
from sparsity_audit.lab.vocabulary import PAD

__all__ = ["Training"]


class Training:
    """A run in the making; `step` until `finished`.

    Args:
        config: Its settings.
        base: What it starts from; copied. In the `bf16` arm it is rounded first, so that a later diff counts
            training and not the cast.
        update_mask: bool tensors by parameter name, True where entries may move; None where all may.

    Raises:
        UsageError: The mask does not fit the model.
    """

    def __init__(self, config: TrainConfig, base: Llama, *, update_mask: UpdateMask | None = None) -> None:
        self.config, self.done = config, 0
        self._task = named_task(config.task)
        self._algorithm = algorithm_for(config)
        reference = _copy(base)
        if config.precision == "bf16":
            round_to_bf16(reference)
        self.actors = Actors(
            policy=_copy(reference),
            reference=reference.requires_grad_(requires_grad=False),
            value_head=Linear(base.config.hidden_size, 1) if config.algorithm in ("ppo", "a2c") else None,
            reward_model=_copy(reference) if config.algorithm == "prime" else None,
        )
        self._policy = Learner(
            dict(self.actors.policy.named_parameters()),
            optimizer=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            precision=config.precision,
            update_mask=update_mask,
        )
        critic = self.actors.value_head or self.actors.reward_model
        self._critic = critic and Learner(
            dict(critic.named_parameters()),
            optimizer="adamw",
            lr=config.critic_lr,
            weight_decay=0.0,
            grad_clip=config.grad_clip,
            precision="fp32",
            update_mask=None,
        )
        self._round: Batch | None = None

    @property
    def policy(self) -> Llama:
        """What has been trained so far."""
        return self.actors.policy

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.config.steps

    def step(self) -> StepMetrics:
        """One step.

        Raises:
            NotFiniteError: A loss or a gradient is NaN or infinite.
        """
        scored, batch = self._data()
        learned = self._learn(batch)
        self.done += 1
        made = batch if self._round is None else self._round
        return StepMetrics(step=self.done, **learned, **describe(scored, made, task=self._task))

    # Data

    def _data(self) -> tuple[Scored | None, Batch]:
        """What this step's rollouts were, if it made any, and what it trains on."""
        if self.config.rounds is not None:
            return self._round_data(self.config.rounds)
        scored = self._scored(self._rollouts(self.done))
        return scored, self._algorithm.prepare(self.actors, scored)

    def _scored(self, rollouts: Rollouts) -> Scored:
        """Rollouts with their readings, once it is sure that the policy still computes.

        A policy of NaN samples, is never rewarded and so never gets a gradient: nothing else would notice.
        """
        scored = score(self.actors, rollouts)
        found = scored.policy.logprobs[rollouts.completion_mask]
        if not torch.isfinite(found).all():
            raise self._not_finite("log-probability of a completion", float(found.sum()))
        return scored

    def _rollouts(self, number: int) -> Rollouts:
        """The rollouts of one step: prompts · samples completions with their rewards."""
        config = self.config
        problems_stream = stream(config.seed, "problems", number)
        if config.formats is not None:
            part = Part(task=config.task, formats=config.formats, lengths=config.lengths)
            return written_solutions(part, config.prompts * config.samples, generator=problems_stream)
        rollouts = sample(
            self.actors.reference if self._is_off_policy else self.actors.policy,
            self._task.sample(config.prompts, lengths=config.lengths, generator=problems_stream),
            task=self._task,
            num_samples=config.samples,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            generator=stream(config.seed, "samples", number),
        )
        if not config.shuffle_rewards:
            return rollouts
        order = torch.randperm(len(rollouts), generator=stream(config.seed, "shuffled rewards", number))
        return replace(rollouts, rewards=rollouts.rewards[order])

    @property
    def _is_off_policy(self) -> bool:
        return self.config.sample_from == "base"

    def _round_data(self, rounds: int) -> tuple[Scored | None, Batch]:
        """Expert iteration: at the start of a round all its completions, then a share of them each step."""
        starts = [number * self.config.steps // rounds for number in range(rounds + 1)]
        number = bisect.bisect_right(starts, self.done) - 1
        place, size = self.done - starts[number], starts[number + 1] - starts[number]
        scored = None
        if place == 0:
            scored = self._scored(_joined([self._rollouts(self.done + i) for i in range(size)]))
            self._round = self._algorithm.prepare(self.actors, scored)
            self._policy.reset(self.actors.reference.state_dict())
        assert self._round is not None
        order = torch.randperm(self._round.num_units, generator=stream(self.config.seed, "round", number))
        return scored, self._round.select(order.tensor_split(size)[place])

    # Updates

    def _learn(self, batch: Batch) -> dict[str, Any]:
        """All updates on one step's data."""
        losses: list[float] = []
        norms: list[float] = []
        found: list[Loss] = []
        for minibatch in self._minibatches(batch):
            generator = stream(self.config.seed, "updates", self.done, len(found))
            loss = self._algorithm.loss(self.actors, minibatch, generator=generator)
            found.append(loss)
            if loss.policy is not None:
                losses.append(loss.policy.item())
                norms.append(self._update(loss.policy, loss.critic))
        clipped = [loss.clipped_share for loss in found if loss.clipped_share is not None]
        weights = [loss.weight_mean for loss in found if loss.weight_mean is not None]
        return {
            "updates": sum(norm > 0 for norm in norms),
            "loss": _mean(losses),
            "grad_norm": _mean(norms),
            "clip_frac": _mean(clipped),
            "weight_mean": _mean(weights),
            "rows": len(batch.rollouts),
            "dropped_rows": sum(loss.dropped_rows for loss in found) // self.config.epochs,
        }

    def _minibatches(self, batch: Batch) -> Iterator[Batch]:
        config = self.config
        if not batch.num_units:
            return
        if config.updates_per_step == 1:
            yield batch
            return
        for epoch in range(config.epochs):
            order = torch.randperm(
                batch.num_units, generator=stream(config.seed, "minibatches", self.done, epoch)
            )
            for units in order.tensor_split(config.minibatches):
                if len(units):
                    yield batch.select(units)

    def _update(self, policy: Tensor, critic: Tensor | None) -> float:
        """One update of the policy and of the critic, if there is one; the policy's gradient norm."""
        total = policy if critic is None else policy + critic
        if not torch.isfinite(total):
            raise self._not_finite("loss", total.item())
        self._policy.forget_gradients()
        if self._critic is not None:
            self._critic.forget_gradients()
        total.backward()
        norm = self._policy.apply()
        if not math.isfinite(norm):
            raise self._not_finite("gradient norm", norm)
        if self._critic is not None and not math.isfinite(critic_norm := self._critic.apply()):
            raise self._not_finite("gradient norm of the critic", critic_norm)
        return norm

    def _not_finite(self, what: str, value: float) -> NotFiniteError:
        return NotFiniteError(
            f"{self.config.algorithm}, step {self.done + 1}",
            f"the {what} is {value}: the run collapsed",
            remedy=f"a learning rate below {self.config.lr:g}; the checkpoints so far are intact",
        )

    # State

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, beside the config."""
        found = {f"policy.{name}": value for name, value in self._policy.state().items()}
        if self._critic is not None:
            found |= {f"critic.{name}": value for name, value in self._critic.state().items()}
        if self._round is not None:
            found |= {
                f"round.{field.name}": getattr(self._round.rollouts, field.name)
                for field in fields(Rollouts)
                if field.name != "temperature"
            }
        return found | {"done": torch.tensor(self.done)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave for the same config and base."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}

        self.done = int(state["done"])
        self._policy.load(part("policy."))
        if self._critic is not None:
            self._critic.load(part("critic."))
        if stored := part("round."):
            rollouts = Rollouts(**stored, temperature=self.config.temperature)
            self._round = Batch(rollouts=rollouts, reference=score(self.actors, rollouts).reference)


def _copy(model: Llama) -> Llama:
    copied = Llama(model.config)
    copied.load_state_dict(model.state_dict())
    return copied


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _joined(parts: list[Rollouts]) -> Rollouts:
    """Rollouts of several steps as one; groups are numbered on."""
    prompt_seq = max(part.prompts.shape[1] for part in parts)
    seq = max(part.completions.shape[1] for part in parts)
    columns: dict[str, list[Tensor]] = {}
    for number, part in enumerate(parts):
        left, right = (prompt_seq - part.prompts.shape[1], 0), (0, seq - part.completions.shape[1])
        groups_before = sum(int(other.group.max()) + 1 for other in parts[:number])
        row = {
            "prompts": pad(part.prompts, left, value=PAD),
            "prompt_mask": pad(part.prompt_mask, left),
            "completions": pad(part.completions, right, value=PAD),
            "completion_mask": pad(part.completion_mask, right),
            "logprobs": pad(part.logprobs, right),
            "group": part.group + groups_before,
            "rewards": part.rewards,
            "truncated": part.truncated,
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return Rollouts(**{n: torch.cat(v) for n, v in columns.items()}, temperature=parts[0].temperature)
