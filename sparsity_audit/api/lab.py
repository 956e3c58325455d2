"""The lab: make a base, judge a policy.

Contract: training and evaluation run on one thread, so that the same seed gives the same bits; the folders
they write and read are ordinary Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

from sparsity_audit.api.lab_outputs import verify_counts
from sparsity_audit.errors import UsageError
from sparsity_audit.lab.determinism import one_thread, stream
from sparsity_audit.lab.evaluate import evaluate
from sparsity_audit.lab.evaluation import Evaluation
from sparsity_audit.lab.folder import load_model, resolve_base
from sparsity_audit.lab.model import SIZES
from sparsity_audit.lab.pretrain import Pretrained, StepRecord
from sparsity_audit.lab.pretrain_run import run_pretraining
from sparsity_audit.lab.recipes import RECIPES, Recipe
from sparsity_audit.lab.tasks import named_task

__all__ = ["lab_evaluate", "lab_pretrain"]

_T = TypeVar("_T")


def lab_pretrain(
    base: str,
    output: str | Path,
    *,
    seed: int = 0,
    size: str = "tiny",
    steps: int | None = None,
    target: tuple[float, float] | Literal["recipe"] | None = "recipe",
    formats: Mapping[str, float] | None = None,
    lengths: Mapping[int, float] | None = None,
    overwrite: bool = False,
    on_step: Callable[[StepRecord], None] = lambda _: None,
) -> Pretrained:
    """Pretrain a base and write it as a Hugging Face folder in bf16.

    Args:
        base: Name of the recipe: `mix` or `single`.
        output: Folder to write; a killed run with the same settings goes on.
        seed: Of everything random.
        size: `tiny`, `small` or `medium`.
        steps: The cosine's period and cap of steps, instead of the recipe's.
        target: Lowest and highest accuracy wanted, instead of the recipe's; None runs all steps.
        formats: Weight by solution format, instead of the recipe's.
        lengths: Weight by length, instead of the recipe's.
        overwrite: Replace what is there.
        on_step: Called after each step.

    Returns:
        The base; `converged` is false where its accuracy never reached the target.

    Raises:
        UsageError: An unknown name, or a mixture or target that cannot be.
        OutputError: Something else is there, or the folder cannot be written.
        NotFiniteError: The loss diverged.
    """
    recipe = _recipe(base, steps=steps, target=target, formats=formats, lengths=lengths)
    with one_thread():
        return run_pretraining(
            recipe,
            _known("size", size, SIZES),
            Path(output),
            seed=seed,
            overwrite=overwrite,
            on_step=on_step,
        )


def _recipe(
    base: str,
    *,
    steps: int | None,
    target: tuple[float, float] | Literal["recipe"] | None,
    formats: Mapping[str, float] | None,
    lengths: Mapping[int, float] | None,
) -> Recipe:
    """The recipe of a name with what the caller wants otherwise."""
    recipe = _known("base", base, RECIPES)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    if target is None:
        recipe = replace(recipe, target=None)
    elif target != "recipe":
        assert recipe.target is not None, "every recipe has a target to change"
        recipe = replace(recipe, target=replace(recipe.target, low=target[0], high=target[1]))
    parts = recipe.parts
    if formats is not None:
        parts = tuple(replace(part, formats=dict(formats)) for part in parts)
    if lengths is not None:
        parts = tuple(replace(part, lengths=dict(lengths)) for part in parts)
    return replace(recipe, parts=parts)


def lab_evaluate(
    checkpoint: str | Path,
    *,
    task: str = "addition",
    digits: Mapping[int, float] | int = 4,
    num_prompts: int = 512,
    num_samples: int = 8,
    seed: int = 0,
    reference: str | Path | None = None,
    betas: Sequence[float] = (0.05, 0.1, 0.2, 0.5, 1.0),
) -> Evaluation:
    """Judge a checkpoint on fresh problems.

    Args:
        checkpoint: A model folder, or `mix` or `single` for a shipped base.
        task: The task's name.
        digits: Length of the problems, or a mixture of lengths by weight.
        num_prompts: Problems.
        num_samples: Samples of each, at temperature 1.
        seed: Of problems and noise: the same seed gives all policies the same problems.
        reference: Checkpoint to measure the drift from, as `checkpoint`.
        betas: KL coefficients to give the distance to the KL-optimal policy for; all > 0.

    Raises:
        UsageError: An unknown task, or a number that cannot be.
        CheckpointNotFoundError: There is no such folder.
        UnsupportedFormatError: It holds a model the lab does not compute.
        CorruptCheckpointError: It cannot be read.
    """
    verify_counts(num_prompts=num_prompts, num_samples=num_samples, betas=betas)
    with one_thread():
        return evaluate(
            load_model(resolve_base(checkpoint)),
            task=named_task(task),
            lengths={digits: 1.0} if isinstance(digits, int) else digits,
            num_prompts=num_prompts,
            num_samples=num_samples,
            generator=stream(seed, "evaluation"),
            reference=None if reference is None else load_model(resolve_base(reference)),
            betas=betas,
        )


def _known(subject: str, name: str, choices: Mapping[str, _T]) -> _T:
    if name not in choices:
        raise UsageError(subject, f"{name!r} is not known", expected=f"one of {', '.join(choices)}")
    return choices[name]
