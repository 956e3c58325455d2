"""What identifies a training run: every setting, resolved, as one frozen value.

Contract: a `TrainConfig` that exists is consistent: ranges are checked, and an option that its algorithm
would not read is refused, never ignored. Two runs with equal configs, on one machine and one version, end
in the same bytes. Defaults live in `api.lab_train`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.advantages import WeightControl
from sparsity_audit.lab.losses import Normalisation
from sparsity_audit.lab.mixtures import check_mixture
from sparsity_audit.lab.tasks import named_task

__all__ = ["ALGORITHMS", "POLICY_GRADIENTS", "PREFERENCES", "TrainConfig", "named_algorithm"]

POLICY_GRADIENTS = ("grpo", "rloo", "ppo", "a2c", "prime")
LIKELIHOODS = ("sft", "expert-iteration")
PREFERENCES = ("dpo", "simpo", "kto", "orpo")
ALGORITHMS = (*POLICY_GRADIENTS, *LIKELIHOODS, *PREFERENCES)
"""Names on the command line, by what they minimise."""

DEFAULT_BETA = {"dpo": 0.1, "simpo": 2.0, "kto": 0.1, "orpo": 0.1, "prime": 0.05}
"""β of the algorithms that have one (ORPO calls it λ): the values of the papers."""

_OF_POLICY_GRADIENTS = {
    "kl": "none",
    "divergence_scale": 0.0,
    "entropy_top": 1.0,
}
_ONLY_FOR = {
    "rounds": ("expert-iteration",),
    "solutions": ("sft",),
    "margin": ("simpo",),
    "beta": tuple(DEFAULT_BETA),
    "divide_by_std": ("grpo",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of one run.

    Args:
        algorithm: One of `ALGORITHMS`.
        base: The reference the base was given by; for the reader only.
        base_sha256: Of the base's weights file: what the run really starts from.
        update_mask_sha256: Of the entries that may move; None where all may.
        task: Name of the task.
        lengths: Weight of each problem length.
        steps: Training steps: one batch of data each, with epochs · minibatches updates.
        prompts: Groups of a step.
        samples: Rollouts of a group, ≥ 2.
        max_new_tokens: Length limit of a completion.
        temperature: Of the behaviour policy.
        seed: Where problems, samples and shuffles come from.
        precision: `bf16` rounds weights to nearest even after every update; moments and matmuls stay fp32, so
            the *storage* is emulated.
        optimizer: `adamw` (betas .9, .999) or `sgd` (no momentum).
        lr: Learning rate.
        weight_decay: Decoupled for AdamW, added to the gradient for SGD.
        grad_clip: Limit of the global gradient norm.
        epochs: Passes over a step's data.
        minibatches: Updates of a pass.
        clip: ε of PPO's ratio clip.
        normalisation: Of token losses.
        divide_by_std: GRPO's advantages over the group's deviation; None for the others.
        gae_lambda: λ of PPO and A2C.
        critic_lr: Learning rate of the value head, or of PRIME's implicit reward model.
        kl: Penalty against the base: `exact`, `k2` and `k3` in the loss, `k1` in the reward, or `none`.
        kl_coefficient: β_KL.
        kl_priority: Weight of a position's KL: J to the power `kl_exponent`, by Shannon's certainty or by the
            largest probability at `kl_temperature`, or `none`.
        kl_exponent: β of the prioritised KL.
        kl_temperature: Of the `max-prob` certainty.
        divergence_scale: s of divergence-weighted advantages; 0 is off.
        divergence_alpha: α.
        divergence_control: `none`, `mean-normalised` or `shuffled`.
        entropy_top: Share of tokens, by entropy, that the policy loss is taken on; 1 is all. Rows without
            advantage are not ranked.
        shuffle_rewards: Permute the rewards of a step's rollouts: the control that must not learn.
        sample_from: Who makes the completions: the `policy` as it is, or the frozen `base`.
        solutions: What SFT imitates: `verified` completions of the base, or `written` by the task.
        formats: Weight of each format among written solutions; None where they are not written.
        rounds: Of expert iteration; each restarts from the base. None for the others.
        beta: The algorithm's β; None where it has none.
        margin: γ of SimPO; None for the others.
        checkpoints: `log` keeps steps 0, 1, 2, 4, … and the last, `last` only that.
    """

    algorithm: str
    base: str
    base_sha256: str
    update_mask_sha256: str | None
    task: str
    lengths: Mapping[int, float]
    steps: int
    prompts: int
    samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    precision: Literal["fp32", "bf16"]
    optimizer: Literal["adamw", "sgd"]
    lr: float
    weight_decay: float
    grad_clip: float
    epochs: int
    minibatches: int
    clip: float
    normalisation: Normalisation
    divide_by_std: bool | None
    gae_lambda: float
    critic_lr: float
    kl: Literal["none", "exact", "k1", "k2", "k3"]
    kl_coefficient: float
    kl_priority: Literal["none", "shannon", "max-prob"]
    kl_exponent: float
    kl_temperature: float
    divergence_scale: float
    divergence_alpha: float
    divergence_control: WeightControl
    entropy_top: float
    shuffle_rewards: bool
    sample_from: Literal["policy", "base"]
    solutions: Literal["verified", "written"] | None
    formats: Mapping[str, float] | None
    rounds: int | None
    beta: float | None
    margin: float | None
    checkpoints: Literal["log", "last"]

    def __post_init__(self) -> None:
        """Refuse what cannot be run, or would not be read. Raises UsageError."""
        named_algorithm(self.algorithm)
        task = named_task(self.task)
        check_mixture("--lengths", self.lengths)
        if self.formats is not None:
            check_mixture("--formats", self.formats, known=task.formats)
        _check_ranges(self)
        _check_options(self)

    @property
    def updates_per_step(self) -> int:
        """Updates made on one step's data."""
        return self.epochs * self.minibatches

    def to_json(self) -> dict[str, Any]:
        """Plain data, equal for equal configs."""
        plain = asdict(self)
        plain["lengths"] = {str(length): weight for length, weight in self.lengths.items()}
        plain["formats"] = None if self.formats is None else dict(self.formats)
        return plain

    def saved_steps(self) -> tuple[int, ...]:
        """Steps whose weights are kept: 0, 1, 2, 4, … and the last one."""
        if self.checkpoints == "last":
            return (self.steps,)
        powers = [2**i for i in range(self.steps.bit_length())]
        return (0, *(step for step in powers if step < self.steps), self.steps)


def named_algorithm(name: str) -> str:
    """The name itself. Raises UsageError, with the nearest name, where there is no such algorithm."""
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name.lower(), ALGORITHMS, n=1, cutoff=0.5)
        raise UsageError(
            "--algorithm",
            f"{name!r} is not known",
            expected=f"one of {', '.join(ALGORITHMS)}",
            remedy=f"did you mean {near[0]!r}?" if near else None,
        )
    return name


def _check_ranges(config: TrainConfig) -> None:
    at_least_one = ("steps", "prompts", "max_new_tokens", "epochs", "minibatches")
    positive = ("lr", "temperature", "grad_clip", "clip", "critic_lr", "kl_temperature")
    not_negative = ("weight_decay", "kl_coefficient", "kl_exponent", "seed")
    limits = [
        *((name, getattr(config, name) >= 1, "at least 1") for name in at_least_one),
        *((name, getattr(config, name) > 0, "more than 0") for name in positive),
        *((name, getattr(config, name) >= 0, "0 or more") for name in not_negative),
        ("samples", config.samples >= 2, "at least 2: a group is compared with itself"),
        ("gae_lambda", 0 <= config.gae_lambda <= 1, "from 0 to 1"),
        ("entropy_top", 0 < config.entropy_top <= 1, "more than 0, at most 1"),
        ("divergence_scale", 0 <= config.divergence_scale <= 2, "from 0 to 2: weights are 1 ± s/2"),
        ("rounds", config.rounds is None or 1 <= config.rounds <= config.steps, "from 1 to --steps"),
        ("beta", config.beta is None or config.beta > 0, "more than 0"),
        ("margin", config.margin is None or config.margin >= 0, "0 or more"),
    ]
    for name, holds, expected in limits:
        if not holds:
            raise UsageError(_flag(name), str(getattr(config, name)), expected=expected)


def _check_options(config: TrainConfig) -> None:
    for name, off in _OF_POLICY_GRADIENTS.items():
        if config.algorithm not in POLICY_GRADIENTS and getattr(config, name) != off:
            raise _not_read(config, name, POLICY_GRADIENTS)
    for name, readers in _ONLY_FOR.items():
        if (getattr(config, name) is not None) != (config.algorithm in readers):
            raise _not_read(config, name, readers)
    if config.sample_from == "base" and config.algorithm not in (*PREFERENCES, "sft"):
        raise _not_read(config, "sample_from", (*PREFERENCES, "sft"))
    if (config.formats is not None) != (config.solutions == "written"):
        raise UsageError(
            "--formats", "says how written solutions are mixed", remedy="add --solutions written"
        )
    if config.kl_coefficient and config.kl == "none":
        raise UsageError("--kl-coefficient", "scales a KL penalty, and there is none", remedy="add --kl")
    if config.divergence_control != "none" and not config.divergence_scale:
        raise UsageError(
            "--divergence-control",
            f"{config.divergence_control} divergence weights, and there are none",
            remedy="add --divergence-weight",
        )
    if config.kl_priority != "none" and config.kl == "none":
        raise UsageError("--kl-priority", "weights a KL penalty, and there is none", remedy="add --kl")
    if config.algorithm == "a2c" and config.updates_per_step != 1:
        raise UsageError(
            "--epochs, --minibatches",
            f"{config.updates_per_step} updates a step, but a2c is the case of one",
            remedy="use ppo, whose clip is made for several",
        )


def _not_read(config: TrainConfig, name: str, readers: tuple[str, ...]) -> UsageError:
    return UsageError(
        _flag(name), f"{getattr(config, name)} with {config.algorithm}", expected=f"{', '.join(readers)} only"
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
