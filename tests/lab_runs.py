"""Small configurations that the tests of the lab's training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsity_audit.lab.config import DEFAULT_BETA, TrainConfig
from sparsity_audit.lab.folder import load_model
from sparsity_audit.lab.model import Llama

ADDITION = Path(__file__).parent / "data" / "addition"

SMALL: dict[str, Any] = {
    "base": "test",
    "base_sha256": "",
    "update_mask_sha256": None,
    "task": "addition",
    "lengths": {2: 1.0},
    "steps": 3,
    "prompts": 4,
    "samples": 4,
    "max_new_tokens": 20,
    "temperature": 1.0,
    "seed": 0,
    "precision": "bf16",
    "optimizer": "adamw",
    "lr": 3e-4,
    "weight_decay": 0.0,
    "grad_clip": 1.0,
    "epochs": 1,
    "minibatches": 1,
    "clip": 0.2,
    "normalisation": "token-mean",
    "divide_by_std": None,
    "gae_lambda": 1.0,
    "critic_lr": 1e-2,
    "kl": "none",
    "kl_coefficient": 0.0,
    "kl_priority": "none",
    "kl_exponent": 10.0,
    "kl_temperature": 1.0,
    "divergence_scale": 0.0,
    "divergence_alpha": 1.0,
    "divergence_control": "none",
    "entropy_top": 1.0,
    "shuffle_rewards": False,
    "sample_from": "policy",
    "solutions": None,
    "formats": None,
    "rounds": None,
    "beta": None,
    "margin": None,
    "checkpoints": "log",
}

_OWN: dict[str, dict[str, Any]] = {
    "grpo": {"divide_by_std": True},
    "sft": {"solutions": "verified", "sample_from": "base"},
    "expert-iteration": {"rounds": 2},
    "simpo": {"margin": 0.5},
}


def config(algorithm: str, **changes: Any) -> TrainConfig:
    """A run of seconds."""
    settings = {**SMALL, "beta": DEFAULT_BETA.get(algorithm), **_OWN.get(algorithm, {}), **changes}
    return TrainConfig(algorithm=algorithm, **settings)


def base() -> Llama:
    """The frozen base of the prototype: weak at 4 digits, good at 2."""
    return load_model(ADDITION / "base-bf16")
