"""Whether runs that agree on a factor (seed, data, algorithm, …) overlap more than runs that differ in it.

Contract: pure, and deterministic given the seed. A figure belongs to a pair of runs; a factor gives each run
a level. *Marginal* compares all pairs that agree with all that differ. *Controlled* compares them only among
pairs that differ in the same other factors, each such group weighted by sd/(s + d), s and d its numbers of
pairs of both kinds. *Only* are the pairs that differ in this factor and in no other.

Pairs share runs, so that they are no sample: a p permutes the levels of *runs*, freely (marginal) or among
runs that agree on all other factors (controlled). The statistic is the difference of the means, alike minus
unlike; with the weights above it grows with the sum of the figures of pairs that agree and with nothing else
that a permutation changes. So sums are compared, as integers, and ties are ties. One-sided: as large, or
larger. Renaming levels changes nothing; what is left are *arrangements*, and fewer than `MIN_ARRANGEMENTS` of
them cannot give a p of .05: then there is none, but a reason.

Source: permutation of labels over a matrix of pairs, Mantel, Cancer Res. 27 (1967) 209; (1 + hits)/(1 +
draws), Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9 (2010) 39.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

__all__ = [
    "MAX_ENUMERATED",
    "MIN_ARRANGEMENTS",
    "Contrast",
    "FactorEffect",
    "Permutation",
    "factor_effects",
    "num_arrangements",
]

MIN_ARRANGEMENTS = 20
"""With fewer arrangements of the labels the smallest p there can be is above .05."""

MAX_ENUMERATED = 20_000
"""Up to so many arrangements all are tried; beyond, a seeded sample of them."""

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Permutation:
    """How often permuted labels of runs give a difference as large as the one observed, or larger.

    Args:
        p: Share of arrangements, or (1 + hits)/(1 + draws); None below `MIN_ARRANGEMENTS`.
        arrangements: Distinct ways to give the runs these labels, whatever the levels are called.
        draws: Random arrangements that were tried; None where all were, and where there is no p.
        reason: Why there is no p; None when there is one.
    """

    p: float | None
    arrangements: int
    draws: int | None
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Pairs that agree on a factor against pairs that differ in it.

    Args:
        same_pairs: Pairs that agree.
        differ_pairs: Pairs that differ.
        same: Mean figure of the first; None without any.
        differ: Of the second.
        difference: same − differ; None where one of them is.
        permutation: Of the difference.
    """

    same_pairs: int
    differ_pairs: int
    same: float | None
    differ: float | None
    difference: float | None
    permutation: Permutation


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorEffect:
    """What a factor has to do with a figure of pairs.

    Args:
        marginal: All pairs.
        controlled: Pairs that differ in the same other factors.
        only_pairs: Pairs that differ in this factor alone.
        only: Their mean figure; None without any.
    """

    marginal: Contrast
    controlled: Contrast
    only_pairs: int
    only: float | None


def factor_effects(
    levels: Mapping[str, Sequence[str]], figures: Sequence[Sequence[float | None]], *, draws: int, seed: int
) -> dict[str, FactorEffect]:
    """The effect of each factor on a figure of pairs.

    Args:
        levels: Factor → level of each run, R of them.
        figures: figures[r][q] of runs r < q, R × R; other cells are not read. Where one is None the factor
            has no means and no p: leaving pairs out would favour one kind.
        draws: Random arrangements, where there are more than `MAX_ENUMERATED`.
        seed: Of these.
    """
    pairs = list(combinations(range(len(figures)), 2))
    values = {pair: figures[pair[0]][pair[1]] for pair in pairs}
    found = {}
    for factor, own in levels.items():
        others = {name: labels for name, labels in levels.items() if name != factor}
        apart = {pair: _apart(others, pair) for pair in pairs}
        only = [pair for pair in pairs if not apart[pair] and own[pair[0]] != own[pair[1]]]
        blocks = [tuple(labels[run] for labels in others.values()) for run in range(len(figures))]
        whole: dict[Pair, Hashable] = dict.fromkeys(pairs, ())
        parts: dict[Pair, Hashable] = dict(apart)
        found[factor] = FactorEffect(
            marginal=_contrast(own, whole, [()] * len(figures), values, draws=draws, seed=seed),
            controlled=_contrast(own, parts, blocks, values, draws=draws, seed=seed),
            only_pairs=len(only),
            only=_mean([values[pair] for pair in only]),
        )
    return found


def _apart(levels: Mapping[str, Sequence[str]], pair: Pair) -> frozenset[str]:
    """Factors in which two runs differ."""
    return frozenset(name for name, labels in levels.items() if labels[pair[0]] != labels[pair[1]])


def _contrast(
    own: Sequence[str],
    groups: Mapping[Pair, Hashable],
    blocks: Sequence[Hashable],
    values: Mapping[Pair, float | None],
    *,
    draws: int,
    seed: int,
) -> Contrast:
    """Compare pairs within groups, and permute labels within blocks of runs."""
    kinds: dict[Hashable, tuple[list[Pair], list[Pair]]] = {}
    for pair, group in groups.items():
        kinds.setdefault(group, ([], []))[own[pair[0]] != own[pair[1]]].append(pair)
    matched = [kind for kind in kinds.values() if kind[0] and kind[1]]
    used = matched or (list(kinds.values()) if len(kinds) == 1 else [])
    weights = [len(same) * len(differ) / (len(same) + len(differ)) for same, differ in matched] or [1.0]
    means = [
        _weighted([_mean([values[pair] for pair in kind[side]]) for kind in used], weights) for side in (0, 1)
    ]
    arrangements = num_arrangements(own, blocks)
    reason = None
    if None in values.values():
        reason = "a pair has no such figure"
    elif not matched:
        reason = _unmatched(own, num_groups=len(kinds))
    elif arrangements < MIN_ARRANGEMENTS:
        reason = f"{_counted(arrangements)} of the labels: a p needs at least {MIN_ARRANGEMENTS}"
    return Contrast(
        same_pairs=sum(len(same) for same, _ in used),
        differ_pairs=sum(len(differ) for _, differ in used),
        same=means[0],
        differ=means[1],
        difference=None if means[0] is None or means[1] is None else means[0] - means[1],
        permutation=Permutation(p=None, arrangements=arrangements, draws=None, reason=reason)
        if reason
        else _permuted(own, blocks, _integers(values), arrangements, draws=draws, seed=seed),
    )


def _unmatched(own: Sequence[str], *, num_groups: int) -> str:
    if len(set(own)) <= 1:
        return "all runs have one level: no pairs differ"
    if len(set(own)) == len(own):
        return "every run has a level of its own: no pairs agree"
    return "no pairs agree" if num_groups == 1 else "no pairs that agree match pairs that differ"


def _counted(arrangements: int) -> str:
    return f"{arrangements} distinct arrangement{'' if arrangements == 1 else 's'}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _weighted(means: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [mean for mean in means if mean is not None]
    if not known or len(known) < len(means):
        return None
    return math.fsum(w * mean for w, mean in zip(weights, known, strict=True)) / math.fsum(weights)


def num_arrangements(own: Sequence[str], blocks: Sequence[Hashable]) -> int:
    """Ways to give runs their labels within blocks that differ in which runs agree.

    Args:
        own: Level of each run.
        blocks: Block of each run; labels move within blocks only.
    """
    sizes, counts = Counter(blocks), Counter(zip(blocks, own, strict=True))
    total = math.prod(math.factorial(size) for size in sizes.values())
    total //= math.prod(math.factorial(count) for count in counts.values())
    # Levels that occur equally often in every block can swap their names.
    alike = Counter(_occurrences(own, blocks).values())
    return total // math.prod(math.factorial(times) for times in alike.values())


def _occurrences(
    own: Sequence[str], blocks: Sequence[Hashable]
) -> dict[str, frozenset[tuple[Hashable, int]]]:
    """How often each level occurs in each block."""
    counts: dict[str, Counter[Hashable]] = {}
    for level, block in zip(own, blocks, strict=True):
        counts.setdefault(level, Counter())[block] += 1
    return {level: frozenset(count.items()) for level, count in counts.items()}


def _permuted(
    own: Sequence[str],
    blocks: Sequence[Hashable],
    values: Mapping[Pair, int],
    arrangements: int,
    *,
    draws: int,
    seed: int,
) -> Permutation:
    numbers = {level: number for number, level in enumerate(dict.fromkeys(own))}
    observed = np.array([[numbers[level] for level in own]], dtype=np.int64)
    if arrangements <= MAX_ENUMERATED:
        tried = np.array(list(_arrangements(own, blocks)), dtype=np.int64)
        assert len(tried) == arrangements, (len(tried), arrangements)
    else:
        tried = np.repeat(observed, draws, axis=0)
        rng = np.random.default_rng(seed)
        for block in dict.fromkeys(blocks):
            places = [run for run, found in enumerate(blocks) if found == block]
            tried[:, places] = rng.permuted(tried[:, places], axis=1)
    hits = int((_agreement(tried, values) >= _agreement(observed, values)).sum())
    if arrangements <= MAX_ENUMERATED:
        return Permutation(p=hits / arrangements, arrangements=arrangements, draws=None, reason=None)
    return Permutation(p=(1 + hits) / (1 + draws), arrangements=arrangements, draws=draws, reason=None)


def _arrangements(own: Sequence[str], blocks: Sequence[Hashable]) -> Iterator[list[int]]:
    """One labelling of each arrangement: of levels that can swap names, the first unused one comes first."""
    kinds = _occurrences(own, blocks)
    levels = list(kinds)
    left = Counter(zip(blocks, own, strict=True))
    times = Counter[str]()
    labels: list[int] = []

    def extend() -> Iterator[list[int]]:
        if len(labels) == len(own):
            yield list(labels)
            return
        block, opened = blocks[len(labels)], set[Hashable]()
        for number, level in enumerate(levels):
            if not left[block, level] or (not times[level] and kinds[level] in opened):
                continue
            if not times[level]:
                opened.add(kinds[level])
            left[block, level] -= 1
            times[level] += 1
            labels.append(number)
            yield from extend()
            labels.pop()
            times[level] -= 1
            left[block, level] += 1

    return extend()


def _integers(values: Mapping[Pair, float | None]) -> dict[Pair, int]:
    """The figures as multiples of a power of two, the smallest for which no sum leaves int64."""
    known = {pair: value for pair, value in values.items() if value is not None}
    exponent = 61 - math.frexp(math.fsum(map(abs, known.values())))[1]
    return {pair: round(math.ldexp(value, exponent)) for pair, value in known.items()}


def _agreement(labels: np.ndarray, values: Mapping[Pair, int]) -> np.ndarray:
    """Sum of the figures of pairs that agree, int64[N], of labellings int64[N, R]."""
    total = np.zeros(len(labels), dtype=np.int64)
    for (r, q), value in values.items():
        total += np.where(labels[:, r] == labels[:, q], np.int64(value), np.int64(0))
    return total
