"""Parts of an update put into a model, in memory, and how much of the token divergence they account for.

Contract: a *part* is a set of entries: whole tensors (a layer, a module type), or those of a mask. *Adding*
it takes the part from the tuned model into the base, *removing* it takes it from the base into the tuned
model. Weights are copied as they are, nothing is computed; when the context ends the model has its own bits
again. What is measured is JS to the tuned model on fixed completions: the share of the divergence that adding
a part takes away, or that removing it brings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparsity_audit.align.roles import role_of
from sparsity_audit.errors import UsageError
from sparsity_audit.models.protocol import LanguageModel
from sparsity_audit.models.score import Resident, Scored, Side, score
from sparsity_audit.tokens.divergence import js_divergence

__all__ = ["Part", "PartKind", "PositionJs", "js_to_tuned", "parts_of", "put", "verify_same_shapes"]

PartKind = Literal["layer", "module", "mask", "update"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Entries of an update.

    Args:
        kind: What it is a part by.
        name: `layer 3`, `q_proj`, a mask's path.
        tensors: Parameter → None for all of its entries, or bool of its shape, true where an entry belongs.
    """

    kind: PartKind
    name: str
    tensors: Mapping[str, Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionJs:
    """JS to the tuned model at every position, by sequence and position.

    Args:
        js: float64[positions], nats.
        sequence: int64[positions].
        agrees: bool[positions]: the most probable token is the tuned model's.
    """

    js: np.ndarray
    sequence: np.ndarray
    agrees: np.ndarray


def parts_of(module: nn.Module, kind: Literal["layer", "module"]) -> tuple[Part, ...]:
    """The parameters by layer (what lies outside of layers by its own kind) or by module type.

    Layers come in order, `embed` before and `norm` and `head` after them; module types as the model has them.
    Tied parameters are in the part of their first name.
    """
    found: dict[str, dict[str, Tensor | None]] = {}
    for name, _ in module.named_parameters():
        role = role_of(name, {})  # named_parameters() has tied ones once
        key = role.module
        if kind == "layer":
            key = f"layer {role.layer}" if role.layer is not None else role.module
        found.setdefault(key, {})[name] = None
    names = sorted(found, key=_place) if kind == "layer" else list(found)
    return tuple(Part(kind=kind, name=name, tensors=found[name]) for name in names)


def _place(name: str) -> tuple[int, int, str]:
    number = re.fullmatch(r"layer (\d+)", name)
    if number is not None:
        return (1, int(number[1]), name)
    return (0 if name == "embed" else 2, name == "head", name)


def verify_same_shapes(base: LanguageModel, tuned: LanguageModel) -> None:
    """Refuse models whose parameters are not the same by name and shape. Raises UsageError."""
    ours, theirs = (dict(model.module.named_parameters()) for model in (base, tuned))
    for name in sorted({*ours, *theirs}):
        shapes = [list(side[name].shape) if name in side else None for side in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"parameter {name!r}",
                f"{shapes[0] or 'not there'} in base, {shapes[1] or 'not there'} in tuned",
                expected="one architecture: parts of one model are put into the other",
            )


@contextmanager
def put(target: nn.Module, source: nn.Module, part: Part) -> Iterator[None]:
    """`target` with a part of `source`; afterwards it has its own bits again."""
    own, other = dict(target.named_parameters()), dict(source.named_parameters())
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, selected in part.tensors.items():
                kept[name] = own[name].detach().clone()
                new = other[name].to(own[name])
                own[name].copy_(new if selected is None else torch.where(selected, new, own[name]))
        yield
    finally:
        with torch.no_grad():
            for name, values in kept.items():
                own[name].copy_(values)


def js_to_tuned(
    model: LanguageModel,
    tuned: Side,
    sequences: Sequence[Scored],
    *,
    vocab_size: int,
    batch_tokens: int,
    chunk_bytes: int,
    on_sequences: Callable[[int], None] = lambda _num: None,
) -> PositionJs:
    """The divergence of a model from the tuned one on fixed completions; arguments as of `models.score`."""
    parts: list[tuple[np.ndarray, ...]] = []
    for chunk in score(
        Resident(model),
        tuned,
        sequences,
        vocab_size=vocab_size,
        batch_tokens=batch_tokens,
        chunk_bytes=chunk_bytes,
        on_sequences=on_sequences,
    ):
        js = js_divergence(chunk.base, chunk.tuned)
        agrees = chunk.base.argmax(dim=-1) == chunk.tuned.argmax(dim=-1)
        parts.append(tuple(values.cpu().numpy() for values in (chunk.sequence, chunk.position, js, agrees)))
    sequence, position, js, agrees = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((position, sequence))
    return PositionJs(js=js[order], sequence=sequence[order], agrees=agrees[order])
