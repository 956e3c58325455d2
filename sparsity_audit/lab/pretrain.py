"""Supervised pretraining of a base, until it reaches its target accuracy.

Contract: cross-entropy on the completions of written solutions, never on prompts; Muon on the layers'
matrices, AdamW without decay on the rest, both under one cosine. The result is rounded to bf16 *before* it is
judged and written, so that a later diff counts training and not the cast. Bit-reproducible from the seed,
also when it was killed and goes on from `state`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparsity_audit.errors import SparsityAuditError
from sparsity_audit.lab.determinism import stream
from sparsity_audit.lab.estimators import Estimate, estimate
from sparsity_audit.lab.evaluate import sampled_rewards
from sparsity_audit.lab.losses import sft_loss, token_weights
from sparsity_audit.lab.mixtures import draw
from sparsity_audit.lab.model import Llama, LlamaConfig, initialise, round_to_bf16
from sparsity_audit.lab.muon import Muon
from sparsity_audit.lab.recipes import Part, Recipe
from sparsity_audit.lab.rollout import Rollouts, as_rollouts, logprobs_of, teacher_forced
from sparsity_audit.lab.tasks import named_task

__all__ = ["NotFiniteError", "Pretrained", "Pretraining", "StepRecord", "written_solutions"]


class NotFiniteError(SparsityAuditError, ArithmeticError):
    """A loss became NaN or infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step.

    Args:
        step: Its number, from 1.
        loss: Mean cross-entropy of the batch's completion tokens, nats.
        lr_scale: Share of the peak rates that was used.
        accuracy: On the target's problems after the step; None where nobody looked.
    """

    step: int
    loss: float
    lr_scale: float
    accuracy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """A finished base.

    Args:
        model: Its weights, on the bf16 grid.
        steps: Steps that were taken.
        converged: Whether the target was reached; true where there is none.
        accuracy: On fresh problems of the target, of the rounded weights; None without a target.
        overshot: Whether that accuracy lies above the target's upper end.
        records: One a step.
    """

    model: Llama
    steps: int
    converged: bool
    accuracy: Estimate | None
    overshot: bool
    records: tuple[StepRecord, ...]


def written_solutions(part: Part, num: int, *, generator: torch.Generator) -> Rollouts:
    """`num` fresh problems of a part with written, right solutions."""
    task = named_task(part.task)
    problems = task.sample(num, lengths=part.lengths, generator=generator)
    formats = draw(part.formats, num, generator=generator)
    texts = [task.write(problem, fmt) for problem, fmt in zip(problems, formats, strict=True)]
    return as_rollouts(problems, texts, task=task)


class Pretraining:
    """A base in the making; `step` until `finished`, then `result`.

    Args:
        recipe: What to train on, and until when.
        config: The model's shape.
        seed: Of everything random.

    Raises:
        UsageError: The recipe cannot be followed.
    """

    def __init__(self, recipe: Recipe, config: LlamaConfig, *, seed: int) -> None:
        recipe.check()
        self.recipe, self.seed = recipe, seed
        self.model = initialise(config, generator=stream(seed, "initial weights"))
        self.records: list[StepRecord] = []
        self._data = stream(seed, "data")
        matrices = [weight for _, weight in self._weights(matrices=True)]
        others = [weight for _, weight in self._weights(matrices=False)]
        self._optimizers = (
            Muon(matrices, lr=recipe.muon_lr, momentum=recipe.muon_momentum),
            torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def _weights(self, *, matrices: bool) -> list[tuple[str, torch.nn.Parameter]]:
        """The layers' matrices, or everything else: embedding, head and norms."""
        return [
            (name, weight)
            for name, weight in self.model.named_parameters()
            if (".layers." in name and weight.ndim == 2) == matrices
        ]

    @property
    def reached_target(self) -> bool:
        """Whether the last look found the target accuracy."""
        target, last = self.recipe.target, self.records[-1].accuracy if self.records else None
        return target is not None and last is not None and last >= target.low

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do: target or cap reached."""
        return self.reached_target or len(self.records) >= self.recipe.steps

    def step(self) -> StepRecord:
        """One batch, of one part of the recipe, and a look at the target where one is due.

        Raises:
            NotFiniteError: The loss is NaN or infinite.
        """
        done, recipe = len(self.records), self.recipe
        lr_scale = (1 + math.cos(math.pi * done / recipe.steps)) / 2
        for optimizer, lr in zip(self._optimizers, (recipe.muon_lr, recipe.adamw_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * lr_scale
        loss = self._update()
        if not math.isfinite(loss):
            raise NotFiniteError("pretraining", f"loss {loss} at step {done + 1}", remedy="lower the rates")
        accuracy = self._look(done + 1) if self._is_due(done + 1) else None
        self.records.append(StepRecord(step=done + 1, loss=loss, lr_scale=lr_scale, accuracy=accuracy))
        return self.records[-1]

    def _is_due(self, step: int) -> bool:
        """Whether the target is looked at after a step: at intervals, and at the end."""
        recipe = self.recipe
        at_interval = step >= recipe.first_look and step % recipe.evaluate_every == 0
        return recipe.target is not None and (at_interval or step == recipe.steps)

    def _update(self) -> float:
        parts = self.recipe.parts
        number = draw({n: part.weight for n, part in enumerate(parts)}, 1, generator=self._data)[0]
        batch = written_solutions(parts[number], self.recipe.batch, generator=self._data)
        logprobs = logprobs_of(teacher_forced(self.model, batch), batch.completions, temperature=1.0)
        loss = sft_loss(logprobs, weights=token_weights(batch.completion_mask, normalisation="token-mean"))
        self.model.zero_grad()
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        return loss.item()

    def _look(self, step: int | str) -> float:
        """The accuracy on fresh problems of the target."""
        return sum(self._rewards(step, self.recipe.evaluation_prompts)) / self.recipe.evaluation_prompts

    def _rewards(self, step: int | str, num: int) -> list[float]:
        target = self.recipe.target
        assert target is not None
        task, generator = named_task(target.task), stream(self.seed, "evaluation", step)
        problems = task.sample(num, lengths={target.length: 1.0}, generator=generator)
        return sampled_rewards(self.model, problems, task=task, generator=generator)

    def result(self) -> Pretrained:
        """The base, rounded to bf16 and judged on fresh problems."""
        round_to_bf16(self.model)
        target = self.recipe.target
        accuracy = None if target is None else estimate(self._rewards("final", self.recipe.final_prompts))
        return Pretrained(
            model=self.model,
            steps=len(self.records),
            converged=target is None or self.reached_target,
            accuracy=accuracy,
            overshot=target is not None and accuracy is not None and accuracy.value > target.high,
            records=tuple(self.records),
        )

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "data": self._data.get_state(),
            "records": [asdict(record) for record in self.records],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave for the same recipe, shape and seed."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._data.set_state(state["data"])
        self.records = [StepRecord(**record) for record in state["records"]]
