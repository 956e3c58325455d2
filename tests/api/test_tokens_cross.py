"""`tokens_cross_sample` end to end: points and controls, resuming, verifiers that fail, refusals."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from token_models import save_random

from sparsity_audit import tokens_cross_sample
from sparsity_audit.api.tokens_cross_points import Setting, settings_of
from sparsity_audit.api.tokens_cross_records import by_prompt
from sparsity_audit.errors import OutputError, UsageError
from sparsity_audit.report.cross import cross_json_schema, cross_to_json
from sparsity_audit.report.cross_files import CROSS_FILES

LINES = [{"prompt": f"{n}+{n}=", "id": f"p{n}", "even": n % 2 == 0} for n in range(6)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_random(folder / "base", 0), save_random(folder / "tuned", 1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def long_enough(_line, completion) -> float:
    """Any verdict that varies: the share of ten tokens."""
    return min(1.0, len(completion) / 10)


def cross(models, prompts, **options):
    defaults = {
        "verifier": long_enough,
        "max_new_tokens": 8,
        "thresholds": (0.1,),
        "budgets": (1,),
        "seed": 3,
        "figures": False,
    }
    return tokens_cross_sample(*models, prompts=prompts, **{**defaults, **options})


@pytest.fixture(scope="module")
def report(models, prompts):
    return cross(models, prompts)


def points(report, direction, selector):
    return [p for p in report.points if (p.direction, p.selector) == (direction, selector)]


def test_every_rule_has_its_controls_in_both_directions(report) -> None:
    for direction in ("forward", "reverse"):
        assert [len(points(report, direction, s)) for s in ("none", "js", "random", "entropy", "first")] == [
            *(1, 2, 2, 2),
            1,
        ]
    keys = [point.key for point in report.points]
    assert len(set(keys)) == len(keys)
    for point in report.points:
        assert (point.matches is None) == (point.selector in ("none", "js"))
        assert point.matches is None or point.matches in keys


def test_counts_are_those_of_the_points(report) -> None:
    for point in report.points:
        assert point.completions == 6
        assert 0 <= point.changed <= point.switched <= point.tokens
        assert point.switched_frac == point.switched / point.tokens
        if point.budget == 1:
            assert point.switched <= 6
    for direction in ("forward", "reverse"):
        (first,) = points(report, direction, "first")
        assert (first.switched, first.spent_frac) == (6, 1.0)


def test_the_ends_are_shares_0_and_1(models, prompts) -> None:
    found = cross(models, prompts, thresholds=(0.0, 100.0), budgets=None, controls=())
    for direction in ("forward", "reverse"):
        never = next(p for p in points(found, direction, "js") if p.threshold == 100.0)
        always = next(p for p in points(found, direction, "js") if p.threshold == 0.0)
        assert (never.switched, never.recovered.value, never.difference.value) == (0, 0.0, 0.0)
        assert always.switched == always.tokens
        assert always.recovered.value == 1.0


def test_identical_models_have_no_gap_and_no_switches(models, prompts) -> None:
    found = cross((models[0], models[0]), prompts)
    assert found.gap.value == 0.0
    assert all(p.switched == 0 for p in found.points if p.selector in ("js", "random", "entropy"))
    assert all(p.changed == 0 for p in found.points)
    assert "cannot be told from 0" in str(found.points[1].recovered.reason)


def test_random_positions_are_as_many_as_the_rule_made(models, prompts) -> None:
    # A verdict has no part in it, and rows that end early have no room: compare with what is possible.
    found = cross(models, prompts, thresholds=(0.2,), budgets=None, num_samples=6)
    for direction in ("forward", "reverse"):
        (rule,), (random,) = points(found, direction, "js"), points(found, direction, "random")
        assert 0 < random.switched <= rule.switched
        assert random.switched >= 0.6 * rule.switched


def test_the_same_seed_gives_the_same_record_and_batches_do_not_matter(models, prompts, report) -> None:
    assert cross_to_json(cross(models, prompts)) == cross_to_json(report)
    # Calibrated thresholds have the rounding of the batch they were measured in; what happens has not.
    again = cross(models, prompts, batch_tokens=30)
    for one, other in zip(again.points, report.points, strict=True):
        for name in ("key", "tokens", "switched", "changed", "truncated", "accuracy", "recovered"):
            assert getattr(one, name) == getattr(other, name), (one.key, name)
    assert cross(models, prompts, seed=4).points != report.points


def test_files_are_complete_and_fit_their_schema(models, prompts, report, tmp_path) -> None:
    import jsonschema

    out = tmp_path / "out"
    found = cross(models, prompts, output=out, figures=True)
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and p.parent.name != "points"}
    assert names == set(CROSS_FILES)
    text = (out / "cross.json").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    record = json.loads(text)
    jsonschema.validate(record, cross_json_schema())
    assert cross_to_json(found) == cross_to_json(report)
    rows = list(csv.DictReader(io.StringIO((out / "cross.csv").read_text())))
    assert [int(row["switched"]) for row in rows] == [point.switched for point in found.points]
    assert "base writes" in (out / "summary.md").read_text().lower()


def test_a_later_call_adds_points_and_keeps_the_others(models, prompts, tmp_path) -> None:
    out = tmp_path / "out"
    cross(models, prompts, output=out, controls=())
    before = {p.name: p.stat().st_mtime_ns for p in (out / "points").iterdir()}
    more = cross(models, prompts, output=out, thresholds=(0.1, 0.3))
    after = {p.name: p.stat().st_mtime_ns for p in (out / "points").iterdir()}
    assert before.items() < after.items()
    assert cross_to_json(more) == cross_to_json(cross(models, prompts, thresholds=(0.1, 0.3)))


KILLED = """
    import os, signal
    from sparsity_audit import seams, tokens_cross_sample
    left = {count}
    def observer(point):
        global left
        if point == "point written":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    seams.observer = observer
    judge = lambda _line, completion: min(1.0, len(completion) / 10)
    tokens_cross_sample({base!r}, {tuned!r}, prompts={prompts!r}, verifier=judge, max_new_tokens=8,
        thresholds=(0.1,), budgets=(1,), seed=3, figures=False, output={out!r})
"""


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(models, prompts, tmp_path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {"base": str(models[0]), "tuned": str(models[1]), "prompts": str(prompts), "out": str(out)}
    code = textwrap.dedent(KILLED.format(count=4, **options))
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "cross.json").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (out / "points").glob("*.safetensors")}
    assert len(kept) == 4
    judge = lambda _line, completion: min(1.0, len(completion) / 10)
    judge.__qualname__ = "<lambda>"
    cross(models, prompts, verifier=judge, output=out)
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in (out / "points").iterdir()}.items()
    cross(models, prompts, verifier=judge, output=whole)
    for name in CROSS_FILES:
        if not name.startswith("figures"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_points_of_other_settings_are_refused_and_replaced_when_asked(models, prompts, tmp_path) -> None:
    out = tmp_path / "out"
    cross(models, prompts, output=out, controls=())
    with pytest.raises(OutputError, match="another cross-sampling: seed is 3 there, 4 here"):
        cross(models, prompts, output=out, controls=(), seed=4)
    cross(models, prompts, output=out, controls=(), seed=4, overwrite=True)
    assert json.loads((out / "cross.json").read_bytes())["seed"] == 4
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "cross.json").write_text("{}")
    with pytest.raises(OutputError, match=r"holds cross\.json"):
        cross(models, prompts, output=tmp_path / "foreign")


def test_a_point_that_cannot_be_read_is_made_again(models, prompts, tmp_path) -> None:
    out = tmp_path / "out"
    found = cross(models, prompts, output=out, controls=())
    damaged = out / "points" / "forward-js-threshold-0.1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert cross_to_json(cross(models, prompts, output=out, controls=())) == cross_to_json(found)


def test_a_verifier_that_raises_is_counted_and_listed_and_the_run_goes_on(models, prompts) -> None:
    def judge(line, completion):
        if line["id"] == "p2":
            raise KeyError("answer")
        if line["id"] == "p3":
            return 7
        return long_enough(line, completion)

    found = cross(models, prompts, verifier=judge, controls=())
    assert {p.unjudged for p in found.points} == {2}
    assert {p.accuracy.num_prompts for p in found.points} == {4}
    reasons = {one.name: one.reason for one in found.unjudged}
    assert reasons == {
        "p2": "the verifier raised KeyError: 'answer'",
        "p3": "the verifier returned 7, which is no number in [0, 1]",
    }
    assert any("completions have no score" in note for note in found.notes)


def test_a_verifier_that_judges_nothing_is_one_error(models, prompts) -> None:
    def judge(_line, _completion):
        raise RuntimeError("no")

    with pytest.raises(UsageError, match=r"forward-alone: none has a score; the first: .*RuntimeError: no"):
        cross(models, prompts, verifier=judge)


def test_a_verifier_is_named_by_module_or_file_and_sees_its_line(models, prompts, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "def even(line, completion):\n    assert '<eos>' not in completion\n    return line['even']\n"
    )
    found = cross(models, prompts, verifier=f"{tmp_path / 'mine.py'}:even", controls=())
    assert found.base_accuracy.value == 0.5
    assert found.verifier.endswith("mine.py:even")
    for text, message in (
        ("nothing", "names no function"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("json:nothing", "has no function 'nothing'"),
        (f"{tmp_path / 'gone.py'}:f", "cannot be imported"),
    ):
        with pytest.raises(UsageError, match=message):
            cross(models, prompts, verifier=text)


def test_the_labs_task_judges_by_itself(models) -> None:
    found = tokens_cross_sample(*models, task="addition", lengths=(1,), num_prompts=4, thresholds=(0.1,))
    assert found.verifier == "addition (built in)"
    assert (found.num_prompts, found.base_accuracy.num_prompts) == (4, 4)


def test_a_prompt_that_cannot_be_used_is_listed(models, tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*LINES[:2], {"prompt": ""}]))
    found = cross(models, path, controls=())
    assert (found.num_prompts, [lost.prompt for lost in found.failed]) == (2, [2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verifier": None}, "nobody judges"),
        ({"thresholds": (-1.0,)}, "thresholds"),
        ({"shares": (1.5,)}, "shares"),
        ({"budgets": (0,)}, "budgets"),
        ({"directions": ("sideways",)}, "'sideways' is not known"),
        ({"directions": ()}, "none is named"),
        ({"controls": ("lucky",)}, "'lucky' is not known"),
        ({"num_samples": 0}, "num_samples"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_settings_are_one_error(models, prompts, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        cross(models, prompts, **options)


def test_settings_are_named_and_counted_once() -> None:
    found = settings_of([0.1, 0.1], [0.05], [1, 2])
    assert [one.key for one in found] == ["threshold-0.1", "share-0.05", "budget-1", "budget-2"]
    assert Setting(kind="budget", amount=1).words == "1 token a completion"
    with pytest.raises(UsageError, match="nothing is asked for"):
        settings_of([], [], [])


def test_scores_are_averaged_within_a_prompt_first() -> None:
    scores = np.array([1.0, 0.0, np.nan, 1.0, np.nan, np.nan])
    assert by_prompt(scores, [7, 7, 4, 4, 9, 9]).tolist()[:2] == [0.5, 1.0]
    assert np.isnan(by_prompt(scores, [7, 7, 4, 4, 9, 9])[2])
