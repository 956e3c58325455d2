"""CSV, Parquet, Markdown, terminal and the record's JSON against the record; what a directory holds."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from sparsity_audit import diff
from sparsity_audit.errors import CorruptCheckpointError, MissingExtraError, OutputError
from sparsity_audit.report import parquet
from sparsity_audit.report.files import render_record
from sparsity_audit.report.output import OutputDirectory
from sparsity_audit.report.schema import DiffReport, GateResult, from_json, json_schema, to_json
from sparsity_audit.report.tables import (
    headline_rows,
    rollups_csv,
    share_text,
    shown_view,
    summary_markdown,
    tensor_columns,
    tensors_csv,
)
from sparsity_audit.report.terminal import print_report
from sparsity_audit.types import View


@pytest.fixture(scope="module")
def fp32(addition) -> DiffReport:
    return diff(addition / "base-fp32", addition / "grpo-fp32-seed0", criteria=["atol:1e-3"], workers=1)


@pytest.fixture(scope="module")
def bf16(addition) -> DiffReport:
    return diff(
        addition / "base-bf16", addition / "grpo-bf16-lr1e-4-seed0", lr=1e-4, weights_dtype="bf16", workers=1
    )


def _read(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode(), newline="")))


def test_the_tensors_csv_has_a_line_for_each_tensor_and_view_with_exact_counts(fp32) -> None:
    rows = _read(tensors_csv(fp32))
    assert [(row["name"], row["view"]) for row in rows] == [
        (t.name, view) for t in fp32.tensors for view in ("native", "served")
    ]
    for tensor, row in zip(fp32.tensors, rows[::2], strict=True):
        counts = {c.criterion: c.changed for c in tensor.summary.native.counts}
        assert {key: int(row[f"changed[{key}]"]) for key in fp32.criteria} == counts
        assert float(row["l2"]) == tensor.summary.native.l2
        assert row["shape"] == "x".join(map(str, tensor.shape))


def test_the_rollups_csv_adds_up_to_the_headline(fp32) -> None:
    rows = _read(rollups_csv(fp32))
    for view in View:
        headline = fp32.headline("atol:1e-3", view)
        members = [row for row in rows if row["view"] == view]
        for grouping in ("part", "module"):
            parts = [row for row in members if row["grouping"] == grouping and row["key"] != "all"]
            assert sum(int(row["changed[atol:1e-3]"]) for row in parts) == headline.changed
            assert sum(int(row["entries"]) for row in parts) == headline.compared
        cells = [row for row in members if row["grouping"] == "layer/module"]
        layers = [row for row in members if row["grouping"] == "layer"]
        assert sum(int(r["changed[value]"]) for r in cells) == sum(int(r["changed[value]"]) for r in layers)
    group = fp32.rollups[0].by_module[2]
    row = next(r for r in rows if (r["view"], r["grouping"], r["key"]) == ("native", "module", group.key))
    count = next(c for c in group.counts if c.total.criterion == "value")
    assert float(row["mean_density[value]"]) == count.mean_density


def test_a_criterion_that_a_group_lacks_is_an_empty_cell(fp32) -> None:
    wider = dataclasses.replace(fp32, criteria=(*fp32.criteria, "ulp:9"))
    assert {row["changed[ulp:9]"] for row in _read(rollups_csv(wider))} == {""}
    assert {row["changed[ulp:9]"] for row in _read(tensors_csv(wider))} == {""}


def test_parquet_has_the_columns_and_values_of_the_csv(fp32) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet` is not installed")
    data = parquet.tensors_parquet(fp32)
    table = pq.read_table(io.BytesIO(data))
    assert table.to_pydict() == {
        name: [v.value if isinstance(v, View) else v for v in values]
        for name, values in tensor_columns(fp32).items()
    }
    assert str(table.schema.field("entries").type) == "int64"
    assert str(table.schema.field("l2").type) == "double"
    assert str(table.schema.field("layer").type) == "int64"
    assert data == parquet.tensors_parquet(fp32)


def test_parquet_without_pyarrow_names_the_extra_before_anything_is_read(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"sparsity-audit\[parquet\]"):
        parquet.verify_parquet()


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 0, "–"), (0, 9, "0.0 %"), (9, 9, "100.0 %"), (1, 99_999, "less than 0.1 %"), (1, 8, "12.5 %")],
)
def test_shares_are_0_or_100_only_when_they_are(part, whole, text) -> None:
    assert share_text(part, whole) == text


def test_the_summary_says_criterion_view_and_both_weightings(fp32) -> None:
    gates = (GateResult(gate="min-sparsity 0.5", passed=False, detail="0.1 | 0.5"),)
    text = summary_markdown(dataclasses.replace(fp32, gates=gates)).decode()
    assert "| view | compared | bitwise | value | atol:1e-5 | rel:1e-3 | atol:1e-3 |" in text
    assert "sparsity (atol:1e-3, size-weighted) | mean over tensors |" in text
    assert "| base | 148,928 | 0 | 0 | 148,928 |" in text
    assert "**FAILED**: min-sparsity 0.5" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| native")}
    assert widths == {len(fp32.criteria) + 3}


def test_the_shown_view_is_native_where_there_is_no_other(bf16, fp32) -> None:
    assert shown_view(dataclasses.replace(bf16, view=View.SERVED)) is View.NATIVE
    assert shown_view(dataclasses.replace(fp32, view=View.SERVED)) is View.SERVED


def test_the_terminal_prints_the_headline_the_law_and_where_files_went(bf16, capsys, tmp_path) -> None:
    print_report(bf16, output=tmp_path / "audit", mask=None)
    printed = capsys.readouterr().out
    for cell in headline_rows(bf16)[0]:
        assert cell in printed
    assert "Half-ULP law at lr 0.0001, weights stored in bf16: 80.7 % frozen" in printed
    assert f"report written to {tmp_path / 'audit'}" in printed
    assert "mask written" not in printed


def test_a_record_survives_its_json(fp32, bf16) -> None:
    for report in (fp32, bf16):
        assert from_json(to_json(report)) == report
        assert to_json(from_json(to_json(report))) == to_json(report)


def test_the_json_fits_the_published_schema(fp32) -> None:
    import jsonschema

    jsonschema.validate(json.loads(to_json(fp32)), json_schema())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "has format and version None"),
        (b'{"format": "sparsity-audit/diff", "version": 99}', "expected: sparsity-audit/diff 1"),
        (b'{"format": "sparsity-audit/diff", "version": 1}', "field tool"),
    ],
)
def test_what_is_no_record_is_refused_with_its_place(data, message) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"somewhere/report\.json") as caught:
        from_json(data, source="somewhere/report.json")
    assert message in str(caught.value)


def test_a_record_with_a_wrong_count_names_the_field(fp32) -> None:
    record = json.loads(to_json(fp32))
    record["headlines"][0]["changed"] = "many"
    with pytest.raises(CorruptCheckpointError, match=r"headlines\.0\.changed"):
        from_json(json.dumps(record).encode())


def test_rendering_a_record_twice_gives_the_same_files(fp32) -> None:
    axes = {f"{t.name}.rows": np.zeros(t.shape[0], dtype=np.uint32) for t in fp32.tensors}
    first = render_record(fp32, axes=axes, figures=False, parquet=False)
    assert render_record(fp32, axes=axes, figures=False, parquet=False) == first
    assert set(first) == {
        *("tensors.csv", "rollups.csv", "summary.md", "report.html"),
        *("tables/headline.tex", "tables/modules.tex", "tables/layers.tex"),
    }


def test_files_in_folders_are_written_and_removed_again_but_nobody_elses(tmp_path) -> None:
    folder = tmp_path / "audit"
    OutputDirectory(folder, overwrite=False).finish(
        {"figures/headline.pdf": b"%PDF", "tables/headline.tex": b"x", "report.json": b"{}"}
    )
    (folder / "figures" / "mine.pdf").write_bytes(b"mine")
    with pytest.raises(OutputError, match="finished run"):
        OutputDirectory(folder, overwrite=False)
    OutputDirectory(folder, overwrite=True).clear()
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert left == ["figures/mine.pdf"]


def test_a_file_in_the_way_of_a_folder_is_an_output_error(tmp_path) -> None:
    (tmp_path / "figures").write_bytes(b"in the way")
    with pytest.raises(OutputError, match="figures"):
        OutputDirectory(tmp_path, overwrite=False).finish({"figures/headline.pdf": b"%PDF"})
