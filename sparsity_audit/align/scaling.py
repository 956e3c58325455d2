"""Find the block scales of an fp8 tensor: `X_scale_inv` beside `X`.

Contract: pure. The value of an entry is its code's number times the scale of its block; a scale tensor has
one entry for each block of the last two axes, and the leading axes of the weights. Block sizes come from the
configuration, and else from the shapes where those leave one choice (blocks of 128 wherever they fit).

Source: the `weight_block_size` and `weight_scale_inv` of DeepSeek-V3, README_WEIGHTS.md of its repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from sparsity_audit.align.records import BlockScale
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.types import DType, TensorSpec

__all__ = ["block_scale"]

_USUAL_BLOCK = 128
# At most 24 significant bits: times the 4 of an fp8 code that is exact in float64.
_SCALE_DTYPES = (DType.F32, DType.BF16, DType.F16)


def block_scale(spec: TensorSpec, catalogue: Catalogue) -> BlockScale | str | None:
    """The scales of an fp8 tensor; None where it has none, a sentence where they cannot be used."""
    if spec.dtype is not DType.F8_E4M3 and spec.dtype is not DType.F8_E5M2:
        return None
    name = f"{spec.name}_scale_inv"
    scale = catalogue.tensors.get(catalogue.aliases.get(name, name))
    if scale is None:
        is_other = f"{spec.name}_scale" in catalogue.tensors
        return "scales under the name weight_scale are not interpreted" if is_other else None
    if scale.dtype not in _SCALE_DTYPES:
        return f"scales stored as {scale.dtype.label} are not interpreted"
    shapes = f"scales {list(scale.shape)} for {list(spec.shape)}"
    if len(spec.shape) < 2 or len(scale.shape) != len(spec.shape) or scale.shape[:-2] != spec.shape[:-2]:
        return f"{shapes} are not one for each block"
    axes = list(zip(spec.shape[-2:], scale.shape[-2:], strict=True))
    stated = _stated_block(catalogue.config)
    if stated is not None:
        if any(_num_blocks(size, block) != count for (size, count), block in zip(axes, stated, strict=True)):
            return f"{shapes} are not those of {stated[0]} × {stated[1]} blocks, as the configuration says"
        return BlockScale(spec=scale, block=stated)
    rows, cols = (_inferred_block(size, count) for size, count in axes)
    if rows is None or cols is None:
        return f"{shapes}: no configuration gives weight_block_size, and shapes leave more than one"
    return BlockScale(spec=scale, block=_block(rows, cols))


def _stated_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    for part in (config, config.get("text_config")):
        quantization = part.get("quantization_config") if isinstance(part, Mapping) else None
        block = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
        if isinstance(block, list | tuple) and len(block) == 2:
            rows, cols = block
            if isinstance(rows, int) and isinstance(cols, int) and min(rows, cols) > 0:
                return _block(rows, cols)
    return None


@cache  # tensors by the ten thousand have one
def _block(rows: int, cols: int) -> tuple[int, int]:
    return rows, cols


def _inferred_block(size: int, count: int) -> int | None:
    if _num_blocks(size, _USUAL_BLOCK) == count:
        return _USUAL_BLOCK
    if count < 1 or size < count:
        return None
    smallest = _num_blocks(size, count)
    largest = size if count == 1 else _num_blocks(size, count - 1) - 1
    is_only = count == 1 or smallest == largest
    return largest if is_only and _num_blocks(size, largest) == count else None


def _num_blocks(size: int, block: int) -> int:
    return -(-size // block)
