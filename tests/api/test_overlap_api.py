"""Overlaps end to end: known answers of the frozen runs, refusals, files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from sparsity_audit import diff, mask_ops, overlap, overlap_criteria
from sparsity_audit.errors import MaskError, OutputError, UsageError
from sparsity_audit.masks.bitmask import pack_bits
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.report.overlap_figure import render_ladder
from sparsity_audit.stats.overlap import (
    MAGNITUDE,
    NULL_ORDER,
    PER_TENSOR,
    PHANTOM,
    ROW_COLUMN,
    ROW_COLUMN_MAGNITUDE,
    UNIFORM,
)


def _chances(pair) -> dict[str, float]:
    return {name: null.jaccard for name, null in pair.overall.nulls.items()}


def test_two_seeds_at_a_low_rate_overlap_no_more_than_their_weights_magnitudes_account_for(addition) -> None:
    runs = [addition / f"grpo-bf16-lr1e-4-seed{seed}" for seed in (0, 1)]
    report = overlap(runs, base=addition / "base-bf16")
    pair = report.headline
    assert round(pair.overall.jaccard, 4) == 0.9224
    assert {name: round(value, 4) for name, value in _chances(pair).items()} == {
        UNIFORM: 0.1022,
        PER_TENSOR: 0.1177,
        MAGNITUDE: 0.9160,
        ROW_COLUMN: 0.1344,
        ROW_COLUMN_MAGNITUDE: 0.9215,
        PHANTOM: 0.4341,
    }
    magnitude = pair.overall.nulls[MAGNITUDE]
    assert (round(magnitude.excess_share, 3), round(magnitude.z, 1)) == (0.089, 10.6)
    assert pair.ladder.residual_null == ROW_COLUMN_MAGNITUDE
    assert (round(pair.ladder.residual, 3), round(pair.ladder.residual_z, 1)) == (0.013, 1.4)
    assert pair.ladder.sentence == (
        "Jaccard .922: uniform chance .102, tensor densities .118, weight magnitude .916; "
        "beyond that an excess share of .09; given its rows and columns as well .922, "
        "beyond that an excess share of .01"
    )


def test_a_run_with_shuffled_rewards_overlaps_as_another_seed_does(addition) -> None:
    runs = [addition / f"grpo-bf16-seed{seed}" for seed in (0, 1)]
    report = overlap(runs, base=addition / "base-bf16", reference=addition / "shuffled-reward-bf16")
    seeds, shuffled = report.headline, report.reference_pair
    assert (seeds.b, shuffled.b) == ("grpo-bf16-seed1", "shuffled-reward-bf16")
    assert (round(seeds.overall.jaccard, 4), round(_chances(seeds)[MAGNITUDE], 4)) == (0.9451, 0.9438)
    assert (round(shuffled.overall.jaccard, 4), round(_chances(shuffled)[MAGNITUDE], 4)) == (0.9453, 0.9444)
    beyond = [pair.overall.nulls[MAGNITUDE].excess_share for pair in (seeds, shuffled)]
    assert [round(share, 3) for share in beyond] == [0.025, 0.018]
    assert (round(seeds.ladder.residual, 3), round(shuffled.ladder.residual, 3)) == (0.003, -0.004)
    assert seeds.ladder.reference_residual == shuffled.ladder.residual
    assert seeds.ladder.sentence.endswith("the reference shuffled-reward-bf16 has .02 and −.004 of its own")
    assert [run.is_reference for run in report.runs] == [False, False, True]
    assert report.compared == 148_928
    assert report.consensus is None  # of two runs and a reference


def test_the_largest_movements_of_two_seeds_overlap_far_beyond_chance_and_those_of_a_control_do_not(
    addition,
) -> None:
    runs = [addition / f"grpo-fp32-seed{seed}" for seed in (0, 1)]
    report = overlap(
        runs,
        base=addition / "base-fp32",
        reference=addition / "shuffled-reward-fp32",
        criterion="top:1%",
    )
    seeds = report.headline
    assert round(seeds.overall.jaccard, 3) == 0.660
    assert round(_chances(seeds)[UNIFORM], 3) == 0.005
    assert round(_chances(seeds)[PER_TENSOR], 3) == 0.028
    assert round(report.reference_pair.overall.jaccard, 3) == 0.003


@pytest.fixture
def masks(addition, tmp_path) -> list[Path]:
    """The masks of both seeds at the low rate."""
    folders = [tmp_path / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        run = addition / f"grpo-bf16-lr1e-4-seed{seed}"
        diff(addition / "base-bf16", run, stats="counts", mask=folder)
    return folders


def test_masks_and_checkpoints_give_the_same_numbers(addition, masks) -> None:
    base = addition / "base-bf16"
    checkpoints = [addition / f"grpo-bf16-lr1e-4-seed{seed}" for seed in (0, 1)]
    whole = overlap(checkpoints, base=base)
    for runs in (masks, [masks[0], checkpoints[1]]):
        found = overlap(runs, base=base, workers=1)
        assert found.headline.overall == whole.headline.overall
        assert found.headline.by_layer == whole.headline.by_layer
    assert [run.kind for run in found.runs] == ["mask", "checkpoint"]


def test_without_a_base_the_magnitude_null_is_absent_and_the_notes_say_how_to_get_it(masks) -> None:
    report = overlap(masks)
    assert list(report.headline.overall.nulls) == [UNIFORM, PER_TENSOR, ROW_COLUMN]
    assert "(beside these: rows and columns .134)" in report.headline.ladder.sentence
    assert all(MAGNITUDE not in part.overlap.nulls for part in report.headline.by_module)
    assert report.headline.ladder.residual_null == PER_TENSOR
    assert any("--base BASE" in note for note in report.notes)


def test_parts_add_up_to_the_whole(addition, masks) -> None:
    pair = overlap(masks, base=addition / "base-bf16").headline
    for groups in (pair.by_module, pair.by_tensor):
        assert sum(part.overlap.both for part in groups) == pair.overall.both
        assert sum(part.overlap.entries for part in groups) == pair.overall.entries
    assert [part.key for part in pair.by_layer] == ["0", "1", "2"]
    assert {part.key for part in pair.by_module} >= {"q_proj", "down_proj", "embed", "norm"}


def test_another_base_than_the_masks_is_refused(addition, masks) -> None:
    with pytest.raises(MaskError, match="fingerprint"):
        overlap(masks, base=addition / "sft-bf16")


def test_masks_of_different_bases_are_refused_with_both_named_unless_forced(
    addition, masks, tmp_path
) -> None:
    other = tmp_path / "other"
    diff(addition / "sft-bf16", addition / "grpo-bf16-seed0", stats="counts", mask=other)
    with pytest.raises(MaskError, match="base fingerprints") as caught:
        overlap([masks[0], other])
    assert str(masks[0]) in str(caught.value)
    assert str(other) in str(caught.value)
    report = overlap([masks[0], other], force=True)
    assert any("base fingerprints" in note for note in report.notes)


@pytest.mark.parametrize(
    ("arguments", "what"), [({"criteria": ["atol:1e-5"]}, "criterion"), ({"view": "served"}, "view")]
)
def test_masks_of_different_questions_are_refused_unless_forced(
    addition, masks, tmp_path, arguments, what
) -> None:
    other = tmp_path / "other"
    run = addition / "grpo-bf16-lr1e-4-seed1"
    diff(addition / "base-bf16", run, stats="counts", mask=other, **arguments)
    with pytest.raises(MaskError, match=what):
        overlap([masks[0], other])
    assert any(what in note for note in overlap([masks[0], other], force=True).notes)


def _write(folder: Path, arrays: dict[str, np.ndarray], compared=None) -> Path:
    tensors = [
        MaskTensor(name=name, shape=bits.shape, compared=compared or ((0, len(bits)),))
        for name, bits in arrays.items()
    ]
    with MaskWriter(folder, tensors, MaskMetadata(criterion="value", view="native")) as writer:
        for name, bits in arrays.items():
            writer.write_bits(name, 0, pack_bits(bits))
        writer.finish()
    return folder


def test_masks_of_different_tensors_are_refused_and_forced_only_common_ones_are_used_and_listed(
    tmp_path,
) -> None:
    bits = np.eye(8, dtype=bool)
    left = _write(tmp_path / "left", {"a": bits, "b": bits})
    right = _write(tmp_path / "right", {"a": bits, "c": bits})
    with pytest.raises(MaskError, match="only in"):
        overlap([left, right])
    report = overlap([left, right], force=True)
    assert report.compared == 64
    assert [lost.name for lost in report.left_out] == ["b", "c"]


def test_masks_of_different_shapes_are_refused_and_nothing_in_common_cannot_be_forced(tmp_path) -> None:
    left = _write(tmp_path / "left", {"a": np.eye(8, dtype=bool)})
    right = _write(tmp_path / "right", {"a": np.eye(8, 9, dtype=bool)})
    with pytest.raises(MaskError, match=r"shapes \[8, 8\] and \[8, 9\]"):
        overlap([left, right])
    with pytest.raises(MaskError, match="no tensor in common"):
        overlap([left, right], force=True)


def test_the_reference_is_never_in_the_headline_of_other_runs_wherever_it_stands(tmp_path) -> None:
    rng = np.random.default_rng(8)
    runs = [_write(tmp_path / name, {"a": rng.random((9, 9)) < 0.5}) for name in ("control", "x", "y")]
    report = overlap(runs, reference=tmp_path / "control")
    assert report.headline.name == "x × y"
    assert report.reference_pair.name == "control × x"
    assert report.headline.ladder.reference_residual == report.reference_pair.ladder.residual
    assert overlap(runs[:2], reference=runs[0]).reference_pair is None


def test_the_ladder_is_drawn_alike_twice_and_shows_its_numbers(addition, masks) -> None:
    report = overlap(masks, base=addition / "base-bf16")
    first, second = render_ladder(report), render_ladder(report)
    assert first == second
    text = first["ladder.svg"].decode()
    for number in ("0.102", "0.118", "0.916", "0.922"):
        assert f">{number}<" in text
    assert report.headline.ladder.sentence in first["ladder.txt"].decode()


def test_masks_of_different_rows_are_refused_and_forced_only_common_rows_are_counted(tmp_path) -> None:
    top, low = np.zeros((4, 9), dtype=bool), np.zeros((4, 9), dtype=bool)
    top[:3, 0], low[1:, 0] = True, True
    left = _write(tmp_path / "left", {"a": top}, compared=((0, 3),))
    right = _write(tmp_path / "right", {"a": low}, compared=((1, 4),))
    with pytest.raises(MaskError, match="compared rows") as caught:
        overlap([left, right])
    assert "[[0, 3]]" in str(caught.value)
    assert "[[1, 4]]" in str(caught.value)
    pair = overlap([left, right], force=True).headline.overall
    assert (pair.entries, pair.a, pair.b, pair.both) == (18, 2, 2, 2)


def test_empty_and_full_masks_have_defined_results(tmp_path) -> None:
    empty = _write(tmp_path / "empty", {"a": np.zeros((3, 5), dtype=bool)})
    also = _write(tmp_path / "also", {"a": np.zeros((3, 5), dtype=bool)})
    full = _write(tmp_path / "full", {"a": np.ones((3, 5), dtype=bool)})
    report = overlap([empty, also, full], output=tmp_path / "out", figures=True)
    assert report.headline.overall.jaccard is None
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {"matrix", "consensus"}
    assert report.matrix.distance is None
    assert report.matrix.runs == ("empty", "also", "full")
    assert report.pairs[1].overall.jaccard == 0.0
    assert "full" in " ".join(report.pairs[1].ladder.warnings)


def test_three_runs_give_three_pairs_and_their_common_entries(tmp_path) -> None:
    rng = np.random.default_rng(3)
    arrays = [rng.random((20, 30)) < 0.4 for _ in range(3)]
    report = overlap([_write(tmp_path / f"r{i}", {"a": bits}) for i, bits in enumerate(arrays)])
    assert [pair.name for pair in report.pairs] == ["r0 × r1", "r0 × r2", "r1 × r2"]
    assert report.consensus.observed == tuple(int((sum(map(np.int64, arrays)) == k).sum()) for k in range(4))
    assert list(report.consensus.expected) == [UNIFORM, PER_TENSOR]
    assert list(report.consensus.cores[-1].excess_share) == [UNIFORM, PER_TENSOR]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path) -> None:
    bits = np.eye(8, dtype=bool)
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    runs = [_write(tmp_path / name / "mask", {"a": bits}) for name in ("x", "y")]
    assert [run.label for run in overlap(runs).runs] == [str(run) for run in runs]


def test_a_combined_mask_can_be_a_run(masks, tmp_path) -> None:
    mask_ops("and", masks, tmp_path / "core")
    pair = overlap([masks[0], tmp_path / "core"]).headline.overall
    assert pair.o2 == 1.0


def test_a_checkpoint_without_base_and_fewer_than_two_runs_are_refused(addition, masks, tmp_path) -> None:
    with pytest.raises(MaskError, match="--base BASE"):
        overlap([masks[0], addition / "sft-bf16"])
    with pytest.raises(UsageError, match="1 runs"):
        overlap([masks[0]])
    with pytest.raises(UsageError, match="given twice"):
        overlap([masks[0], f"{masks[0]}/../{masks[0].name}"])
    with pytest.raises(MaskError, match="as asked"):
        overlap(masks, criterion="atol:1e-5")


def test_a_mask_that_records_no_question_cannot_decide_that_of_a_checkpoint(addition, tmp_path) -> None:
    other = tmp_path / "other"
    metadata = MaskMetadata(criterion="unspecified", view="unspecified")
    with MaskWriter(other, [MaskTensor.whole("a", (2, 8))], metadata) as writer:
        writer.write_bits("a", 0, pack_bits(np.eye(2, 8, dtype=bool)))
        writer.finish()
    with pytest.raises(MaskError, match="does not record"):
        overlap([other, addition / "sft-bf16"], base=addition / "base-bf16")


def test_output_holds_record_tables_and_ladder_and_is_not_overwritten_unasked(
    addition, masks, tmp_path
) -> None:
    out = tmp_path / "out"
    report = overlap(masks, base=addition / "base-bf16", output=out, figures=True)
    record = json.loads((out / "overlap.json").read_bytes())
    assert (record["format"], record["version"]) == ("sparsity-audit/overlap", 1)
    assert record["pairs"][0]["overall"]["both"] == report.headline.overall.both
    assert len((out / "overlap.csv").read_text().splitlines()) == 1 + 6 * (1 + 3 + 10 + 30)
    assert report.headline.ladder.sentence in (out / "summary.md").read_text()
    assert r"\toprule" in (out / "tables" / "overlap.tex").read_text()
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in ("ladder", "parts") for suffix in ("pdf", "svg", "png", "txt")
    }
    with pytest.raises(OutputError, match="would replace"):
        overlap(masks, output=out)
    overlap(masks, output=out, overwrite=True)
    assert not list((out / "figures").iterdir()), "figures of other numbers than the record's"
    with pytest.raises(OutputError, match="holds a run"):
        overlap(masks, output=masks[0])


def test_no_figure_of_chance_is_printed_without_the_name_of_its_null(addition, masks, tmp_path) -> None:
    overlap(masks, base=addition / "base-bf16", output=tmp_path / "out")
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "uniform chance | per-tensor chance | magnitude chance | row-column-magnitude chance" in text
    for line in text.splitlines():
        if "chance" in line:
            assert any(name in line for name in NULL_ORDER) or line.startswith("#")


def test_finer_strata_give_the_known_answers(addition) -> None:
    runs = [addition / f"grpo-bf16-lr1e-4-seed{seed}" for seed in (0, 1)]
    rows = {row.scheme: row for row in overlap(runs, base=addition / "base-bf16").headline.convergence}
    found = {scheme: round(row.jaccard, 4) for scheme, row in rows.items()}
    assert found == {
        "tensor × exponent": 0.9127,
        "tensor × exponent × power of two (magnitude)": 0.9160,
        "tensor × 20 quantiles": 0.8417,
        "tensor × 100 quantiles": 0.9018,
        "tensor × 400 quantiles": 0.9151,
        "tensor × code (15 bits)": 0.9184,
    }
    assert rows["tensor × code (15 bits)"].in_small_strata > 0.8


def test_masks_of_two_seeds_overlap_as_those_of_a_control_do_and_their_updates_do_not(addition) -> None:
    runs = [addition / f"grpo-bf16-seed{seed}" for seed in (0, 1)]
    report = overlap(runs, base=addition / "base-bf16", reference=addition / "shuffled-reward-bf16")
    seeds, control = report.headline, report.reference_pair
    assert round(seeds.overall.jaccard, 3) == round(control.overall.jaccard, 3) == 0.945
    assert round(seeds.delta.cosine_overall, 3) == 0.590
    assert round(control.delta.cosine_overall, 3) == 0.043
    assert round(seeds.delta.sign_agreement, 3) == 0.559
    assert round(control.delta.sign_agreement, 3) == 0.523
    assert seeds.delta.both == seeds.overall.both


def test_signs_and_cosines_need_checkpoints_and_a_note_says_so(addition, masks) -> None:
    report = overlap(masks, base=addition / "base-bf16")
    assert report.headline.delta is None
    assert any("signs and cosines" in note for note in report.notes)


def test_every_null_is_there_or_its_absence_is_explained(addition) -> None:
    runs = [addition / f"grpo-fp32-seed{seed}" for seed in (0, 1)]
    for options, absent, reason in (
        ({}, {PHANTOM}, "no weight is stored in 16 bits"),
        ({"view": "served"}, set(), None),
        ({"criterion": "atol:1e-5"}, {PHANTOM}, "atol:1e-5 asks for something else"),
        ({"nulls": "counts"}, {PHANTOM, ROW_COLUMN, ROW_COLUMN_MAGNITUDE}, "left out by request"),
    ):
        report = overlap(runs, base=addition / "base-fp32", **options)
        assert set(NULL_ORDER) - set(report.headline.overall.nulls) == absent
        for null in absent:
            assert any(null in note and reason in note for note in report.notes), (null, report.notes)


def test_rows_and_columns_of_large_runs_are_fitted_when_asked_for(masks, monkeypatch) -> None:
    monkeypatch.setattr("sparsity_audit.api.overlap_nulls.AUTO_VISITS", 1000)
    report = overlap(masks)
    assert list(report.headline.overall.nulls) == [UNIFORM, PER_TENSOR]
    assert any("--nulls all" in note for note in report.notes)
    assert ROW_COLUMN in overlap(masks, nulls="all").headline.overall.nulls


def test_phantoms_of_a_wide_base_have_the_observed_densities(addition) -> None:
    runs = [addition / f"grpo-fp32-seed{seed}" for seed in (0, 1)]
    pair = overlap(runs, base=addition / "base-fp32", view="served").headline
    assert pair.phantom.expected_a == pytest.approx(pair.overall.a, abs=1e-3)
    assert pair.phantom.expected_b == pytest.approx(pair.overall.b, abs=1e-3)
    assert pair.phantom.sigma_a[0] <= pair.phantom.sigma_a[1]
    assert round(pair.overall.nulls[PHANTOM].jaccard, 3) == 0.793


def test_tensors_that_are_not_rounded_keep_their_magnitude_null_under_the_phantom(tmp_path) -> None:
    rng = np.random.default_rng(4)
    import torch
    from safetensors.torch import save_file

    base = {
        "low": torch.from_numpy(rng.normal(size=(40, 30))).bfloat16(),
        "wide": torch.from_numpy(rng.normal(size=(40, 30))).float(),
    }
    folders = [tmp_path / name for name in ("base", "x", "y")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        moved = {
            name: (tensor + number * 1e-2 * torch.from_numpy(rng.normal(size=(40, 30)))).to(tensor.dtype)
            for name, tensor in base.items()
        }
        save_file(moved, folder / "model.safetensors")
    pair = overlap(folders[1:], base=folders[0])
    by_tensor = {part.key: part.overlap.nulls for part in pair.headline.by_tensor}
    assert by_tensor["wide"][PHANTOM].expected == by_tensor["wide"][MAGNITUDE].expected
    assert by_tensor["low"][PHANTOM].expected != by_tensor["low"][MAGNITUDE].expected
    assert any("1 tensors that are not stored in 16 bits" in note for note in pair.notes)


def test_heterogeneity_is_over_tensors_and_absent_below_twenty(addition, tmp_path) -> None:
    runs = [addition / f"grpo-bf16-lr1e-4-seed{seed}" for seed in (0, 1)]
    spread = overlap(runs, base=addition / "base-bf16").headline.heterogeneity
    assert (spread.null, spread.blocks) == (ROW_COLUMN_MAGNITUDE, 23)
    assert spread.low < spread.excess_share < spread.high
    rng = np.random.default_rng(3)
    few = [_write(tmp_path / f"r{i}", {"a": rng.random((9, 9)) < 0.4}) for i in range(2)]
    lonely = overlap(few).headline.heterogeneity
    assert (lonely.low, lonely.high) == (None, None)
    assert "at least 20" in lonely.reason


def test_a_walk_stands_beside_the_runs_with_its_own_density(addition) -> None:
    runs = [addition / f"grpo-bf16-lr1e-4-seed{seed}" for seed in (0, 1)]
    report = overlap(runs, base=addition / "base-bf16", walk=(120, 1e-4), nulls="counts")
    # 2 × 256 walkers a value: standard errors below .001 (docs/design/chance.md: .874, .181).
    assert report.walk.density == pytest.approx(0.181, abs=0.004)
    assert report.walk.jaccard == pytest.approx(0.874, abs=0.006)
    assert report.walk == overlap(runs, base=addition / "base-bf16", walk=(120, 1e-4), nulls="counts").walk
    fp32 = [addition / f"grpo-fp32-seed{seed}" for seed in (0, 1)]
    without = overlap(fp32, base=addition / "base-fp32", walk=(5, 1e-4), nulls="counts")
    assert without.walk is None
    assert any("no weight of the base is stored in bf16" in note for note in without.notes)
    with pytest.raises(UsageError, match="walk"):
        overlap(runs, base=addition / "base-bf16", walk=(0, 1e-4))


def test_several_criteria_make_one_table_and_a_folder_each(addition, tmp_path) -> None:
    runs = [addition / f"grpo-fp32-seed{seed}" for seed in (0, 1)]
    out = tmp_path / "out"
    reports = overlap_criteria(
        runs,
        criteria=["top:1%", "top:5%"],
        base=addition / "base-fp32",
        reference=addition / "shuffled-reward-fp32",
        output=out,
        figures=True,
    )
    found = [round(report.headline.overall.jaccard, 3) for report in reports]
    assert found == [0.660, 0.406]  # tests/data/addition/README.md
    chance = [round(report.headline.overall.nulls[PER_TENSOR].jaccard, 3) for report in reports]
    assert chance == [0.028, 0.054]
    assert [round(r.headline.overall.nulls[ROW_COLUMN].jaccard, 3) for r in reports] == [0.606, 0.316]
    rows = list(csv.DictReader((out / "criteria.csv").open()))
    assert [row["criterion"] for row in rows] == ["top:1%"] * 3 + ["top:5%"] * 3
    assert float(rows[0]["Jaccard"]) == reports[0].headline.overall.jaccard
    assert json.loads((out / "top-5pct" / "overlap.json").read_bytes())["criterion"] == "top:5%"
    assert reports[1].headline.ladder.sentence in (out / "summary.md").read_text()
    assert (out / "figures" / "criteria.png").stat().st_size > 1000
    with pytest.raises(OutputError, match="would replace"):
        overlap_criteria(runs, criteria=["top:1%"], base=addition / "base-fp32", output=out)


def test_more_movements_than_there_are_leave_a_shorter_mask(addition) -> None:
    runs = [addition / f"grpo-bf16-lr1e-4-seed{seed}" for seed in (0, 1)]
    top = overlap(runs, base=addition / "base-bf16", criterion="top:90%").headline.overall
    value = overlap(runs, base=addition / "base-bf16").headline.overall
    assert (top.a, top.b, top.both) == (value.a, value.b, value.both)
