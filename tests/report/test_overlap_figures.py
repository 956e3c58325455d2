"""Figures across runs: their numbers, labels and captions, and records with nothing to draw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparsity_audit import overlap
from sparsity_audit.masks.bitmask import pack_bits
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.report.overlap_consensus_figure import draw_consensus, render_consensus
from sparsity_audit.report.overlap_matrix_figure import draw_matrix, render_matrix
from sparsity_audit.report.overlap_parts_figure import draw_parts, render_parts
from sparsity_audit.report.style import house_style

NAMES = ["model.embed_tokens.weight", *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(12))]


@pytest.fixture(scope="module")
def report_of(tmp_path_factory):
    """The report of runs that share a part of their entries; the last run is the reference."""

    def make(num_runs: int):
        rng = np.random.default_rng(3)
        folder = tmp_path_factory.mktemp(f"runs{num_runs}")
        common = {name: rng.random((50, 40)) for name in NAMES}
        for run in range(num_runs):
            tensors = [MaskTensor(name=name, shape=(50, 40), compared=((0, 50),)) for name in NAMES]
            metadata = MaskMetadata(criterion="value", view="native")
            with MaskWriter(folder / f"run {run}", tensors, metadata) as writer:
                for name in NAMES:
                    bits = 0.6 * common[name] + 0.4 * rng.random((50, 40)) < 0.4
                    writer.write_bits(name, 0, pack_bits(bits))
                writer.finish()
        runs = [folder / f"run {run}" for run in range(num_runs)]
        return overlap(runs, reference=runs[-1], nulls="counts")

    return make


@pytest.fixture(scope="module")
def report(report_of):
    return report_of(5)


def test_the_matrix_shows_observed_below_and_chance_above_the_diagonal_in_clustering_order(report):
    with house_style():
        left, right, *_ = draw_matrix(report, report.matrix, width=6.75).axes
        shown = {text.get_position(): text.get_text() for text in left.texts}
        excess = {text.get_position(): text.get_text() for text in right.texts}
    matrix = report.matrix
    for r in range(5):
        for q in range(5):
            if r == q:
                assert (q, r) not in shown
                continue
            cells = matrix.jaccard if q < r else matrix.chance
            assert shown[q, r] == f"{cells[r][q]:.3f}".removeprefix("0")
            assert excess[q, r] == f"{matrix.excess_share[r][q]:.3f}".removeprefix("0")
    assert [label.get_text() for label in left.get_yticklabels()] == list(matrix.runs)
    assert "per-tensor chance above the diagonal" in left.get_title()


def test_many_runs_have_labels_but_no_numbers(report_of):
    report = report_of(13)
    with house_style():
        left, *_ = draw_matrix(report, report.matrix, width=6.75).axes
        assert not left.texts
        assert len(left.get_yticklabels()) == 13


def test_long_labels_keep_their_ends(report):
    long = "a very long directory name/seed 12"
    matrix = replace(report.matrix, runs=(long, *report.matrix.runs[1:]))
    with house_style():
        left, *_ = draw_matrix(report, matrix, width=6.75).axes
        label = left.get_yticklabels()[0].get_text()
    assert len(label) == 24
    assert label.startswith("…")
    assert long.endswith(label[1:])


def test_parts_stand_in_order_with_the_reference_pair_beside_the_headline(report):
    with house_style():
        figure = draw_parts(report, width=5.5)
        modules, layers = figure.axes
        assert [label.get_text() for label in layers.get_yticklabels()] == [str(n) for n in range(12)]
        assert [label.get_text() for label in modules.get_yticklabels()] == ["embed", "up_proj"]
        xs = sorted(float(line.get_xdata()[0]) for line in layers.lines if len(line.get_xdata()) == 1)
    pairs = (report.headline, report.reference_pair)
    expected = sorted(part.overlap.nulls["per-tensor"].excess_share for p in pairs for part in p.by_layer)
    assert xs == expected


def test_a_share_beyond_the_axis_is_a_triangle_with_its_value(report):
    part = report.headline.by_module[0]
    null = part.overlap.nulls["per-tensor"]
    # Five entries between chance and the smaller mask, and an overlap twenty below chance.
    few = replace(
        part.overlap, a=20, b=20, nulls={"per-tensor": replace(null, expected=15.0, excess_share=-4.0)}
    )
    first = replace(report.headline, by_module=(replace(part, overlap=few), *report.headline.by_module[1:]))
    with house_style():
        modules, _ = draw_parts(replace(report, pairs=(first, *report.pairs[1:])), width=5.5).axes
        assert [text.get_text() for text in modules.texts] == ["−4.00"]
        assert any(line.get_marker() == "<" for line in modules.lines)


def test_the_histogram_is_logarithmic_only_where_bars_differ_much(report):
    found = replace(report.consensus, observed=(40, 30, 20, 10, 5))
    with house_style():
        (axes,) = draw_consensus(report, found, width=5.5).axes
        assert axes.get_yscale() == "linear"
        (axes,) = draw_consensus(report, replace(found, observed=(4000, 30, 0, 10, 5)), width=5.5).axes
        assert axes.get_yscale() == "log"
        assert [bar.get_height() for bar in axes.patches] == [4000, 30, 0, 10, 5]
    labels = axes.get_legend_handles_labels()[1]
    assert set(labels) == {"observed", "uniform expects", "per-tensor expects"}


def test_captions_state_criterion_view_base_and_null(report):
    for render, name in (
        (render_matrix, "matrix"),
        (render_parts, "parts"),
        (render_consensus, "consensus"),
    ):
        files = render(report)
        assert set(files) == {f"{name}.{suffix}" for suffix in ("pdf", "svg", "png", "txt")}
        caption = files[f"{name}.txt"].decode()
        for words in ("criterion value, native view", "no base given", "per-tensor"):
            assert words in caption, name
        assert files == render(report)
    assert "(without the reference run 4)" in render_consensus(report)["consensus.txt"].decode()


def test_records_without_these_parts_have_no_figures(report):
    bare = replace(report, matrix=None, consensus=None)
    assert render_matrix(bare) == render_consensus(bare) == {}
    empty = replace(report.headline, by_module=(), by_layer=())
    assert render_parts(replace(report, pairs=(empty, *report.pairs[1:]))) == {}
    nothing = tuple((None,) * 5 for _ in range(5))
    assert render_matrix(replace(report, matrix=replace(report.matrix, jaccard=nothing))) == {}


def test_a_record_of_two_runs_draws_parts_alone(report_of):
    report = report_of(2)
    assert report.matrix is None
    assert report.reference_pair is None
    assert set(render_parts(report)) == {"parts.pdf", "parts.svg", "parts.png", "parts.txt"}
