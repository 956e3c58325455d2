from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsity_audit
from sparsity_audit.report.html import render_html
from sparsity_audit.report.page_data import axis_criterion, axis_maps, script_json
from sparsity_audit.report.schema import DiffReport, LeftoverRecord, TolerancePoint, from_json, to_json
from sparsity_audit.report.svg_charts import delta_bins, tolerance_chart, tolerance_steps, ulp_chart
from sparsity_audit.types import View

HOSTILE = (
    "<script>alert(1)</script>",
    '"onmouseover="alert(1)',
    "</script><img src=x onerror=alert(1)>",
    "'quote' & <b>",
    "x" * 3000,
    "モデル.重み\u2028\u202e",
    "{{7*7}}",
)


@pytest.fixture(scope="module")
def wide(addition: Path) -> DiffReport:
    return sparsity_audit.diff(
        addition / "base-fp32", addition / "grpo-fp32-seed0", kernel="numpy", workers=1
    )


@pytest.fixture(scope="module")
def narrow(addition: Path, tmp_path_factory) -> tuple[DiffReport, dict[str, np.ndarray], Path]:
    from safetensors.numpy import load_file

    folder = tmp_path_factory.mktemp("narrow")
    report = sparsity_audit.diff(
        addition / "base-bf16",
        addition / "grpo-bf16-seed0",
        output=folder,
        kernel="numpy",
        workers=1,
        criteria=["value", "top:1%"],
    )
    return report, load_file(folder / "axis_counts.safetensors"), folder


class _Page(HTMLParser):
    """Tables as rows of text by caption, tags with attributes, and the embedded data."""

    def __init__(self, page: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self._open: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("meta", "link", "input", "br"):
            return
        self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "title":
            self.titles.append("")
        elif tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass
        if tag == "table":
            self.tables.setdefault(self._caption, self._rows)

    def handle_data(self, data: str) -> None:
        text = data.replace("\N{NO-BREAK SPACE}", " ")
        if self._open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self._open[-1:] == ["style"]:
            self.styles[-1] += data
        elif self._open[-1:] == ["title"]:
            self.titles[-1] += text
        elif "caption" in self._open:
            self._caption += text
        elif "td" in self._open or "th" in self._open:
            self._rows[-1][-1] += text

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def test_every_headline_stands_with_its_counts(wide) -> None:
    page = _Page(render_html(wide, axes={}))
    head, *rows = page.tables["Update sparsity: share of compared entries that did not change"]
    assert head[1:] == list(wide.criteria)
    for view, row in zip((View.NATIVE, View.SERVED), rows, strict=True):
        assert row[0].startswith(view.value)
        for criterion, cell in zip(wide.criteria, row[1:], strict=True):
            found = wide.headline(criterion, view)
            assert found is not None
            assert f"{found.changed:,} of {found.compared:,} changed" in cell
            assert f"{100 * (found.sparsity or 0):.1f} %" in cell


def test_accounts_rollups_and_heat_map_equal_the_record(narrow) -> None:
    report, axes, _ = narrow
    page = _Page(render_html(report, axes=axes))
    accounts = page.tables["Entries: compared + skipped + left over = total"]
    for row, account in zip(accounts[1:], (report.accounts.base, report.accounts.tuned), strict=True):
        numbers = [int(cell.replace(",", "")) for cell in row[1:]]
        assert numbers == [account.compared, account.skipped, account.leftover, account.total]
        assert sum(numbers[:3]) == numbers[3]
    modules = {row[0]: row for row in page.tables["By module (value)"][1:]}
    for group in report.rollups[0].by_module:
        total = next(c.total for c in group.counts if c.total.criterion == "value")
        assert modules[group.key][3:5] == [f"{total.compared:,}", f"{total.changed:,}"]
    details = {attrs["title"] for tag, attrs in page.tags if tag == "td" and "title" in attrs}
    for group in report.rollups[0].by_layer_and_module:
        total = next(c.total for c in group.counts if c.total.criterion == "value")
        layer, module = group.key.split("/")
        start = f"layer {layer}, {module}: {total.changed:,} of {total.compared:,} changed"
        assert any(detail is not None and detail.startswith(start) for detail in details), start


def test_the_embedded_tensors_equal_the_record(wide) -> None:
    data = _Page(render_html(wide, axes={})).data
    assert data["name"] == [t.name for t in wide.tensors]
    assert data["entries"] == [t.entries for t in wide.tensors]
    for view in View:
        for criterion in wide.criteria:
            counts = [
                next(c.changed for c in summary.counts if c.criterion == criterion)
                for t in wide.tensors
                if (summary := t.summary.served if view is View.SERVED else t.summary.native) is not None
            ]
            assert data["views"][view]["changed"][criterion] == counts
    assert data["views"]["native"]["l2"] == [t.summary.native.l2 for t in wide.tensors]
    assert [data["kind"]["labels"][i] for i in data["kind"]["at"]] == [t.summary.kind for t in wide.tensors]


def test_charts_name_the_counts_of_the_record(wide) -> None:
    page = _Page(render_html(wide, axes={}))
    titles = "\n".join(page.titles)
    for record in wide.precision:
        for found in record.ulps.bins:
            for what, count in (("outward", found.outward), ("inward", found.inward)):
                if count:
                    assert re.search(rf"ULP {what}: {count:,} \(", titles), (what, count)
        for hidden in record.hidden:
            if hidden.criterion.startswith("atol"):
                changed = hidden.value_changed - hidden.hidden
                assert f"{hidden.criterion}: {changed:,} of {record.entries:,} changed, counted" in titles
        rows = page.tables[f"Change rate by |w_base| ({record.view.value}, {record.dtype.label})"][1:]
        assert [row[1:3] for row in rows] == [[f"{r.entries:,}", f"{r.changed:,}"] for r in record.rates]


def test_a_count_that_is_only_bounded_is_never_one_number(wide) -> None:
    record = dataclasses.replace(
        wide.precision[0],
        tolerance=(
            TolerancePoint(criterion="atol:0.4", exponent=-1, lower=0, upper=0, is_exact=True),
            TolerancePoint(criterion="atol:0.03", exponent=-5, lower=10, upper=40, is_exact=False),
            TolerancePoint(criterion="atol:0.01", exponent=-6, lower=90, upper=90, is_exact=True),
        ),
    )
    assert [(p.exponent, p.lower, p.upper) for p in tolerance_steps(record)] == [
        *[(-1, 0, 0), (-2, 0, 0), (-3, 0, 0), (-4, 0, 0)],
        *[(-5, 10, 40), (-6, 90, 90)],
    ]
    bins = {b.exponent: (b.lower, b.upper) for b in delta_bins(record)}
    assert bins[-5] == (10, 40)
    assert bins[-6] == (50, 80)
    assert "between 10 and 40 entries" in tolerance_chart(record)


def test_a_record_without_changes_has_no_ulp_chart(wide) -> None:
    record = wide.precision[0]
    still = dataclasses.replace(record, ulps=dataclasses.replace(record.ulps, bins=()), tolerance=())
    assert ulp_chart(still, number=0) == tolerance_chart(still) == ""


def test_maps_hold_the_counts_of_the_record(narrow) -> None:
    report, axes, _ = narrow
    maps = axis_maps(report, axes)
    assert maps
    scores = [found.row_score or 0 for found in maps]
    assert scores == sorted(scores, reverse=True)
    for found in maps:
        tensor = report.tensors[found.index]
        changed = next(c.changed for c in tensor.summary.native.counts if c.criterion == "value")
        assert sum(found.rows) == sum(found.cols) == changed


def test_maps_name_the_criterion_that_their_counts_follow(addition, tmp_path) -> None:
    from safetensors.numpy import load_file

    report = sparsity_audit.diff(
        addition / "base-bf16",
        addition / "grpo-bf16-seed0",
        output=tmp_path / "out",
        criteria=["top:1%"],
        kernel="numpy",
        workers=1,
    )
    axes = load_file(tmp_path / "out" / "axis_counts.safetensors")
    criterion = axis_criterion(report)
    assert f"Changed share ({criterion}, native view)" in render_html(report, axes=axes).decode()
    for found in axis_maps(report, axes):
        counts = report.tensors[found.index].summary.native.counts
        assert sum(found.rows) == next(c.changed for c in counts if c.criterion == criterion)
        assert report.structure is not None
        stripes = next(s for s in report.structure.stripes if s.name == found.name)
        assert (found.row_score, found.col_score) == (stripes.rows.observed, stripes.cols.observed)


def test_bins_of_a_long_axis_cover_every_row_once(narrow) -> None:
    report, _, _ = narrow
    name = report.tensors[0].name
    rows = np.arange(1001, dtype=np.uint32) % 7
    axes = {f"{name}.rows": rows, f"{name}.cols": np.full(10, rows.sum() // 10, dtype=np.uint32)}
    (found,) = axis_maps(report, axes)
    size = len(found.rows)
    edges = [b * 1001 // size for b in range(size + 1)]
    expected = [int(rows[a:b].sum()) for a, b in pairwise(edges)]
    assert list(found.rows) == expected


def test_hostile_names_stay_text(wide) -> None:
    tensors = tuple(
        dataclasses.replace(t, name=name, tuned_name=name + "'")
        for t, name in zip(wide.tensors, HOSTILE, strict=False)
    )
    report = dataclasses.replace(
        wide,
        base=dataclasses.replace(wide.base, reference=HOSTILE[0], resolved=HOSTILE[2], notes=HOSTILE),
        tensors=tensors,
        findings=HOSTILE,
        leftovers=tuple(
            LeftoverRecord(side="base", name=name, num_entries=1, reason="only here", detail=name)
            for name in HOSTILE
        ),
    )
    page = _Page(render_html(report, axes={}))
    assert len(page.scripts) == 2
    assert not [tag for tag, _ in page.tags if tag in ("img", "b")]
    assert not [attr for _, attrs in page.tags for attr in attrs if attr.startswith("on") or attr == "style"]
    assert page.data["name"] == list(HOSTILE)
    assert [row[0] for row in page.tables["Skipped and left over"][1:]] == list(HOSTILE)


def test_script_json_cannot_leave_its_element() -> None:
    text = script_json({"name": list(HOSTILE)})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"name": list(HOSTILE)}


def test_the_policy_allows_one_script_one_style_sheet_and_no_request(narrow) -> None:
    report, axes, _ = narrow
    page = _Page(render_html(report, axes=axes))
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for rule, text in (("script-src", page.scripts[1]), ("style-src", page.styles[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    links = [a.get("href") or a.get("src") for _, a in page.tags if "href" in a or "src" in a]
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    anchors = {a["id"] for _, a in page.tags if "id" in a}
    assert all(link[1:] in anchors for link in links if link and link.startswith("#"))


def test_the_same_record_gives_the_same_bytes(narrow) -> None:
    report, axes, folder = narrow
    page = render_html(report, axes=axes)
    assert page == render_html(from_json(to_json(report)), axes=dict(reversed(axes.items())))
    assert page == (folder / "report.html").read_bytes()


def test_a_report_of_counts_alone_says_so(addition) -> None:
    report = sparsity_audit.diff(
        addition / "base-bf16", addition / "sft-bf16", stats="counts", kernel="numpy", workers=1
    )
    page = render_html(report, axes={}).decode()
    assert "This run counted criteria alone" in page
    assert 'id="precision"' not in page


def test_a_page_for_300_tensors_stays_below_half_a_megabyte(wide) -> None:
    many = tuple(
        dataclasses.replace(t, name=f"model.layers.{n}.{t.name}", tuned_name=f"model.layers.{n}.{t.name}")
        for n in range(10)
        for t in wide.tensors
    )
    assert len(many) == 300
    report = dataclasses.replace(wide, tensors=many)
    axes = {f"{t.name}.{axis}": np.arange(2048, dtype=np.uint32) for t in many for axis in ("rows", "cols")}
    assert len(render_html(report, axes=axes)) < 500_000


def test_jinja_is_imported_only_when_a_page_is_rendered() -> None:
    code = "import sys, sparsity_audit.report.html; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
