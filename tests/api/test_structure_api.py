"""Structure in a diff: when the base is read again, what is said without it, and what real runs show."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparsity_audit.api import structure as api_structure
from sparsity_audit.api.diff import diff
from sparsity_audit.errors import UsageError
from sparsity_audit.report.schema import from_json, to_json
from sparsity_audit.report.structure import stripe_rows
from sparsity_audit.report.terminal import print_report

ADDITION = Path(__file__).resolve().parents[1] / "data" / "addition"
BF16 = (ADDITION / "base-bf16", ADDITION / "grpo-bf16-seed0")
FP32 = (ADDITION / "base-fp32", ADDITION / "grpo-fp32-seed0")


def _structure(*sides, **options):
    record = diff(*sides, **options).structure
    assert record is not None
    return record


def _is_layer(name: str) -> bool:
    return ".layers." in name


def test_in_bf16_magnitudes_account_for_the_stripes_of_every_matrix_of_the_layers():
    report = diff(*BF16)
    assert report.structure is not None
    stripes = [tensor for tensor in report.structure.stripes if _is_layer(tensor.name)]
    assert len(stripes) == 21
    scores = [(line.observed, line.expected, line.z) for t in stripes for line in (t.rows, t.cols)]
    assert max(observed for observed, _, _ in scores) > 3
    assert max(abs(z or 0) for _, _, z in scores) < 5
    found = [text for text in report.findings if text.startswith("Changes gather")]
    assert len(found) == 1
    assert "1 of 2 embeddings and heads" in found[0]
    assert "model.embed_tokens.weight (38.15 against 1.04" in found[0]


def test_fp32_weights_rounded_for_serving_have_rows_that_magnitudes_do_not_explain():
    report = diff(*FP32, view="served")
    assert report.structure is not None
    striped = [t for t in report.structure.stripes if _is_layer(t.name) and t.rows.is_striped]
    assert len(striped) == 12
    assert any("12 of 21 matrices of the layers" in text for text in report.findings)


def test_every_head_of_a_real_run_is_counted_once():
    record = _structure(*BF16)
    assert len(record.heads) == 3 * 4 * 4
    assert record.heads_notes == ()
    assert {head.entries for head in record.heads} == {16 * 64}
    report = diff(*BF16)
    for tensor in report.tensors:
        if tensor.summary.module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            changed = next(c.changed for c in tensor.summary.native.counts if c.criterion == "value")
            mine = [
                h.changed
                for h in record.heads
                if (h.layer, h.module) == (str(tensor.summary.layer), tensor.summary.module)
            ]
            assert sum(mine) == changed


def test_off_leaves_the_expectation_out_and_says_how_to_get_it(capsys):
    on, off = _structure(*BF16, structure="on"), _structure(*BF16, structure="off")
    assert [t.rows.observed for t in off.stripes] == [t.rows.observed for t in on.stripes]
    assert all(t.rows.expected is None and t.cols.z is None for t in off.stripes)
    assert off.heads == on.heads
    assert on.stripes_note == ""
    assert "--structure on reads the base's matrices a second time" in off.stripes_note
    report = diff(*BF16, structure="off")
    assert not any(text.startswith("Changes gather") for text in report.findings)
    print_report(report, output=None, mask=None)
    assert off.stripes_note in capsys.readouterr().out


def test_auto_reads_small_bases_again_and_leaves_large_ones(monkeypatch):
    assert _structure(*BF16) == _structure(*BF16, structure="on")
    monkeypatch.setattr(api_structure, "MAX_AUTO_BYTES", 1000)
    assert _structure(*BF16) == _structure(*BF16, structure="off")
    notes: list[str] = []
    diff(*BF16, structure="on", on_note=notes.append)
    assert any("bytes of the base a second time" in note for note in notes)


def test_at_level_counts_there_is_no_structure():
    assert diff(*BF16, stats="counts").structure is None
    with pytest.raises(UsageError, match="--stats full"):
        diff(*BF16, stats="counts", structure="on")
    with pytest.raises(UsageError, match="auto, on or off"):
        diff(*BF16, structure="yes")  # pyright: ignore[reportArgumentType]


def test_a_criterion_that_strata_do_not_decide_has_no_expectation_and_says_so():
    record = _structure(*FP32, criteria=["atol:1e-4"])
    assert record.criterion == "atol:1e-4"
    assert record.stripes
    assert "their changes by magnitude are not known under atol:1e-4" in record.stripes_note


def test_a_top_mask_has_scores_of_its_own_entries():
    record = _structure(*FP32, criteria=["top:5%"])
    assert record.criterion == "top:5%"
    assert all(tensor.rows.observed > 0 for tensor in record.stripes)


def test_the_record_reads_back_equal_and_the_terminal_shows_its_most_uneven_matrices(capsys):
    report = diff(*FP32, view="served")
    assert from_json(to_json(report)) == report
    assert report.structure is not None
    rows = stripe_rows(report.structure)
    assert len(rows) == 5
    assert rows[0][:3] == ["model.embed_tokens.weight", "33.03", "1.02"]
    print_report(report, output=None, mask=None)
    shown = capsys.readouterr().out
    assert all(cell in shown for row in rows for cell in row)


def test_a_checkpoint_without_a_config_has_no_heads_and_says_why(tmp_path):
    rng = np.random.default_rng(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = rng.standard_normal((8, 8)).astype(np.float32)
    for folder, array in (("b", weights), ("t", weights + (rng.random((8, 8)) < 0.3).astype(np.float32))):
        (tmp_path / folder).mkdir()
        save_file({name: array}, tmp_path / folder / "model.safetensors")
    record = _structure(tmp_path / "b", tmp_path / "t")
    assert record.heads == ()
    assert record.heads_notes == (f"{name}: the base has no config.json",)


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
def test_experts_and_routers_of_a_mixture_are_counted_apart(tmp_path, stacked):
    rng = np.random.default_rng(1)
    up = rng.standard_normal((4, 6, 8)).astype(np.float32)
    changed = rng.random(up.shape) < np.array([0.0, 0.2, 0.5, 1.0])[:, None, None]
    router = rng.standard_normal((4, 8)).astype(np.float32)
    for folder, experts, gate in (("b", up, router), ("t", up + changed, router + 1)):
        tensors = {"model.layers.0.mlp.gate.weight": gate.astype(np.float32)}
        if stacked:
            tensors["model.layers.0.mlp.experts.gate_up_proj"] = experts.astype(np.float32)
        else:
            for number, matrix in enumerate(experts):
                tensors[f"model.layers.0.mlp.experts.{number}.up_proj.weight"] = matrix.astype(np.float32)
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    record = _structure(tmp_path / "b", tmp_path / "t")
    assert [(e.layer, e.expert, e.entries, e.changed) for e in record.experts] == [
        ("0", number, 48, int(part.sum())) for number, part in enumerate(changed)
    ]
    assert [(g.group, g.entries, g.changed) for g in record.mixture] == [
        ("routers", 32, 32),
        ("routed experts", 192, int(changed.sum())),
    ]
