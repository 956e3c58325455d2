"""Many pairs: the YAML file, what a run records, the tables and the figure."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml

from sparsity_audit.api.pairs import diff_pairs
from sparsity_audit.api.pairs_file import read_pairs
from sparsity_audit.errors import UsageError
from sparsity_audit.report.pairs import (
    ExpectedRecord,
    Measured,
    PairRow,
    PairsReport,
    pairs_json_schema,
    pairs_to_json,
)
from sparsity_audit.report.pairs_figure import render_strip
from sparsity_audit.report.pairs_tables import pairs_csv, pairs_latex, pairs_markdown
from sparsity_audit.types import View

QUICK = {"figures": False, "kernel": "numpy", "workers": 1}


@pytest.fixture
def write_pairs(tmp_path: Path, addition: Path) -> Callable[..., Path]:
    """A YAML file beside a link to the frozen checkpoints; entries default to a small RL pair."""
    (tmp_path / "checkpoints").symlink_to(addition)

    def write(*entries: dict, **top: object) -> Path:
        usual = {"base": "checkpoints/base-bf16", "tuned": "checkpoints/grpo-bf16-seed0"}
        text = yaml.safe_dump({"pairs": [usual | entry for entry in entries], **top}, allow_unicode=True)
        path = tmp_path / "pairs.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def rows_of(report: PairsReport) -> dict[str, PairRow]:
    return {row.name: row for row in report.rows}


def test_paths_are_relative_to_the_file_and_reports_are_normal_ones(write_pairs, tmp_path, monkeypatch):
    path = write_pairs({"name": "one", "algorithm": "GRPO", "kind": "RL"})
    monkeypatch.chdir("/")
    report = diff_pairs(path, tmp_path / "out", **QUICK)
    (row,) = report.rows
    assert (row.status, row.algorithm, row.kind, row.report) == ("done", "GRPO", "RL", "one/report.json")
    single = json.loads((tmp_path / "out" / row.report).read_bytes())
    value = next(h for h in single["headlines"] if h["criterion"] == "value" and h["view"] == "native")
    assert (row.measured.compared, row.measured.changed) == (value["compared"], value["changed"])
    assert {p.name for p in (tmp_path / "out" / "one").iterdir()} >= {
        "report.json",
        "run.json",
        "tensors.csv",
    }


def test_a_hub_name_never_becomes_a_directory_below_the_working_one(
    write_pairs, tmp_path, monkeypatch, addition
):
    (tmp_path / "elsewhere" / "org").mkdir(parents=True)
    shutil.copytree(addition / "base-bf16", tmp_path / "elsewhere" / "org" / "model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (entry,) = read_pairs(write_pairs({"name": "x", "base": "org/model", "tuned_revision": None})).pairs
    assert entry.base == "hf://org/model"
    entry = read_pairs(write_pairs({"name": "x", "base": "org/model", "base_revision": "v1"})).pairs[0]
    assert entry.base == "hf://org/model@v1"


def test_one_failing_pair_does_not_lose_the_others(write_pairs, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"\x10\x00")
    path = write_pairs(
        {"name": "corrupt", "tuned": "broken"},
        {"name": "missing", "tuned": "./nowhere"},
        {"name": "same", "tuned": "checkpoints/base-bf16"},
        {"name": "good"},
    )
    notes: list[str] = []
    report = diff_pairs(path, tmp_path / "out", on_note=notes.append, **QUICK)
    rows = rows_of(report)
    assert [row.status for row in report.rows] == ["failed", "failed", "failed", "done"]
    assert "model.safetensors" in rows["corrupt"].message
    assert "no such file or directory" in rows["missing"].message
    assert "the same checkpoint" in rows["same"].message
    assert len(report.failed) == sum("failed" in text for text in notes) == 3
    assert rows_of(report)["good"].measured.sparsity is not None


def test_expectations_are_judged_by_the_preset_or_by_the_criterion_they_name(write_pairs, tmp_path):
    found = diff_pairs(write_pairs({"name": "probe", "preset": "zhu2025"}), tmp_path / "probe", **QUICK).rows[
        0
    ]
    percent = 100 * found.preset.sparsity
    path = write_pairs(
        {"name": "met", "preset": "zhu2025", "expected": {"sparsity": percent + 0.9}},
        {"name": "missed", "preset": "zhu2025", "expected": {"sparsity": percent + 1.1}},
        {"name": "wide", "preset": "zhu2025", "expected": {"sparsity": percent - 1.1, "tolerance": 1.2}},
        {"name": "other", "expected": {"sparsity": 100, "tolerance": 0, "criterion": "atol:10"}},
        {"name": "plain", "criteria": ["ulp:3"], "expected": {"sparsity": 0}},
    )
    report = diff_pairs(path, tmp_path / "out", **QUICK)
    rows = rows_of(report)
    assert {n: r.expected.passed for n, r in rows.items()} == {
        "met": True, "missed": False, "wide": True, "other": True, "plain": False,
    }  # fmt: skip
    assert [row.name for row in report.missed] == ["missed", "plain"]
    assert rows["met"].measured.rule == "zhu2025"
    assert rows["met"].expected.difference_points == pytest.approx(-0.9, abs=1e-9)  # one rounded subtraction
    assert (rows["other"].measured.rule, rows["other"].expected.measured.rule) == ("value", "atol:10")
    assert rows["plain"].measured.rule == rows["plain"].expected.measured.rule == "ulp:3"


def test_finished_pairs_are_read_and_not_run_again(write_pairs, tmp_path):
    path = write_pairs({"name": "one"}, {"name": "two", "tuned": "checkpoints/grpo-bf16-seed1"})
    ran: list[str] = []
    options = QUICK | {"on_report": lambda entry, _report: ran.append(entry.name)}
    first = diff_pairs(path, tmp_path / "out", only=["one"], **options)
    assert [row.status for row in first.rows] == ["done", "skipped"]
    before = (tmp_path / "out" / "one" / "run.json").read_bytes()
    second = diff_pairs(path, tmp_path / "out", **options)
    assert ran == ["one", "two"]
    assert [row.status for row in second.rows] == ["done", "done"]
    assert (tmp_path / "out" / "one" / "run.json").read_bytes() == before
    third = diff_pairs(path, tmp_path / "out", only=["two"], overwrite=True, **options)
    assert ran == ["one", "two", "two"]
    assert rows_of(third)["two"].measured == rows_of(second)["two"].measured


@pytest.mark.parametrize("how", ["question", "input", "reference"])
def test_a_report_about_other_inputs_is_refused_and_overwrite_measures_again(
    write_pairs, tmp_path, how, addition
):
    copy = tmp_path / "copy"
    shutil.copytree(addition / "grpo-bf16-seed0", copy)
    path = write_pairs({"name": "one", "tuned": "copy"})
    diff_pairs(path, tmp_path / "out", **QUICK)
    if how == "question":
        path = write_pairs({"name": "one", "tuned": "copy", "criteria": ["ulp:1"]})
    elif how == "reference":
        path = write_pairs({"name": "one"})
    else:
        shutil.copyfile(addition / "grpo-bf16-seed1" / "model.safetensors", copy / "model.safetensors")
    (row,) = diff_pairs(path, tmp_path / "out", **QUICK).rows
    assert row.status == "failed"
    what = {"question": "criteria", "input": "files", "reference": "tuned"}[how]
    assert f"holds a report with other {what}" in row.message
    assert "--overwrite" in row.message
    (row,) = diff_pairs(path, tmp_path / "out", overwrite=True, **QUICK).rows
    assert row.status == "done"


def test_a_table_is_rendered_again_without_the_checkpoints(write_pairs, tmp_path, addition):
    shutil.copytree(addition / "grpo-bf16-seed0", tmp_path / "copy")
    path = write_pairs({"name": "one", "tuned": "./copy"})
    first = diff_pairs(path, tmp_path / "out", **QUICK)
    shutil.rmtree(tmp_path / "copy")
    assert diff_pairs(path, tmp_path / "out", **QUICK) == first
    (row,) = diff_pairs(path, tmp_path / "out", overwrite=True, **QUICK).rows
    assert row.status == "failed"


def test_the_table_of_an_interrupted_run_holds_what_was_measured(write_pairs, tmp_path):
    path = write_pairs({"name": "one"}, {"name": "two"})

    def stop(number: int, _count: int, _entry: object) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diff_pairs(path, tmp_path / "out", on_pair=stop, **QUICK)
    found = json.loads((tmp_path / "out" / "pairs.json").read_bytes())
    assert [row["status"] for row in found["rows"]] == ["done", "skipped"]


def test_a_skipped_pair_runs_by_its_full_name_alone(write_pairs, tmp_path):
    path = write_pairs({"name": "big", "skip": "too large"}, {"name": "small"})
    report = diff_pairs(path, tmp_path / "a", only=["*"], **QUICK)
    assert [(r.status, r.message) for r in report.rows] == [("skipped", "too large"), ("done", "")]
    report = diff_pairs(path, tmp_path / "b", only=["big"], **QUICK)
    assert [r.status for r in report.rows] == ["done", "skipped"]
    with pytest.raises(UsageError, match=r"matches no pair of pairs\.yaml"):
        diff_pairs(path, tmp_path / "c", only=["bg"], **QUICK)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a/b"}, "pair 1, name: 'a/b'"),
        ({"name": "figures"}, "pair 1, name: 'figures'"),
        ({"name": None}, "pair 1, name: None"),
        ({"name": "x", "algoritm": "PPO"}, "pair 'x': unknown key algoritm"),
        ({"name": "x", "base": 3}, "pair 'x', base: 3"),
        ({"name": "x", "base": "org/model@a b"}, "pair 'x', base: 'a b' is not a branch"),
        ({"name": "x", "base_revision": "main"}, "base_revision: given for a local path"),
        ({"name": "x", "base": "org/model@a", "base_revision": "b"}, "base_revision: 'b'"),
        ({"name": "x", "preset": "smith2020"}, "preset: 'smith2020'"),
        ({"name": "x", "criteria": "value"}, "criteria: is a str"),
        ({"name": "x", "criteria": ["atoll:1"]}, "criteria: 'atoll:1' is not understood"),
        ({"name": "x", "view": "serve"}, "view: 'serve'"),
        ({"name": "x", "lr": -1}, "lr: -1"),
        ({"name": "x", "lr": True}, "lr: True"),
        ({"name": "x", "weights_dtype": "fp16"}, "weights_dtype: 'fp16'"),
        ({"name": "x", "maps": ["abc"]}, "maps: 'abc'"),
        ({"name": "x", "kind": 3}, "kind: is a int"),
        ({"name": "x", "expected": 80}, "expected: is a int"),
        ({"name": "x", "expected": {"tolerance": 1}}, "expected: has no sparsity"),
        ({"name": "x", "expected": {"sparsity": 101}}, "sparsity: 101"),
        ({"name": "x", "expected": {"sparsity": 80, "tolerance": -1}}, "tolerance: -1"),
        ({"name": "x", "expected": {"sparsity": 80, "criterium": "value"}}, "unknown key criterium"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_pair_and_key(write_pairs, entry, message):
    with pytest.raises(UsageError) as caught:
        read_pairs(write_pairs(entry))
    assert "pairs.yaml" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a", "is a list"),
        ("pairs: []", "lists no pairs"),
        ("pairs: [a", "is not YAML in line"),
        ("paris: [1]", "unknown key paris"),
        ("pairs: [{name: x, view: native, view: served}]", "line 1: view stands twice"),
        ("pairs: [3]", "pair 1: is a int"),
        ("defaults: {name: x}\npairs: [{}]", "defaults: unknown key name"),
        ("pairs: [{name: a, base: ./x, tuned: ./y}, {name: A, base: ./x, tuned: ./y}]", "is named like 'a'"),
        ("pairs: [{name: a, base: ./x, tuned: ./y}, {name: a, base: ./x, tuned: ./y}]", "occurs twice"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, text, message):
    path = tmp_path / "pairs.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_pairs(path)
    assert message in str(caught.value)


def test_yaml_numbers_without_a_point_are_numbers(write_pairs):
    """YAML 1.1 reads 1e-6 as text."""
    (entry,) = read_pairs(write_pairs({"name": "x", "lr": "1e-6", "weights_dtype": "bf16"})).pairs
    assert entry.lr == 1e-6


def test_defaults_hold_where_a_pair_says_nothing(write_pairs):
    path = write_pairs(
        {"name": "x"}, {"name": "y", "kind": "SFT"}, defaults={"kind": "RL", "preset": "zhu2025"}, title="T"
    )
    found = read_pairs(path)
    assert found.title == "T"
    assert [(p.kind, p.preset) for p in found.pairs] == [("RL", "zhu2025"), ("SFT", "zhu2025")]


PUBLISHED = {
    "mukherjee2025": {
        "tulu-3-8b-dpo": 81.4, "tulu-3-70b-dpo": 95.2, "deepseek-math-7b-rl": 68.5, "deepseek-r1-zero": 86.0,
        "mistral-orpo-beta": 76.9, "eurus-7b-kto": 96.0, "llama-3-8b-kto": 81.2,
        "llama-3-8b-base-simpo": 86.5,
        "llama-3-8b-instruct-simpo": 76.4, "mistral-7b-instruct-simpo": 89.1,
        "math-shepherd-mistral-7b-rl": 80.8, "eurus-2-7b-prime": 77.0,
    },
    "zhu2025": {
        "deepscaler-1.5b": 53.8, "deepcoder-1.5b": 45.5, "archer-code-1.5b": 52.5, "prorl-1.5b": 38.4,
        "prorl-v2-1.5b": 36.3, "klear-reasoner-8b": 69.5, "polaris-4b": 79.3, "polaris-7b": 61.7,
        "ulorl-30b-a3b": 91.7,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_published_sets_hold_the_papers_figures_with_their_preset_and_source(name):
    found = read_pairs(f"published:{name}")
    assert {p.name: p.expected.sparsity for p in found.pairs} == PUBLISHED[name]
    assert all(p.expected.tolerance == 1.0 and p.preset == name and p.kind == "RL" for p in found.pairs)
    assert "arXiv" in found.source
    # Nobody told us a commit, so none may stand there.
    assert all(re.fullmatch(r"hf://[\w.-]+/[\w.-]+", ref) for p in found.pairs for ref in (p.base, p.tuned))
    too_big = {"tulu-3-70b-dpo", "deepseek-r1-zero", "prorl-1.5b", "ulorl-30b-a3b"}
    assert {p.name for p in found.pairs if p.skip} == too_big & PUBLISHED[name].keys()


def test_pairs_that_share_a_base_stand_together_so_that_eviction_keeps_one_pair_at_most():
    for name in PUBLISHED:
        bases = [p.base for p in read_pairs(f"published:{name}").pairs if p.skip is None]
        changes = sum(one != other for one, other in itertools.pairwise(bases))
        assert changes == len(set(bases)) - 1


def test_an_unknown_published_set_names_those_there_are():
    with pytest.raises(UsageError, match="published:mukherjee2025, published:zhu2025"):
        read_pairs("published:table1")


def known() -> PairsReport:
    """A record with known numbers: met, missed, failed and skipped."""

    def row(name: str, kind: str, changed: int, expected: ExpectedRecord | None, **more) -> PairRow:
        measured = Measured(
            rule="value", view=View.NATIVE, compared=1000, changed=changed, sparsity=(1000 - changed) / 1000
        )
        return PairRow(
            name=name, algorithm="DPO_&_GRPO" if kind == "RL" else "SFT", kind=kind, base="org/base",
            tuned="org/tuned", status="done", base_resolved="hf://org/base@" + "a" * 40,
            tuned_resolved="hf://org/tuned@" + "b" * 40, base_dtypes=("bf16",), tuned_dtypes=("fp32",),
            measured=measured, expected=expected, report=f"{name}/report.json", **more,
        )  # fmt: skip

    met = ExpectedRecord(sparsity_percent=81.4, tolerance_points=1.0, difference_points=0.3, passed=True)
    missed = ExpectedRecord(sparsity_percent=20, tolerance_points=1.5, difference_points=-13.8, passed=False)
    lost = ExpectedRecord(sparsity_percent=95.2, tolerance_points=1.0)
    return PairsReport(
        tool="sparsity-audit 0.1.0", label="pairs.yaml", title="Known 100 % table", source="a paper", note="",
        rows=(
            row("rl_one", "RL", 183, met, note="a note"),
            row("sft", "SFT", 938, missed),
            replace(row("gone", "RL", 0, lost), status="failed", message="org/x: gated\n  remedy: accept",
                    measured=None, report=None),
            row("rl_two", "RL", 1, None),
        ),
    )  # fmt: skip


def test_every_table_holds_the_records_numbers():
    report = known()
    cells = list(csv.DictReader(io.StringIO(pairs_csv(report).decode())))
    assert [c["sparsity_percent"] for c in cells] == ["81.7", "6.2", "", "99.9"]
    assert [c["changed"] for c in cells] == ["183", "938", "", "1"]
    assert [c["passed"] for c in cells] == ["True", "False", "", ""]
    markdown = pairs_markdown(report).decode()
    assert "| rl_one | DPO_&_GRPO | RL | 81.7 % | 81.4 ± 1 % | +0.3 | value, native | 1,000 |" in markdown
    assert "| sft | SFT | SFT | 6.2 % | 20 ± 1.5 % | −13.8 (missed) | value, native | 1,000 |" in markdown
    assert "gone failed: org/x: gated remedy: accept" in markdown
    latex = pairs_latex(report).decode()
    assert r"rl\_one & DPO\_\&\_GRPO & RL & 81.7 & 81.4 $\pm$ 1 \\" in latex
    assert r"gone & DPO\_\&\_GRPO & RL & failed & 95.2 $\pm$ 1 \\" in latex
    assert r"\caption{Known 100 \% table. value (native view). Published values: a paper.}" in latex
    assert r"\toprule" in latex
    assert latex.count(r"\\") == 5


def test_the_json_follows_its_schema_and_gives_the_same_bytes_twice():
    data = pairs_to_json(known())
    jsonschema.validate(json.loads(data), pairs_json_schema())
    assert data == pairs_to_json(known())
    assert json.loads(data)["version"] == 1


def test_the_strip_shows_every_number_where_it_belongs():
    from matplotlib.figure import Figure

    from sparsity_audit.report.pairs_figure import draw_strip
    from sparsity_audit.report.style import house_style

    with house_style():
        axes = Figure().subplots()
        draw_strip(axes, known())
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["rl_one (DPO_&_GRPO)", "gone (DPO_&_GRPO), failed", "rl_two (DPO_&_GRPO)", "sft (SFT)"]
    points = {(x, y) for line in axes.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert points >= {(81.7, 0), (99.9, 2), (6.2, 3)}
    assert points >= {(81.4, 0), (95.2, 1), (20, 3)}
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["RL", "SFT", "expected ± tolerance"]


def test_the_strip_renders_to_the_same_bytes_twice_with_its_caption():
    first, second = render_strip(known()), render_strip(known())
    assert first == second
    assert set(first) == {"pairs.pdf", "pairs.svg", "pairs.png"}
    text = first["pairs.svg"].decode()
    for part in ("rl_one (DPO_&amp;_GRPO)", "rule value, native view", "bf16→fp32", "Known 100 % table"):
        assert part in text


def test_nothing_to_show_draws_nothing():
    assert render_strip(replace(known(), rows=())) == {}
