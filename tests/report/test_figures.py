"""Figures against the records they are made from, and their bytes."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from sparsity_audit import diff
from sparsity_audit.errors import UsageError
from sparsity_audit.report.figures import FIGURES, caption, render_figures
from sparsity_audit.report.figures_headline import draw_headline
from sparsity_audit.report.figures_precision import draw_change_rate, draw_ulps, law_edges, shown_rates
from sparsity_audit.report.figures_structure import density_grids, draw_density, draw_layers
from sparsity_audit.report.figures_tolerance import curve_outline, delta_bins, draw_delta, draw_tolerance
from sparsity_audit.report.runs import Run, label_runs, short_percent, short_share
from sparsity_audit.report.schema import DiffReport
from sparsity_audit.report.style import WIDTHS, house_style
from sparsity_audit.stats.rollup import Rollup, RollupCount

ATOLS = ("atol:1e-6", "atol:1e-4", "atol:1e-3", "atol:0.0009765625")


@pytest.fixture(scope="module")
def bf16(addition) -> DiffReport:
    return diff(
        addition / "base-bf16", addition / "grpo-bf16-lr1e-4-seed0", lr=1e-4, weights_dtype="bf16", workers=1
    )


@pytest.fixture(scope="module")
def fp32(addition) -> DiffReport:
    return diff(addition / "base-fp32", addition / "grpo-fp32-seed0", criteria=["value", *ATOLS], workers=1)


@pytest.fixture(scope="module")
def both(bf16, fp32) -> tuple[Run, ...]:
    return label_runs([bf16, fp32])


def _svg_texts(data: bytes) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", data.decode())


def _with_headline(report: DiffReport, changed: int) -> DiffReport:
    rows = tuple(
        dataclasses.replace(row, compared=1000, changed=changed) if row.criterion == "value" else row
        for row in report.headlines
    )
    return dataclasses.replace(report, headlines=rows)


def test_bars_and_their_numbers_are_the_records(bf16) -> None:
    runs = label_runs([_with_headline(bf16, 317)])
    with house_style():
        figure = draw_headline(runs, width=5.5)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[bf16.criteria.index("value")] == pytest.approx(68.3, abs=1e-9)
    texts = _svg_texts(render_figures(runs, names=["headline"], formats=["svg"])["headline.svg"])
    assert {"68.3", "81.5", "bitwise", "atol:1e-5"} <= set(texts)


def test_served_bars_stand_beside_native_ones_only_where_there_is_a_served_view(both) -> None:
    with house_style():
        figure = draw_headline(both, width=6.75)
    assert [len(axes.patches) for axes in figure.axes] == [4, 2 * len(both[1].report.criteria)]


@pytest.mark.parametrize(
    ("part", "text"),
    [(0, "0.0"), (1, "<0.1"), (500, "0.5"), (99_999, ">99.9"), (100_000, "100.0"), (99_950, "100.0")],
)
def test_percentages_are_0_or_100_only_when_they_are(part, text) -> None:
    expected = text if part != 99_950 else ">99.9"
    assert short_percent(part, 100_000) == expected == short_share(part / 100_000)


def test_cells_are_the_densities_of_layer_and_module(bf16) -> None:
    run = label_runs([bf16])[0]
    grid = density_grids(run)[0]
    with house_style():
        figure = draw_density([run], width=5.5)
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    found = {group.key: group for group in bf16.rollups[0].by_layer_and_module}
    for y, module in enumerate(grid.modules):
        for x, layer in enumerate(grid.layers):
            counts = {c.total.criterion: c.total for c in found[f"{layer}/{module}"].counts}["value"]
            assert drawn[y, x] == pytest.approx(100 * counts.changed / counts.compared, rel=1e-12)
    assert grid.modules[:4] == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert grid.layers == ("0", "1", "2")
    texts = _svg_texts(render_figures([run], names=["density"], formats=["svg"])["density.svg"])
    assert {"26", "16", "28"} <= set(texts)


def _with_layers(report: DiffReport, change: Callable[[int, Rollup], list[Rollup]]) -> DiffReport:
    """Replace layers and cells of the native view."""
    rollups = report.rollups[0]
    made = dataclasses.replace(
        rollups,
        by_layer=tuple(g for i, group in enumerate(rollups.by_layer) for g in change(i, group)),
        by_layer_and_module=tuple(
            g for i, group in enumerate(rollups.by_layer_and_module) for g in change(i, group)
        ),
    )
    return dataclasses.replace(report, rollups=(made, *report.rollups[1:]))


def test_eighty_layers_have_no_numbers_and_two_stacks_have_a_panel_each(bf16) -> None:
    def many(_: int, group: Rollup) -> list[Rollup]:
        layer, _, module = group.key.partition("/")
        tail = f"/{module}" if module else ""
        keys = [f"text.layers.{27 * int(layer) + i}{tail}" for i in range(27)] + [
            f"vision.layers.{layer}{tail}"
        ]
        return [dataclasses.replace(group, key=key) for key in keys]

    runs = label_runs([_with_layers(bf16, many)])
    with house_style():
        figure = draw_density(runs, width=6.75)
        lines = draw_layers(runs, width=6.75)
    text, vision = figure.axes[:2]
    assert (len(text.texts), len(vision.texts)) == (0, 24)
    assert np.asarray(text.images[0].get_array()).shape == (8, 81)
    assert len(lines.axes) == 2
    assert list(lines.axes[0].lines[0].get_xdata()) == list(range(81))


def test_a_module_that_a_layer_lacks_stays_empty(bf16) -> None:
    def drop(number: int, group: Rollup) -> list[Rollup]:
        return [] if group.key == "1/q_proj" else [group]

    with house_style():
        figure = draw_density(label_runs([_with_layers(bf16, drop)]), width=5.5)
    assert np.isnan(np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)).sum() == 1


def test_layers_show_both_weightings(bf16) -> None:
    with house_style():
        figure = draw_layers(label_runs([bf16]), width=5.5)
    weighted, mean = figure.axes[0].lines
    counts: list[RollupCount] = [
        next(c for c in group.counts if c.total.criterion == "value") for group in bf16.rollups[0].by_layer
    ]
    assert list(weighted.get_ydata()) == pytest.approx([100 * c.total.sparsity for c in counts], rel=1e-12)
    assert list(mean.get_ydata()) == pytest.approx([100 * c.mean_sparsity for c in counts], rel=1e-12)


def test_lines_are_the_change_rates_and_the_step_stands_where_half_a_ulp_passes_the_learning_rate(
    both,
) -> None:
    with house_style():
        figure = draw_change_rate(both, width=6.75)
    record = both[0].report.precision[0]
    line, law = figure.axes[0].lines
    assert list(line.get_ydata()) == [100 * rate.changed / rate.entries for rate in shown_rates(record)]
    assert list(line.get_xdata()) == [rate.exponent + 0.5 for rate in shown_rates(record)]
    # Half a ULP of bf16 is 2^(e-8): 6.1e-5 at e = -6, 1.2e-4 at e = -5.
    assert law_edges(record) == (-4, -5, -6)
    assert list(law.get_xdata()) == [-5, -5]
    native, served = figure.axes[1].lines
    for drawn, view in ((native, 0), (served, 1)):
        rates = shown_rates(both[1].report.precision[view])
        assert list(drawn.get_ydata()) == [100 * rate.changed / rate.entries for rate in rates]
    assert law_edges(both[1].report.precision[0]) is None


def test_distances_are_stacked_shares_of_the_changed_entries(bf16) -> None:
    with house_style():
        figure = draw_ulps(label_runs([bf16]), width=5.5)
    bins = bf16.precision[0].ulps.bins
    changed = sum(b.outward + b.inward + b.crossing for b in bins)
    bars = figure.axes[0].patches
    assert sum(bar.get_height() for bar in bars) == pytest.approx(100, rel=1e-12)
    assert bars[0].get_height() == pytest.approx(100 * bins[0].outward / changed, rel=1e-12)
    inward = bars[len(bars) // 3]
    assert inward.get_height() == pytest.approx(100 * bins[0].inward / changed, rel=1e-12)
    assert inward.get_y() == pytest.approx(bars[0].get_height(), rel=1e-12)


def test_the_band_holds_every_tolerance_that_was_counted(fp32) -> None:
    for record in fp32.precision:
        outline = curve_outline(record)
        for row in fp32.headlines:
            if row.view is record.view and row.criterion.startswith("atol:"):
                x = float(np.log2(float(row.criterion.removeprefix("atol:"))))
                around = [
                    (low, high)
                    for low, high in zip(outline[1::2], outline[::2], strict=True)
                    if low.exponent <= x <= high.exponent
                ]
                assert around
                # On a power of two the octave above holds |Δ| > 2^k, the one below |Δ| ≥ 2^k.
                assert any(low.lower <= row.changed <= low.upper for low, _ in around), row.criterion


def test_tolerance_draws_the_band_and_the_counted_points(fp32) -> None:
    with house_style():
        figure = draw_tolerance(label_runs([fp32]), width=5.5)
    record = fp32.precision[0]
    lower, upper, counted = figure.axes[0].lines[:3]
    assert list(lower.get_ydata()) == [100 * p.lower / record.entries for p in curve_outline(record)]
    assert list(upper.get_ydata()) == [100 * p.upper / record.entries for p in curve_outline(record)]
    rows = [r for r in fp32.headlines if r.view is record.view and r.criterion.startswith("atol:")]
    assert list(counted.get_ydata()) == [100 * row.changed / row.compared for row in rows]


def test_octaves_of_delta_hold_the_true_counts(addition, fp32) -> None:
    from safetensors.numpy import load_file

    sides = [load_file(addition / name / "model.safetensors") for name in ("base-fp32", "grpo-fp32-seed0")]
    deltas = np.concatenate(
        [np.abs(sides[1][n].astype(np.float64) - sides[0][n].astype(np.float64)).ravel() for n in sides[0]]
    )
    exponents = np.frexp(deltas[deltas > 0])[1] - 1
    true = dict(zip(*np.unique(exponents, return_counts=True), strict=True))
    bins = {item.exponent: item for item in delta_bins(fp32.precision[0])}
    for exponent in range(-40, -1):
        found = bins.get(exponent)
        low, high = (found.lower, found.upper) if found else (0, 0)
        assert low <= true.get(exponent, 0) <= high
    with house_style():
        figure = draw_delta(label_runs([fp32]), width=5.5)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[: len(bins)] == [100 * item.upper / fp32.precision[0].entries for item in bins.values()]
    assert heights[len(bins) :] == [100 * item.lower / fp32.precision[0].entries for item in bins.values()]


def test_the_same_record_gives_the_same_bytes_whatever_the_users_settings(fp32) -> None:
    import matplotlib as mpl

    runs = label_runs([fp32])
    first = render_figures(runs)
    with mpl.rc_context({"font.size": 20, "svg.hashsalt": None, "lines.linewidth": 9, "pdf.fonttype": 3}):
        assert render_figures(runs) == first
    assert {name.partition(".")[0] for name in first} == set(FIGURES)
    assert len(first) == 4 * len(FIGURES)


def test_files_hold_no_date_and_embed_truetype(bf16) -> None:
    files = render_figures(label_runs([bf16]), names=["headline"])
    assert b"CreationDate" not in files["headline.pdf"]
    assert b"/FontFile2" in files["headline.pdf"]
    assert b"<dc:date>" not in files["headline.svg"]
    assert b"Software" not in files["headline.png"]
    assert files["headline.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [min(WIDTHS), max(WIDTHS)])
def test_every_figure_can_be_laid_out_narrow_and_wide_without_a_warning(both, width) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = render_figures(both, formats=["png"], width=width)
    for name, data in files.items():
        if name.endswith(".png"):
            num_pixels = int.from_bytes(data[16:20], "big")
            assert num_pixels == round(200 * width), name


def test_a_report_of_level_counts_has_no_figures_of_precision(addition) -> None:
    report = diff(addition / "base-bf16", addition / "sft-bf16", stats="counts", workers=1)
    runs = label_runs([report])
    names = {name.partition(".")[0] for name in render_figures(runs, formats=["svg"])}
    assert names == {"headline", "density", "layers"}
    with pytest.raises(UsageError, match="have nothing for it"):
        render_figures(runs, names=["change-rate"])


def test_changes_without_a_distance_or_a_size_leave_figures_out_instead_of_failing(write_checkpoint) -> None:
    base = write_checkpoint("base", {"w": np.array([[1.0, 2.0, 0.0, 3.0]], dtype=np.float32)})
    tuned = write_checkpoint("tuned", {"w": np.array([[np.nan, np.inf, -0.0, 3.0]], dtype=np.float32)})
    runs = label_runs([diff(base, tuned, workers=1)])
    files = render_figures(runs, formats=["svg"])
    assert {name.partition(".")[0] for name in files} == {"headline", "change-rate"}
    same = write_checkpoint("same", {"w": np.array([[1.0, 2.0, 0.0, 3.0]], dtype=np.float32)})
    files = render_figures(label_runs([diff(base, same, workers=1)]), formats=["svg"])
    assert {name.partition(".")[0] for name in files} == {"headline", "change-rate"}


def test_pairs_of_several_dtypes_have_a_line_or_panel_for_each(write_checkpoint) -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(40, 50)).astype(np.float32)
    codes = rng.integers(0x3C00, 0x3F00, size=(40, 50)).astype(np.uint16)
    base = write_checkpoint("base", {"a.weight": wide, "b.weight": codes})
    tuned = write_checkpoint("tuned", {"a.weight": wide * np.float32(1.001), "b.weight": codes + 1})
    runs = label_runs([diff(base, tuned, workers=1)])
    with house_style():
        rates, ulps = draw_change_rate(runs, width=6.75), draw_ulps(runs, width=6.75)
    labels = rates.axes[0].get_legend_handles_labels()[1]
    assert {"changed, native (fp32)", "changed, native (bf16)", "changed, served (bf16)"} <= set(labels)
    assert len({line.get_color() for line in rates.axes[0].lines}) == 3
    assert len(ulps.axes) == len(runs[0].report.precision) == 3


def test_an_unknown_figure_lists_the_known_ones(bf16) -> None:
    with pytest.raises(UsageError, match="unknown: pie\n  expected: of headline, change-rate"):
        render_figures(label_runs([bf16]), names=["pie"])


def test_captions_state_criterion_view_dtypes_and_references(both) -> None:
    for name in FIGURES:
        text = caption(name, both)
        assert "criterion value, native view; 148,928 entries in 30 tensors compared" in text
        assert f"base {both[0].report.base.resolved} (bf16)" in text
        assert f"tuned {both[1].report.tuned.resolved} (fp32)" in text
    assert "learning rate 1e-4" in caption("change-rate", both)
    assert "the law leaves 80.7 % frozen" in caption("change-rate", both)


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/weights", "y/weights"], ["x/weights", "y/weights"]),
        (["hf://org/model@0123abc", "hf://org/other@4567def"], ["model", "other"]),
        (["hf://org/model@0123abc", "hf://org/model@4567def"], ["model@0123abc", "model@4567def"]),
        (["same", "same"], ["same (1)", "same (2)"]),
        (["weights", "x/weights"], ["weights", "x/weights"]),
    ],
)
def test_labels_are_the_shortest_ends_that_tell_the_references_apart(bf16, references, expected) -> None:
    reports = [
        dataclasses.replace(bf16, tuned=dataclasses.replace(bf16.tuned, resolved=r)) for r in references
    ]
    assert [run.label for run in label_runs(reports)] == expected


@pytest.mark.parametrize(("labels", "message"), [(["a"], "1 for 2 reports"), (["a", "a"], "occur twice")])
def test_labels_that_do_not_fit_are_refused(bf16, labels, message) -> None:
    with pytest.raises(UsageError, match=message):
        label_runs([bf16, bf16], labels)


def test_runs_of_different_questions_say_their_own(bf16, addition) -> None:
    other = diff(addition / "base-fp32", addition / "sft-fp32", view="served", workers=1)
    runs = label_runs([bf16, other])
    texts = _svg_texts(render_figures(runs, names=["layers"], formats=["svg"])["layers.svg"])
    assert "sft-fp32 (value, served)" in texts
    assert "grpo-bf16-lr1e-4-seed0 (value, native)" in texts
