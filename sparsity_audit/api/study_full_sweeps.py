"""The questions of `lab study --full`, each as a table of settings. Data alone; nothing runs here.

Contract: a sweep is what all its runs share, one row of settings for each arm, and the seeds that every arm
is run with. Arms of one sweep differ in what their rows say and in nothing else, so a difference between
them is theirs. What is not said here is a default of `lab_train`: 16 prompts × 8 samples, AdamW at 3e-4, clip
.2, one update a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PARTS", "SWEEPS", "BaseSpec", "JudgedOn", "Sweep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedOn:
    """What policies are judged on: a task at one length."""

    task: str = "addition"
    digits: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSpec:
    """A base that the study pretrains, once for each of `seeds`; the RL seed picks its own.

    Args:
        recipe: Name of the recipe.
        options: What `lab_pretrain` is told otherwise.
        seeds: Seeds of pretraining. One seed means that all RL runs share one base.
    """

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """One question.

    Args:
        key: Its name; jobs and figures are called so.
        part: The letter that `--only` takes.
        question: In words.
        common: Settings of `lab_train` that all its runs share.
        arms: Arm → the settings that make it.
        seeds: Seeds of every arm.
        tests: What runs are judged on beside their own task and length.
        num_prompts: Problems of a test, two samples each.
        bases: Base → how it is made; other names are shipped bases.
    """

    key: str
    part: str
    question: str
    common: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...] = (0, 1)
    tests: tuple[JudgedOn, ...] = ()
    num_prompts: int = 512
    bases: Mapping[str, BaseSpec] = field(default_factory=dict)


PARTS = {
    "a": "Do the KL penalty, the clip or stale data move update sparsity?",
    "b": "What do runs share that differ in seed, algorithm or data?",
    "c": "Does RL carry over from easy to hard, and which format wins?",
    "d": "Where are the critical tokens, and what does pretraining do to them?",
    "e": "Does a prioritised KL penalty buy more accuracy at equal KL?",
    "f": "Does weighting the advantage by divergence teach more?",
}
"""In the order of the page."""


_OFF = {"epochs": 2, "minibatches": 2}
"""Four updates a step: learns as much in 16 steps as one update a step does in 60."""

_QUICK = {"algorithm": "grpo", "precision": "fp32", "checkpoints": "last", **_OFF}

# (a) Sparsity. One update a step is on-policy, and there the ratio is 1 and no clip can act, so `on` has no
# arms without a clip. Off-policy data: 2 epochs × 2 minibatches, each update further from the sampler.

_NO_CLIP = {"clip": 1e6}
_KL = {"kl": "k3", "kl_coefficient": 0.1}
_A_ARMS: dict[str, dict[str, Any]] = {
    "on": {},
    "on-kl": {**_KL},
    "off": {**_OFF},
    "off-kl": {**_OFF, **_KL},
    "off-noclip": {**_OFF, **_NO_CLIP},
    "off-kl-noclip": {**_OFF, **_KL, **_NO_CLIP},
    # As many updates as `on`, from a quarter of its rollouts.
    "off-quarter": {**_OFF, "steps": 6},
    # The rate of a pilot with seed 0: .1 learned, 1 and 5 collapsed.
    "on-sgd": {"optimizer": "sgd", "lr": 0.1},
}
SPARSITY = Sweep(
    key="sparsity",
    part="a",
    question="Sparsity of the update by KL penalty, clip, staleness of the data and optimizer.",
    common={"algorithm": "grpo", "base": "mix", "steps": 24, "checkpoints": "last"},
    arms={
        f"{arm}-{precision}": {**settings, "precision": precision}
        for precision in ("fp32", "bf16")
        for arm, settings in _A_ARMS.items()
    },
)

# (b) The grid. One base can do both tasks; three seeds are the least at which every factor has enough
# arrangements for a p. The control is no cell of the grid.

GRID = Sweep(
    key="grid",
    part="b",
    question="Overlap of runs by seed, algorithm and data.",
    common={"base": "both", "precision": "bf16", "steps": 30, "checkpoints": "last"},
    arms={
        f"{algorithm}-{task}": {"algorithm": algorithm, "task": task, "lengths": length}
        for algorithm in ("grpo", "dpo")
        for task, length in (("addition", 4), ("sorting", 8))
    },
    seeds=(0, 1, 2),
    bases={"both": BaseSpec(recipe="both")},
)
GRID_CONTROL = Sweep(
    key="grid-control",
    part="b",
    question="The same without anything to learn: GRPO on addition with shuffled rewards.",
    common={**GRID.common, "algorithm": "grpo", "shuffle_rewards": True},
    arms={"shuffled": {}},
    seeds=(9,),
    bases=GRID.bases,
)

# (c) Three sweeps: lengths, pretraining mixtures, sizes.


def _degree(steps: int, **options: Any) -> BaseSpec:
    """`mix` after so many steps of a cosine that ends there, whatever its accuracy; two of them."""
    return BaseSpec(recipe="mix", options={"steps": steps, "target": None, **options}, seeds=(0, 1))


TRANSFER = Sweep(
    key="transfer",
    part="c",
    question="Accuracy with four digits after RL on three.",
    common={**_QUICK, "steps": 16},
    arms={
        f"{base}-n{length}{'-shuffled' * shuffled}": {
            "base": base,
            "lengths": length,
            **({"shuffle_rewards": True} if shuffled else {}),
        }
        for base in ("mix", "single")
        for length, shuffled in ((3, False), (4, False), (3, True))
    },
    tests=(JudgedOn(digits=4), JudgedOn(digits=3)),
)

_MIXTURES = {
    "C-most": {"S": 0.10, "C": 0.80, "R": 0.10},
    "R-most": {"S": 0.10, "C": 0.10, "R": 0.80},
}
MIXTURES = Sweep(
    key="mixtures",
    part="c",
    question="Which format RL selects, by the mixture a base was pretrained on.",
    common={**_QUICK, "steps": 24},
    # Mixtures differ in what they can reach, so a number of steps stands for the target accuracy.
    arms={"even": {"base": "degree-400"}, **{name: {"base": f"mixture-{name}"} for name in _MIXTURES}},
    bases={
        "degree-400": _degree(400),
        **{f"mixture-{name}": _degree(400, formats=formats) for name, formats in _MIXTURES.items()},
    },
)
SCALE = Sweep(
    key="scale",
    part="c",
    question="Which format RL selects, by the size of the model. The learning rate falls as the width grows.",
    common={**_QUICK, "steps": 16},
    arms={"tiny": {"base": "mix", "lr": 3e-4}, "small": {"base": "small", "lr": 1.5e-4}},
    bases={"small": BaseSpec(recipe="mix", options={"size": "small"})},
)

# (d) Degree of pretraining: the same cosine, over more steps. Each base is used for either kind of operands.

DEGREES = (250, 400, 700)
CRITICAL_TASKS = {"identical": "addition", "varying": "addition-varying"}
DEGREE = Sweep(
    key="degree",
    part="d",
    question="What RL reaches, and where the base hesitates, by how long it was pretrained.",
    common={**_QUICK, "steps": 16, "checkpoints": "log"},
    arms={
        f"{steps}-{operands}": {"base": f"degree-{steps}", "task": task}
        for steps in DEGREES
        for operands, task in CRITICAL_TASKS.items()
    },
    bases={f"degree-{steps}": _degree(steps) for steps in DEGREES},
)

# (e) Frontier: each penalty over a range of coefficients. Prioritised ones leave out uncertain positions, so
# they need larger coefficients to reach the same KL.

_COEFFICIENTS = {
    "standard": (0.1, 0.3, 0.5, 1.0, 3.0),
    "shannon": (1.0, 3.0, 10.0, 30.0),
    "max-prob": (1.0, 3.0, 10.0, 30.0),
}
FRONTIER = Sweep(
    key="frontier",
    part="e",
    question="Accuracy against KL(policy‖base), by kind and coefficient of the penalty.",
    common={**_QUICK, "base": "mix", "steps": 16},
    arms={
        "no-penalty": {},
        **{
            f"{kind}-{coefficient:g}": {
                "kl": "exact",
                "kl_coefficient": coefficient,
                **({} if kind == "standard" else {"kl_priority": kind}),
            }
            for kind, coefficients in _COEFFICIENTS.items()
            for coefficient in coefficients
        },
    },
    num_prompts=1024,
)

# (f) Divergence weights are 1 on the first minibatch after a rollout, so there are four updates a step. The
# published form (s = .3, α = 1) hardly differs from 1; the strong one shows what it would do.

_WEAK = {"divergence_weight": 0.3, "divergence_alpha": 1.0}
_STRONG = {"divergence_weight": 2.0, "divergence_alpha": 30.0}
DIVERGENCE = Sweep(
    key="divergence",
    part="f",
    question="Accuracy with divergence-weighted advantages, the same weights normalised, or shuffled.",
    common={**_QUICK, "base": "mix", "steps": 16},
    arms={
        "baseline": {},
        "weak": {**_WEAK},
        "strong": {**_STRONG},
        "strong-negative": {**_STRONG, "divergence_alpha": -30.0},
        "strong-normalised": {**_STRONG, "divergence_control": "mean-normalised"},
        "strong-shuffled": {**_STRONG, "divergence_control": "shuffled"},
    },
    seeds=(0, 1, 2),
    num_prompts=1024,
)

SWEEPS = (SPARSITY, GRID, GRID_CONTROL, TRANSFER, MIXTURES, SCALE, DEGREE, FRONTIER, DIVERGENCE)
"""All sweeps, in the order of the page."""
