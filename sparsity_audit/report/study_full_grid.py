"""Part b of a full study: what runs share that differ in seed, algorithm or data.

Contract: figures are those of `overlap runs.yaml`; pairs are sorted by the factors in which they differ, and
every overlap stands beside the nulls of the default table and beside the pairs with shuffled rewards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsity_audit.report.study_full import FullClaim, FullVerdict, Table
from sparsity_audit.report.study_full_facts import FullFacts, GridFacts, PairKind
from sparsity_audit.report.study_full_judging import not_measured, signed
from sparsity_audit.report.style import COLOURS, HATCHES, INK, WIDTHS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_grid", "grid_claims"]

_EXCESS = 0.15
"""Mean excess share over the magnitude null that counts as explained by rounding, as in the small study."""

_LEVEL = 0.05
_TITLES = {
    "grid-value": "Runs of different seeds, algorithms and data update the same subnetwork",
    "grid-largest": "Which weights move most is decided by the data, more than by seed or algorithm",
}
_FACTORS = ("seed", "algorithm", "data")


def grid_claims(facts: FullFacts) -> tuple[FullClaim, ...]:
    """A claim for either criterion; `not measured` without the grid."""
    value, largest = (_grid(facts, name) for name in ("value", "top"))
    if value is None or largest is None:
        return tuple(
            not_measured(key, part="b", title=title, source="2505.11711") for key, title in _TITLES.items()
        )
    return _same(facts, value), _decides(largest)


def _grid(facts: FullFacts, name: str) -> GridFacts | None:
    return next((grid for grid in facts.grids if grid.criterion.startswith(name)), None)


def _same(facts: FullFacts, grid: GridFacts) -> FullClaim:
    kinds = [kind for kind in grid.kinds if "shuffled" not in kind.differs]
    excess = {kind.differs: kind.excess.get("magnitude") for kind in kinds}
    known = [value for value in excess.values() if value is not None]
    verdict: FullVerdict = "undecided"
    if known and max(known) <= _EXCESS:
        verdict = "is explained"
    elif known and min(known) > _EXCESS:
        verdict = "reproduces"
    control = grid.kind("shuffled")
    runs = facts.of("grid")
    gains = [run.tests[0].accuracy.value - facts.start_of(run).accuracy.value for run in runs]
    return FullClaim(
        key="grid-value",
        part="b",
        title=_TITLES["grid-value"],
        source="2505.11711",
        goal="rounding explains it where the mean excess share over the magnitude null is at most "
        f"{_EXCESS:g} whatever the pairs differ in; it reproduces where it is above for all; else undecided",
        verdict=verdict,
        explained_by="rounding" if verdict == "is explained" else "",
        reading=f"Jaccard is {_span([kind.jaccard for kind in kinds])} over all kinds of pairs, "
        f"magnitudes alone expect {_span([kind.chance.get('magnitude') for kind in kinds])}, and pairs with "
        f"the shuffled control have {_number(control and control.jaccard)}. Excess share over magnitude: "
        f"{_span(known)}, with the control {_number(control and control.excess.get('magnitude'))}. The runs "
        f"gained {signed(min(gains))} to {signed(max(gains))}.",
        tables=(_kinds_table(grid), _factor_table(grid)),
        caption="Mean Jaccard of pairs by the factors in which they differ, observed and expected under each "
        "null; left the mask of all changed entries (value, stored in bf16), right the largest 1 % of "
        "movements. `shuffled`: pairs with the control.",
    )


def _decides(grid: GridFacts) -> FullClaim:
    null = grid.factors.null
    alone = {factor: _excess_of(grid.kind(factor), null) for factor in _FACTORS}
    effects = {record.factor: record.excess_share.controlled for record in grid.factors.factors}
    data = effects["data"]
    others = [alone[factor] for factor in ("seed", "algorithm")]
    verdict: FullVerdict = "undecided"
    if alone["data"] is not None and None not in others:
        lower = all(other is not None and alone["data"] < other for other in others)
        p = data.permutation.p
        if lower and p is not None and p <= _LEVEL:
            verdict = "reproduces"
        elif not lower:
            verdict = "does not reproduce"
    control = _excess_of(grid.kind("shuffled"), null)
    return FullClaim(
        key="grid-largest",
        part="b",
        title=_TITLES["grid-largest"],
        source="2505.11711 (Table 4: overlap falls most with other data)",
        goal=f"pairs that differ in the data alone have a smaller excess share over {null} than pairs "
        "that differ in the seed or in the algorithm alone, and the controlled difference for data has p ≤ "
        f"{_LEVEL:g}",
        verdict=verdict,
        reading="Excess share of pairs that differ in one factor alone: "
        + ", ".join(f"{factor} {_number(value)}" for factor, value in alone.items())
        + f"; with the shuffled control {_number(control)}. Controlled difference, alike − unlike: "
        + ", ".join(f"{factor} {_effect(grid, factor)}" for factor in _FACTORS)
        + ". Other data are another task here. Runs of one seed see the same problems and, at first, the "
        "same completions, so that the algorithm alone is the smallest change, and no factor without weight.",
        tables=(_kinds_table(grid), _factor_table(grid)),
        caption="",
    )


def _effect(grid: GridFacts, factor: str) -> str:
    contrast = next(r.excess_share.controlled for r in grid.factors.factors if r.factor == factor)
    p = contrast.permutation.p
    shown = "–" if contrast.difference is None else signed(contrast.difference)
    return f"{shown} (p {p:.3f})" if p is not None else f"{shown} (no p: {contrast.permutation.reason})"


def _excess_of(kind: PairKind | None, null: str) -> float | None:
    return None if kind is None else kind.excess.get(null)


def _span(values: list[float | None] | list[float]) -> str:
    known = [value for value in values if value is not None]
    return f"{_number(min(known))} to {_number(max(known))}" if known else "undefined"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}".replace("-", "−")


def _kind_name(kind: PairKind) -> str:
    return " + ".join(kind.differs)


def _kinds_table(grid: GridFacts) -> Table:
    return Table(
        title=f"Pairs by what they differ in ({grid.criterion}, {grid.view}): Jaccard, then excess share "
        f"by null",
        head=("differ in", "pairs", "Jaccard", *grid.nulls, "cosine"),
        rows=tuple(
            (
                _kind_name(kind),
                str(kind.pairs),
                _number(kind.jaccard),
                *(_number(kind.excess.get(null)) for null in grid.nulls),
                _number(kind.cosine),
            )
            for kind in grid.kinds
        ),
    )


def _factor_table(grid: GridFacts) -> Table:
    rows = []
    for record in grid.factors.factors:
        effect = record.excess_share
        for name, contrast in (("all pairs", effect.marginal), ("others matched", effect.controlled)):
            p = contrast.permutation.p
            rows.append(
                (
                    *(record.factor, name, str(contrast.same_pairs), _number(contrast.same)),
                    *(str(contrast.differ_pairs), _number(contrast.differ)),
                    "–" if contrast.difference is None else signed(contrast.difference),
                    "–" if p is None else f"{p:.3f}",
                )
            )
    return Table(
        title=f"Factors: excess share over {grid.factors.null} of pairs alike and unlike; p permutes runs",
        head=("factor", "compared", "alike", "excess", "unlike", "excess", "difference", "p"),
        rows=tuple(rows),
    )


def draw_grid(facts: FullFacts) -> Figure:
    """Observed and expected Jaccard by kind of pair; draw in `house_style`."""
    from matplotlib.figure import Figure

    grids = [grid for name in ("value", "top") if (grid := _grid(facts, name)) is not None]
    figure = Figure(figsize=(WIDTHS[2], 3.1))
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, grid in zip(panels, grids, strict=True):
        _draw_panel(axes, grid)
    panels[0].set_ylabel("Jaccard, mean over pairs")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _draw_panel(axes: Axes, grid: GridFacts) -> None:
    shown = ("uniform", "per-tensor", "magnitude", "row-column-magnitude")
    names = ("uniform", "tensor densities", "magnitude", "rows, columns, magnitude")
    width = 0.8 / (len(shown) + 1)
    for place, (null, label) in enumerate(zip(shown, names, strict=True)):
        axes.bar(
            [number + width * (place - 2) for number in range(len(grid.kinds))],
            [kind.chance.get(null) or 0.0 for kind in grid.kinds],
            width,
            color=COLOURS[place + 1],
            hatch=HATCHES[place % len(HATCHES)],
            edgecolor="white",
            label=f"chance: {label}",
        )
    axes.bar(
        [number + width * (len(shown) - 2) for number in range(len(grid.kinds))],
        [kind.jaccard or 0.0 for kind in grid.kinds],
        width,
        color=COLOURS[0],
        label="observed",
    )
    labels = ["\n+ ".join(kind.differs) for kind in grid.kinds]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes.axvline(len(labels) - 1.5, color=INK, linewidth=0.4, linestyle=":")
    axes.set_title(f"{grid.criterion}, {grid.view}")
    axes.grid(axis="y")
