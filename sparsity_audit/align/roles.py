"""What a tensor is in its model, told from its name: layer, module, and kind for the roll-ups.

Contract: pure and total; a name that no table covers is `other`, never an error. Biases and norms stand apart
from matrices, embeddings and heads apart from both; a norm's bias belongs to the norm. Covers the names of
Llama, Qwen, Mistral, Mixtral, Gemma, GPT-2, GPT-NeoX, Falcon, OPT, Phi and BERT in transformers. A part of a
fused tensor (`…qkv_proj.weight:q_proj`, `…experts.gate_up_proj:7.up_proj`) has the role of the part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from sparsity_audit.align.rules import config_ties, normalise

__all__ = ["LayerModuleKeys", "Role", "RoleKind", "role_of"]

RoleKind = Literal["matrix", "norm", "bias", "embedding", "head", "router", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Where a tensor stands in its model.

    Args:
        layer: Number of the block, None outside of blocks.
        module: Module type: q_proj, …, down_proj, norm, embed, head, router, bias, other.
        kind: What the roll-ups keep apart.
        expert: Number of the expert in a mixture, None elsewhere and for stacked experts.
        stack: Normalised path of the list of blocks, which tells a vision tower's layer 0 from the text's.
    """

    layer: int | None
    module: str
    kind: RoleKind
    expert: int | None = None
    stack: str = ""


# Last module component → module type. Keys with a dot are matched before those without.
_MATRICES: Mapping[str, str] = {
    **{name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")},
    **{name: name for name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj")},
    **dict.fromkeys(("self.query", "attention.query", "wq"), "q_proj"),
    **dict.fromkeys(("self.key", "attention.key", "wk"), "k_proj"),
    **dict.fromkeys(("self.value", "attention.value", "wv"), "v_proj"),
    **dict.fromkeys(("query_key_value", "Wqkv", "c_attn", "linear_qkv", "attn.qkv"), "qkv_proj"),
    **dict.fromkeys(
        (
            "out_proj",
            "self_attn.dense",
            "self_attention.dense",
            "attention.dense",
            "attn.c_proj",
            "attn.proj",
            "wo",
        ),
        "o_proj",
    ),
    "attention.output.dense": "o_proj",
    "w1": "gate_proj",
    **dict.fromkeys(("w3", "fc1", "c_fc", "dense_h_to_4h", "intermediate.dense"), "up_proj"),
    **dict.fromkeys(("w2", "fc2", "mlp.c_proj", "dense_4h_to_h", "output.dense"), "down_proj"),
}
_EMBEDDINGS = frozenset(
    {
        "embed_tokens",
        "embed_positions",
        "wte",
        "wpe",
        "embed_in",
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
        "tok_embeddings",
        "shared",
    }
)
_HEADS = frozenset({"lm_head", "embed_out", "output_layer", "predictions.decoder", "lm_head.decoder"})
_ROUTERS = frozenset({"block_sparse_moe.gate", "mlp.gate", "router", "mlp.router", "shared_expert_gate"})
# GPT-2 and GPT-NeoX store the causal mask as `attn.bias`.
_MASK_BUFFERS = frozenset({"attn", "attention"})
_BLOCK_LISTS = frozenset({"layers", "layer", "h", "blocks", "block"})
_PART_NAMES: Mapping[str, str] = {
    **{part: part for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")},
    **{name: f"{name[0]}_proj" for name in ("query", "key", "value", "q", "k", "v")},
    **{name: f"{name[1]}_proj" for name in ("wq", "wk", "wv")},
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}


def role_of(name: str, config: Mapping[str, Any]) -> Role:
    """The role of a tensor.

    Args:
        name: Its name, or a pair's name with `:part`.
        config: The checkpoint's configuration; where it ties the embeddings, a head is the embedding.
    """
    name, _, label = name.partition(":")
    number, _, part = label.rpartition(".")
    *owner, last = normalise(name).key.split(".")
    place = _place(owner)
    module, kind = _module_and_kind(owner, last, part, is_block=place.layer is not None)
    if kind == "head" and last == "weight" and config_ties(config) is True:
        module, kind = "embed", "embedding"
    if number.isdecimal():
        place = replace(place, expert=int(number))
    return replace(place, module=module, kind=kind)


def _module_and_kind(owner: list[str], last: str, part: str, *, is_block: bool) -> tuple[str, RoleKind]:
    short, pair = ".".join(owner[-1:]), ".".join(owner[-2:])
    if _is_norm(short or last):
        return "norm", "norm"
    if last in ("bias", "masked_bias") and short in _MASK_BUFFERS:
        return "other", "other"
    if last == "bias" or last.endswith("_bias"):
        return "bias", "bias"
    if short in _EMBEDDINGS and last == "weight":
        return "embed", "embedding"
    if short in _HEADS or pair in _HEADS or owner == ["output"]:
        return ("head", "head") if last == "weight" else ("other", "other")
    if last == "weight" and is_block and (short in _ROUTERS or pair in _ROUTERS):
        return "router", "router"
    if last != "weight" and last not in _MATRICES:
        return "other", "other"
    module = _PART_NAMES.get(part) or _matrix(owner if last == "weight" else [*owner, last])
    return module or "other", "matrix"


def _place(owner: list[str]) -> Role:
    """The block and the expert that a module's path leads through; an unspecific role otherwise."""
    layer, expert, stack = None, None, ""
    for position, (before, number) in enumerate(pairwise(owner)):
        if number.isdecimal():
            if layer is None and before in _BLOCK_LISTS:
                layer, stack = int(number), ".".join(owner[: position + 1])
            elif expert is None and before == "experts":
                expert = int(number)
    return Role(layer=layer, module="other", kind="other", expert=expert, stack=stack)


def _is_norm(module: str) -> bool:
    """LayerNorm, input_layernorm, q_norm, norm, ln_1, ln_f, final_layer_norm, attention_norm, ln_attn."""
    lower = module.lower()
    return "norm" in lower or lower.startswith("ln_")


def _matrix(owner: list[str]) -> str | None:
    for length in (3, 2, 1):
        module = _MATRICES.get(".".join(owner[-length:]))
        if module is not None and len(owner) >= length:
            return module
    return None


class LayerModuleKeys:
    """Layer and module of tensors as keys of roll-ups; with several stacks, layers carry their stack's name.

    Args:
        names: Tensor names.
        config: The checkpoint's configuration.
    """

    def __init__(self, names: Iterable[str], config: Mapping[str, Any]) -> None:
        self._roles = {name: role_of(name, config) for name in names}
        self._several = len({role.stack for role in self._roles.values() if role.layer is not None}) > 1

    def layer(self, name: str) -> str | None:
        """The layer's number; None outside of layers."""
        role = self._roles[name]
        if role.layer is None:
            return None
        return f"{role.stack}.{role.layer}" if self._several else str(role.layer)

    def module(self, name: str) -> str:
        """The module type."""
        return self._roles[name].module
