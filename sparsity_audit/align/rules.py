"""The names that frameworks give to the same tensor: wrappers, roots, fused parts, vocabulary tensors.

Contract: pure functions of names, no shapes and no data. Every table is small and documented in
`docs/guide/alignment.md`; a name that no table covers is the business of `--map`. Normalised names (*keys*)
only propose partners; whether two tensors are partners is decided where collisions can be seen.

Source: wrapper names as PyTorch's DDP, FSDP, activation checkpointing and `torch.compile` and PEFT put them
into state dicts; fused names as in transformers (Phi-3, GPT-2, Falcon, GPT-NeoX, Mixtral, Qwen3-MoE), MPT and
Megatron-Core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "EXPERT_PARTS",
    "FUSED",
    "ROOTS",
    "WRAPPERS",
    "FusedRule",
    "NormalName",
    "config_ties",
    "describe_rename",
    "is_embedding",
    "is_vocabulary",
    "normalise",
    "split_experts",
    "split_leaf",
]

# Components dropped wherever they stand in a name.
WRAPPERS = frozenset(
    {
        "module",  # DistributedDataParallel, DeepSpeed, SWA
        "_fsdp_wrapped_module",  # FullyShardedDataParallel
        "_fpw_module",  # the same, older
        "_orig_mod",  # torch.compile
        "_checkpoint_wrapped_module",  # activation checkpointing
        "_forward_module",  # Fabric
        "base_layer",  # a layer that PEFT has wrapped
    }
)
# Components dropped at the start of a name, any number of them.
ROOTS = frozenset(
    {
        "base_model",  # PEFT: base_model.model.
        "pretrained_model",  # TRL's value-head models
        "model",  # most causal language models
        "language_model",  # the text part of a vision-language model
        "transformer",  # GPT-2, Falcon, MPT
        "gpt_neox",
        "bert",
        "roberta",
    }
)

_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "embed_in", "shared"}
)
_HEADS = frozenset(
    {
        "lm_head",
        "embed_out",
        "output",
        "output_layer",
        "lm_head.decoder",
        "predictions.decoder",
        "cls.predictions",
    }
)
# Words too common to mean the vocabulary anywhere but at the root of a model.
_ROOT_ONLY = frozenset({"output", "shared"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalName:
    """A name without what frameworks add to it.

    Args:
        key: What is left; equal keys propose partners.
        wrappers: The wrapper components that were dropped, in their order.
        root: The leading components that were dropped, with the dot after them.
    """

    key: str
    wrappers: tuple[str, ...]
    root: str


def normalise(name: str) -> NormalName:
    """Drop wrapper components anywhere, then leading root components; the last component always stays."""
    *path, last = name.split(".")
    wrappers: tuple[str, ...] = ()
    if not WRAPPERS.isdisjoint(path):
        wrappers = tuple(part for part in path if part in WRAPPERS)
        path = [part for part in path if part not in WRAPPERS]
    start = 0
    while start < len(path) and path[start] in ROOTS:
        start += 1
    root = ".".join([*path[:start], ""]) if start else ""
    key = ".".join([*path[start:], last]) if start or wrappers else name
    return NormalName(key=key, wrappers=wrappers, root=root)


def describe_rename(base: NormalName, tuned: NormalName) -> str:
    """Which rules make two names equal, in words that are the same for every tensor of a kind."""
    parts = []
    for side, mine, theirs in (("base", base, tuned), ("tuned", tuned, base)):
        extra = [part for part in dict.fromkeys(mine.wrappers) if part not in theirs.wrappers]
        parts += [f"{side} wrapper {part + '.'!r} dropped" for part in extra]
    if base.root and tuned.root and base.root != tuned.root:
        parts.append(f"leading {base.root!r} of base taken for {tuned.root!r} of tuned")
    elif base.root != tuned.root:
        side, root = ("base", base.root) if base.root else ("tuned", tuned.root)
        parts.append(f"leading {root!r} of {side} dropped")
    return ", ".join(parts) or "wrapper components counted once"


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedRule:
    """A module that some frameworks store in one piece and others in several.

    Args:
        parts: Possible names of the pieces, in their order along the first axis.
        is_concatenation: False where the rows are interleaved per head or group, which shapes do not tell.
    """

    parts: tuple[tuple[str, ...], ...]
    is_concatenation: bool = True


_QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"), ("q", "k", "v"))
FUSED: Mapping[str, FusedRule] = {
    "qkv_proj": FusedRule(parts=_QKV),
    "Wqkv": FusedRule(parts=_QKV),
    "c_attn": FusedRule(parts=_QKV),
    "qkv": FusedRule(parts=_QKV),
    "query_key_value": FusedRule(parts=_QKV, is_concatenation=False),
    "linear_qkv": FusedRule(parts=_QKV, is_concatenation=False),
    "gate_up_proj": FusedRule(parts=(("gate_proj", "up_proj"),)),
}

# Module that stacks all experts along a first axis → possible names of one expert's pieces, in their order.
EXPERT_PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_SCALE_SUFFIX = "_scale_inv"


def split_leaf(key: str) -> tuple[str, str, str] | None:
    """A key as (path with its dot, module, `weight`, `weight_scale_inv` or `bias`); None for other keys."""
    owner, _, kind = key.rpartition(".")
    if kind not in ("weight", "weight" + _SCALE_SUFFIX, "bias"):
        return None
    path, dot, module = owner.rpartition(".")
    return path + dot, module, kind


def split_experts(key: str) -> tuple[tuple[str, ...], str, str] | None:
    """A key of stacked experts as (paths of single experts, module, kind of leaf); None for any other key.

    transformers ≥ 5 stacks Mixtral's `block_sparse_moe.experts` as `mlp.experts`.
    """
    owner, _, last = key.rpartition(".")
    module = last.removesuffix(_SCALE_SUFFIX)
    if module not in EXPERT_PARTS or owner.rpartition(".")[2] != "experts":
        return None
    kind = "weight" if module == last else "weight" + _SCALE_SUFFIX
    paths = (f"{owner}.", f"{owner}.".replace("mlp.experts.", "block_sparse_moe.experts."))
    return tuple(dict.fromkeys(paths)), module, kind


def is_embedding(name: str) -> bool:
    """Whether a name looks like the token embedding."""
    return _owner_in(name, _EMBEDDINGS)


def is_vocabulary(name: str) -> bool:
    """Whether a name looks like the token embedding or the output head, so that its rows are tokens."""
    return _owner_in(name, _EMBEDDINGS) or _owner_in(name, _HEADS)


def _owner_in(name: str, names: frozenset[str]) -> bool:
    parts = name.split(".")
    if len(parts) < 2 or parts[-1] not in ("weight", "bias"):
        return False
    if parts[-2] not in names and ".".join(parts[-3:-1]) not in names:
        return False
    key = normalise(name).key.split(".")
    return not any(part.isdigit() for part in key) and (key[-2] not in _ROOT_ONLY or len(key) == 2)


def config_ties(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration says that the head is the embedding; None when it says nothing.

    A configuration that names its model type and omits the entry means True: that is the default of
    transformers' `PretrainedConfig`, which does not write defaults.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        value = part.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
    return True if "model_type" in config else None
