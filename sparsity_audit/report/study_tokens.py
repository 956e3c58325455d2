"""Token divergence in the study: its facts, its claim and its figure.

Contract: pure. The claim is judged on the tuned model's own samples, as published; the base's samples, which
nobody published, and the shuffled control stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsity_audit.report.style import COLOURS, MARKERS, WIDTHS
from sparsity_audit.tokens.intervals import RatioEstimate
from sparsity_audit.tokens.summary import CURVE_FRACS, HIGH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsity_audit.report.study import Claim, StudyFacts

__all__ = ["TokenFacts", "TokenSetFacts", "draw_study_tokens", "tokens_claim"]

_MOST = 0.1
"""Share of the positions that may have JS > `HIGH`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSetFacts:
    """One set of completions of a run.

    Args:
        name: `base` or `tuned`: whose samples.
        positions: Positions.
        above: Share with JS > .1.
        concentration: Share of all JS in the most divergent tenth.
        in_top_3: Where JS > .1: share whose first choice under the tuned model is in the base's top 3.
        new: There: share whose first choice has p < .01 under the base.
        curve: Share of all JS in the most divergent x of positions, x by `CURVE_FRACS`; None without JS.
        profile: Mean JS by position, as far as one completion in 50 goes and each position is one bin.
    """

    name: str
    positions: int
    above: RatioEstimate
    concentration: RatioEstimate
    in_top_3: RatioEstimate
    new: RatioEstimate
    curve: tuple[float, ...] | None
    profile: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFacts:
    """Token divergence of a run from its base.

    Args:
        run: Its name.
        role: `seed` or `shuffled`.
        num_prompts: Prompts, none of which the run was trained on.
        num_samples: Completions of each by each model.
        sets: The base's samples, then the run's.
    """

    run: str
    role: str
    num_prompts: int
    num_samples: int
    sets: tuple[TokenSetFacts, ...]

    def of(self, name: str) -> TokenSetFacts:
        """The set of that name."""
        return next(one for one in self.sets if one.name == name)


def tokens_claim(facts: StudyFacts) -> Claim:
    """RL moves few distributions."""
    from sparsity_audit.report.study import Claim

    seeds = [found for found in facts.tokens if found.role == "seed"]
    shares = [found.of("tuned").above.value or 0.0 for found in seeds]
    verdict = "not measured"
    if seeds:
        verdict = "reproduces" if max(shares) <= _MOST else "does not reproduce"
    return Claim(
        key="tokens",
        title="RL changes the distribution of few tokens, and those few hold the divergence",
        source="2603.22446",
        goal=f"JS > {HIGH:g} at a share ≤ {_MOST:g} of the positions of every GRPO run's own samples",
        numbers=tuple(line for found in facts.tokens for line in _lines(found)),
        verdict=verdict,
        reading=_reading(facts, shares),
        caption=_caption(facts),
    )


def _lines(found: TokenFacts) -> list[tuple[str, str]]:
    return [
        (f"{found.run}, samples of {'the base' if one.name == 'base' else 'the run'}", _line(one))
        for one in found.sets
    ]


def _line(one: TokenSetFacts) -> str:
    return (
        f"JS > {HIGH:g} at {_span(one.above)} of {one.positions:,}; the most divergent tenth holds "
        f"{_span(one.concentration)}; where JS > {HIGH:g}, base's top 3: {_span(one.in_top_3)}, new: "
        f"{_span(one.new)}"
    )


def _span(found: RatioEstimate) -> str:
    if found.value is None:
        return "–"
    return f"{found.value:.3f}" + ("" if found.low is None else f" ({found.low:.3f}–{found.high:.3f})")


def _reading(facts: StudyFacts, shares: list[float]) -> str:
    if not shares:
        return "This study scores no tokens."
    others = [found.of("base").above.value or 0.0 for found in facts.tokens if found.role == "seed"]
    text = (
        f"JS > {HIGH:g} at {_list(shares)} of the positions of the runs' own samples, and at {_list(others)} "
        "of those of the base's samples; published figures are of the former alone."
    )
    control = [found.of("tuned").above.value or 0.0 for found in facts.tokens if found.role == "shuffled"]
    return text + (f" With shuffled rewards: {_list(control)}." if control else "")


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _caption(facts: StudyFacts) -> str:
    if not facts.tokens:
        return ""
    first = facts.tokens[0]
    return (
        f"Jensen–Shannon divergence of run and base at every position, {first.num_prompts} prompts × "
        f"{first.num_samples}. Left: share of all divergence in the most divergent x of the positions. "
        "Right: mean divergence by position, where one completion in 50 is as long. Solid: samples of "
        "the run; dashed: samples of the base."
    )


def draw_study_tokens(facts: StudyFacts) -> Figure:
    """Concentration and profile of every run; draw in `house_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTHS[2], 2.6))
    left, right = figure.subplots(1, 2)
    for number, found in enumerate(facts.tokens):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for one in found.sets:
            style = "-" if one.name == "tuned" else "--"
            label = found.run if one.name == "tuned" else None
            if one.curve is not None:
                left.plot(CURVE_FRACS, one.curve, color=colour, linestyle=style)
            right.plot(
                range(len(one.profile)),
                one.profile,
                color=colour,
                linestyle=style,
                marker=marker if one.name == "tuned" else None,
                markevery=4,
                label=label,
            )
    left.set_xscale("log")
    left.set_xticks([0.001, 0.01, 0.1, 1.0], ["0.1 %", "1 %", "10 %", "all"])
    left.set_xlabel("most divergent positions")
    left.set_ylabel("share of all divergence")
    left.set_ylim(0, 1.03)
    right.set_xlabel("position in the completion (tokens)")
    right.set_ylabel("mean JS (nats)")
    right.set_ylim(0, None)
    for axes in (left, right):
        axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
