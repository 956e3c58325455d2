"""Many pairs as one table: CSV, Markdown and LaTeX, pure functions of the record.

Contract: CSV holds exact counts and floats that read back equal; Markdown and LaTeX round to one decimal and
never to 0 or 100 when it is neither. Every table says which rule and view its numbers have.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from sparsity_audit.report.pairs import PairRow, PairsReport
from sparsity_audit.stats.findings import percent
from sparsity_audit.stats.rollup import Headline

__all__ = ["pairs_csv", "pairs_latex", "pairs_markdown"]

_CSV_HEAD = (
    *("name", "algorithm", "kind", "status", "rule", "view", "compared", "changed", "sparsity_percent"),
    *("expected_percent", "tolerance_points", "difference_points", "passed"),
    *("base", "tuned", "base_dtypes", "tuned_dtypes", "source", "note", "message"),
)


def pairs_csv(report: PairsReport) -> bytes:
    """One line a pair; then one column for each view and criterion that some pair counted, in percent."""
    keys = list(dict.fromkeys((h.view, h.criterion) for row in report.rows for h in row.headlines))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_CSV_HEAD, *[f"sparsity_percent[{view}:{key}]" for view, key in keys]])
    for row in report.rows:
        found = {(h.view, h.criterion): _percent(h) for h in row.headlines}
        writer.writerow([*_csv_cells(row), *[found.get(key) for key in keys]])
    return text.getvalue().encode()


def _csv_cells(row: PairRow) -> list[object]:
    measured, expected = row.measured, row.expected
    return [
        *(row.name, row.algorithm, row.kind, row.status),
        *((measured.rule, measured.view, measured.compared, measured.changed) if measured else [None] * 4),
        None if measured is None else measured.percent,
        *((expected.sparsity_percent, expected.tolerance_points) if expected else [None] * 2),
        *((expected.difference_points, expected.passed) if expected else [None] * 2),
        row.base_resolved or row.base,
        row.tuned_resolved or row.tuned,
        " ".join(row.base_dtypes),
        " ".join(row.tuned_dtypes),
        *(row.source, row.note, row.message),
    ]


def _percent(row: Headline) -> float | None:
    return 100 * (row.compared - row.changed) / row.compared if row.compared else None


def pairs_markdown(report: PairsReport) -> bytes:
    """Title, table, then what every number stands for and what went wrong."""
    head = ["pair", "algorithm", "kind", "sparsity", "expected", "difference", "rule", "compared"]
    rows = [[_md(cell) for cell in _printed(row)] for row in report.rows]
    lines = [f"# {report.title or report.label}", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "|".join("---" for _ in head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "Sparsity: share of compared entries that did **not** change.", ""]
    lines += [f"- {sentence}" for sentence in _sentences(report)]
    return ("\n".join(lines) + "\n").encode()


def _md(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _printed(row: PairRow) -> list[str]:
    expected = row.expected
    wanted, difference = "–", "–"
    if expected is not None:
        wanted = f"{expected.sparsity_percent:g} ± {expected.tolerance_points:g} %"
        if expected.difference_points is not None:
            verdict = "" if expected.passed else " (missed)"
            difference = f"{expected.difference_points:+.1f}{verdict}".replace("-", "−")
    cells = [row.name, row.algorithm or "–", row.kind or "–", _sparsity(row), wanted, difference]
    if row.measured is None:
        return [*cells, "–", "–"]
    return [*cells, f"{row.measured.rule}, {row.measured.view}", f"{row.measured.compared:,}"]


def _sparsity(row: PairRow) -> str:
    if row.measured is None:
        return row.status
    return (
        percent(row.measured.compared - row.measured.changed, row.measured.compared)
        if row.measured.compared
        else "–"
    )


def _sentences(report: PairsReport) -> list[str]:
    """Rules, sources, caveats and errors, each once."""
    presets = [row.preset for row in report.rows if row.preset is not None]
    found = [f"{preset.preset}: {preset.rule} ({preset.source})" for preset in presets]
    found += [f"expected values: {report.source}"] if report.source else []
    found += [report.note] if report.note else []
    for row in report.rows:
        if row.status != "done":
            found.append(f"{row.name} {row.status}: {' '.join(row.message.split())}")
            continue
        found.append(
            f"{row.name}: {row.base_resolved} ({', '.join(row.base_dtypes)}) → "
            f"{row.tuned_resolved} ({', '.join(row.tuned_dtypes)})"
        )
        if row.note:
            found.append(f"{row.name}: {row.note}")
        if row.preset is not None:
            if row.preset.dropped:
                count, entries = len(row.preset.dropped), sum(t.entries for t in row.preset.dropped)
                found.append(f"{row.name}: {count} tensors ({entries:,} entries) left out by the rule")
            found += [f"{row.name}: {caveat}" for caveat in row.preset.caveats]
    return list(dict.fromkeys(found))


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "|": "$|$"}
    | {"±": r"$\pm$", "≤": r"$\le$", "·": r"$\cdot$", "→": r"$\to$", "−": "$-$", "–": "--", "Δ": r"$\Delta$"}
)


def pairs_latex(report: PairsReport) -> bytes:
    """A booktabs table; its caption says which rule, view and source the numbers have."""
    columns: list[tuple[str, str, Callable[[PairRow], str]]] = [
        ("l", "Pair", lambda row: row.name),
        ("l", "Algorithm", lambda row: row.algorithm or "–"),
        ("l", "Kind", lambda row: row.kind or "–"),
        ("r", "Sparsity (%)", lambda row: _sparsity(row).removesuffix(" %")),
    ]
    if any(row.expected for row in report.rows):
        columns.append(("r", "Published (%)", lambda row: _printed(row)[4].removesuffix(" %")))
    lines = [
        *(r"\begin{table}", r"\centering", rf"\caption{{{_tex(_caption(report))}}}"),
        rf"\begin{{tabular}}{{{''.join(align for align, _, _ in columns)}}}",
        r"\toprule",
        " & ".join(_tex(title) for _, title, _ in columns) + r" \\",
        r"\midrule",
        *[" & ".join(_tex(cell(row)) for _, _, cell in columns) + r" \\" for row in report.rows],
        *(r"\bottomrule", r"\end{tabular}", r"\end{table}"),
    ]
    return ("\n".join(lines) + "\n").encode()


def _tex(text: str) -> str:
    return text.translate(_LATEX)


def _caption(report: PairsReport) -> str:
    shown = [row.measured for row in report.rows if row.measured is not None]
    rules = list(dict.fromkeys(f"{m.rule} ({m.view} view)" for m in shown))
    rules += list(
        dict.fromkeys(f"{row.preset.preset}: {row.preset.rule}" for row in report.rows if row.preset)
    )
    parts = [report.title or "Update sparsity: share of compared entries that did not change"]
    parts += ["; ".join(rules)] if rules else []
    parts += [f"Published values: {report.source}"] if report.source else []
    return ". ".join(part.rstrip(".") for part in parts) + "."
