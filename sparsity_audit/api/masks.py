"""What can be done with masks: describe, combine, convert, draw at random.

Contract: each function reads and writes mask directories with memory of a few blocks and returns a frozen
record whose `to_json()` holds exact integers and fractions in [0, 1] (null where nothing is compared).
An *update mask* selects the entries that training changed (or may change). It is no pruning mask: a 0
means "not updated", not "remove", and nothing here offers it as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparsity_audit.api.engines import EngineName, open_engine
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.errors import UsageError
from sparsity_audit.masks.algebra import CombinedSource, LeftOut, MaskOp, Operand
from sparsity_audit.masks.bitmask import packed_bytes, popcount
from sparsity_audit.masks.encodings import indices_bytes, write_mask
from sparsity_audit.masks.metadata import Encoding, MaskMetadata, describe_reference
from sparsity_audit.masks.reader import MaskReader, open_mask
from sparsity_audit.masks.sampling import RandomSource, UniformGrouping
from sparsity_audit.masks.sources import StoredMask, open_source
from sparsity_audit.passes.base_strata import StrataGrouping
from sparsity_audit.passes.mask_copies import write_mapped_mask

__all__ = [
    "MaskConversion",
    "MaskInfo",
    "MaskOperation",
    "MaskTensorInfo",
    "RandomMask",
    "mask_convert",
    "mask_info",
    "mask_ops",
    "mask_random",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskTensorInfo:
    """One tensor of a mask, or the total.

    Args:
        name: The base tensor's name.
        shape: Its shape.
        entries: Its entries.
        compared: Entries the mask speaks of.
        selected: Entries it selects.
        packed_bytes: Size in the encoding `packed`.
        indices_bytes: Size in the encoding `indices`.
    """

    name: str
    shape: tuple[int, ...]
    entries: int
    compared: int
    selected: int
    packed_bytes: int
    indices_bytes: int

    @property
    def density(self) -> float | None:
        """Selected ÷ compared entries; None where nothing is compared."""
        return self.selected / self.compared if self.compared else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {"shape": list(self.shape), "density": self.density}


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskInfo:
    """What a mask holds.

    Args:
        path: Where it lies.
        encoding: How it is stored.
        metadata: Criterion, view, references, origin.
        tensors: One record a tensor, in name order.
    """

    path: str
    encoding: Encoding
    metadata: MaskMetadata
    tensors: tuple[MaskTensorInfo, ...]

    def _total(self, name: str) -> int:
        return sum(getattr(tensor, name) for tensor in self.tensors)

    @property
    def entries(self) -> int:
        """Entries of all tensors."""
        return self._total("entries")

    @property
    def compared(self) -> int:
        """Entries the mask speaks of."""
        return self._total("compared")

    @property
    def selected(self) -> int:
        """Entries it selects."""
        return self._total("selected")

    @property
    def density(self) -> float | None:
        """Selected ÷ compared entries; None where nothing is compared."""
        return self.selected / self.compared if self.compared else None

    @property
    def smallest_encoding(self) -> Encoding:
        """`packed` or `indices`, whichever takes fewer bytes; `packed` when equal."""
        return "indices" if self._total("indices_bytes") < self._total("packed_bytes") else "packed"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        metadata = self.metadata
        return {
            "path": self.path,
            "encoding": self.encoding,
            "polarity": "1=updated",
            "criterion": metadata.criterion,
            "view": metadata.view,
            "base": describe_reference(metadata.base),
            "tuned": describe_reference(metadata.tuned),
            "origin": dict(metadata.origin),
            "tool": metadata.tool,
            "aliases": dict(metadata.aliases),
            "entries": self.entries,
            "compared": self.compared,
            "selected": self.selected,
            "density": self.density,
            "sizes_bytes": {"packed": self._total("packed_bytes"), "indices": self._total("indices_bytes")},
            "smallest_encoding": self.smallest_encoding,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskOperation:
    """The result of `mask_ops`: what was made, and the tensors a forced operation could not combine."""

    operation: MaskOp
    inputs: tuple[str, ...]
    result: MaskInfo
    left_out: tuple[LeftOut, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "operation": self.operation,
            "inputs": list(self.inputs),
            "left_out": [asdict(tensor) for tensor in self.left_out],
            "result": self.result.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskConversion:
    """The result of `mask_convert`; `result.path` is the new directory."""

    source: str
    inverted: bool
    result: MaskInfo

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"source": self.source, "inverted": self.inverted, "result": self.result.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomMask:
    """The result of `mask_random`; `matched` says what is equal to the imitated mask."""

    like: str
    seed: int
    matched: str
    result: MaskInfo

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "like": self.like,
            "seed": self.seed,
            "matched": self.matched,
            "result": self.result.to_json(),
        }


def mask_info(path: str | Path) -> MaskInfo:
    """Counts and metadata of a mask in any encoding.

    Args:
        path: A mask directory, or a mask of another tool (see `mask_convert`).

    Raises:
        MaskError: It is no mask, or contradicts itself.
    """
    with closing(open_source(path)) as source:
        return _describe(source, path)


def mask_ops(
    op: MaskOp,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    k: int | None = None,
    force: bool = False,
    engine: EngineName = "threads",
    workers: int | None = None,
) -> MaskOperation:
    """Combine masks into a new one at `out`.

    Args:
        op: `and`, `or`, `xor`, `minus` (the first without all others), `not` (among compared entries),
            `k-of-n` (selected by at least k masks).
        paths: One mask for `not`, two or more otherwise, in any encoding.
        out: Directory to make.
        k: For `k-of-n`.
        force: Combine masks of different bases, criteria or views; tensors that do not fit are left out
            and listed in the result.
        engine: `threads`: one thread of this process, or `ray`: the tensors on a Ray cluster.
        workers: With an engine, tasks at once.

    Raises:
        MaskError: The masks do not belong together, or one is damaged.
        OutputError: `out` exists and is not empty, or cannot be written.
        UsageError: Wrong number of masks or k.
    """
    if engine == "threads" and workers not in (None, 1):
        raise UsageError(
            "--workers",
            f"{workers} threads",
            expected="1: masks are combined in one thread, or by tasks of --engine ray",
        )
    operands: list[Operand] = []
    try:
        operands += [Operand(path=str(path), source=open_source(path)) for path in paths]
        combined = CombinedSource(op, operands, k=k, force=force)
        if engine == "threads":
            write_mask(combined, out, "packed")
        else:
            with open_engine(engine, workers=workers) as running:
                write_mapped_mask(combined, out, workers=running)
    finally:
        for operand in operands:
            operand.source.close()
    names = tuple(str(path) for path in paths)
    return MaskOperation(operation=op, inputs=names, result=mask_info(out), left_out=combined.left_out)


def mask_convert(
    path: str | Path, out: str | Path, encoding: Encoding = "packed", *, inverted: bool = False
) -> MaskConversion:
    """Write a mask in another encoding, or import one that another tool wrote.

    Args:
        path: A mask directory of ours, or a `.pt` or safetensors file or directory of bool or 0/1 tensors.
        out: Directory to make.
        encoding: `packed`, `bool`, `indices` or `pt`.
        inverted: The foreign mask has 1 where an entry was *not* updated.

    Raises:
        MaskError: It is no mask; or `inverted` is asked of a mask that records its polarity.
        OutputError: `out` exists and is not empty, or cannot be written.
    """
    with closing(open_source(path, inverted=inverted)) as source:
        write_mask(source, out, encoding)
    return MaskConversion(source=str(path), inverted=inverted, result=mask_info(out))


def mask_random(
    like: str | Path,
    out: str | Path,
    *,
    seed: int,
    base: str | Path | None = None,
    force: bool = False,
) -> RandomMask:
    """Draw a random mask with the same counts as `like`: a control for masked training and overlaps.

    Each tensor gets exactly as many entries as in `like`, uniformly among its compared entries. With
    `base`, each stratum (tensor × exponent of |w_base| × mantissa = 0) gets exactly as many.

    Args:
        like: A packed mask directory.
        out: Directory to make.
        seed: ≥ 0; the same seed gives the same mask.
        base: The checkpoint `like` was made from.
        force: Accept a base whose fingerprints are unknown or differ.

    Raises:
        MaskError: `like` is damaged, or `base` is not its base.
        OutputError: `out` exists and is not empty, or cannot be written.
        UsageError: A negative seed.
    """
    if seed < 0:
        raise UsageError("seed", str(seed), expected="a number ≥ 0")
    matched = "tensor" if base is None else "tensor × exponent of |w_base| × mantissa = 0"
    with MaskReader(open_mask(like)) as reader:
        grouping = (
            UniformGrouping(reader)
            if base is None
            else StrataGrouping(reader, open_checkpoint(base), force=force)
        )
        with closing(grouping):
            # The draw owes nothing to the tuned checkpoint but its counts.
            tensors = {n: replace(t, fingerprints=(t.fingerprints[0], 0)) for n, t in reader.tensors.items()}
            source = RandomSource(tensors, _random_metadata(reader, like, seed, matched), grouping, seed=seed)
            write_mask(source, out, "packed")
    return RandomMask(like=str(like), seed=seed, matched=matched, result=mask_info(out))


def _random_metadata(reader: MaskReader, like: str | Path, seed: int, matched: str) -> MaskMetadata:
    import numpy as np

    known = reader.metadata
    return MaskMetadata(
        criterion=known.criterion,
        view=known.view,
        base=known.base,
        aliases=known.aliases,
        origin={
            "like": str(like),
            "like_origin": dict(known.origin),
            "matched": matched,
            "numpy": np.__version__,
            "operation": "random",
            "seed": seed,
        },
    )


def _describe(source: StoredMask, path: str | Path) -> MaskInfo:
    tensors = []
    for name, tensor in source.tensors.items():
        selected = sum(popcount(bits) for _, bits in source.blocks(name))
        tensors.append(
            MaskTensorInfo(
                name=name,
                shape=tensor.shape,
                entries=tensor.num_entries,
                compared=tensor.num_compared,
                selected=selected,
                packed_bytes=packed_bytes(tensor.shape),
                indices_bytes=indices_bytes(tensor.num_entries, selected),
            )
        )
    return MaskInfo(
        path=str(path), encoding=source.encoding, metadata=source.metadata, tensors=tuple(tensors)
    )
