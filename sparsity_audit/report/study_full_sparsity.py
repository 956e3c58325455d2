"""Part a of a full study: does update sparsity move with the KL penalty, the clip, stale data, the optimizer?

Contract: sparsity is an exact count, so what is uncertain is the run, not the figure: a contrast is taken in
every pair of runs that differ in one setting and share the seed, and all of them must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsity_audit.report.study_full import FullClaim, FullVerdict, Table
from sparsity_audit.report.study_full_facts import FullFacts, FullRun
from sparsity_audit.report.study_full_judging import NEGLIGIBLE, by_seed, not_measured, shown_interval, signed
from sparsity_audit.report.study_full_judging import difference as accuracy_difference
from sparsity_audit.report.style import COLOURS, INK, MARKERS, PALE, WIDTHS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_sparsity_sweep", "sparsity_claims"]

_SWEEP = "sparsity"
_VIEWS = {"fp32, as stored": "fp32", "fp32, served in bf16": "fp32", "bf16": "bf16"}
_CONTRASTS: dict[str, tuple[tuple[str, str], ...]] = {
    "KL penalty: with − without": (("on-kl", "on"), ("off-kl", "off"), ("off-kl-noclip", "off-noclip")),
    "clip: with − without": (("off", "off-noclip"), ("off-kl", "off-kl-noclip")),
    "on-policy − off-policy, same rollouts": (("on", "off"), ("on-kl", "off-kl")),
    "on-policy − off-policy, same updates": (("on", "off-quarter"),),
    "SGD − AdamW": (("on-sgd", "on"),),
}
_KL, _CLIP, _ROLLOUTS, _UPDATES, _OPTIMIZER = _CONTRASTS
_LABELS = {
    "on": "on-policy",
    "on-kl": "on-policy, KL",
    "off": "off-policy",
    "off-kl": "off-policy, KL",
    "off-noclip": "off-policy, no clip",
    "off-kl-noclip": "off-policy, KL, no clip",
    "off-quarter": "off-policy, as many updates",
    "on-sgd": "on-policy, SGD",
}
_SOURCE = "2505.11711"
_TITLES = {
    "kl-clip": "Neither a KL penalty nor the clip is what makes updates sparse",
    "on-policy": "On-policy data are what makes updates sparse",
    "optimizer": "The optimizer decides: SGD learns as much and moves far fewer weights",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contrast:
    """Differences of sparsity over all matched pairs and seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def is_none(self) -> bool:
        return all(abs(value) <= NEGLIGIBLE for value in self.values)

    @property
    def is_positive(self) -> bool:
        return all(value > NEGLIGIBLE for value in self.values)

    @property
    def is_real(self) -> bool:
        return self.is_positive or all(value < -NEGLIGIBLE for value in self.values)

    def __str__(self) -> str:
        return f"{signed(self.mean)} ({signed(min(self.values))} to {signed(max(self.values))})"


def sparsity_claims(facts: FullFacts) -> tuple[FullClaim, ...]:
    """Three claims; `not measured` without the runs."""
    if not facts.of(_SWEEP):
        sources = dict.fromkeys(_TITLES, _SOURCE) | {"optimizer": "2602.07729"}
        return tuple(
            not_measured(key, part="a", title=title, source=sources[key]) for key, title in _TITLES.items()
        )
    found = {view: {name: _contrast(facts, name, view) for name in _CONTRASTS} for view in _VIEWS}
    return _kl_and_clip(facts, found), _on_policy(found), _optimizer(facts, found)


def _sparsity(run: FullRun, view: str) -> float:
    return run.served_sparsity if "served" in view else run.sparsity


def _contrast(facts: FullFacts, name: str, view: str) -> _Contrast:
    values = []
    for a, b in _CONTRASTS[name]:
        ones, others = (by_seed(facts.of(_SWEEP, f"{arm}-{_VIEWS[view]}")) for arm in (a, b))
        values += [_sparsity(ones[seed], view) - _sparsity(others[seed], view) for seed in ones]
    return _Contrast(values=tuple(values))


def _kl_and_clip(facts: FullFacts, found: dict[str, dict[str, _Contrast]]) -> FullClaim:
    parts = [found[view][name] for view in _VIEWS for name in (_KL, _CLIP)]
    verdict: FullVerdict = "undecided"
    if all(part.is_none for part in parts):
        verdict = "reproduces"
    elif any(part.is_real for part in parts):
        verdict = "does not reproduce"
    kls = {
        arm: [run.tests[0].kl or 0.0 for run in facts.of(_SWEEP, arm)] for arm in ("off-fp32", "off-kl-fp32")
    }
    clipped = [run.clip_frac or 0.0 for run in facts.of(_SWEEP, "off-fp32")]
    return FullClaim(
        key="kl-clip",
        part="a",
        title=_TITLES["kl-clip"],
        source=_SOURCE,
        goal=f"it reproduces where every matched difference is within {NEGLIGIBLE:g} in all three views, it "
        f"does not where all of a view's lie beyond it on one side",
        verdict=verdict,
        reading=f"With and without a KL penalty sparsity differs by {found['bf16'][_KL]} in bf16, with and "
        f"without a clip by {found['bf16'][_CLIP]}; served from fp32 by "
        f"{found['fp32, served in bf16'][_KL]} and {found['fp32, served in bf16'][_CLIP]}. The penalty "
        f"takes KL(policy‖base) from {_range(kls['off-fp32'])} to {_range(kls['off-kl-fp32'])} nats a "
        f"completion, and the clip silences {100 * sum(clipped) / len(clipped):.2f} % of the tokens of "
        "stale data. On-policy, with one update a step, the ratio is 1 and a clip cannot act.",
        tables=(_arm_table(facts), _contrast_table(found)),
        caption="Update sparsity (criterion value) of all arms and seeds: fp32 as stored and served in bf16 "
        "(left), stored in bf16 (right, with the half-ULP law for AdamW at this rate). Off-policy: 2 "
        "epochs × 2 minibatches.",
    )


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f}–{max(values):.2f}"


def _on_policy(found: dict[str, dict[str, _Contrast]]) -> FullClaim:
    rollouts, updates = (found["bf16"][name] for name in (_ROLLOUTS, _UPDATES))
    verdict: FullVerdict = "undecided"
    if rollouts.is_positive and updates.is_positive:
        verdict = "reproduces"
    elif rollouts.is_positive and updates.is_none:
        verdict = "is explained"
    elif rollouts.is_none and updates.is_none:
        verdict = "does not reproduce"
    served = found["fp32, served in bf16"]
    return FullClaim(
        key="on-policy",
        part="a",
        title=_TITLES["on-policy"],
        source=_SOURCE,
        goal="judged on weights stored in bf16: it reproduces where on-policy runs are sparser by more than "
        f"{NEGLIGIBLE:g} both at the same rollouts and at the same number of updates; it is explained by the "
        "number of updates where they are at the same rollouts alone; it does not where neither",
        verdict=verdict,
        explained_by="the number of updates" if verdict == "is explained" else "",
        reading=f"In bf16 on-policy runs differ by {rollouts} from off-policy ones with the same rollouts "
        f"and four times the updates, and by {updates} from those with as many updates. Served from fp32 it "
        f"is {served[_ROLLOUTS]} and {served[_UPDATES]}: what moves the served sparsity is how far weights "
        "have come, not how fresh the data are."
        if served[_ROLLOUTS].is_positive and served[_UPDATES].is_none
        else f"In bf16 on-policy runs differ by {rollouts} from off-policy ones with the same rollouts and "
        f"four times the updates, and by {updates} from those with as many updates. Served from fp32 it is "
        f"{served[_ROLLOUTS]} and {served[_UPDATES]}.",
        tables=(),
        caption="",
    )


def _optimizer(facts: FullFacts, found: dict[str, dict[str, _Contrast]]) -> FullClaim:
    contrast = found["bf16"][_OPTIMIZER]
    ones, others = (by_seed(facts.of(_SWEEP, f"{arm}-bf16")) for arm in ("on-sgd", "on"))
    gains = [
        accuracy_difference(ones[seed].tests[0].accuracy, others[seed].tests[0].accuracy) for seed in ones
    ]
    sparser = all(value > 0.1 for value in contrast.values)
    as_good = all(gain.high > 0 for gain in gains)
    verdict: FullVerdict = "undecided"
    if sparser and as_good:
        verdict = "reproduces"
    elif contrast.is_none or all(value < 0 for value in contrast.values):
        verdict = "does not reproduce"
    return FullClaim(
        key="optimizer",
        part="a",
        title=_TITLES["optimizer"],
        source="2602.07729",
        goal="it reproduces where SGD is sparser in bf16 by more than .1 in every seed and its accuracy is "
        "not below AdamW's (no interval below 0); it does not where it is no sparser",
        verdict=verdict,
        reading=f"SGD at {ones[0].lr:g} differs from AdamW at {others[0].lr:g} by {contrast} in bf16, and by "
        f"{found['fp32, as stored'][_OPTIMIZER]} as stored in fp32; its accuracy by "
        + " and ".join(shown_interval(gain) for gain in gains)
        + ". SGD's rate comes from a pilot with seed 0, AdamW's is the lab's default. AdamW moves every "
        "weight by about its rate whatever the gradient; SGD moves them in proportion to it, and bf16 "
        "swallows the small ones.",
        tables=(),
        caption="",
    )


def _arm_table(facts: FullFacts) -> Table:
    rows = []
    for arm, label in _LABELS.items():
        fp32, bf16 = facts.of(_SWEEP, f"{arm}-fp32"), facts.of(_SWEEP, f"{arm}-bf16")
        rows.append(
            (
                label,
                " / ".join(str(run.updates) for run in bf16[:1]),
                _seeds([run.tests[0].accuracy.value for run in fp32]),
                _seeds([run.tests[0].accuracy.value for run in bf16]),
                _seeds([run.sparsity for run in fp32]),
                _seeds([run.served_sparsity for run in fp32]),
                _seeds([run.sparsity for run in bf16]),
            )
        )
    return Table(
        title="Arms; one number a seed",
        head=("arm", "updates", "accuracy fp32", "accuracy bf16", "sparsity fp32", "fp32 served", "bf16"),
        rows=tuple(rows),
    )


def _seeds(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in values)


def _contrast_table(found: dict[str, dict[str, _Contrast]]) -> Table:
    return Table(
        title="Differences of sparsity over matched pairs and seeds: mean (smallest to largest)",
        head=("contrast", *_VIEWS),
        rows=tuple((name, *(str(found[view][name]) for view in _VIEWS)) for name in _CONTRASTS),
    )


def draw_sparsity_sweep(facts: FullFacts) -> Figure:
    """Sparsity by arm; draw in `house_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTHS[2], 2.9))
    panels = figure.subplots(1, 2, sharey=True)
    for place, arm in enumerate(_LABELS):
        for run in facts.of(_SWEEP, f"{arm}-fp32"):
            for number, value in enumerate((run.sparsity, run.served_sparsity)):
                panels[0].plot(
                    value,
                    place + 0.12 * (2 * run.seed - 1),
                    color=COLOURS[number],
                    marker=MARKERS[number],
                    linestyle="none",
                    label=("as stored", "served in bf16")[number],
                )
        for run in facts.of(_SWEEP, f"{arm}-bf16"):
            if run.half_ulp is not None and not place:
                panels[1].axvspan(
                    run.half_ulp[0], run.half_ulp[2], color=PALE, linewidth=0, label="half-ULP interval"
                )
            panels[1].plot(
                run.sparsity,
                place + 0.12 * (2 * run.seed - 1),
                color=COLOURS[2],
                marker=MARKERS[2],
                linestyle="none",
                label="stored in bf16",
            )
    for axes, title in zip(panels, ("fp32 run", "bf16 run"), strict=True):
        axes.set_xlim(-0.02, 1.02)
        axes.set_title(title)
        axes.set_xlabel("update sparsity (value)")
        axes.grid(axis="x")
        axes.axhline(len(_LABELS) - 1.5, color=INK, linewidth=0.4, linestyle=":")
    panels[0].set_yticks(range(len(_LABELS)), list(_LABELS.values()))
    panels[0].invert_yaxis()
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure
