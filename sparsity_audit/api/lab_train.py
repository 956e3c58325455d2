"""Fine-tune a base with reinforcement learning, or with what it is compared to, on one CPU core.

Contract: the run's folder is a function of the settings alone; the same call goes on where a killed run
stopped. Defaults live here: 16 prompts × 8 samples at temperature 1, AdamW at 3e-4 without decay, one
update a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from sparsity_audit.errors import CheckpointNotFoundError
from sparsity_audit.lab.advantages import WeightControl
from sparsity_audit.lab.config import DEFAULT_BETA, TrainConfig, named_algorithm
from sparsity_audit.lab.folder import load_model, resolve_base
from sparsity_audit.lab.losses import Normalisation
from sparsity_audit.lab.metrics import StepMetrics
from sparsity_audit.lab.runs import TrainResult, run_training
from sparsity_audit.lab.tasks import named_task
from sparsity_audit.lab.update import UpdateMask, mask_sha256

__all__ = ["lab_train"]

_T = TypeVar("_T")


def lab_train(
    output: str | Path,
    *,
    algorithm: str = "grpo",
    base: str | Path = "mix",
    task: str = "addition",
    lengths: Mapping[int, float] | int = 4,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "bf16",
    steps: int = 40,
    prompts: int = 16,
    samples: int = 8,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    lr: float = 3e-4,
    weight_decay: float = 0.0,
    grad_clip: float = 1.0,
    epochs: int | None = None,
    minibatches: int = 1,
    clip: float = 0.2,
    normalisation: Normalisation = "token-mean",
    divide_by_std: bool | None = None,
    gae_lambda: float = 1.0,
    critic_lr: float | None = None,
    kl: Literal["none", "exact", "k1", "k2", "k3"] = "none",
    kl_coefficient: float | None = None,
    kl_priority: Literal["none", "shannon", "max-prob"] = "none",
    kl_exponent: float = 10.0,
    kl_temperature: float = 1.0,
    divergence_weight: float = 0.0,
    divergence_alpha: float = 1.0,
    divergence_control: WeightControl = "none",
    entropy_top: float = 1.0,
    shuffle_rewards: bool = False,
    sample_from: Literal["policy", "base"] | None = None,
    solutions: Literal["verified", "written"] | None = None,
    formats: Mapping[str, float] | None = None,
    rounds: int | None = None,
    beta: float | None = None,
    margin: float | None = None,
    checkpoints: Literal["log", "last"] = "log",
    update_mask: UpdateMask | None = None,
    overwrite: bool = False,
    state_every: int = 5,
    on_step: Callable[[StepMetrics], None] = lambda _metrics: None,
    on_note: Callable[[str], None] = lambda _text: None,
) -> TrainResult:
    """Train a policy and write its checkpoints, metrics and config.

    Args:
        output: The run's folder. A killed run with the same settings goes on; another run's is refused.
        algorithm: `grpo`, `rloo`, `ppo`, `a2c`, `prime`, `sft`, `expert-iteration`, `dpo`, `simpo`, `kto` or
            `orpo`.
        base: `mix`, `single`, or a model folder.
        task: The task's name.
        lengths: Length of the problems, or a mixture of lengths by weight.
        seed: Of problems, samples and shuffles.
        precision: `bf16` rounds the base, and the weights after every update; `fp32` does neither.
        steps: Training steps.
        prompts: Problems of a step.
        samples: Completions of each.
        max_new_tokens: Length limit; default the task's.
        temperature: Of sampling.
        optimizer: `adamw` or `sgd`.
        lr: Learning rate.
        weight_decay: Decoupled for AdamW.
        grad_clip: Limit of the gradient norm.
        epochs: Passes over a step's data; default 4 for SFT, 8 for expert iteration, else 1.
        minibatches: Updates of a pass; with one update a step the ratio clip is never active.
        clip: ε of the ratio clip.
        normalisation: `token-mean` or `sequence-mean`.
        divide_by_std: GRPO: advantages over the group's deviation; default true.
        gae_lambda: λ of PPO and A2C; 1 suits an outcome that stands at the end.
        critic_lr: Of the value head (default 1e-2) or of PRIME's reward model (default `lr`).
        kl: Penalty against the base; `k1` goes into the reward, the others into the loss.
        kl_coefficient: β_KL, with `kl`; default .1.
        kl_priority: Weights the KL of each position by the base's certainty to the power `kl_exponent`.
        kl_exponent: β of the prioritised KL.
        kl_temperature: Of the `max-prob` certainty.
        divergence_weight: s of divergence-weighted advantages; 0 is off.
        divergence_alpha: α.
        divergence_control: `none`, `mean-normalised` or `shuffled`.
        entropy_top: Share of tokens, by entropy, that have a policy loss.
        shuffle_rewards: The control that must not learn.
        sample_from: Who completes: default the policy, for SFT the base.
        solutions: SFT: `verified` completions (default) or `written` ones.
        formats: Weight of each format of written solutions; default S alone.
        rounds: Of expert iteration; default 4, or as many as there are steps.
        beta: The algorithm's β; default the paper's.
        margin: γ of SimPO; default .5.
        checkpoints: `log` keeps steps 0, 1, 2, 4, … and the last.
        update_mask: bool tensors by parameter name, True where entries may move.
        overwrite: Remove what another run left in the folder.
        state_every: Steps between two states that a killed run can go on from.
        on_step: Called after each new step.
        on_note: Called with warnings and other lines for the user.

    Returns:
        Accuracies before and after, and what was said.

    Raises:
        UsageError: An unknown name, a value out of range, or an option that the algorithm does not read.
        OutputError: The folder belongs to another run, or cannot be written.
        NotFiniteError: The run collapsed.
        SparsityAuditError: The base cannot be loaded.
    """
    folder = resolve_base(base)
    model = load_model(folder)
    lengths = {lengths: 1.0} if isinstance(lengths, int) else dict(lengths)
    own = _own_defaults(named_algorithm(algorithm), steps=steps, lr=lr)
    config = TrainConfig(
        algorithm=algorithm,
        base=str(base),
        base_sha256=_sha256(folder / "model.safetensors"),
        update_mask_sha256=None if update_mask is None else mask_sha256(update_mask),
        task=task,
        lengths=lengths,
        steps=steps,
        prompts=prompts,
        samples=samples,
        max_new_tokens=_or(max_new_tokens, named_task(task).max_new_tokens(max(lengths, default=1))),
        temperature=temperature,
        seed=seed,
        precision=precision,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        grad_clip=grad_clip,
        minibatches=minibatches,
        clip=clip,
        normalisation=normalisation,
        gae_lambda=gae_lambda,
        kl=kl,
        kl_coefficient=_or(kl_coefficient, 0.0 if kl == "none" else 0.1),
        kl_priority=kl_priority,
        kl_exponent=kl_exponent,
        kl_temperature=kl_temperature,
        divergence_scale=divergence_weight,
        divergence_alpha=divergence_alpha,
        divergence_control=divergence_control,
        entropy_top=entropy_top,
        shuffle_rewards=shuffle_rewards,
        formats=_or(formats, {"S": 1.0} if solutions == "written" else None),
        checkpoints=checkpoints,
        epochs=_or(epochs, own["epochs"]),
        critic_lr=_or(critic_lr, own["critic_lr"]),
        divide_by_std=_or(divide_by_std, own["divide_by_std"]),
        sample_from=_or(sample_from, own["sample_from"]),
        solutions=_or(solutions, own["solutions"]),
        rounds=_or(rounds, own["rounds"]),
        beta=_or(beta, own["beta"]),
        margin=_or(margin, own["margin"]),
    )
    return run_training(
        config,
        model,
        Path(output),
        update_mask=update_mask,
        overwrite=overwrite,
        state_every=state_every,
        on_step=on_step,
        on_note=on_note,
    )


def _own_defaults(algorithm: str, *, steps: int, lr: float) -> dict[str, Any]:
    """Defaults that depend on the algorithm; None where it has no such setting.

    Imitation takes smaller steps than a signed advantage does, so it makes several passes over its data.
    """
    is_sft, is_expert_iteration = algorithm == "sft", algorithm == "expert-iteration"
    return {
        "epochs": {"sft": 4, "expert-iteration": 8}.get(algorithm, 1),
        "critic_lr": lr if algorithm == "prime" else 1e-2,
        "divide_by_std": True if algorithm == "grpo" else None,
        "sample_from": "base" if is_sft else "policy",
        "solutions": "verified" if is_sft else None,
        "rounds": min(4, steps) if is_expert_iteration else None,
        "beta": DEFAULT_BETA.get(algorithm),
        "margin": 0.5 if algorithm == "simpo" else None,
    }


def _or(given: _T | None, default: _T) -> _T:
    """What was given, where something was: 0 is something."""
    return default if given is None else given


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointNotFoundError(str(path), error.strerror or "cannot be read") from error
