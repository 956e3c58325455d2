"""Draw random masks with exact counts: every subset of the asked size is equally likely.

Contract: a tensor's entries are divided into *groups* (all compared entries, or strata of |w_base|); in
each group exactly as many entries are drawn as the caller asks for, uniformly over all subsets of that
size. The draw goes over fixed blocks, so it needs the memory of one block and does not depend on how the
mask is later read. It depends on seed and tensor name alone, within one version of numpy (NEP 19 lets
generators' streams change between versions).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from sparsity_audit.masks.bitmask import BLOCK_BYTES, Block, blocks_of, compared_bits
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.masks.reader import MaskReader

__all__ = ["OUTSIDE", "Grouping", "RandomSource", "UniformGrouping", "choose", "split_draw"]

OUTSIDE = -1
"""The group of entries that are not compared; never drawn."""


class Grouping(Protocol):
    """How a tensor's entries are grouped, and how many of each group the mask that is imitated selects."""

    def num_groups(self, name: str) -> int:
        """Number of groups of a tensor."""
        ...

    def groups(self, name: str, block: Block) -> np.ndarray:
        """Group of each entry of a block in row-major order, int16; OUTSIDE where not compared."""
        ...

    def selected(self, name: str, block: Block) -> np.ndarray:
        """Bool array of the entries the imitated mask selects."""
        ...

    def close(self) -> None:
        """Close files it opened."""
        ...


class UniformGrouping:
    """One group: all compared entries of a tensor.

    Args:
        like: The mask to imitate.
    """

    def __init__(self, like: MaskReader) -> None:
        self._like = like

    def num_groups(self, name: str) -> int:  # noqa: ARG002 - the interface of all groupings
        """One."""
        return 1

    def groups(self, name: str, block: Block) -> np.ndarray:
        """Zero where compared."""
        bits = compared_bits(block, self._like.tensors[name].entry_ranges)
        compared = np.unpackbits(bits, axis=-1, count=block.num_cols, bitorder="little").reshape(-1)
        return compared.astype(np.int16) + OUTSIDE

    def selected(self, name: str, block: Block) -> np.ndarray:
        """The imitated mask's bits, unpacked."""
        bits = self._like.read_block(name, block)
        return (
            np.unpackbits(bits, axis=-1, count=block.num_cols, bitorder="little").reshape(-1).view(np.bool_)
        )

    def close(self) -> None:
        """The imitated mask is the caller's to close."""


class RandomSource:
    """A random mask as a `MaskSource`.

    Args:
        tensors: Tensors to draw for.
        metadata: Metadata of the result.
        grouping: Groups and counts.
        seed: ≥ 0.
    """

    def __init__(
        self, tensors: Mapping[str, MaskTensor], metadata: MaskMetadata, grouping: Grouping, *, seed: int
    ) -> None:
        self.tensors, self.metadata = tensors, metadata
        self._grouping, self._seed = grouping, seed

    def blocks(self, name: str, *, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Block, np.ndarray]]:
        """Draw a tensor's bits. The blocks are part of the draw, so `max_bytes` must be the default."""
        assert max_bytes == BLOCK_BYTES
        blocks = list(blocks_of(self.tensors[name].shape))
        picks = self._picks(name, blocks, rng := _generator(self._seed, name))
        for block, wanted in zip(blocks, picks, strict=True):
            drawn = choose(self._grouping.groups(name, block), wanted, rng)
            yield block, np.packbits(drawn.reshape(-1, block.num_cols), axis=-1, bitorder="little")

    def close(self) -> None:
        """Nothing is open here."""

    def _picks(self, name: str, blocks: list[Block], rng: np.random.Generator) -> np.ndarray:
        """How many entries to draw, int64[blocks, groups]."""
        num_groups = self._grouping.num_groups(name)
        sizes = np.zeros((len(blocks), num_groups), dtype=np.int64)
        wanted = np.zeros(num_groups, dtype=np.int64)
        for row, block in enumerate(blocks):
            groups, selected = self._grouping.groups(name, block), self._grouping.selected(name, block)
            sizes[row] = np.bincount(groups[groups != OUTSIDE], minlength=num_groups)
            wanted += np.bincount(groups[selected], minlength=num_groups)
        picks = np.zeros_like(sizes)
        for group in np.flatnonzero(wanted):
            picks[:, group] = split_draw(sizes[:, group], int(wanted[group]), rng)
        return picks


def split_draw(sizes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """How many of `count` entries, drawn uniformly without replacement, fall into each cell.

    Binomial counts are drawn for every cell, and the difference to `count` is then removed from (or
    added to) the selected (unselected) entries one at a time, each equally likely. A Bernoulli set of
    given size is a uniform subset, and stays one when entries are removed or added uniformly, so the
    result is exactly multivariate hypergeometric. numpy's own stops at 10⁹ entries; this one does not.

    Args:
        sizes: int64[cells].
        count: 0 … sum of sizes.
        rng: The generator.
    """
    total = int(sizes.sum())
    assert 0 <= count <= total, (count, total)
    if count in (0, total):
        return sizes.copy() if count else np.zeros_like(sizes)
    drawn = rng.binomial(sizes, count / total).astype(np.int64)
    surplus = int(drawn.sum()) - count
    pool = drawn if surplus > 0 else sizes - drawn
    for _ in range(abs(surplus)):
        edges = np.cumsum(pool)
        pool[np.searchsorted(edges, rng.integers(edges[-1]), side="right")] -= 1
    return pool if surplus > 0 else sizes - pool


def choose(groups: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A bool array that selects exactly `wanted[g]` entries of each group g, uniformly."""
    selected = np.zeros(groups.shape, dtype=np.bool_)
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(len(wanted) + 1))
    for group in np.flatnonzero(wanted):
        members = order[starts[group] : starts[group + 1]]
        selected[members[rng.choice(len(members), int(wanted[group]), replace=False, shuffle=False)]] = True
    return selected


def _generator(seed: int, name: str) -> np.random.Generator:
    """A tensor's own generator, so that a draw does not depend on which other tensors there are."""
    key = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:16], "little")
    return np.random.default_rng([seed, key])
