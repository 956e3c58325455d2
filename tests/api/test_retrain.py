"""Retraining of a lab run end to end: frozen bits, controls, rates, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from retrain_runs import BASE, SMALL, full_run, mask_of
from safetensors.numpy import load_file

import sparsity_audit as sa
from sparsity_audit.api.retrain_arms import CollapsedRunError, Trained
from sparsity_audit.api.retrain_controls import parse_controls, parse_rates
from sparsity_audit.api.retrain_runs import RunPlan, train_run
from sparsity_audit.errors import CheckpointNotFoundError, MaskError, OutputError, UsageError
from sparsity_audit.masks.bitmask import unpack_bits
from sparsity_audit.report.retrain import retrain_json_schema

CONTROLS = ("random", "magnitude", "complement", "seed", "layer:1")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("retrained")
    run = full_run(folder / "full")
    mask = mask_of(run, folder / "mask")
    sa.mask_random(mask, folder / "foreign", seed=9)
    return {"run": run, "mask": mask, "foreign": folder / "foreign", "folder": folder}


@pytest.fixture(scope="module")
def found(made):
    controls = [*CONTROLS, f"other:{made['foreign']}"]
    return sa.retrain(
        made["folder"] / "out",
        run=made["run"],
        mask=made["mask"],
        controls=controls,
        control_lrs=[1, 3],
        **SMALL,
    )


def _bits(mask: Path) -> dict[str, np.ndarray]:
    shapes = {tensor.name: tensor.shape for tensor in sa.mask_info(mask).tensors}
    packed = {k: v for file in sorted(mask.glob("*.safetensors")) for k, v in load_file(file).items()}
    return {name: unpack_bits(packed[name], shape) for name, shape in shapes.items()}


def _codes(folder: Path) -> dict[str, np.ndarray]:
    """Stored codes; bf16 has no numpy dtype, so bytes are read by the header's offsets."""
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    kinds = {"F32": np.uint32, "BF16": np.uint16}
    return {
        name: np.frombuffer(raw[8 + size :][slice(*t["data_offsets"])], kinds[t["dtype"]]).reshape(t["shape"])
        for name, t in header.items()
        if name != "__metadata__"
    }


def _outside_is_equal(base: Path, tuned: Path, mask: Path) -> bool:
    before, after, bits = _codes(base), _codes(tuned), _bits(mask)
    return all(np.array_equal(before[n][~bits[n]], after[n][~bits[n]]) for n in before)


def test_every_run_at_every_rate_moved_inside_its_mask_alone(made, found) -> None:
    start = made["run"] / "checkpoint-0"
    masked = [run for run in found.report.runs if run.kind != "seed"]
    assert len(masked) == 6
    for run in masked:
        mask = found.output / run.mask
        assert [rate.multiple for rate in run.rates] == ([1] if run.kind == "sub" else [1, 3])
        for rate in run.rates:
            assert _outside_is_equal(start, found.output / rate.folder / "final", mask), rate.folder
        before, after, bits = _codes(start), _codes(found.output / run.folder / "final"), _bits(mask)
        moved = sum(int((before[n] != after[n])[bits[n]].sum()) for n in before)
        assert moved > 0.5 * run.selected
        assert run.selected == sum(int(b.sum()) for b in bits.values())
        assert run.proof.num_frozen <= sum(b.size for b in bits.values()) - run.selected
    dense = found.report.run("seed")
    assert (dense.mask, dense.proof, dense.seed) == (None, None, 1)


def test_bf16_weights_are_proven_against_the_rounded_base(tmp_path) -> None:
    run = full_run(tmp_path / "full", precision="bf16")
    mask = mask_of(run, tmp_path / "mask", "value")
    found = sa.retrain(tmp_path / "out", run=run, mask=mask, seed=0, controls=["random"], **SMALL)
    for own in found.report.runs:
        final = found.output / own.folder / "final"
        assert _outside_is_equal(run / "checkpoint-0", final, found.output / own.mask)
    assert any(w.startswith("same seed and weights rounded to bf16") for w in found.report.warnings)


def test_controls_have_the_masks_they_are_called_by(made, found) -> None:
    masks = {run.label: _bits(found.output / run.mask) for run in found.report.runs if run.mask}
    sub = masks["sub"]
    for name, bits in sub.items():
        assert masks["random"][name].sum() == bits.sum() == masks["magnitude"][name].sum()
        assert np.array_equal(masks["complement"][name], ~bits)
        assert masks["layer-1"][name].all() == (".layers.1." in name)
        assert masks["layer-1"][name].any() == (".layers.1." in name)
    given = _bits(made["foreign"])
    assert all(np.array_equal(masks["other-foreign"][name], given[name]) for name in given)


def test_scores_are_those_recovery_judges_and_all_answered_as_many_prompts(found) -> None:
    scores = json.loads((found.output / "scores.json").read_text())
    labels = ["metric", "base", "full", *[run.label for run in found.report.runs]]
    assert list(scores) == labels
    assert {entry["n"] for label, entry in scores.items() if label != "metric"} == {24}
    record = json.loads((found.output / "recovery" / "recovery.json").read_text())
    assert [run["label"] for run in record["runs"]] == ["base", *labels[3:]]
    for run, judged in zip(found.report.runs, record["runs"][1:], strict=True):
        assert run.score.value == judged["score"]["accuracy"]["value"]
        assert run.score.value == scores[run.label]["correct"] / 24
        assert judged["frozen"] is None or judged["frozen"]["moved"] == 0
    assert found.report.verdict.startswith(found.recovery.verdict)


def test_the_rate_of_a_control_is_the_one_that_validates_best(found) -> None:
    for run in found.report.runs[1:]:
        if run.kind == "seed":
            assert len(run.rates) == 1
            continue
        best = max(rate.validation.value for rate in run.rates)
        chosen = next(rate for rate in run.rates if rate.validation.value == best)
        assert (run.lr, run.folder) == (chosen.lr, chosen.folder)
        assert (
            f"{run.label} at learning rate {run.lr:.3g}, best on validation prompts" in found.report.verdict
        )


class _Arm:
    """Validation scores by folder name; None collapses."""

    def __init__(self, scores: dict[str, float | None]) -> None:
        self._scores = scores

    def train(self, job, *, on_note) -> Trained:
        if self._scores[job.folder.name] is None:
            raise CollapsedRunError("step 3", "the loss is nan")
        return Trained(checkpoint=job.folder, proof=None)

    def score(self, checkpoint, *, validation) -> dict[str, float]:
        assert validation
        return {"accuracy": self._scores[checkpoint.name], "n": 16}


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({"random": 0.4, "random-x3": 0.6, "random-x10": 0.5}, 3),
        ({"random": 0.6, "random-x3": 0.6, "random-x10": 0.1}, 1),
        ({"random": 0.0, "random-x3": None, "random-x10": None}, 1),
        ({"random": None, "random-x3": None, "random-x10": None}, None),
    ],
)
def test_the_best_rate_wins_the_smaller_of_equal_ones_and_never_a_collapsed_one(scores, chosen) -> None:
    plan = RunPlan(
        label="random",
        control=parse_controls(["random"])[0],
        mask=Path("mask"),
        seed=1,
        rates=((1, 1e-3), (3, 3e-3), (10, 1e-2)),
    )
    result = train_run(plan, _Arm(scores), Path("out"), on_note=lambda _: None)
    assert (result.chosen and result.chosen.multiple) == chosen
    assert [rate.failure is None for rate in result.rates] == [value is not None for value in scores.values()]
    with pytest.raises(CollapsedRunError):
        train_run(
            replace(plan, label="sub", control=None, rates=((1, 1e-3),)),
            _Arm({"sub": None}),
            Path("out"),
            on_note=lambda _: None,
        )


@pytest.fixture(scope="module")
def whole(made):
    """Never interrupted, one control, one rate."""
    options = {"run": made["run"], "mask": made["mask"], **SMALL}
    return sa.retrain(made["folder"] / "whole", **options, controls=["random"])


def test_repeated_it_trains_nothing_and_writes_the_same_bytes_and_more_controls_may_follow(made, whole):
    out, notes = whole.output, []
    options = {"run": made["run"], "mask": made["mask"], **SMALL}
    assert whole.report.sub.seed == 1, "a new seed is the evidence"
    before = {name: (out / name).read_bytes() for name in ("retrain.json", "scores.json")}
    sa.retrain(out, **options, controls=["random"], on_note=notes.append)
    assert [note for note in notes if "finished; nothing was done" in note] == [
        f"{out}/runs/{name} holds this run, finished; nothing was done" for name in ("sub", "random")
    ]
    assert before == {name: (out / name).read_bytes() for name in before}
    more = sa.retrain(out, **options, controls=["complement"])
    assert [run.label for run in more.report.runs] == ["sub", "complement"]
    assert more.report.sub == whole.report.sub
    sa.retrain(out, **options, controls=["random"])
    assert before == {name: (out / name).read_bytes() for name in before}


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_retraining_goes_on_to_the_bytes_of_an_uninterrupted_one(
    made, whole, tmp_path, step
) -> None:
    """Step 1 is within `sub`, step 4 is the last one of the control."""
    out = tmp_path / "out"
    arguments = [str(made["run"]), str(made["mask"]), str(out)]
    command = [sys.executable, "-m", "retrain_runs", *arguments, str(step)]
    root = Path(__file__).parents[1]
    killed = subprocess.run(command, cwd=root, check=False, env=_environment(root))
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "retrain.json").exists()
    options = {"run": made["run"], "mask": made["mask"], "controls": ["random"], **SMALL}
    sa.retrain(out, **options)
    for name in ("retrain.json", "scores.json", "runs/random/final/model.safetensors"):
        assert (out / name).read_bytes() == (whole.output / name).read_bytes(), name


def _environment(root: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{root}:{root.parent}"}


def test_the_record_is_of_the_published_schema(found) -> None:
    record = json.loads((found.output / "retrain.json").read_text())
    Draft202012Validator(retrain_json_schema()).validate(record)
    assert str(found.output) not in json.dumps(record["runs"])


def test_untuned_random_masks_are_warned_about_and_tuned_ones_are_not(whole, found) -> None:
    text = "trained at the full run's rate alone"
    assert any(text in warning for warning in whole.report.warnings)
    assert not any(text in warning for warning in found.report.warnings)


# Refusals


def _refuse(made, tmp_path, error, match, **options):
    settings = {"run": made["run"], "mask": made["mask"], **SMALL, **options}
    with pytest.raises(error, match=match):
        sa.retrain(tmp_path / "refused", **settings)
    assert not (tmp_path / "refused" / "runs").exists()


def test_a_mask_of_another_base_is_refused_by_its_fingerprint(made, tmp_path, addition) -> None:
    pair = addition / "grpo-fp32-seed0", addition / "grpo-fp32-seed1"
    sa.mask_export(*pair, tmp_path / "mask", criterion="top:5%")
    _refuse(made, tmp_path, MaskError, "made from a base with the fingerprint", mask=tmp_path / "mask")
    control = [f"other:{tmp_path / 'mask'}"]
    _refuse(made, tmp_path, MaskError, "made from a base with the fingerprint", controls=control)


def test_a_mask_of_another_model_is_refused_by_its_names(made, tmp_path, write_checkpoint) -> None:
    tensors = {"w": np.arange(64, dtype=np.float32).reshape(8, 8)}
    pair = write_checkpoint("a", tensors), write_checkpoint("b", {"w": tensors["w"] ** 2})
    sa.mask_export(*pair, tmp_path / "mask")
    _refuse(made, tmp_path, MaskError, "in the base, not in the mask|not in the base", mask=tmp_path / "mask")


def test_masks_that_select_nothing_or_everything_are_refused(made, tmp_path) -> None:
    mask = made["mask"]
    sa.mask_ops("minus", [mask, mask], tmp_path / "empty")
    sa.mask_ops("not", [tmp_path / "empty"], tmp_path / "whole")
    _refuse(made, tmp_path, MaskError, "selects none of 148,928", mask=tmp_path / "empty")
    _refuse(made, tmp_path, MaskError, r"selects all of 148,928(.|\n)*inverted", mask=tmp_path / "whole")


def test_a_mask_that_may_be_inverted_is_refused_until_its_polarity_is_said(made, tmp_path) -> None:
    import torch

    torch.save({n: torch.from_numpy(~b) for n, b in _bits(made["mask"]).items()}, tmp_path / "frozen.pt")
    _refuse(
        made,
        tmp_path,
        MaskError,
        r"does not record its polarity(.|\n)*--inverted",
        mask=tmp_path / "frozen.pt",
    )


def test_what_is_no_finished_full_run_is_refused(made, found, tmp_path) -> None:
    _refuse(made, tmp_path, CheckpointNotFoundError, "no run.json", run=BASE)
    _refuse(made, tmp_path, UsageError, "is the output of a retraining", run=found.output)
    _refuse(made, tmp_path, UsageError, "itself trained inside a mask", run=found.output / "runs" / "sub")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(made["run"], unfinished)
    (unfinished / "result.json").unlink()
    _refuse(made, tmp_path, UsageError, r"is not finished: 2 of 2 steps(.|\n)*lab train", run=unfinished)


def test_a_directory_of_something_else_is_not_written_to(made, found, tmp_path) -> None:
    options = {"run": made["run"], "mask": made["mask"], **SMALL}
    with pytest.raises(OutputError, match=r"holds another retraining: seed 1 → 5"):
        sa.retrain(found.output, **options, seed=5)
    with pytest.raises(OutputError, match=r"holds another retraining: lr"):
        sa.retrain(found.output, **options, lr=1e-3)
    with pytest.raises(OutputError, match="is another mask than"):
        sa.retrain(found.output, **{**options, "mask": made["foreign"]})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="not the folder of a retraining"):
        sa.retrain(tmp_path / "full", **options)


@pytest.mark.parametrize(
    ("controls", "match"),
    [
        (["randon"], r"'randon' is not known(.|\n)*did you mean 'random'"),
        (["layer"], "expected: layer:N"),
        (["layer:9"], r"has no such layer(.|\n)*expected: 0, 1, 2"),
        (["other"], "expected: other:MASK"),
        (["other:nowhere"], "nowhere"),
        (["seed:x"], "seed or seed:N"),
        (["random:2"], "expected: random"),
        (["random", "random"], "stands twice"),
    ],
)
def test_controls_that_cannot_be_are_refused(made, tmp_path, controls, match) -> None:
    _refuse(made, tmp_path, ValueError, match, controls=controls)


def test_two_foreign_masks_of_one_name_are_two_controls(tmp_path) -> None:
    labels = [
        control.label for control in parse_controls([f"other:{tmp_path}/a/mask", f"other:{tmp_path}/b/mask"])
    ]
    assert labels == ["other-mask", "other-mask-2"]


def test_settings_that_contradict_each_other_are_refused(made, tmp_path) -> None:
    _refuse(made, tmp_path, UsageError, "either a lab run or a config", config={})
    _refuse(made, tmp_path, UsageError, "either a lab run or a config", run=None)
    _refuse(made, tmp_path, UsageError, "--mask: is missing", mask=None)
    _refuse(made, tmp_path, UsageError, "more than 0", lr=0.0)
    _refuse(made, tmp_path, UsageError, "multiples of the learning rate", control_lrs=[1, 0])
    with pytest.raises(UsageError, match="multiples of the learning rate"):
        parse_rates([])
