"""What many runs say together, as a part of the record of an overlap.

Contract: pure data; None is undefined, never 0, and stands beside a reason. Every figure of chance carries
the name of its null. Runs are named by their labels in the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sparsity_audit.stats.clustering import Merge
from sparsity_audit.stats.factors import FactorEffect
from sparsity_audit.stats.uncertainty import RunInterval

__all__ = ["Cells", "FactorRecord", "FactorTable", "OverRuns", "OverlapMatrix"]

Cells = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OverRuns:
    """Means over all pairs of runs other than the reference; intervals by leaving out one run at a time.

    Args:
        runs: Their labels.
        jaccard: Of the observed Jaccard.
        excess_share: Of the excess share over each null.
    """

    runs: tuple[str, ...]
    jaccard: RunInterval
    excess_share: Mapping[str, RunInterval]


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapMatrix:
    """Every pair of runs, in the order of a clustering that puts runs with much in common side by side.

    Args:
        runs: Labels of all runs, the reference among them, in that order.
        null: The null of `chance` and `excess_share`: the highest rung that every pair has.
        jaccard: Observed Jaccard, R × R; None on the diagonal, as in what follows.
        chance: Jaccard expected under the null.
        excess_share: Excess share over it.
        distance: What was clustered (average linkage): 1 − excess share, or 1 − Jaccard where a pair has no
            excess share; None where a pair has neither, and the runs stand as they were given.
        merges: The clustering; numbers are those of the report's runs, and then those of earlier merges.
    """

    runs: tuple[str, ...]
    null: str
    jaccard: Cells
    chance: Cells
    excess_share: Cells
    distance: Literal["excess_share", "jaccard"] | None
    merges: tuple[Merge, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorRecord:
    """One factor.

    Args:
        factor: Its name.
        levels: Level → labels of its runs.
        excess_share: Its effect on the excess share over the table's null.
        jaccard: Its effect on the observed Jaccard.
    """

    factor: str
    levels: Mapping[str, tuple[str, ...]]
    excess_share: FactorEffect
    jaccard: FactorEffect


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorTable:
    """Pairs of runs that agree on a factor against pairs that differ in it.

    Args:
        null: The null of the excess shares.
        statistic: What the permutation p is of.
        runs: Labels of the runs with factors; a reference that is among them counts like the others.
        factors: One record a factor, in the order of the file.
        notes: What a reader must know, such as factors that cannot be told apart.
    """

    null: str
    statistic: str
    runs: tuple[str, ...]
    factors: tuple[FactorRecord, ...]
    notes: tuple[str, ...]
