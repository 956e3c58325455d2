"""LaTeX tables (booktabs) of one or several runs: headline, by module, by layer.

Contract: functions of records; numbers are percentages with one decimal, never 0 or 100 when they are
neither; each table carries its caption with criterion, view, dtypes and references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparsity_audit.report.runs import (
    Run,
    describe_runs,
    question,
    shared_question,
    short_percent,
    short_share,
)
from sparsity_audit.report.schema import ViewRollups
from sparsity_audit.report.tables import shown_view
from sparsity_audit.stats.rollup import Rollup

__all__ = ["TABLES", "escape", "headline_latex", "latex_tables", "layers_latex", "modules_latex"]

_SPECIAL = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "#": r"\#",
        "$": r"\$",
        "%": r"\%",
        "&": r"\&",
        "_": r"\_",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"$<$",
        ">": r"$>$",
        "–": "--",
        "Δ": r"$\Delta$",
        "≥": r"$\ge$",
        "…": r"\ldots{}",
    }
)


TABLES = ("headline", "modules", "layers")


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return text.translate(_SPECIAL)


def latex_tables(runs: Sequence[Run]) -> dict[str, bytes]:
    """File name → table; tables without rows are left out."""
    texts = (headline_latex(runs), modules_latex(runs), layers_latex(runs))
    made = dict(zip(TABLES, texts, strict=True))
    return {f"{name}.tex": text.encode() for name, text in made.items() if text is not None}


def headline_latex(runs: Sequence[Run]) -> str | None:
    """Update sparsity by criterion, one row a run and view."""
    criteria = list(dict.fromkeys(key for run in runs for key in run.report.criteria))
    rows = []
    for run in runs:
        for view in dict.fromkeys(row.view for row in run.report.headlines):
            found = {row.criterion: row for row in run.report.headlines if row.view is view}
            compared = next(iter(found.values())).compared
            cells = [
                short_percent(found[key].compared - found[key].changed, found[key].compared)
                if key in found and found[key].compared
                else "–"
                for key in criteria
            ]
            rows.append([run.label, view.value, f"{compared:,}", *cells])
    if not rows:
        return None
    return _table(
        "headline",
        "Update sparsity (\\%): share of compared entries that did not change, by criterion.",
        runs,
        columns="ll" + "r" * (1 + len(criteria)),
        heads=[["run", "view", "entries", *criteria]],
        rows=rows,
    )


def modules_latex(runs: Sequence[Run]) -> str | None:
    """Update sparsity by module type, size-weighted and as a mean over tensors, one pair of columns a run."""
    return _rollup_table("modules", "module type", runs, lambda rollups: rollups.by_module)


def layers_latex(runs: Sequence[Run]) -> str | None:
    """The same by layer."""
    return _rollup_table("layers", "layer", runs, lambda rollups: rollups.by_layer)


def _rollup_table(
    name: str, title: str, runs: Sequence[Run], choose: Callable[[ViewRollups], Sequence[Rollup]]
) -> str | None:
    groups = [{group.key: group for group in choose(_shown(run))} for run in runs]
    keys = list(dict.fromkeys(key for found in groups for key in found))
    if not keys:
        return None
    asked = shared_question(runs)
    rows = [
        [
            key,
            *[cell for run, found in zip(runs, groups, strict=True) for cell in _cells(run, found.get(key))],
        ]
        for key in keys
    ]
    labels = [run.label if asked else f"{run.label} ({question(run.report)})" for run in runs]
    return _table(
        name,
        f"Update sparsity (\\%) by {title}: over all entries of the group, and as the unweighted mean over "
        "its tensors.",
        runs,
        columns="l" + "rrr" * len(runs),
        heads=[["", *labels], [title, *["entries", "sparsity", "mean"] * len(runs)]],
        rows=rows,
    )


def _cells(run: Run, group: Rollup | None) -> list[str]:
    counts = () if group is None else group.counts
    count = next((c for c in counts if c.total.criterion == run.report.mask_criterion), None)
    if group is None or count is None or not count.total.compared:
        return ["–" if group is None else f"{group.entries:,}", "–", "–"]
    weighted = short_percent(count.total.compared - count.total.changed, count.total.compared)
    mean = "–" if count.mean_sparsity is None else short_share(count.mean_sparsity)
    return [f"{group.entries:,}", weighted, mean]


def _shown(run: Run) -> ViewRollups:
    view = shown_view(run.report)
    return next(rollups for rollups in run.report.rollups if rollups.view is view)


def _table(
    name: str,
    caption: str,
    runs: Sequence[Run],
    *,
    columns: str,
    heads: Sequence[Sequence[str]],
    rows: Sequence[Sequence[str]],
) -> str:
    """A `table` environment; of two head lines the first spans three columns a run."""
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{caption} {' '.join(escape(line) for line in describe_runs(runs))}}}",
        rf"  \label{{tab:{name}}}",
        rf"  \begin{{tabular}}{{{columns}}}",
        r"    \toprule",
    ]
    if len(heads) == 2:
        spans = [rf"\multicolumn{{3}}{{c}}{{{escape(label)}}}" for label in heads[0][1:]]
        rules = [rf"\cmidrule(lr){{{3 * i + 2}-{3 * i + 4}}}" for i in range(len(spans))]
        lines += [rf"    & {' & '.join(spans)} \\", f"    {' '.join(rules)}"]
    lines += [rf"    {' & '.join(map(escape, heads[-1]))} \\", r"    \midrule"]
    lines += [rf"    {' & '.join(map(escape, row))} \\" for row in rows]
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)
