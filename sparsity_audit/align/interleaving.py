"""In how many groups the rows of a fused query, key and value alternate, told from configurations.

Contract: pure. The layout is that of Megatron-Core's `linear_qkv` and of `query_key_value` in GPT-NeoX, BLOOM
and Falcon: for each group of key and value heads its query heads, one key head, one value head, each of
head-dim rows. Shapes alone never decide it; sizes that contradict the configuration are refused.

Source: the attention modules of GPT-NeoX, BLOOM and Falcon in transformers and of Megatron-Core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["count_groups"]

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_GROUPS = ("num_key_value_heads", "num_query_groups", "num_kv_heads", "n_head_kv")
_HEAD_DIM = ("head_dim", "kv_channels")
# ChatGLM concatenates under this name when it groups queries and interleaves when it does not.
_OTHER_LAYOUTS = ("chatglm",)


def count_groups(configs: Sequence[Mapping[str, Any]], rows: tuple[int, int, int]) -> int | str:
    """The number of groups, or why it cannot be known.

    Args:
        configs: The configurations of both sides; one that says nothing may be empty.
        rows: Rows of query, key and value.
    """
    sections = [part for config in configs for part in (config, config.get("text_config"))]
    known = [section for section in sections if isinstance(section, Mapping)]
    for config in known:
        if config.get("model_type") in _OTHER_LAYOUTS:
            return f"{config['model_type']} models use this name for another layout"
    heads, groups, head_dim = (_values(known, keys) for keys in (_HEADS, _GROUPS, _HEAD_DIM))
    if not heads:
        return f"no configuration gives {_HEADS[0]}"
    if len(heads) > 1:
        return f"the configurations disagree about {_HEADS[0]}: {sorted(heads)}"
    num_heads = heads.pop()
    query, key, value = rows
    if num_heads < 1 or query % num_heads or query == 0 or key != value:
        return f"{query}, {key} and {value} rows are not those of {num_heads} query heads"
    size = query // num_heads
    found = key // size
    if key % size or found == 0 or num_heads % found:
        return f"{key} key rows are not a number of groups of {num_heads} query heads with {size} rows each"
    if head_dim and head_dim != {size}:
        return (
            f"{_HEAD_DIM[0]} is {sorted(head_dim)}, but {query} rows in {num_heads} query heads mean {size}"
        )
    if groups and groups != {found}:
        return f"{_GROUPS[0]} is {sorted(groups)}, but {key} key rows in heads of {size} mean {found}"
    return found


def _values(configs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> set[int]:
    return {
        config[key]
        for config in configs
        for key in keys
        if isinstance(config.get(key), int) and not isinstance(config[key], bool)
    }
