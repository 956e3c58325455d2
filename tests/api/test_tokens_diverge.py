"""`tokens_diverge` end to end on the lab's models: what it finds, what it writes, what it refuses."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from token_models import Faulty, random_model, save_random

import sparsity_audit
from sparsity_audit.api.token_models import ModelSource
from sparsity_audit.errors import MissingExtraError, OutputError, UnsupportedFormatError, UsageError
from sparsity_audit.report.tokens import tokens_json_schema, tokens_to_json
from sparsity_audit.report.tokens_files import TOKENS_FILES


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_random(folder / "base", 0), save_random(folder / "tuned", 1)


def prompts_file(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def audit(models, prompts=None, **options):
    options = {"max_new_tokens": 10, "seed": 3} | options
    return sparsity_audit.tokens_diverge(*models, prompts=prompts, **options)


SOME = [{"prompt": "12+34="}, {"prompt": "5+5=", "id": "five"}, {"prompt": "99+1="}]


def test_both_models_sample_and_both_sets_are_scored(models, tmp_path) -> None:
    report = audit(models, prompts_file(tmp_path, *SOME), num_samples=2, output=tmp_path / "out", top_p=0.9)
    assert [one.name for one in report.sets] == ["base", "tuned"]
    for one in report.sets:
        assert (one.summary.prompts, one.summary.sequences) == (3, 6)
        assert one.accuracy is None
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written == set(TOKENS_FILES) - {"positions.parquet"}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "positions.csv").read_text())))
    assert len(rows) == sum(one.summary.positions for one in report.sets)
    for one in report.sets:
        js = [float(row["js"]) for row in rows if row["set"] == one.name]
        assert np.mean(np.array(js) > 0.1) == pytest.approx(one.summary.above.value)
        texts = [row["text"] for row in rows if row["set"] == one.name and row["prompt"] == "0"]
        first = next(s for s in one.shifted_positions if s.prompt == 0)
        assert first.token in texts
    record = json.loads((tmp_path / "out" / "tokens.json").read_bytes())
    import jsonschema

    jsonschema.validate(record, tokens_json_schema())
    assert record["prompts"][1]["name"] == "five"
    assert "# Which tokens changed" in (tmp_path / "out" / "summary.md").read_text()


def test_neither_batches_nor_other_prompts_nor_sequential_change_a_completion(models, tmp_path) -> None:
    whole = audit(models, prompts_file(tmp_path, *SOME))
    small = audit(models, prompts_file(tmp_path, *SOME), batch_tokens=1, chunk_bytes=1)
    one_at_a_time = audit(models, prompts_file(tmp_path, *SOME), sequential=True)
    fewer = audit(models, prompts_file(tmp_path, *SOME), num_prompts=2)
    assert tokens_to_json(one_at_a_time) == tokens_to_json(whole)
    for other in (small, fewer):
        for mine, theirs in zip(other.sets, whole.sets, strict=True):
            for row, wanted in zip(mine.by_prompt, theirs.by_prompt, strict=False):
                assert row.positions == wanted.positions
                # Batches change fp32 logits below 10 by some 1e-6.
                assert row.mean_js == pytest.approx(wanted.mean_js, abs=1e-5)


def test_a_model_against_itself_has_no_divergence(models) -> None:
    report = audit((models[0], models[0]), task="addition", num_prompts=4)
    for one in report.sets:
        assert one.summary.mean_js.value == 0.0
        assert one.summary.argmax_agreement.value == 1.0
        assert one.summary.curve is None
    assert report.sets[0].accuracy is not None


def test_given_completions_are_scored_and_nothing_is_sampled(models, tmp_path) -> None:
    path = prompts_file(
        tmp_path,
        {"prompt": "12+34=", "completion": "S64#46<eos>"},
        {"prompt": "1+1=", "completions": ["2", "", "#2<eos>"]},
        {"prompt": "3+3="},
        {"prompt": "4+4=", "completion": "word"},
    )
    report = audit(models, path)
    (given,) = report.sets
    assert given.name == "given"
    assert (given.summary.sequences, given.summary.positions) == (3, 7 + 1 + 3)
    assert given.truncated == 1
    assert report.sampling.num_samples is None
    reasons = {(f.prompt, f.completion): f.reason for f in report.failed}
    assert reasons[1, "given completion 1"] == "is empty"
    assert "no completion" in reasons[2, ""]
    assert "not in the alphabet" in reasons[3, ""]


def test_prompts_that_cannot_be_used_are_listed_and_the_run_goes_on(models, tmp_path) -> None:
    path = prompts_file(
        tmp_path,
        {"prompt": "12+34="},
        {"prompt": " "},
        {"prompt": "1" * 70 + "="},
        {"prompt": "hello"},
        {"messages": [{"role": "user", "content": "12+34="}]},
        {"messages": []},
    )
    report = audit(models, path)
    assert len(report.prompts) == 1
    reasons = [f.reason for f in report.failed]
    assert [f.prompt for f in report.failed] == [1, 2, 3, 4, 5]
    for reason, part in zip(
        reasons,
        ("is empty", "no room in a context of 64", "alphabet", "chat template", "are empty"),
        strict=True,
    ):
        assert part in reason
    with pytest.raises(UsageError, match=r"none of 1 can be used.*is empty"):
        audit(models, prompts_file(tmp_path, {"prompt": ""}))


def test_logits_that_are_no_numbers_fail_their_completion_alone(models, tmp_path, monkeypatch) -> None:
    def spoil(hidden, tokens, _mask):
        return torch.where((tokens == 12)[..., None], torch.nan, hidden)  # the digit 9

    loaded = {"base": random_model(0), "tuned": Faulty(1, hidden=spoil)}
    monkeypatch.setattr(ModelSource, "load", lambda self, on_note: loaded[Path(self.reference).name])
    report = audit(models, prompts_file(tmp_path, *SOME), num_samples=4)
    assert report.failed
    assert all("no numbers" in f.reason for f in report.failed)
    assert {f.prompt for f in report.failed if f.completion.startswith("tuned")} >= {2}
    kept = sum(one.summary.sequences for one in report.sets)
    assert kept + len(report.failed) == 2 * 3 * 4
    path = prompts_file(tmp_path, *SOME)
    loaded["tuned"] = Faulty(1, logits=lambda logits: logits * torch.nan)
    with pytest.raises(UsageError, match=r"none could be scored.*no numbers"):
        audit(models, path)


def test_files_that_are_not_prompts_are_one_error_with_the_line(models, tmp_path) -> None:
    for lines, message in (
        ("{]\n", "line 1: is not JSON"),
        ('{"prompt": "1"}\n\n[]\n', "line 3: has not exactly one"),
        ('{"prompt": "1", "messages": []}\n', "exactly one of `prompt` and `messages`"),
        ('{"prompt": 1}\n', "`prompt` is int"),
        ('{"messages": [{"role": "user"}]}\n', "no conversation"),
        ('{"prompt": "1", "completion": "a", "completions": []}\n', "has both"),
        ('{"prompt": "1", "completions": "a"}\n', "not a list of texts"),
        ("\n", "holds no prompts"),
    ):
        path = tmp_path / "bad.jsonl"
        path.write_text(lines)
        with pytest.raises(UsageError, match=message):
            audit(models, path)
    with pytest.raises(UsageError, match="cannot be read"):
        audit(models, tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match="exactly one of a file and a task"):
        audit(models)


def test_numbers_that_cannot_be_are_refused_before_anything_is_read(tmp_path) -> None:
    nowhere = (tmp_path / "a", tmp_path / "b")
    for options, message in (
        ({"num_samples": 0}, "num_samples"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"num_prompts": 0}, "num_prompts"),
        ({"task": "poetry"}, "poetry"),
        ({"dtype": "int4"}, "dtype"),
    ):
        with pytest.raises(UsageError, match=message):
            audit(nowhere, **({"task": "addition"} | options))


def test_a_model_beyond_the_labs_needs_the_extra(models, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    (tmp_path / "other").mkdir()
    with pytest.raises(MissingExtraError, match=r"sparsity-audit\[lab\]"):
        audit((models[0], tmp_path / "other"), task="addition")


def test_an_output_that_is_taken_is_refused_unless_overwritten(models, tmp_path) -> None:
    options = {"task": "addition", "num_prompts": 2, "figures": False, "output": tmp_path / "out"}
    audit(models, **options)
    with pytest.raises(OutputError, match="would replace"):
        audit(models, **options)
    before = (tmp_path / "out" / "tokens.json").read_bytes()
    audit(models, overwrite=True, **options)
    assert (tmp_path / "out" / "tokens.json").read_bytes() == before
    with pytest.raises(OutputError, match="holds a run"):
        audit(models, **(options | {"output": models[0], "overwrite": True}))


def test_positions_as_parquet_are_those_of_the_csv(models, tmp_path) -> None:
    import pyarrow.parquet as pq

    options = {"task": "addition", "num_prompts": 2, "figures": False}
    audit(models, output=tmp_path / "csv", **options)
    audit(models, output=tmp_path / "parquet", parquet=True, **options)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "csv" / "positions.csv").read_text())))
    table = pq.read_table(tmp_path / "parquet" / "positions.parquet").to_pylist()
    assert len(rows) == len(table) > 0
    for row, wanted in zip(rows, table, strict=True):
        assert row["text"] == wanted["text"]
        assert float(row["js"]) == pytest.approx(wanted["js"], rel=1e-8)


def test_a_series_scores_every_step_on_the_same_completions(models, tmp_path) -> None:
    run = tmp_path / "run"
    for step, seed in ((1, 0), (20, 5), (3, 1)):
        save_random(run / f"checkpoint-{step}", seed)
    options = {"task": "addition", "num_prompts": 6, "max_new_tokens": 10}
    report = sparsity_audit.tokens_series(models[0], run, output=tmp_path / "out", **options)
    assert [step.number for step in report.steps] == [1, 3, 20]
    assert [one.name for one in report.sets] == ["base", "tuned"]
    for one in report.sets:
        steps = one.series.steps
        assert steps[0].mean_js.value == 0.0  # step 1 is the base itself
        assert steps[1].mean_js.value > 0
        assert steps[-1].jaccard == 1.0
    direct = audit((models[0], run / "checkpoint-20"), task="addition", num_prompts=6, seed=0)
    for mine, theirs in zip(report.sets, direct.sets, strict=True):
        assert mine.series.positions == theirs.summary.positions
        assert mine.series.steps[-1].mean_js.value == pytest.approx(theirs.summary.mean_js.value, abs=1e-12)
        assert mine.series.steps[-1].above == theirs.summary.above
    names = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"tokens-series.json", "tokens-series.csv", "summary.md", "tokens-series.pdf"} <= names
    with pytest.raises(UsageError, match="no saved step"):
        sparsity_audit.tokens_series(models[0], task="addition")


def test_a_lab_folder_of_another_shape_is_no_lab_model(tmp_path) -> None:
    folder = save_random(tmp_path / "model", 0)
    assert ModelSource(reference=folder, device="cpu", dtype="auto").is_lab
    assert ModelSource(reference="mix", device="cpu", dtype="fp32").is_lab
    assert not ModelSource(reference="mix", device="cpu", dtype="bf16").is_lab
    assert not ModelSource(reference="mix", device="cuda", dtype="auto").is_lab
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["x"] = 20
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert not ModelSource(reference=folder, device="cpu", dtype="auto").is_lab
    tied = save_random(tmp_path / "tied", 0)
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedFormatError, match="tie_word_embeddings"):
        audit((tied, tied), task="addition")
