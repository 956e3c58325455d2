"""`tokens_patch` and `tokens_critical` end to end on the lab's models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from token_models import random_llama, save_random

from sparsity_audit import mask_export, prune, tokens_critical, tokens_diverge, tokens_patch
from sparsity_audit.errors import OutputError, UsageError
from sparsity_audit.lab.folder import save_model
from sparsity_audit.report.critical import critical_json_schema
from sparsity_audit.report.critical_files import TOKENS_CRITICAL_FILES
from sparsity_audit.report.tokens_patch import patch_json_schema
from sparsity_audit.report.tokens_patch_files import PATCH_FILES

TASK = {"task": "addition", "lengths": (1,), "num_prompts": 6, "seed": 1, "figures": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_random(folder / "base", 0), save_random(folder / "tuned", 1)


@pytest.fixture(scope="module")
def headed(models, tmp_path_factory) -> Path:
    """The base with another head: an update of one part alone."""
    llama, other = random_llama(0), random_llama(1)
    llama.lm_head.weight.data.copy_(other.lm_head.weight.data)
    folder = tmp_path_factory.mktemp("headed") / "model"
    save_model(llama, folder, dtype="fp32")
    return folder


def rows(report, direction="add") -> dict:
    return {row.name: row for row in report.rows if row.direction == direction}


def test_an_update_of_one_part_is_found_in_that_part_and_nowhere_else(models, headed) -> None:
    report = tokens_patch(models[0], headed, parts=("layer",), **TASK)
    for direction in ("add", "remove"):
        found = rows(report, direction)
        assert found["head"].js_share.value == pytest.approx(1.0)
        assert found["head"].argmax_share.value in (1.0, None)
        for name in ("embed", "layer 0", "layer 1", "norm"):
            assert found[name].js_share.value == pytest.approx(0.0)
    assert report.divergent > 0
    assert rows(report)["head"].divergent_share.value == 1.0
    assert rows(report, "remove")["layer 0"].divergent_share.value == 0.0


def test_a_pruned_update_and_its_mask_are_one_part(models, tmp_path) -> None:
    base, tuned = models
    (made,) = prune(base, tuned, tmp_path / "kept", keep=["top:30%"])
    mask_export(base, tuned, tmp_path / "mask", criterion="top:30%")
    report = tokens_patch(
        base, tuned, parts=(), masks=[tmp_path / "mask"], pruned=[made.path], take_over=0.1, **TASK
    )
    of_mask, pruned = rows(report)[str(tmp_path / "mask")], rows(report)[str(made.path)]
    assert of_mask.mean_js == pytest.approx(pruned.mean_js, abs=1e-9)
    assert of_mask.js_share.value == pytest.approx(pruned.js_share.value, abs=1e-9)
    assert of_mask.entries == pruned.entries
    assert of_mask.take_over == pruned.take_over
    assert report.tuned_take_over is not None
    assert rows(report, "remove")[str(tmp_path / "mask")].take_over is None


def test_patch_files_are_complete_and_fit_their_schema(models, tmp_path) -> None:
    import jsonschema

    out = tmp_path / "out"
    report = tokens_patch(*models, output=out, **TASK | {"figures": True})
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == set(PATCH_FILES)
    jsonschema.validate(json.loads((out / "patch.json").read_bytes()), patch_json_schema())
    assert report == tokens_patch(*models, **TASK)
    with pytest.raises(OutputError, match=r"holds patch\.json"):
        tokens_patch(*models, output=out, **TASK)


def test_completions_without_a_judge_have_no_accuracy(models, tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    report = tokens_patch(*models, prompts=path, parts=("layer",), completions="tuned", max_new_tokens=6)
    assert report.base_accuracy is None
    assert report.num_completions == 2
    assert all(row.accuracy is None for row in report.rows)


def _any_sum(_line, completion) -> bool:
    return "#" in completion


def test_a_function_that_judges_stands_in_the_record_by_its_name(models, tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    asked = {"prompts": path, "verifier": _any_sum, "max_new_tokens": 6, "figures": False}
    assert tokens_patch(*models, parts=("layer",), completions="tuned", **asked).verifier == "_any_sum"
    assert tokens_critical(models[0], **asked).verifier == "_any_sum"


def test_a_verifier_beside_a_task_is_refused_not_preferred(models) -> None:
    for call in (lambda **o: tokens_patch(*models, **o), lambda **o: tokens_critical(models[0], **o)):
        with pytest.raises(UsageError, match="a task of the lab judges by itself") as caught:
            call(verifier=_any_sum, **TASK)
        assert "leave --verifier out" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("neuron",)}, "'neuron' is not known"),
        ({"parts": ()}, "nothing is asked for"),
        ({"limit": -0.1}, "limit"),
        ({"take_over": float("nan")}, "take_over"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_bad_patch_settings_are_one_error(models, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        tokens_patch(*models, **TASK | options)


def test_equal_models_have_nothing_to_explain(models) -> None:
    with pytest.raises(UsageError, match="do not diverge"):
        tokens_patch(models[0], models[0], **TASK)


def test_the_least_certain_positions_are_judged_beside_random_ones(models, tmp_path) -> None:
    import jsonschema

    out = tmp_path / "out"
    report = tokens_critical(models[0], per_completion=2, output=out, **TASK | {"figures": True})
    chosen, random = report.groups
    assert chosen.positions <= 12
    assert chosen.delta_certainty.value < random.delta_certainty.value
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == set(TOKENS_CRITICAL_FILES)
    jsonschema.validate(json.loads((out / "critical.json").read_bytes()), critical_json_schema())
    for row in report.positions:
        assert row.token != row.substitute
        assert row.drop == pytest.approx(row.score_kept - row.score_substituted)
        assert row.at_stake == pytest.approx((1 - row.kept_probability) * row.drop)
    assert report == tokens_critical(models[0], per_completion=2, **TASK)


def test_positions_come_from_a_file_or_a_divergence(models, tmp_path) -> None:
    path = tmp_path / "positions.jsonl"
    path.write_text('{"prompt": 0, "position": 1}\n\n{"prompt": 2, "position": 0}\n')
    report = tokens_critical(models[0], positions=path, **TASK)
    chosen = [(row.prompt, row.position) for row in report.positions if row.group == "chosen"]
    assert chosen == [(0, 1), (2, 0)]
    tokens_diverge(*models, output=tmp_path / "diverged", **TASK)
    again = tokens_critical(models[0], divergent=tmp_path / "diverged", divergent_set="tuned", **TASK)
    assert again.completions == "tuned"
    assert again.groups[0].positions == 6
    with pytest.raises(UsageError, match="expected: the same prompts"):
        tokens_critical(models[0], divergent=tmp_path / "diverged", **TASK | {"seed": 2})
    with pytest.raises(UsageError, match="one of them"):
        tokens_critical(models[0], divergent=tmp_path / "diverged", positions=path, **TASK)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "names no position"),
        ('{"prompt": 0}', "names no position"),
        ('{"prompt": 77, "position": 0}', "prompt 77 has no completion 0"),
        ('{"prompt": 0, "position": 999}', "position 999 of"),
        ("", "names no positions"),
    ],
)
def test_positions_that_are_not_there_are_refused(models, tmp_path, line, message) -> None:
    path = tmp_path / "positions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=message):
        tokens_critical(models[0], positions=path, **TASK)


def test_given_completions_are_used_and_a_verifier_may_fail(models, tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "1+1=", "completion": "#2<eos>"}\n{"prompt": "2+2=", "completion": "#4<eos>"}\n'
    )

    def judge(line, completion):
        if line["prompt"] == "2+2=":
            raise ValueError
        return completion.endswith("2")

    report = tokens_critical(models[0], prompts=path, verifier=judge, num_continuations=2, max_new_tokens=6)
    assert report.completions == "given"
    assert report.unjudged == 8
    assert {row.prompt for row in report.positions if row.drop is None} == {1}


@pytest.mark.parametrize(
    "options", [{"min_drop": 1.0}, {"per_completion": 0}, {"num_continuations": 0}, {"num_samples": 0}]
)
def test_bad_critical_settings_are_one_error(models, options) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        tokens_critical(models[0], **TASK | options)
