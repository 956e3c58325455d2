"""Overlap of update masks from exact counts per tensor and stratum of |w_base|.

Contract: pure. A `StratumTable` holds the integers of one tensor for R runs; tables of parts of a tensor
merge by addition, in any order and for any split. Everything else here is computed from tables. *Magnitude*
strata are the tables' own (tensor × stratum), *per-tensor* adds them up within a tensor, *uniform* over all
tensors. Whatever is undefined is None (see `chance`); a tensor without entries counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.chance import (
    Expectation,
    NullOverlap,
    hypergeometric,
    jaccard_of,
    mantel_haenszel,
    null_overlap,
    share_of,
)

__all__ = [
    "MAGNITUDE",
    "NULL_ORDER",
    "PER_TENSOR",
    "PHANTOM",
    "ROW_COLUMN",
    "ROW_COLUMN_MAGNITUDE",
    "UNIFORM",
    "PairOverlap",
    "StratumTable",
    "overlap_by",
    "pair_overlap",
]

UNIFORM = "uniform"
PER_TENSOR = "per-tensor"
MAGNITUDE = "magnitude"
ROW_COLUMN = "row-column"
ROW_COLUMN_MAGNITUDE = "row-column-magnitude"
PHANTOM = "phantom"
NULL_ORDER = (UNIFORM, PER_TENSOR, MAGNITUDE, ROW_COLUMN, ROW_COLUMN_MAGNITUDE, PHANTOM)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StratumTable:
    """Counts of one tensor, or of a part of it, by stratum of the base.

    Args:
        tensor: The tensor's name.
        strata: Stratum numbers, int64[S], ascending and distinct (`strata.py`, or a finer division).
        entries: Entries of each stratum, int64[S].
        changed: Changed entries of each run, int64[R, S].
        both: Entries changed in two runs, int64[R, R, S]; symmetric, its diagonal is `changed`.
        core: Entries changed in exactly k of the runs of `core_of`, int64[len(core_of) + 1, S].
        core_of: The runs whose agreement `core` counts: all, or those beside a reference. Ascending.
    """

    tensor: str
    strata: np.ndarray
    entries: np.ndarray
    changed: np.ndarray
    both: np.ndarray
    core: np.ndarray
    core_of: tuple[int, ...]

    @property
    def num_runs(self) -> int:
        """R."""
        return len(self.changed)

    @classmethod
    def from_masks(
        cls,
        tensor: str,
        strata: np.ndarray,
        masks: Sequence[np.ndarray],
        *,
        core_of: Sequence[int] | None = None,
    ) -> StratumTable:
        """Count boolean masks entry by entry: the reference for every faster way.

        Args:
            tensor: The tensor's name.
            strata: Stratum of each entry, any integers.
            masks: One boolean array a run, of the same size.
            core_of: The runs whose agreement is counted; all without it.
        """
        numbers, places = np.unique(np.asarray(strata).reshape(-1), return_inverse=True)
        bits = [np.asarray(mask, dtype=np.bool_).reshape(-1) for mask in masks]
        chosen = tuple(range(len(bits)) if core_of is None else core_of)
        held = np.zeros(places.shape, dtype=np.int64) + sum(bits[r].astype(np.int64) for r in chosen)

        def count(selected: np.ndarray) -> np.ndarray:
            return np.bincount(places[selected], minlength=len(numbers)).astype(np.int64)

        shape = (len(bits), len(bits), len(numbers))
        return cls(
            tensor=tensor,
            strata=numbers.astype(np.int64),
            entries=np.bincount(places, minlength=len(numbers)).astype(np.int64),
            changed=np.array([count(bit) for bit in bits], dtype=np.int64).reshape(shape[1:]),
            both=np.array([[count(x & y) for y in bits] for x in bits], dtype=np.int64).reshape(shape),
            core=np.array([count(held == k) for k in range(len(chosen) + 1)], dtype=np.int64),
            core_of=chosen,
        )

    def merge(self, other: StratumTable) -> StratumTable:
        """Both parts of one tensor together: the union of their strata, counts added."""
        assert (self.tensor, self.num_runs) == (other.tensor, other.num_runs), (self.tensor, other.tensor)
        assert self.core_of == other.core_of, self.tensor
        strata = np.union1d(self.strata, other.strata)
        places = (np.searchsorted(strata, self.strata), np.searchsorted(strata, other.strata))

        def add(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            total = np.zeros((*mine.shape[:-1], len(strata)), dtype=np.int64)
            total[..., places[0]] += mine
            total[..., places[1]] += theirs
            return total

        return StratumTable(
            tensor=self.tensor,
            strata=strata,
            entries=add(self.entries, other.entries),
            changed=add(self.changed, other.changed),
            both=add(self.both, other.both),
            core=add(self.core, other.core),
            core_of=self.core_of,
        )

    def coarsen(self, into: Callable[[np.ndarray], np.ndarray]) -> StratumTable:
        """The same counts over wider strata.

        Args:
            into: Gives the new number of each stratum: `lambda s: s // 2` drops the power-of-two bit.
        """
        strata, places = np.unique(into(self.strata), return_inverse=True)

        def add(counts: np.ndarray) -> np.ndarray:
            total = np.zeros((len(strata), *counts.shape[:-1]), dtype=np.int64)
            np.add.at(total, places, np.moveaxis(counts, -1, 0))
            return np.ascontiguousarray(np.moveaxis(total, 0, -1))

        return StratumTable(
            tensor=self.tensor,
            strata=strata.astype(np.int64),
            entries=add(self.entries),
            changed=add(self.changed),
            both=add(self.both),
            core=add(self.core),
            core_of=self.core_of,
        )

    def check(self) -> None:
        """Assert what must hold of any counts of masks."""
        runs, size = self.num_runs, len(self.strata)
        shapes = {"entries": (size,), "changed": (runs, size), "both": (runs, runs, size)}
        for name, shape in {**shapes, "core": (len(self.core_of) + 1, size)}.items():
            found = getattr(self, name)
            assert found.shape == shape, (self.tensor, name, found.shape, shape)
            assert found.dtype == np.int64, (self.tensor, name, found.dtype)
            assert (found >= 0).all(), (self.tensor, name)
        assert (np.diff(self.strata) > 0).all(), self.tensor
        assert (np.einsum("iis->is", self.both) == self.changed).all(), self.tensor
        assert (self.both == self.both.transpose(1, 0, 2)).all(), self.tensor
        sums = self.changed[:, None] + self.changed[None]
        assert (self.both <= np.minimum(self.changed[:, None], self.changed[None])).all(), self.tensor
        assert (self.both >= sums - self.entries).all(), self.tensor
        assert list(self.core_of) == sorted(set(self.core_of) & set(range(runs))), (self.tensor, self.core_of)
        held, chosen = np.arange(len(self.core_of) + 1), list(self.core_of)
        # Each entry changed in k runs counts k times in `changed` and k² times in `both`.
        assert (self.core.sum(axis=0) == self.entries).all(), self.tensor
        assert (held @ self.core == self.changed[chosen].sum(axis=0)).all(), self.tensor
        assert (held**2 @ self.core == self.both[np.ix_(chosen, chosen)].sum(axis=(0, 1))).all(), self.tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOverlap:
    """Overlap of two masks and its chance levels.

    Args:
        entries: Entries compared, n.
        a: |A|, changed in the first run.
        b: |B|, changed in the second.
        both: |A∩B|.
        jaccard: |A∩B|/|A∪B|.
        o1: |A∩B|/|A|.
        o2: |A∩B|/|B|.
        o1_ceiling: min(1, |B|/|A|): what o1 is when one mask holds the other.
        o2_ceiling: min(1, |A|/|B|).
        phi: Correlation of the two masks as 0/1 variables; None where one is empty or full.
        nulls: By name; `uniform`, `per-tensor` and `magnitude` always, others as given.
    """

    entries: int
    a: int
    b: int
    both: int
    jaccard: float | None
    o1: float | None
    o2: float | None
    o1_ceiling: float | None
    o2_ceiling: float | None
    phi: float | None
    nulls: Mapping[str, NullOverlap]


def pair_overlap(
    tables: Sequence[StratumTable], r: int, q: int, *, others: Mapping[str, Expectation] | None = None
) -> PairOverlap:
    """Overlap of runs r and q over all tables.

    Args:
        tables: One table a tensor; two tables of one tensor would be two strata of `per-tensor`.
        r: The first run.
        q: The second.
        others: Expectations under nulls that need more than tables: `row-column`, `row-column-magnitude`,
            `phantom`, each over the same entries.
    """
    strata = [_Counts.of_strata(table, r, q) for table in tables]
    by_tensor = _Counts.joined([part.total() for part in strata])
    overall = by_tensor.total()
    levels = ((UNIFORM, overall), (PER_TENSOR, by_tensor), (MAGNITUDE, _Counts.joined(strata)))
    n, a, b, both = (int(part[0]) for part in (overall.entries, overall.a, overall.b, overall.both))
    nulls = {
        name: null_overlap(
            name,
            a=a,
            b=b,
            both=both,
            expectation=hypergeometric(level.entries, level.a, level.b),
            odds_ratio=mantel_haenszel(level.entries, level.a, level.b, level.both),
        )
        for name, level in levels
    }
    for name, expectation in (others or {}).items():
        nulls[name] = null_overlap(name, a=a, b=b, both=both, expectation=expectation)
    spread = a * (n - a) * b * (n - b)
    return PairOverlap(
        entries=n,
        a=a,
        b=b,
        both=both,
        jaccard=jaccard_of(both, a, b),
        o1=share_of(both, a),
        o2=share_of(both, b),
        o1_ceiling=share_of(min(a, b), a),
        o2_ceiling=share_of(min(a, b), b),
        phi=(n * both - a * b) / math.sqrt(spread) if spread else None,
        nulls=nulls,
    )


def overlap_by(
    tables: Sequence[StratumTable],
    key: Callable[[str], str | None],
    r: int = 0,
    q: int = 1,
    *,
    others: Mapping[str, Mapping[str, Expectation]] | None = None,
) -> dict[str, PairOverlap]:
    """Overlap of runs r and q in groups of tensors: by layer, by module type, or tensor by tensor.

    Args:
        tables: One table a tensor.
        key: The group of a tensor's name; None leaves the tensor out.
        r: The first run.
        q: The second.
        others: By tensor and null, expectations that need more than tables; every tensor has the same nulls.

    Returns:
        Groups in the order in which they first occur.
    """
    groups: dict[str, list[StratumTable]] = {}
    for table in tables:
        group = key(table.tensor)
        if group is not None:
            groups.setdefault(group, []).append(table)
    return {
        group: pair_overlap(
            members, r, q, others=_summed([others[m.tensor] for m in members]) if others else None
        )
        for group, members in groups.items()
    }


def _summed(parts: Sequence[Mapping[str, Expectation]]) -> dict[str, Expectation]:
    return {null: Expectation.total([part[null] for part in parts]) for null in parts[0]}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Counts:
    """The four counts of a pair of runs in some division of the entries, int64 arrays of one length."""

    entries: np.ndarray
    a: np.ndarray
    b: np.ndarray
    both: np.ndarray

    @classmethod
    def of_strata(cls, table: StratumTable, r: int, q: int) -> _Counts:
        return cls(entries=table.entries, a=table.changed[r], b=table.changed[q], both=table.both[r, q])

    @classmethod
    def joined(cls, parts: Sequence[_Counts]) -> _Counts:
        empty = np.zeros(0, dtype=np.int64)

        def join(name: str) -> np.ndarray:
            return np.concatenate([empty, *(getattr(part, name) for part in parts)])

        return cls(entries=join("entries"), a=join("a"), b=join("b"), both=join("both"))

    def total(self) -> _Counts:
        return _Counts(
            **{
                name: getattr(self, name).sum(keepdims=True, dtype=np.int64)
                for name in ("entries", "a", "b", "both")
            }
        )
