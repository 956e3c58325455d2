"""`runs.yaml`: what it may say, how paths, labels and levels are read, and every refusal by its message."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsity_audit.api.runs_file import labels_of, question_of, read_runs
from sparsity_audit.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
base: base
criterion: top:1%
view: served
reference: third
runs:
  - {run: a, label: first, seed: 0, lr: 3e-4, warm: yes}
  - {run: sub/b, seed: 1, lr: 0.0003, warm: true}
  - {run: c, label: third, seed: x, lr: 3.0e-4, warm: no}
"""


@pytest.fixture
def write(tmp_path):
    def file(text: str) -> Path:
        path = tmp_path / "runs.yaml"
        path.write_text(text)
        return path

    return file


def ask(runs, **options):
    return question_of(runs, **{"base": None, "reference": None, "criterion": None, "view": None, **options})


def test_paths_are_relative_to_the_file_and_equal_levels_are_spelt_alike(write, tmp_path):
    (tmp_path / "sub" / "b").mkdir(parents=True)
    found = read_runs(write(GOOD))
    assert found.runs == (str(tmp_path / "a"), str(tmp_path / "sub" / "b"), str(tmp_path / "c"))
    assert (found.base, found.criterion, found.view) == (str(tmp_path / "base"), "top:1%", "served")
    assert [found.levels[run]["lr"] for run in found.runs] == ["0.0003"] * 3
    assert [found.levels[run]["seed"] for run in found.runs] == ["0", "1", "x"]
    assert [found.levels[run]["warm"] for run in found.runs] == ["true", "true", "false"]
    assert list(found.levels[found.runs[0]]) == ["seed", "lr", "warm"]


def test_what_the_caller_says_wins_over_the_file(write, tmp_path):
    path = write(GOOD)
    asked = ask([path])
    assert asked.reference == str(tmp_path / "c")
    assert asked == ask(str(path))
    asked = ask(path, base="elsewhere", reference="first", criterion="value", view="native")
    assert (asked.base, asked.criterion, asked.view) == ("elsewhere", "value", "native")
    assert asked.reference == str(tmp_path / "a")
    assert ask(path, reference="other/run").reference == "other/run"


def test_runs_in_so_many_words_have_no_labels_and_no_factors():
    asked = ask(["x/mask", Path("y/mask"), "z"])
    assert asked.runs == ("x/mask", "y/mask", "z")
    assert asked.levels == asked.labels == {}
    assert labels_of(asked, asked.runs) == ["x/mask", "y/mask", "z"]


def test_a_label_wins_over_the_end_of_a_path(write):
    asked = ask(write("runs:\n  - {run: x/b}\n  - {run: a, label: b}\n  - {run: y/c}\n"))
    labels = labels_of(asked, asked.runs)
    assert labels[1:] == ["b", "c"]
    assert labels[0].endswith("x/b")


def test_a_directory_that_is_named_like_a_file_of_runs_is_a_run(tmp_path):
    folder = tmp_path / "mask.yaml"
    folder.mkdir()
    assert ask([folder, "other"]).runs == (str(folder), "other")


def test_references_on_the_hub_keep_their_full_form(write):
    found = read_runs(write("runs:\n  - {run: org/model@main}\n  - {run: hf://org/other}\n"))
    assert found.runs == ("hf://org/model@main", "hf://org/other")


def test_a_file_beside_other_runs_is_refused(write):
    with pytest.raises(UsageError, match="beside other runs"):
        ask([write(GOOD), "a"])


def test_a_file_that_is_missing_or_no_yaml_is_refused(tmp_path, write):
    with pytest.raises(UsageError, match="a YAML file of runs"):
        ask(tmp_path / "absent.yml")
    with pytest.raises(UsageError, match=r"runs.yaml: is not YAML in line 1"):
        ask(write("runs: [a"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bse: x\nruns: [{run: a}]", r"runs\.yaml: unknown key bse\n  expected: some of base, criterion"),
        ("base: x", r"runs\.yaml: lists no runs"),
        ("runs: []", r"lists no runs"),
        ("runs: [a, b]", r"runs\.yaml: run 1: is a str"),
        ("runs: [{run: a}, {label: b}]", r"runs\.yaml: run 2, run: None"),
        ("runs: [{run: a}, {run: 3}]", r"run 2, run: 3\n  expected: a path"),
        ("runs: [{run: a}, {run: ./a}]", r"run 2, run: \./a is run 1 already"),
        ("runs: [{run: a, label: x}, {run: b, label: x}]", r"run 2, label: 'x' is that of run 1 too"),
        ("runs: [{run: a, label: ''}]", r"run 1, label: is empty"),
        ("runs: [{run: a, label: [x]}]", r"run 1, label: \['x'\]"),
        ("runs: [{run: a, seed: 0}, {run: b}]", r"runs\.yaml: run 2: has no seed, which run 1 has"),
        ("runs: [{run: a}, {run: b, seed: 0}]", r"runs\.yaml: run 1: has no seed, which run 2 has"),
        ("runs: [{run: a, seed: }, {run: b, seed: 0}]", r"run 1, seed: None\n  expected: text, a number"),
        ("runs: [{run: a, seed: .nan}]", r"run 1, seed: nan"),
        ("runs: [{run: a, day: 2024-01-01}]", r"run 1, day: datetime"),
        ("runs: [{run: a, view: native}]", r"run 1, view: a factor cannot have this name"),
        ("runs: [{run: a, criterion: value}]", r"run 1, criterion: a factor cannot have this name"),
        ("runs: [{run: a, lable: x}]", r"run 1, lable: a factor cannot have a name so close to `label`"),
        ("runs: [{run: a, ' ': x}]", r"a factor without a name"),
        ("runs: [{run: a, 3: x}]", r"run 1: is a dict"),
        ("runs: [{run: a, seed: 0, seed: 1}]", r"runs\.yaml, line 1: seed stands twice"),
        ("base: a\nbase: b\nruns: [{run: a}]", r"runs\.yaml, line 2: base stands twice"),
        ("criterion: atoll\nruns: [{run: a}]", r"runs\.yaml: criterion: 'atoll' is not understood"),
        ("view: naive\nruns: [{run: a}]", r"runs\.yaml, view: 'naive'\n  expected: native or served"),
        ("reference: [x]\nruns: [{run: a}]", r"runs\.yaml: reference: \['x'\]"),
        ("base: 7\nruns: [{run: a}]", r"runs\.yaml: base: 7"),
    ],
)
def test_refusals_name_the_file_the_run_and_the_key(write, text, message):
    path = write(text)
    with pytest.raises(UsageError, match=message):
        ask(path)


def test_the_guide_shows_the_example_as_it_is():
    example = (ROOT / "examples" / "overlap-runs.yaml").read_text()
    guide = (ROOT / "docs" / "guide" / "factors.md").read_text()
    assert f"```yaml examples/overlap-runs.yaml\n{example}```" in guide
