"""Figures of a token divergence: how it is spread over positions, and which tokens hold it.

Contract: pure functions of the record; sets of completions keep their colour and marker in every panel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_audit.report.style import (
    COLOURS,
    FORMATS,
    HATCHES,
    HEAT_MAP,
    INK,
    MARKERS,
    PALE,
    WIDTHS,
    house_style,
    power,
    to_bytes,
)
from sparsity_audit.report.tokens import SetRecord, TokensReport
from sparsity_audit.report.tokens_tables import SET_NAMES, facts, headline, shown
from sparsity_audit.tokens.summary import (
    CURVE_FRACS,
    ENTROPY_EDGES,
    HIGH,
    JS_EDGES,
    LOW,
    NEW_TOKEN,
    SetSummary,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_divergence", "draw_tokens", "render_tokens_figures"]

_NUM_TOKENS = 12
_LOOKS = {"base": 0, "tuned": 1, "given": 2}


def render_tokens_figures(report: TokensReport) -> dict[str, bytes]:
    """Each figure in every format, and its caption."""
    about = f"{headline(report)}. {'; '.join(facts(report))}."
    captions = {
        "divergence": (
            "a: share of positions with a Jensen–Shannon divergence of at least x. b: share of all "
            "divergence in the most divergent x of the positions; grey is an even spread. c: mean "
            "divergence over the position, where one completion in 50 is as long. d: positions "
            f"by divergence and entropy of the base, {SET_NAMES[report.sets[-1].name]}."
        ),
        "tokens": (
            f"Left: where JS > {HIGH}, the tuned model's first choice under the base; `new` is below "
            f"{NEW_TOKEN}. Right: the tokens with the largest share of all divergence."
        ),
    }
    files: dict[str, bytes] = {}
    with house_style():
        for name, draw in (("divergence", draw_divergence), ("tokens", draw_tokens)):
            figure = draw(report, width=WIDTHS[2])
            files |= {f"{name}.{suffix}": to_bytes(figure, suffix) for suffix in FORMATS}
            files[f"{name}.txt"] = f"{captions[name]} {about}\n".encode()
    return files


def draw_divergence(report: TokensReport, *, width: float) -> Figure:
    """Four panels: distribution, concentration, profile, divergence × entropy; draw in `house_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.6))
    panels = figure.subplots(2, 2)
    for axes, letter in zip(panels.flat, "abcd", strict=True):
        axes.set_title(letter, loc="left", fontweight="bold")
    for one in report.sets:
        _draw_distribution(panels[0, 0], one)
        _draw_concentration(panels[0, 1], one)
        _draw_profile(panels[1, 0], one)
    _finish_curves(panels)
    _draw_histogram(figure, panels[1, 1], report.sets[-1])
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    return figure


def _look(name: str) -> dict[str, Any]:
    return {"color": COLOURS[_LOOKS[name]], "marker": MARKERS[_LOOKS[name]]}


def _draw_distribution(axes: Axes, one: SetRecord) -> None:
    rows = np.array(one.summary.histogram).sum(axis=1)
    reached = rows[::-1].cumsum()[::-1] / rows.sum()
    edges, shares = JS_EDGES[1:-1], reached[1:]
    seen = shares > 0
    axes.plot(np.array(edges)[seen], shares[seen], label=SET_NAMES[one.name], **_look(one.name))


def _draw_concentration(axes: Axes, one: SetRecord) -> None:
    if one.summary.curve is not None:
        places = [CURVE_FRACS.index(x) for x in (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)]
        axes.plot(CURVE_FRACS, one.summary.curve, markevery=places, **_look(one.name))


def _draw_profile(axes: Axes, one: SetRecord) -> None:
    points = [
        ((p.start + p.end - 1) / 2, js)
        for p in one.summary.by_position
        if p.is_common(one.summary.sequences) and (js := p.mean_js) is not None
    ]
    axes.plot(
        [place for place, _ in points],
        [js for _, js in points],
        markevery=max(1, len(points) // 16),
        **_look(one.name),
    )


def _finish_curves(panels: np.ndarray) -> None:
    first, second, third = panels[0, 0], panels[0, 1], panels[1, 0]
    first.set_xscale("log")
    first.set_xlabel("divergence x (nats)")
    first.set_ylabel("share of positions\nwith JS ≥ x")
    for x in (LOW, HIGH):
        first.axvline(x, color=INK, linewidth=0.6, linestyle=":")
    first.set_ylim(0, None)
    second.plot(CURVE_FRACS, CURVE_FRACS, color=PALE, zorder=1)
    second.set_xscale("log")
    second.set_xticks([0.001, 0.01, 0.1, 1.0], ["0.1 %", "1 %", "10 %", "all"])
    second.set_xlabel("most divergent positions")
    second.set_ylabel("share of all divergence")
    second.set_ylim(0, 1.03)
    third.set_xlabel("position in the completion (tokens)")
    third.set_ylabel("mean JS (nats)")
    third.set_ylim(0, None)
    for axes in (first, second, third):
        axes.grid(axis="y")


def _draw_histogram(figure: Figure, axes: Axes, one: SetRecord) -> None:
    from matplotlib.colors import LogNorm

    counts = np.array(one.summary.histogram, dtype=np.float64)
    last = max(int(np.nonzero(counts.any(axis=0))[0].max(initial=0)) + 1, 1)
    shares = np.ma.masked_equal(counts[:, :last] / counts.sum(), 0)
    low = max(float(shares.min()) if shares.count() else 1e-3, 1e-6)
    image = axes.pcolormesh(shares, cmap=HEAT_MAP, norm=LogNorm(vmin=min(low, 0.1), vmax=1.0))
    axes.set_xticks(range(0, last + 1, 2), [f"{x:g}" for x in ENTROPY_EDGES[: last + 1 : 2]])
    ticks = [place for place, x in enumerate(JS_EDGES) if x in (0.0, 1e-5, 1e-3, 0.01, 0.1, 0.3)]
    axes.set_yticks([*ticks, len(JS_EDGES) - 1], [*[_js_label(JS_EDGES[t]) for t in ticks], "ln 2"])
    axes.set_xlabel("entropy of the base (nats)")
    axes.set_ylabel("JS (nats)")
    figure.colorbar(image, ax=axes, label="share of positions")


def _js_label(value: float) -> str:
    return power(10, round(math.log10(value))) if 0 < value < 0.01 else f"{value:g}"


def draw_tokens(report: TokensReport, *, width: float) -> Figure:
    """Re-ranking or new tokens, and the tokens that hold the divergence; draw in `house_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 2.9))
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.25)})
    _draw_choices(left, report)
    _draw_shares(right, report)
    return figure


def _parts(summary: SetSummary) -> list[float] | None:
    """Same choice, another of the top 3, of the top 10, beyond; None without divergent positions."""
    found = summary.choices_above
    values = [found.same.value, found.in_top_3.value, found.in_top_10.value]
    if any(value is None for value in values):
        return None
    same, three, ten = (value or 0.0 for value in values)
    return [same, max(0.0, three - same), max(0.0, ten - three), max(0.0, 1 - ten)]


def _draw_choices(axes: Axes, report: TokensReport) -> None:
    labels = ("base's first choice", "rank 2 or 3", "rank 4 to 10", "rank beyond 10")
    shades = (PALE, COLOURS[5], COLOURS[0], COLOURS[1])
    for row, one in enumerate(report.sets):
        parts = _parts(one.summary)
        if parts is None:
            axes.text(0.5, row, f"no position with JS > {HIGH}", ha="center", va="center", fontsize=7)
            continue
        start = 0.0
        for part, label, shade, hatch in zip(parts, labels, shades, HATCHES, strict=True):
            axes.barh(
                row, part, left=start, height=0.5, color=shade, hatch=hatch, edgecolor="white",
                label=label if row == 0 else None,
            )  # fmt: skip
            start += part
        new = one.summary.choices_above.new.value or 0.0
        axes.text(1.0, row - 0.32, f"new: {new:.1%}", ha="right", va="bottom", fontsize=7, color=INK)
    axes.set_yticks(
        range(len(report.sets)), [SET_NAMES[one.name].replace(" ", "\n", 1) for one in report.sets]
    )
    axes.set_ylim(len(report.sets) - 0.4, -0.7)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"tuned's first choice under the base, JS > {HIGH}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, 1.22), ncols=2)


def _draw_shares(axes: Axes, report: TokensReport) -> None:
    shares = {one.name: {t.token_id: t for t in one.shifted_tokens} for one in report.sets}
    names = {t.token_id: t.token for one in report.sets for t in one.shifted_tokens}
    largest = sorted(
        names, key=lambda n: (-max(s[n].js_share if n in s else 0.0 for s in shares.values()), n)
    )[:_NUM_TOKENS]
    for number, one in enumerate(report.sets):
        found = shares[one.name]
        places = [row + 0.18 * (2 * number - len(report.sets) + 1) for row in range(len(largest))]
        values = [found[n].js_share if n in found else math.nan for n in largest]
        axes.hlines(places, 0, values, color=COLOURS[_LOOKS[one.name]], linewidth=0.9)
        axes.plot(values, places, linestyle="none", label=SET_NAMES[one.name], **_look(one.name))
    axes.set_yticks(range(len(largest)), [_tick(names[n]) for n in largest], fontsize=7)
    axes.set_ylim(len(largest) - 0.5, -0.5)
    axes.set_xlim(0, None)
    axes.set_xlabel("share of all divergence, by the token that stands there")
    axes.grid(axis="x")
    axes.legend(loc="lower right")


def _tick(text: str) -> str:
    """A token as a label: short, and no `$`, which would begin a formula."""
    body = shown(text)[:14].replace("$", r"\$")
    return "".join(c if c.isprintable() and ord(c) < 0x2FFF else "�" for c in body) or "∅"
