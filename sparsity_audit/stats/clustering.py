"""Average linkage of runs: which of them lie close together, and an order that puts those side by side.

Contract: pure and deterministic. Clusters are numbered as they arise: runs first, then merges. Of equally
near clusters the pair with the lowest numbers is merged first, so that neither heights nor order hang on
anything but the distances and the order of the runs. Heights never decrease.

Source: unweighted pair groups with arithmetic mean, Sokal and Michener, Univ. Kansas Sci. Bull. 38 (1958)
1409. Without ties merges and order are those of scipy's `linkage(…, "average")` and `leaves_list`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

__all__ = ["Linkage", "Merge", "average_linkage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """Two clusters that become one.

    Args:
        left: Number of the older cluster; runs have 0 … R − 1, the k-th merge (from 0) makes R + k.
        right: Number of the younger one.
        height: Mean distance of their runs.
        size: Runs in the new cluster.
    """

    left: int
    right: int
    height: float
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Linkage:
    """All merges, and the runs in the order of the tree's leaves."""

    merges: tuple[Merge, ...]
    order: tuple[int, ...]


def average_linkage(distances: Sequence[Sequence[float]]) -> Linkage:
    """Merge the two nearest clusters until one is left; their distance is the mean over pairs of runs.

    Args:
        distances: distances[r][q] of runs r < q, R × R; other cells are not read.
    """
    runs = len(distances)
    apart = {(r, q): float(distances[r][q]) for r, q in combinations(range(runs), 2)}
    members: dict[int, tuple[int, ...]] = {run: (run,) for run in range(runs)}
    merges: list[Merge] = []
    while len(members) > 1:
        left, right = min(apart, key=lambda pair: (apart[pair], pair))
        height, new = apart.pop((left, right)), runs + len(merges)
        weights = (len(members[left]), len(members[right]))
        for other in members.keys() - {left, right}:
            sides = [apart.pop((min(old, other), max(old, other))) for old in (left, right)]
            apart[other, new] = (weights[0] * sides[0] + weights[1] * sides[1]) / sum(weights)
        members[new] = (*members.pop(left), *members.pop(right))
        merges.append(Merge(left=left, right=right, height=height, size=len(members[new])))
    return Linkage(merges=tuple(merges), order=next(iter(members.values()), ()))
