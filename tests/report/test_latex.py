"""LaTeX cells against the record, and the shape of the tables."""

from __future__ import annotations

import dataclasses
import re

import pytest

from sparsity_audit import diff
from sparsity_audit.report.latex import (
    TABLES,
    escape,
    headline_latex,
    latex_tables,
    layers_latex,
    modules_latex,
)
from sparsity_audit.report.runs import Run, label_runs, short_percent, short_share
from sparsity_audit.report.schema import DiffReport


@pytest.fixture(scope="module")
def bf16(addition) -> DiffReport:
    return diff(addition / "base-bf16", addition / "grpo-bf16-lr1e-4-seed0", workers=1)


@pytest.fixture(scope="module")
def both(bf16, addition) -> tuple[Run, ...]:
    return label_runs([bf16, diff(addition / "base-fp32", addition / "grpo-fp32-seed0", workers=1)])


def _rows(text: str) -> list[list[str]]:
    body = text.partition("\\midrule\n")[2].partition("    \\bottomrule")[0]
    return [re.sub(r" \\\\$", "", line.strip()).split(" & ") for line in body.splitlines()]


def test_headline_cells_are_the_records(both) -> None:
    rows = _rows(headline_latex(both))
    expected = []
    for run in both:
        for view in dict.fromkeys(row.view for row in run.report.headlines):
            found = [row for row in run.report.headlines if row.view is view]
            shares = [short_percent(row.compared - row.changed, row.compared) for row in found]
            expected.append([run.label, view.value, "148,928", *map(escape, shares)])
    assert rows == expected
    assert rows[0][3:5] == ["81.5", "81.5"]


def test_a_share_that_is_almost_nothing_is_not_printed_as_nothing(bf16) -> None:
    rows = tuple(
        dataclasses.replace(row, compared=100_000, changed=99_999) if row.criterion == "value" else row
        for row in bf16.headlines
    )
    cells = _rows(headline_latex(label_runs([dataclasses.replace(bf16, headlines=rows)])))[0]
    assert cells[3 + bf16.criteria.index("value")] == "$<$0.1"


def test_a_criterion_that_one_run_lacks_is_a_dash(bf16, addition) -> None:
    other = diff(addition / "base-bf16", addition / "sft-bf16", criteria=["ulp:2"], workers=1)
    rows = _rows(headline_latex(label_runs([bf16, other])))
    assert rows[0][-1] == "--"
    assert rows[1][-1] != "--"


@pytest.mark.parametrize(("table", "group"), [(modules_latex, "by_module"), (layers_latex, "by_layer")])
def test_roll_up_cells_are_the_records(bf16, table, group) -> None:
    rows = _rows(table(label_runs([bf16])))
    expected = []
    for rollup in getattr(bf16.rollups[0], group):
        count = next(c for c in rollup.counts if c.total.criterion == "value")
        weighted = short_percent(count.total.compared - count.total.changed, count.total.compared)
        cells = [f"{rollup.entries:,}", weighted, short_share(count.mean_sparsity)]
        expected.append([escape(rollup.key), *map(escape, cells)])
    assert rows == expected


def test_every_row_has_as_many_cells_as_the_table_has_columns(both) -> None:
    for name, data in latex_tables(both).items():
        text = data.decode()
        columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text).group(1)
        assert {len(row) for row in _rows(text)} == {len(columns)}, name
        assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_captions_state_criterion_dtypes_and_references(both) -> None:
    for data in latex_tables(both).values():
        text = data.decode()
        assert "criterion value, native view" in text
        assert f"base {escape(both[0].report.base.resolved)} (bf16)" in text


def test_tables_without_rows_are_left_out(bf16) -> None:
    flat = dataclasses.replace(bf16, rollups=tuple(dataclasses.replace(r, by_layer=()) for r in bf16.rollups))
    assert set(latex_tables(label_runs([flat]))) == {"headline.tex", "modules.tex"}
    assert set(latex_tables(label_runs([bf16]))) == {f"{name}.tex" for name in TABLES}


def test_names_from_a_checkpoint_cannot_break_the_table() -> None:
    assert escape(r"a_b & 50% \x {y} #1 $z ^ ~") == (
        r"a\_b \& 50\% \textbackslash{}x \{y\} \#1 \$z \textasciicircum{} \textasciitilde{}"
    )
