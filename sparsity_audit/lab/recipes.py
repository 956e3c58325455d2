"""What a base is pretrained on, and when it is good enough: weak where RL will work, able in one format.

Contract: a recipe is plain data that says everything but the seed and the size. Pretraining stops at a target
accuracy, not at a step count: ability comes in a phase transition whose step depends on the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.mixtures import check_mixture
from sparsity_audit.lab.tasks import named_task

__all__ = ["RECIPES", "Part", "Recipe", "Target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One kind of data.

    Args:
        task: A task's name.
        formats: Weight by solution format.
        lengths: Weight by length.
        weight: Weight of the part among all.
    """

    task: str
    formats: Mapping[str, float]
    lengths: Mapping[int, float]
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The accuracy (one sample at temperature 1) at which a base is done.

    Args:
        task: On which task.
        length: At which length.
        low: Training stops at the first look that reads at least so much. The first of many noisy looks over
            a mark reads about one standard error too high, so the base lies that much lower.
        high: Above it the base is called overshot.
    """

    task: str
    length: int
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a base is made.

    Args:
        parts: The data.
        steps: The cosine's period and the cap: a base that has not reached its target by then did not
            converge.
        target: When to stop; None runs all steps.
        batch: Sequences a step.
        muon_lr: Peak rate of the layers' matrices.
        muon_momentum: Their momentum.
        adamw_lr: Peak rate of embedding, head and norms.
        evaluate_every: Steps between looks at the target.
        first_look: Step before which nobody looks: untrained models are slow to sample from.
        evaluation_prompts: Prompts of a look; the standard error at accuracy .4 is .49 / sqrt of it.
        final_prompts: Prompts that the finished base is judged on.
    """

    parts: tuple[Part, ...]
    steps: int
    target: Target | None
    batch: int = 64
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    adamw_lr: float = 3e-3
    evaluate_every: int = 10
    first_look: int = 0
    evaluation_prompts: int = 512
    final_prompts: int = 4096

    def check(self) -> None:
        """Refuse a recipe that cannot be followed. Raises UsageError."""
        if not self.parts:
            raise UsageError("recipe", "has no data", expected="at least one part")
        for part in self.parts:
            check_mixture(f"formats of {part.task}", part.formats, known=named_task(part.task).formats)
            check_mixture(f"lengths of {part.task}", part.lengths)
        if self.steps < 1:
            raise UsageError("steps", str(self.steps), expected="at least 1")
        if self.target is not None and not 0 < self.target.low <= self.target.high <= 1:
            raise UsageError(
                "target",
                f"{self.target.low} to {self.target.high}",
                expected="0 < low ≤ high ≤ 1",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


_MIX = {"S": 0.30, "C": 0.35, "R": 0.35}
_LENGTHS = {1: 1, 2: 2, 3: 4, 4: 2}
_ADDITION_TARGET = {"task": "addition", "length": 4}

RECIPES = {
    "mix": Recipe(
        parts=(Part(task="addition", formats=_MIX, lengths=_LENGTHS),),
        steps=700,
        first_look=300,
        target=Target(**_ADDITION_TARGET, low=0.40, high=0.43),
    ),
    "single": Recipe(
        parts=(Part(task="addition", formats={"S": 1}, lengths={1: 1, 2: 2, 3: 4, 4: 0.4}),),
        steps=200,
        first_look=80,
        target=Target(**_ADDITION_TARGET, low=0.29, high=0.35),
    ),
    "both": Recipe(
        parts=(
            Part(task="addition", formats=_MIX, lengths=_LENGTHS),
            Part(task="sorting", formats=_MIX, lengths={2: 1, 4: 2, 6: 4, 8: 1}),
        ),
        steps=1400,
        first_look=600,
        target=Target(**_ADDITION_TARGET, low=0.40, high=0.43),
    ),
}
"""`mix` leaves RL a choice of format, `single` only the skill; both ship. `both` can do either task, so that
one base can be tuned on different data."""
