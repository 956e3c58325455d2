"""Changes by attention head and by expert, from row and column counts.

Contract: pure. Counts are exact and follow the criterion of the row and column counts. Heads are read from
the configuration and accepted only where a tensor's shape is the one it implies; whatever cannot be taken
apart is named with the reason, never guessed. Only weight matrices count: biases and norms stand apart.

*Heads*: rows of q, k and v, columns of o (inputs and outputs swapped in GPT-2, which stores transposed
matrices). A head of k or v under grouped queries is a key-value head. Whole fused matrices are cut as
they are stored: q, k, v one after another, or group by group where their rows alternate
(`query_key_value`, `linear_qkv`).

*Experts*: `experts.N.` in a name, or the first axis of a stacked tensor below `experts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from sparsity_audit.align.roles import Role
from sparsity_audit.align.rules import FUSED
from sparsity_audit.stats.tally import AxisCounts

__all__ = [
    "ExpertDensity",
    "GroupDensity",
    "HeadDensity",
    "HeadLayout",
    "StructuredTensor",
    "by_expert",
    "by_head",
    "head_layout",
    "mixture_groups",
]

Group = Literal["routers", "routed experts", "shared experts"]

_NUM_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_NUM_KV_HEADS = ("num_key_value_heads", "num_query_groups", "num_kv_heads", "n_head_kv")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_TOWERS = {"vision": "vision_config", "visual": "vision_config", "audio": "audio_config"}
_TRANSPOSED_MODELS = frozenset({"gpt2"})
_UNKNOWN_FUSION = frozenset({"chatglm"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredTensor:
    """A compared pair as far as its structure is concerned.

    Args:
        name: The pair's name.
        role: What it is.
        layer: Its layer as roll-ups name it; None outside the stack.
        shape: Shape compared.
        axes: Changed entries per row and column.
    """

    name: str
    role: Role
    layer: str | None
    shape: tuple[int, ...]
    axes: AxisCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadDensity:
    """Changes in one attention head's part of one projection.

    Args:
        layer: The layer, as in the roll-ups by layer.
        module: q_proj, k_proj, v_proj or o_proj.
        head: Number of the query head, or of the key-value head for k_proj and v_proj.
        entries: Entries of the part.
        changed: Changed ones.
        density: changed ÷ entries.
    """

    layer: str
    module: str
    head: int
    entries: int
    changed: int
    density: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDensity:
    """Changes in all weight matrices of one expert of one layer; shared experts are not among them."""

    layer: str | None
    expert: int
    entries: int
    changed: int
    density: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDensity:
    """Routers, routed experts and shared experts of a mixture, each apart, over all layers."""

    group: Group
    num_tensors: int
    entries: int
    changed: int
    density: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayout:
    """Attention heads as a configuration gives them.

    Args:
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        size: Rows of a query or key head.
        value_size: Rows of a value head, columns of a head of o_proj.
        is_transposed: Whether matrices are stored inputs × outputs.
        fused_is_known: Whether the order of rows in an alternating fused matrix is known.
    """

    num_heads: int
    num_kv_heads: int
    size: int
    value_size: int
    is_transposed: bool = False
    fused_is_known: bool = True


def head_layout(config: Mapping[str, Any], stack: str = "") -> HeadLayout | str:
    """The heads of a stack of layers, or why they are not known.

    Args:
        config: The base's configuration; empty where there is none.
        stack: Path of the list of layers, which tells a vision tower from the text.
    """
    if not config:
        return "the base has no config.json"
    section = _section(config, stack)
    num_heads = _number(section, _NUM_HEADS)
    if num_heads is None:
        return f"config.json gives no {_NUM_HEADS[0]}" + (f" for {stack}" if stack else "")
    size = _number(section, ("head_dim", "kv_channels"))
    if size is None:
        hidden = _number(section, _HIDDEN)
        if hidden is None or hidden % num_heads:
            return f"config.json gives no head_dim, and {_HIDDEN[0]} {hidden} is not in {num_heads} heads"
        size = hidden // num_heads
    model_type = section.get("model_type", config.get("model_type"))
    return HeadLayout(
        num_heads=num_heads,
        num_kv_heads=_number(section, _NUM_KV_HEADS) or num_heads,
        size=size,
        value_size=_number(section, ("v_head_dim",)) or size,
        is_transposed=model_type in _TRANSPOSED_MODELS,
        fused_is_known=model_type not in _UNKNOWN_FUSION,
    )


def _section(config: Mapping[str, Any], stack: str) -> Mapping[str, Any]:
    tower = next((key for word, key in _TOWERS.items() if word in stack), "text_config")
    found = config.get(tower)
    if isinstance(found, Mapping):
        return found
    return config if tower == "text_config" else {}


def _number(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def by_head(
    tensors: Sequence[StructuredTensor], config: Mapping[str, Any]
) -> tuple[tuple[HeadDensity, ...], tuple[str, ...]]:
    """Densities of all heads, and for tensors that were not taken apart why not (each reason once)."""
    heads: list[HeadDensity] = []
    reasons: dict[str, list[str]] = {}
    for tensor in tensors:
        module = tensor.role.module
        if tensor.role.kind != "matrix" or module not in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"):
            continue
        layout = head_layout(config, tensor.role.stack)
        parts = layout if isinstance(layout, str) else _parts(tensor, layout)
        if isinstance(parts, str) or tensor.layer is None:
            reason = parts if isinstance(parts, str) else "outside the layers"
            reasons.setdefault(reason, []).append(tensor.name)
        else:
            heads += _densities(tensor, tensor.layer, parts)
    notes = [
        f"{names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in reasons.items()
    ]
    return tuple(heads), tuple(notes)


@dataclass(frozen=True, slots=True)
class _Part:
    """One head's lines: rows, or columns of an output projection."""

    module: str
    head: int
    lines: slice
    in_rows: bool


def _parts(tensor: StructuredTensor, layout: HeadLayout) -> list[_Part] | str:
    module, in_rows = tensor.role.module, (tensor.role.module != "o_proj") != layout.is_transposed
    sizes = {
        "q_proj": (layout.num_heads, layout.size),
        "k_proj": (layout.num_kv_heads, layout.size),
        "v_proj": (layout.num_kv_heads, layout.value_size),
        "o_proj": (layout.num_heads, layout.value_size),
    }
    lines = len(tensor.axes.rows if in_rows else tensor.axes.cols)
    wanted = [module] if module != "qkv_proj" else ["q_proj", "k_proj", "v_proj"]
    expected = sum(sizes[name][0] * sizes[name][1] for name in wanted)
    if lines != expected or len(tensor.shape) != 2:
        count, size = sizes["q_proj" if module == "qkv_proj" else module]
        return (
            f"shape {list(tensor.shape)} is not that of {count} heads of {size} "
            f"({expected} {'rows' if in_rows else 'columns'} expected)"
        )
    if module == "qkv_proj" and _alternates(tensor.name):
        return _alternating(layout, in_rows=in_rows)
    parts, start = [], 0
    for name in wanted:
        count, size = sizes[name]
        for head in range(count):
            parts.append(_Part(name, head, slice(start, start + size), in_rows))
            start += size
    return parts


def _alternates(name: str) -> bool:
    rule = FUSED.get(name.split(".")[-2] if "." in name else name)
    return rule is not None and not rule.is_concatenation


def _alternating(layout: HeadLayout, *, in_rows: bool) -> list[_Part] | str:
    """Group by group: the group's query heads, its key head, its value head."""
    if not layout.fused_is_known or layout.num_heads % layout.num_kv_heads:
        return "the order of rows in the fused matrix is not known for this model"
    parts, start = [], 0
    in_group = layout.num_heads // layout.num_kv_heads
    for group in range(layout.num_kv_heads):
        for module, head, size in (
            *(("q_proj", group * in_group + i, layout.size) for i in range(in_group)),
            ("k_proj", group, layout.size),
            ("v_proj", group, layout.value_size),
        ):
            parts.append(_Part(module, head, slice(start, start + size), in_rows))
            start += size
    order = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
    return sorted(parts, key=lambda part: (order[part.module], part.head))


def _densities(tensor: StructuredTensor, layer: str, parts: Sequence[_Part]) -> list[HeadDensity]:
    found = []
    for part in parts:
        counts = (tensor.axes.rows if part.in_rows else tensor.axes.cols)[part.lines]
        entries = len(counts) * len(tensor.axes.cols if part.in_rows else tensor.axes.rows)
        changed = int(counts.sum(dtype=np.int64))
        if entries:
            found.append(
                HeadDensity(
                    layer=layer,
                    module=part.module,
                    head=part.head,
                    entries=entries,
                    changed=changed,
                    density=changed / entries,
                )
            )
    return found


def by_expert(tensors: Sequence[StructuredTensor]) -> tuple[ExpertDensity, ...]:
    """Densities of all routed experts, in layer order as the tensors come, then by number."""
    totals: dict[str | None, dict[int, tuple[int, int]]] = {}
    for tensor in tensors:
        for expert, entries, changed in _experts(tensor):
            of_layer = totals.setdefault(tensor.layer, {})
            before = of_layer.get(expert, (0, 0))
            of_layer[expert] = (before[0] + entries, before[1] + changed)
    return tuple(
        ExpertDensity(layer=layer, expert=expert, entries=entries, changed=changed, density=changed / entries)
        for layer, experts in totals.items()
        for expert, (entries, changed) in sorted(experts.items())
        if entries
    )


def _experts(tensor: StructuredTensor) -> list[tuple[int, int, int]]:
    """(expert, entries, changed) of each expert that a tensor holds weights of."""
    if _group(tensor) != "routed experts":
        return []
    if tensor.role.expert is not None:
        return [(tensor.role.expert, prod(tensor.shape), _changed(tensor))]
    experts = tensor.shape[0]
    counts = tensor.axes.rows.reshape(experts, -1).sum(axis=1, dtype=np.int64)
    return [(number, prod(tensor.shape[1:]), int(count)) for number, count in enumerate(counts)]


def mixture_groups(tensors: Sequence[StructuredTensor]) -> tuple[GroupDensity, ...]:
    """Routers, routed experts, shared experts; empty for a model without a mixture."""
    members: dict[Group, list[StructuredTensor]] = {
        "routers": [],
        "routed experts": [],
        "shared experts": [],
    }
    for tensor in tensors:
        group = _group(tensor)
        if group is not None:
            members[group].append(tensor)
    found = []
    for group, of_group in members.items():
        entries = sum(prod(tensor.shape) for tensor in of_group)
        changed = sum(_changed(tensor) for tensor in of_group)
        if entries:
            found.append(
                GroupDensity(
                    group=group,
                    num_tensors=len(of_group),
                    entries=entries,
                    changed=changed,
                    density=changed / entries,
                )
            )
    return tuple(found)


def _group(tensor: StructuredTensor) -> Group | None:
    words = tensor.name.split(".")
    if tensor.role.kind == "router":
        return "routers"
    if tensor.role.kind != "matrix" and not (tensor.role.kind == "other" and len(tensor.shape) >= 3):
        return None
    if any(word.startswith("shared_expert") for word in words):
        return "shared experts"
    is_stacked = "experts" in words and len(tensor.shape) >= 3 and tensor.shape[0] > 0
    return "routed experts" if tensor.role.expert is not None or is_stacked else None


def _changed(tensor: StructuredTensor) -> int:
    return int(tensor.axes.rows.sum(dtype=np.int64))
