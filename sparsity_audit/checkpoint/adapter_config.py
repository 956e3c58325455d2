"""What `adapter_config.json` says, and what of PEFT is not merged here.

Contract: LoRA, with rsLoRA and DoRA. Anything that changes what the adapter does to a weight and is not
known is refused by its name; nothing is ignored that could change a number.

Source: peft 0.21 `tuners/lora/config.py`, `tuners/lora/layer.py` (`update_layer`: scaling), `utils/other.py`
(`get_pattern_key`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError

__all__ = ["AdapterConfig", "read_adapter_config"]

_REFUSED = (
    *("layer_replication", "trainable_token_indices", "target_parameters", "arrow_config", "kasa_config"),
    *("velora_config", "monteclora_config", "alora_invocation_tokens", "lora_bias"),
)
_KNOWN_USES = frozenset(("use_rslora", "use_dora"))
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "true", "false", "none")
_MAX_PATTERN_CHARACTERS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """How an adapter is merged.

    Args:
        base: The base model it names; "" where it names none.
        alpha: `lora_alpha`.
        alphas: Other values, by pattern of the module's name.
        root_rank: rsLoRA: scale by alpha ÷ √rank, not alpha ÷ rank.
        dora: Whether rows are brought to a length of their own (DoRA).
        transposed: Whether weights are stored inputs × outputs (`fan_in_fan_out`).
    """

    base: str
    alpha: float
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    root_rank: bool
    dora: bool
    transposed: bool

    def scale(self, module: str, rank: int) -> float:
        """The factor before B A of a module."""
        alpha = next((value for pattern, value in self.alphas if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.root_rank else rank)


def read_adapter_config(config: Mapping[str, Any], *, subject: str) -> AdapterConfig:
    """The configuration of a LoRA adapter.

    Args:
        config: `adapter_config.json`, parsed.
        subject: What messages call the adapter.

    Raises:
        UnsupportedFormatError: Another kind of adapter, or an option that is not merged, by name.
        CorruptCheckpointError: A value that has no meaning.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedFormatError(
            subject,
            f"is an adapter of kind {str(kind)[:40]}",
            expected="LORA (with rsLoRA or DoRA)",
            remedy="merge it with peft's merge_and_unload, save, and compare the result",
        )
    uses = [k for k, v in config.items() if k.startswith("use_") and v and k not in _KNOWN_USES]
    for option in (*(key for key in _REFUSED if config.get(key)), *uses, *_changed_base(config)):
        raise UnsupportedFormatError(
            subject,
            f"uses {option}, which is not merged here",
            remedy="merge it with peft's merge_and_unload, save, and compare the result",
        )
    return AdapterConfig(
        base=str(config.get("base_model_name_or_path") or ""),
        alpha=_number(config.get("lora_alpha"), "lora_alpha", subject),
        alphas=_patterns(config.get("alpha_pattern"), subject),
        root_rank=config.get("use_rslora") is True,
        dora=config.get("use_dora") is True,
        transposed=config.get("fan_in_fan_out") is True,
    )


def _changed_base(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Initialisations such as PiSSA take what the adapter starts from out of the base weights."""
    way = str(config.get("init_lora_weights", True))
    return () if way.lower() in _KEEPS_BASE else (f"init_lora_weights={way[:40]!r} (another base)",)


def _patterns(value: object, subject: str) -> tuple[tuple[re.Pattern[str], float], ...]:
    if not value:
        return ()
    if not isinstance(value, dict):
        raise CorruptCheckpointError(subject, "alpha_pattern is no table", expected="pattern → alpha")
    found = []
    for pattern, alpha in value.items():
        try:
            compiled = re.compile(rf"(.*\.)?({pattern[:_MAX_PATTERN_CHARACTERS]})$")
        except re.error as error:
            raise CorruptCheckpointError(
                subject, f"alpha_pattern {pattern[:60]!r} is not a regular expression"
            ) from error
        found.append((compiled, _number(alpha, "alpha_pattern", subject)))
    return tuple(found)


def _number(value: object, name: str, subject: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CorruptCheckpointError(subject, f"{name} is {str(value)[:40]!r}", expected="a number")
    return float(value)
