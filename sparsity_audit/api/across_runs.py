"""What many runs say together: consensus, intervals over runs, the matrix of all pairs, factors.

Contract: from the record of the pairs and the counts alone; nothing is read. Defaults of the resampling live
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from sparsity_audit.report.across_runs import Cells, FactorRecord, FactorTable, OverlapMatrix, OverRuns
from sparsity_audit.report.overlap import OverlapReport, PairRecord
from sparsity_audit.stats.clustering import average_linkage
from sparsity_audit.stats.consensus import Consensus, consensus
from sparsity_audit.stats.factors import factor_effects
from sparsity_audit.stats.ladder import RUNGS
from sparsity_audit.stats.overlap import MAGNITUDE, NULL_ORDER, StratumTable
from sparsity_audit.stats.uncertainty import jackknife_over_runs

__all__ = ["MIN_CONSENSUS_RUNS", "across_runs"]

MIN_CONSENSUS_RUNS = 3
"""Two runs agree as their pair says; a consensus and a matrix begin with the third."""

_DRAWS, _SEED = 9_999, 0
_STATISTIC = "difference of means, pairs alike − pairs unlike; share of arrangements as large or larger"

_Figure = Callable[[PairRecord], float | None]


def across_runs(
    report: OverlapReport, tables: Sequence[StratumTable], levels: Mapping[str, Mapping[str, str]]
) -> OverlapReport:
    """The report with what its runs say together.

    Args:
        report: Runs and pairs.
        tables: Their counts; `core_of` are the runs other than the reference.
        levels: Factor levels by run, as the report refers to it; may lack a reference, or be empty.
    """
    pairs = {frozenset((pair.a, pair.b)): pair for pair in report.pairs}
    learned = [run.label for run in report.runs if not run.is_reference]
    return replace(
        report,
        consensus=_consensus(tables, has_base=report.base is not None)
        if len(learned) >= MIN_CONSENSUS_RUNS
        else None,
        over_runs=_over_runs(pairs, learned),
        matrix=_matrix(pairs, [run.label for run in report.runs])
        if len(report.runs) >= MIN_CONSENSUS_RUNS
        else None,
        factors=_factors(report, pairs, levels) if levels else None,
    )


def _cells(pairs: Mapping[frozenset[str], PairRecord], runs: Sequence[str], figure: _Figure) -> Cells:
    """R × R, None on the diagonal."""
    return tuple(tuple(None if a == b else figure(pairs[frozenset((a, b))]) for b in runs) for a in runs)


def _jaccard(pair: PairRecord) -> float | None:
    return pair.overall.jaccard


def _excess(null: str) -> _Figure:
    return lambda pair: pair.overall.nulls[null].excess_share


def _common_null(pairs: Mapping[frozenset[str], PairRecord]) -> str:
    """The highest rung that every pair has."""
    return next(
        null for null in reversed(RUNGS) if all(null in pair.overall.nulls for pair in pairs.values())
    )


def _consensus(tables: Sequence[StratumTable], *, has_base: bool) -> Consensus:
    found = consensus(tables)
    if has_base:
        return found
    # Without strata of a base, what the counts call magnitude is the per-tensor null again.
    known = [null for null in found.expected if null != MAGNITUDE]
    return replace(
        found,
        expected={null: found.expected[null] for null in known},
        cores=tuple(
            replace(
                core,
                expected={null: core.expected[null] for null in known},
                excess_share={null: core.excess_share[null] for null in known},
            )
            for core in found.cores
        ),
    )


def _over_runs(pairs: Mapping[frozenset[str], PairRecord], runs: Sequence[str]) -> OverRuns:
    among = [pair for key, pair in pairs.items() if key <= set(runs)]
    nulls = [null for null in NULL_ORDER if among and all(null in pair.overall.nulls for pair in among)]
    return OverRuns(
        runs=tuple(runs),
        jaccard=jackknife_over_runs(_cells(pairs, runs, _jaccard)),
        excess_share={null: jackknife_over_runs(_cells(pairs, runs, _excess(null))) for null in nulls},
    )


def _matrix(pairs: Mapping[frozenset[str], PairRecord], runs: Sequence[str]) -> OverlapMatrix:
    null = _common_null(pairs)
    figures: dict[str, _Figure] = {"excess_share": _excess(null), "jaccard": _jaccard}
    distance, merges, order = None, (), list(runs)
    for name in ("excess_share", "jaccard"):
        found = [
            [1.0 if value is None else 1 - value for value in row]
            for row in _cells(pairs, runs, figures[name])
        ]
        if all(figures[name](pair) is not None for pair in pairs.values()):
            tree = average_linkage(found)
            distance, merges, order = name, tree.merges, [runs[place] for place in tree.order]
            break
    return OverlapMatrix(
        runs=tuple(order),
        null=null,
        jaccard=_cells(pairs, order, _jaccard),
        chance=_cells(pairs, order, lambda pair: pair.overall.nulls[null].jaccard),
        excess_share=_cells(pairs, order, _excess(null)),
        distance=distance,
        merges=merges,
    )


def _factors(
    report: OverlapReport,
    pairs: Mapping[frozenset[str], PairRecord],
    levels: Mapping[str, Mapping[str, str]],
) -> FactorTable:
    known = [run for run in report.runs if run.reference in levels]
    runs = [run.label for run in known]
    own = {factor: [levels[run.reference][factor] for run in known] for factor in levels[known[0].reference]}
    null = _common_null(pairs)
    effects = {
        name: factor_effects(own, _cells(pairs, runs, figure), draws=_DRAWS, seed=_SEED)
        for name, figure in (("excess_share", _excess(null)), ("jaccard", _jaccard))
    }
    notes = [
        f"{run.label} stands in no row of the file: it has no factors"
        for run in report.runs
        if run.reference not in levels
    ]
    notes += [
        f"{first} and {second} divide the runs alike: their effects cannot be told apart"
        for first, second in combinations(own, 2)
        if len(set(own[first])) > 1 and _pattern(own[first]) == _pattern(own[second])
    ]
    return FactorTable(
        null=null,
        statistic=_STATISTIC,
        runs=tuple(runs),
        factors=tuple(
            FactorRecord(
                factor=factor,
                levels={
                    level: tuple(run for run, found in zip(runs, labels, strict=True) if found == level)
                    for level in dict.fromkeys(labels)
                },
                excess_share=effects["excess_share"][factor],
                jaccard=effects["jaccard"][factor],
            )
            for factor, labels in own.items()
        ),
        notes=tuple(notes),
    )


def _pattern(labels: Sequence[str]) -> list[int]:
    """Which runs agree, whatever the levels are called."""
    return [labels.index(label) for label in labels]
