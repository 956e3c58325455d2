"""Masks of the entries of an update that are kept: made by selection or at random, or opened and verified.

Contract: every mask is packed and in base coordinates. A mask that is given belongs to the base: same
tensors, shapes and fingerprints, or it is refused. Random draws give every subset of the asked size the same
chance, over all compared entries or within each pair, and depend on the seed, the names and the counts alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sparsity_audit.align.records import Alignment, Pair, TensorSlice
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.errors import MaskError
from sparsity_audit.masks.bitmask import Block
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.encodings import write_mask
from sparsity_audit.masks.metadata import MaskTensor
from sparsity_audit.masks.reader import MaskCatalogue, open_mask
from sparsity_audit.masks.sampling import OUTSIDE, RandomSource, split_draw
from sparsity_audit.passes.base_strata import base_fingerprint
from sparsity_audit.passes.keep import Keep
from sparsity_audit.passes.mask_sink import MaskSink, mask_fingerprints, mask_metadata, mask_tensors
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import Plan
from sparsity_audit.passes.topk import TopSelection, select_all_but_smallest, select_top
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import Criterion, View

__all__ = ["KeepMask", "QuotaGrouping", "make_keep_mask", "open_base_mask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepMask:
    """The bits behind a selection.

    Args:
        keep: The selection.
        mask: Its bits; of `bottom`, those of the entries that moved and are *not* kept. None for all and
            none.
        selections: What the search for the cut found, one or one a pair; of `top` and `bottom`.
    """

    keep: Keep
    mask: MaskCatalogue | None
    selections: tuple[TopSelection, ...] = ()

    def choose(self, bits: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """Which entries of a block are kept.

        Args:
            bits: The mask's, bool; anything of that shape where there is no mask.
            moved: Whether Δ is neither 0 nor NaN, bool.
        """
        kind = self.keep.kind
        if kind in ("all", "none"):
            chosen = np.full(moved.shape, kind == "all")
        else:
            chosen = moved & ~bits if kind == "bottom" else bits
        return ~chosen if self.keep.complement else chosen


def make_keep_mask(
    keep: Keep,
    plan: Plan,
    tallies: Sequence[Tally],
    alignment: Alignment,
    *,
    view: View,
    seed: int,
    force: bool,
    workers: int,
    scratch: Path,
) -> KeepMask:
    """Make or open the mask of a selection.

    Args:
        keep: The selection.
        plan: The pairs.
        tallies: Their tallies, for fingerprints.
        alignment: The matching behind the plan.
        view: The view whose Δ orders the entries.
        seed: ≥ 0, of `random`.
        force: Take a mask whose base cannot be shown to be this one.
        workers: Threads.
        scratch: Directory that does not exist yet, for a mask that is made.

    Raises:
        MaskError: A given mask is not one of this base.
    """
    if keep.kind in ("all", "none"):
        return KeepMask(keep=keep, mask=None)
    if keep.mask is not None:
        known = mask_fingerprints(plan.pairs, tallies)
        mine = {tensor.name: tensor for tensor in mask_tensors(plan.base, alignment)}
        known = {name: prints[0] for name, prints in known.items()}
        return KeepMask(keep=keep, mask=open_base_mask(keep.mask, plan.base, mine, known, force=force))
    assert keep.amount is not None
    tensors = mask_tensors(plan.base, alignment)
    metadata = mask_metadata(plan.base, plan.tuned, criterion=keep.amount, view=view)
    if keep.kind == "random":
        by_name = {tensor.name: tensor for tensor in tensors}
        grouping = QuotaGrouping(plan.pairs, _quotas(plan.pairs, keep.amount, seed))
        write_mask(RandomSource(by_name, metadata, grouping, seed=seed), scratch, "packed")
        return KeepMask(keep=keep, mask=open_mask(scratch))
    select = select_top if keep.kind == "top" else select_all_but_smallest
    with MaskWriter(scratch, tensors, metadata) as writer:
        selections, _ = select(plan, tallies, keep.amount, view=view, workers=workers, bits=MaskSink(writer))
        writer.finish()
    selections = tuple(replace(selection, criterion=keep.key) for selection in selections)
    return KeepMask(keep=keep, mask=open_mask(scratch), selections=selections)


class QuotaGrouping:
    """Groups are the pairs of a tensor, and of each a stated number of entries is drawn.

    Args:
        pairs: All pairs.
        quotas: Entries to draw of each.
    """

    def __init__(self, pairs: Sequence[Pair], quotas: Sequence[int]) -> None:
        self._parts: dict[str, list[tuple[TensorSlice, int]]] = {}
        for pair, quota in zip(pairs, quotas, strict=True):
            assert 0 <= quota <= pair.base.num_entries, (pair.name, quota)
            self._parts.setdefault(pair.base.spec.name, []).append((pair.base, quota))

    def num_groups(self, name: str) -> int:
        """Pairs of the tensor, at least 1."""
        return max(len(self._parts.get(name, ())), 1)

    def groups(self, name: str, block: Block) -> np.ndarray:
        """Number of the pair, OUTSIDE where there is none."""
        found = np.full(block.num_entries, OUTSIDE, dtype=np.int16)
        for number, (part, _) in enumerate(self._parts.get(name, ())):
            for start, stop in part.runs:
                found[_within(block, start, stop)] = number
        return found

    def selected(self, name: str, block: Block) -> np.ndarray:
        """The first entries of each pair, as many as its quota: their number is all that counts."""
        found = np.zeros(block.num_entries, dtype=np.bool_)
        for part, quota in self._parts.get(name, ()):
            for number, (start, stop) in enumerate(part.runs):
                left = quota - number * part.run_entries
                found[_within(block, start, min(start + max(left, 0), stop))] = True
        return found

    def close(self) -> None:
        """Nothing is open."""


def _within(block: Block, start: int, stop: int) -> slice:
    """Entries start ≤ i < stop of a tensor, as a slice of the block's entries."""
    first, count = block.first_entry, block.num_entries
    return slice(min(max(start - first, 0), count), min(max(stop - first, 0), count))


def _quotas(pairs: Sequence[Pair], amount: Criterion, seed: int) -> list[int]:
    """How many entries to draw of each pair: at least one of what is not empty, as `top` selects."""
    sizes = [pair.base.num_entries for pair in pairs]

    def asked(size: int) -> int:
        wanted = round(amount.parameter * size) if amount.is_fraction else int(amount.parameter)
        return max(min(wanted, size), min(1, size))

    if amount.per_tensor:
        return [asked(size) for size in sizes]
    drawn = split_draw(np.array(sizes, dtype=np.int64), asked(sum(sizes)), np.random.default_rng([seed, 0]))
    return [int(count) for count in drawn]


def open_base_mask(
    path: str | Path,
    base: Catalogue,
    compared: Mapping[str, MaskTensor],
    fingerprints: Mapping[str, int],
    *,
    force: bool,
) -> MaskCatalogue:
    """A packed mask of `base`, opened; what is wrong with one of another base is said.

    Args:
        path: The mask directory.
        base: The base.
        compared: Its tensors with what this run compares of them.
        fingerprints: The base's fingerprints over just that, by tensor, where they are known.
        force: Accept fingerprints that are unknown or differ.

    Raises:
        MaskError: Other tensors or shapes; or other or unknown fingerprints, which `force` accepts.
    """
    mask = open_mask(path)
    odd = sorted(mask.tensors.keys() ^ compared.keys())
    if odd:
        raise MaskError(
            f"{path}: tensor {odd[0]!r}",
            f"not in the base {base.reference}" if odd[0] in mask.tensors else "in the base, not in the mask",
            expected="a mask of this base, with all of its tensors",
            remedy="make it with `mask export BASE TUNED`",
        )
    files, kernel = OpenFiles(base), NumpyKernel()
    try:
        for name, tensor in mask.tensors.items():
            mine = compared[name]
            if tensor.shape != mine.shape:
                raise MaskError(
                    f"{path}: tensor {name!r}",
                    f"shape {list(tensor.shape)}",
                    expected=f"shape {list(mine.shape)}, as in the base {base.reference}",
                )
            if force or not tensor.num_compared:
                continue
            found = fingerprints.get(name, 0) if tensor.compared == mine.compared else 0
            if tensor.fingerprints[0] and not found:
                found = base_fingerprint(tensor, base.tensors[name], files, kernel)
            _verify_fingerprint(path, base, tensor, found)
    finally:
        files.close()
    return mask


def _verify_fingerprint(path: str | Path, base: Catalogue, tensor: MaskTensor, found: int) -> None:
    subject, expected = f"{path}: tensor {tensor.name!r}", tensor.fingerprints[0]
    if not expected:
        raise MaskError(
            subject,
            "the mask does not record its base's fingerprint",
            remedy=f"--force takes your word that {base.reference} is its base",
        )
    if found != expected:
        raise MaskError(
            subject,
            f"made from a base with the fingerprint {expected:016x}",
            expected=f"{found:016x}, of {base.reference}",
            remedy="give a mask of this base; --force uses this one all the same",
        )
