"""What many runs say together: numbers of the frozen runs by independent code, files, schema."""

from __future__ import annotations

import csv
import io
import json
import math
from itertools import combinations
from pathlib import Path

import addition_runs
import jsonschema
import numpy as np
import pytest

from sparsity_audit import overlap
from sparsity_audit.masks.bitmask import pack_bits
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.report.overlap import OverlapReport, overlap_json_schema, overlap_to_json
from sparsity_audit.report.overlap_files import FILE_NAMES, render_overlap
from sparsity_audit.stats.uncertainty import jackknife_over_runs

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "overlap-runs.yaml"
RUNS = {
    "GRPO 0": "grpo-bf16-seed0",
    "GRPO 1": "grpo-bf16-seed1",
    "PPO": "ppo-bf16",
    "expert it.": "expert-iteration-bf16",
    "DPO": "dpo-bf16",
    "SimPO": "simpo-bf16",
    "SFT": "sft-bf16",
}


@pytest.fixture(scope="module")
def report() -> OverlapReport:
    return overlap(EXAMPLE, nulls="counts")


@pytest.fixture(scope="module")
def masks() -> dict[str, np.ndarray]:
    """All entries of each run, −0 equal to 0, without the package's kernels."""
    base = {name: addition_runs.values(codes) for name, codes in addition_runs.load("base-bf16").items()}
    return {
        label: np.concatenate(
            [(addition_runs.values(run[name]) != weights).ravel() for name, weights in base.items()]
        )
        for label, folder in RUNS.items()
        for run in [addition_runs.load(folder)]
    }


@pytest.fixture(scope="module")
def strata() -> np.ndarray:
    """Tensor × stratum of |w| of each entry, in one numbering."""
    base = addition_runs.load("base-bf16")
    return np.concatenate(
        [1000 * place + addition_runs.strata_of(codes).ravel() for place, codes in enumerate(base.values())]
    )


def test_the_consensus_of_seven_runs_is_that_of_their_entries_and_leaves_the_reference_out(report, masks):
    held = sum(mask.astype(int) for mask in masks.values())
    assert report.consensus.observed == tuple(int((held == k).sum()) for k in range(8))
    assert report.consensus.cores[-1].observed == 78_951


def test_the_core_is_expected_as_the_sum_of_products_over_strata(report, masks, strata):
    core = report.consensus.cores[-1]
    entries = np.bincount(strata)
    rates = [np.bincount(strata, weights=mask) / np.maximum(entries, 1) for mask in masks.values()]
    assert core.expected["magnitude"] == pytest.approx(float(entries @ np.prod(rates, axis=0)), rel=1e-12)
    sizes = [int(mask.sum()) for mask in masks.values()]
    uniform = 148_928 * math.prod(size / 148_928 for size in sizes)
    assert core.expected["uniform"] == pytest.approx(uniform, rel=1e-12)
    assert round(core.excess_share["magnitude"], 3) == 0.062
    room = min(sizes) - core.expected["magnitude"]
    assert core.excess_share["magnitude"] == pytest.approx((78_951 - core.expected["magnitude"]) / room)


def test_the_interval_over_runs_is_the_jackknife_over_pairs_without_the_reference(report, masks):
    labels = list(masks)
    jaccard = [
        [float((masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()) for b in labels] for a in labels
    ]
    assert report.over_runs.runs == tuple(sorted(labels, key=[r.label for r in report.runs].index))
    expected = jackknife_over_runs(jaccard)
    assert report.over_runs.jaccard.mean == pytest.approx(expected.mean, rel=1e-12)
    assert report.over_runs.jaccard.low == pytest.approx(expected.low, rel=1e-9)
    excess = report.over_runs.excess_share["magnitude"]
    assert (round(excess.mean, 3), round(excess.low, 3), round(excess.high, 3)) == (0.045, 0.021, 0.07)


def test_the_matrix_has_every_pair_in_its_place(report):
    matrix, pairs = report.matrix, {frozenset((p.a, p.b)): p.overall for p in report.pairs}
    assert sorted(matrix.runs) == sorted([*RUNS, "shuffled"])
    assert (matrix.null, matrix.distance) == ("magnitude", "excess_share")
    for (r, a), (q, b) in combinations(enumerate(matrix.runs), 2):
        found = pairs[frozenset((a, b))]
        assert matrix.jaccard[r][q] == matrix.jaccard[q][r] == found.jaccard
        assert matrix.chance[r][q] == matrix.chance[q][r] == found.nulls["magnitude"].jaccard
        assert matrix.excess_share[q][r] == found.nulls["magnitude"].excess_share
    assert all(matrix.jaccard[r][r] is matrix.excess_share[r][r] is None for r in range(8))


def test_runs_with_much_in_common_stand_side_by_side(report):
    places = {run: place for place, run in enumerate(report.matrix.runs)}
    assert abs(places["GRPO 0"] - places["PPO"]) == 1
    assert abs(places["DPO"] - places["SimPO"]) == 1
    assert abs(places["SFT"] - places["expert it."]) == 1
    assert places["shuffled"] == 0
    heights = [merge.height for merge in report.matrix.merges]
    assert heights == sorted(heights)
    labels = [run.label for run in report.runs]
    first = report.matrix.merges[0]
    assert {labels[first.left], labels[first.right]} == {"GRPO 0", "PPO"}


def test_factors_of_the_example_by_hand(report):
    table = {record.factor: record for record in report.factors.factors}
    share = {frozenset((p.a, p.b)): p.overall.nulls["magnitude"].excess_share for p in report.pairs}
    grpo = ["GRPO 0", "GRPO 1", "shuffled"]
    assert table["algorithm"].levels["GRPO"] == tuple(grpo)
    alike = [share[frozenset(pair)] for pair in combinations(grpo, 2)]
    found = table["algorithm"].excess_share
    assert (found.marginal.same_pairs, found.marginal.differ_pairs, found.only_pairs) == (3, 25, 15)
    assert found.marginal.same == pytest.approx(sum(alike) / 3, rel=1e-12)
    assert (found.marginal.permutation.arrangements, found.marginal.permutation.p) == (56, 1.0)
    assert table["seed"].excess_share.only == share[frozenset(("GRPO 0", "GRPO 1"))]
    assert table["rewards"].excess_share.only == share[frozenset(("GRPO 0", "shuffled"))]
    assert table["seed"].excess_share.marginal.permutation.reason.startswith("8 distinct arrangements")
    assert round(table["rewards"].jaccard.marginal.same, 3) == 0.946
    assert report.factors.notes == ()


def test_the_record_follows_its_schema(report):
    record = json.loads(overlap_to_json(report))
    jsonschema.validate(record, overlap_json_schema())
    assert len(record["matrix"]["jaccard"]) == len(record["factors"]["runs"]) == 8
    assert record["consensus"]["cores"][6]["runs"] == 7
    assert record["over_runs"]["jaccard"]["runs"] == 7


def test_all_files_are_listed_so_that_overwriting_them_is_noticed(report):
    files = render_overlap(report, figures=True)
    assert set(files) == set(FILE_NAMES)
    assert list(files)[-1] == "overlap.json"
    again = render_overlap(report, figures=False)
    assert again == {name: data for name, data in files.items() if not name.startswith("figures/")}


def _rows(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode())))


def test_csv_files_hold_the_record_exactly(report):
    files = render_overlap(report, figures=False)
    rows = _rows(files["matrix.csv"])
    assert len(rows) == 8 * 7 * 3
    row = next(r for r in rows if (r["run_a"], r["run_b"], r["null"]) == ("GRPO 1", "GRPO 0", "magnitude"))
    found = report.headline.overall
    assert float(row["jaccard"]) == found.jaccard
    assert float(row["chance"]) == found.nulls["magnitude"].jaccard
    assert float(row["excess_share"]) == found.nulls["magnitude"].excess_share
    rows = _rows(files["factors.csv"])
    assert len(rows) == 3 * 2 * 3
    first = rows[0]
    assert (first["factor"], first["compared"], first["figure"], first["null"]) == (
        *("algorithm", "marginal", "excess_share", "magnitude"),
    )
    assert float(first["difference"]) == report.factors.factors[0].excess_share.marginal.difference
    assert rows[2]["pairs_differ"] == "15"
    rows = _rows(files["consensus.csv"])
    assert len(rows) == (8 + 7) * 3
    assert (rows[-1]["count"], rows[-1]["observed"], rows[-1]["null"]) == ("at least", "78951", "magnitude")
    assert float(rows[-1]["expected"]) == report.consensus.cores[-1].expected["magnitude"]


def test_the_summary_has_factors_matrix_intervals_and_consensus_with_named_nulls(report):
    text = render_overlap(report, figures=False)["summary.md"].decode()
    for words in (
        "## Factors: do runs that agree on one overlap more (excess share over magnitude)?",
        "| algorithm | all pairs | 3 | 0.020 | 0.945 | 25 | 0.042 | 0.946 | −0.022 | 1 |",
        "- seed, all pairs: no p: 8 distinct arrangements of the labels: a p needs at least 20",
        "## Jaccard, observed below the diagonal, magnitude chance above it",
        "Runs in the order of average linkage on 1 − excess share over magnitude.",
        "## Means over 21 pairs of 7 runs",
        "| excess share over magnitude | 0.045 | 0.010 | 0.021 … 0.070 |",
        "## Consensus of 7 runs",
        "Expected if runs were independent: uniform 5,239.7, per-tensor 12,711.3, magnitude 78,099.4.",
    ):
        assert words in text


def test_latex_tables_have_as_many_cells_as_columns(report):
    files = render_overlap(report, figures=False)
    for name in ("matrix", "factors", "consensus"):
        text = files[f"tables/{name}.tex"].decode()
        (columns,) = [line for line in text.splitlines() if r"\begin{tabular}" in line]
        count = columns.count("r", columns.index("}{l"))
        body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
        assert {line.count(" & ") for line in body.strip().splitlines()} == {count}
        assert "criterion value, native view" in text


def test_the_guide_prints_the_factors_of_the_largest_movements_as_they_are():
    report = overlap(EXAMPLE, criterion="top:1%")
    assert report.matrix.null == report.factors.null == "row-column-magnitude"
    assert {"row-column", "row-column-magnitude"} <= set(report.over_runs.excess_share)
    files = render_overlap(report, figures=False)
    guide = (EXAMPLE.parents[1] / "docs" / "guide" / "factors.md").read_text()
    lines = files["summary.md"].decode().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith(("| algorithm |", "| seed |", "| rewards |"))
    ]
    assert len(rows) == 9
    for cells in rows:
        shown = [cell for place, cell in enumerate(cells) if place not in (4, 7)]
        assert f"| {' | '.join(shown)} |".replace("|  |", "| |").replace("|  |", "| |") in guide
    assert report.consensus.cores[-1].observed == 198
    assert report.consensus.cores[-2].observed == 671
    assert "% seed, all pairs: no p: 8 distinct" in files["tables/factors.tex"].decode()


def _write(folder: Path, bits: np.ndarray) -> Path:
    tensor = MaskTensor(
        name="model.layers.0.mlp.up_proj.weight", shape=bits.shape, compared=((0, len(bits)),)
    )
    with MaskWriter(folder, [tensor], MaskMetadata(criterion="value", view="native")) as writer:
        writer.write_bits(tensor.name, 0, pack_bits(bits))
        writer.finish()
    return folder


@pytest.fixture
def write_runs(tmp_path):
    """Masks of a planted group structure, and the file that describes them."""

    def write(rows: list[str], groups: str) -> Path:
        rng = np.random.default_rng(5)
        shared = {group: rng.random((40, 50)) for group in dict.fromkeys(groups)}
        for number, group in enumerate(groups):
            _write(tmp_path / f"r{number}", 0.7 * shared[group] + 0.3 * rng.random((40, 50)) < 0.4)
        path = tmp_path / "runs.yaml"
        path.write_text("runs:\n" + "".join(f"  - {{run: r{n}, {row}}}\n" for n, row in enumerate(rows)))
        return path

    return write


def test_a_planted_factor_is_found_and_a_seed_of_its_own_for_every_run_says_so(write_runs):
    groups = "ABBAABBA"
    report = overlap(write_runs([f"data: {g}, seed: {n}" for n, g in enumerate(groups)], groups))
    data, seed = report.factors.factors
    assert report.factors.null == "per-tensor"
    assert data.excess_share.marginal.permutation.p == 1 / 35
    assert data.excess_share.marginal.difference > 0.3
    assert seed.excess_share.marginal.permutation.reason == "every run has a level of its own: no pairs agree"
    assert {*report.matrix.runs[:4]} in ({"r0", "r3", "r4", "r7"}, {"r1", "r2", "r5", "r6"})


def test_factors_that_divide_the_runs_alike_are_said_to_be_inseparable(write_runs):
    report = overlap(write_runs([f"data: {g}, lr: {g.lower()}, one: x" for g in "AABB"], "AABB"))
    assert report.factors.notes == ("data and lr divide the runs alike: their effects cannot be told apart",)


def test_a_reference_outside_of_the_file_has_no_factors_but_a_place_in_the_matrix(write_runs, tmp_path):
    path = write_runs([f"data: {g}" for g in "AABB"], "AABB")
    control = _write(tmp_path / "control", np.random.default_rng(9).random((40, 50)) < 0.4)
    report = overlap(path, reference=control)
    assert report.factors.runs == ("r0", "r1", "r2", "r3")
    assert report.factors.notes == ("control stands in no row of the file: it has no factors",)
    assert "control" in report.matrix.runs
    assert report.over_runs.runs == ("r0", "r1", "r2", "r3")
    assert len(report.consensus.observed) == 5


def test_a_file_without_factors_has_no_table_of_them(write_runs):
    report = overlap(write_runs(["label: x", "label: y", "label: z"], "AAB"))
    assert report.factors is None
    assert sorted(report.matrix.runs) == ["x", "y", "z"]


def test_below_four_runs_there_is_no_interval_but_its_reason_is_printed(write_runs):
    report = overlap(write_runs(["label: x", "label: y", "label: z"], "AAB"))
    assert report.over_runs.jaccard.mean is not None
    assert report.over_runs.jaccard.low is None
    text = render_overlap(report, figures=False)["summary.md"].decode()
    assert "- no interval: 3 runs: an interval over runs needs at least 4" in text
