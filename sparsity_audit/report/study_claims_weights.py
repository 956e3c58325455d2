"""A study's claims about weights: sparsity, overlap, the largest movements, when the mask is there. Pure."""

from __future__ import annotations

from sparsity_audit.report.study import Claim, PairFacts, PruneFacts, RunFacts, StudyFacts, Verdict

__all__ = ["weight_claims"]

_MASKED = {
    "top-5pct": "the 5 % largest movements",
    "random-5pct": "5 % at random",
    "complement": "the other 95 %",
}
_FOUND_LATE = 0.5
"""Share of the final mask after one step below which the mask came about in training."""
_NEGLIGIBLE = 0.02
"""Sparsity of an fp32 run that counts as none, and the difference of sparsities that counts as none."""


def weight_claims(facts: StudyFacts) -> tuple[Claim, ...]:
    """The claims, in the order of the page."""
    return (
        _sparsity(facts),
        _overlap(facts),
        _cosines(facts),
        _largest(facts),
        _first_step(facts),
        _pruning(facts),
        _retraining(facts),
    )


def _sparsity(facts: StudyFacts) -> Claim:
    fp32 = [r for r in facts.runs if (r.precision, r.role, r.base) == ("fp32", "seed", "mix")]
    bf16 = [r for r in facts.runs if (r.precision, r.role) == ("bf16", "seed")]
    control = next(r for r in facts.runs if (r.precision, r.role) == ("bf16", "shuffled"))
    dense = max(run.sparsity for run in fp32) <= _NEGLIGIBLE
    lawful = all(_inside(run) for run in (*bf16, control))
    alike = max(abs(run.sparsity - control.sparsity) for run in bf16) <= _NEGLIGIBLE
    verdict: Verdict = "reproduces"
    if dense and lawful and alike:
        verdict = "is explained by rounding"
    elif min(run.sparsity for run in bf16) < 0.5:
        verdict = "does not reproduce"
    law = bf16[0].half_ulp
    assert law is not None, "a bf16 run has its half-ULP prediction"
    return Claim(
        key="sparsity",
        title="RL updates a small subnetwork: most weights do not change at all",
        source="2505.11711",
        goal=f"rounding explains it when the fp32 arm has sparsity ≤ {_NEGLIGIBLE:g}, the bf16 arm lies "
        f"inside the half-ULP interval, and shuffled rewards give the same within {_NEGLIGIBLE:g}",
        numbers=(
            *((run.name, f"{run.sparsity:.3f} as stored, {run.served_sparsity:.3f} served") for run in fp32),
            *((run.name, f"{run.sparsity:.3f}") for run in (*bf16, control)),
            ("half-ULP law, bf16", f"{law[1]:.3f} ({law[0]:.3f}–{law[2]:.3f})"),
        ),
        verdict=verdict,
        reading=f"With fp32 weights hardly an entry stays as it was; stored in bf16, {bf16[0].sparsity:.1%} "
        f"do, which the half-ULP law says of any Adam run with this learning rate ({law[1]:.1%}), and a run "
        f"that learns nothing has {control.sparsity:.1%}. {_bf16_gains(facts)}",
        caption="Update sparsity (criterion value), as stored and with both sides rounded to bf16. Bands: "
        "the interval of the half-ULP law for the bf16 arm, P(½ ULP(w) > lr).",
    )


def _inside(run: RunFacts) -> bool:
    return run.half_ulp is not None and run.half_ulp[0] <= run.sparsity <= run.half_ulp[2]


def _overlap(facts: StudyFacts) -> Claim:
    seeds = _pair(facts, "value", "grpo-bf16-seed0", "grpo-bf16-seed1")
    control = _pair(facts, "value", "grpo-bf16-seed0", "shuffled-bf16-seed2")
    magnitude, uniform = seeds.chance("magnitude"), seeds.chance("uniform")
    of_control = control.chance("magnitude")
    assert magnitude, "an overlap with a base has this null"
    assert uniform, "an overlap has this null"
    assert of_control, "an overlap with a base has this null"
    excess, beside = magnitude.excess_share or 0.0, of_control.excess_share or 0.0
    limit = facts.goals.rounding_excess
    return Claim(
        key="overlap",
        title="Different seeds find the same subnetwork",
        source="2505.11711",
        goal=f"rounding explains it when the excess share over the magnitude null is ≤ {limit:g}",
        numbers=(
            ("Jaccard, two seeds", _three(seeds.jaccard)),
            ("Jaccard, seed and shuffled rewards", _three(control.jaccard)),
            *((f"chance: {part.null}", _three(part.jaccard)) for part in seeds.nulls),
            ("excess share over magnitude, two seeds", _with_z(excess, magnitude.z)),
            ("excess share over magnitude, with shuffled rewards", _with_z(beside, of_control.z)),
        ),
        verdict="is explained by rounding" if excess <= limit else "reproduces",
        reading=f"Two seeds agree at Jaccard {_three(seeds.jaccard)}, far above uniform chance "
        f"({_three(uniform.jaccard)}). Runs that knew nothing but which weights are small would reach "
        f"{_three(magnitude.jaccard)}, and a run with shuffled rewards reaches {_three(control.jaccard)}. "
        f"An excess share of {excess:.3f} is left, beside {beside:.3f} of the control. {_bf16_gains(facts)}",
        caption="Masks of the bf16 arm (criterion value): observed Jaccard of two seeds and of a seed with "
        "the shuffled control, and what each null expects. Uniform, tensor densities and magnitude are "
        "nested, the last but one adds rows and columns to them; rows and columns alone and the phantom "
        "stand beside.",
    )


def _cosines(facts: StudyFacts) -> Claim:
    seeds = _pair(facts, "value", "grpo-bf16-seed0", "grpo-bf16-seed1")
    control = _pair(facts, "value", "grpo-bf16-seed0", "shuffled-bf16-seed2")
    alike = abs((seeds.jaccard or 0) - (control.jaccard or 0)) <= 2 * _NEGLIGIBLE
    apart = (seeds.cosine or 0) >= 2 * abs(control.cosine or 0) and (seeds.cosine or 0) > 0.1
    return Claim(
        key="cosines",
        title="Where weights moved says little; which way they moved tells learning from noise",
        source="ours",
        goal="the masks of a seed pair and of a pair with shuffled rewards overlap alike (within .04) "
        "while the cosine of the seeds' updates is above .1 and at least twice the control's",
        numbers=(
            ("Jaccard: two seeds, with shuffled", f"{_three(seeds.jaccard)}, {_three(control.jaccard)}"),
            ("cosine: two seeds, with shuffled", f"{_three(seeds.cosine)}, {_three(control.cosine)}"),
            (
                "equal signs: two seeds, with shuffled",
                (
                    f"{_three(seeds.sign_agreement)}, {_three(control.sign_agreement)} (independent: "
                    f"{_three(seeds.independent_signs)})"
                ),
            ),
        ),
        verdict="reproduces" if alike and apart else "does not reproduce",
        reading="The masks cannot tell the control from a seed; the updates can: cosine "
        f"{_three(seeds.cosine)} between seeds, {_three(control.cosine)} with the control.",
        caption="The same two pairs of bf16 runs, by overlap of masks, cosine of updates and agreement of "
        "signs.",
    )


def _largest(facts: StudyFacts) -> Claim:
    goals = facts.goals
    seeds = _pair(facts, "top:1%", "grpo-fp32-seed0", "grpo-fp32-seed1")
    control = _pair(facts, "top:1%", "grpo-fp32-seed0", "shuffled-fp32-seed2")
    lift, beside = (_lift(pair, "per-tensor") for pair in (seeds, control))
    numbers = [
        ("top 1 %, two seeds", f"Jaccard {_three(seeds.jaccard)}, {lift:.1f} × tensor chance"),
        (
            "top 1 %, with shuffled rewards",
            f"Jaccard {_three(control.jaccard)}, {beside:.1f} × tensor chance",
        ),
        *((f"chance: {part.null}", _three(part.jaccard)) for part in seeds.nulls),
    ]
    wider = facts.overlap("top:5%", "grpo-fp32-seed0", "grpo-fp32-seed1")
    if wider is not None:
        numbers.append(("top 5 %, two seeds", f"{_three(wider.jaccard)}, {_lift(wider, 'per-tensor'):.1f} ×"))
    single = facts.overlap("top:1%", "single-fp32-seed0", "single-fp32-seed1")
    if single is not None:
        numbers.append(
            ("top 1 %, base single", f"{_three(single.jaccard)}, {_lift(single, 'per-tensor'):.1f} ×")
        )
    for algorithm in ("expert-iteration", "sft", "ppo", "dpo"):
        pair = facts.overlap("top:1%", "grpo-fp32-seed0", f"{algorithm}-fp32-seed0")
        if pair is not None:
            numbers.append((f"top 1 %, GRPO and {algorithm}", _three(pair.jaccard)))
    rows = seeds.chance("row-column")
    return Claim(
        key="largest",
        title="The largest movements fall on the same weights in different seeds",
        source="2505.11711, with a criterion that rounding cannot make",
        goal=f"top-1 % masks of two fp32 seeds overlap ≥ {goals.seed_lift:g} × tensor chance, with shuffled "
        f"rewards ≤ {goals.shuffled_lift:g} ×",
        numbers=tuple(numbers),
        verdict="reproduces"
        if lift >= goals.seed_lift and beside <= goals.shuffled_lift
        else "does not reproduce",
        reading=f"The seeds share {lift:.1f} times what tensors of these densities would share by chance, "
        f"the control {beside:.1f} times."
        + (
            ""
            if rows is None
            else f" Which rows and columns are hit accounts for {_three(rows.jaccard)} of "
            f"{_three(seeds.jaccard)}: it is largely a matter of which neurons."
        ),
        caption="Masks of the largest |Δ| in fp32: observed Jaccard by pair, with the nulls; logarithmic "
        "axis.",
    )


def _first_step(facts: StudyFacts) -> Claim:
    first = {part.run: part.points[0] for part in facts.series}
    covered = [point.coverage or 0.0 for point in first.values()]
    verdict: Verdict = "does not reproduce"
    if min(covered) >= facts.goals.first_step_coverage:
        verdict = "is explained by rounding"
    elif max(point.coverage or 0.0 for run, point in first.items() if "bf16" in run) < _FOUND_LATE:
        verdict = "reproduces"
    return Claim(
        key="first-step",
        title="The subnetwork is found in the course of training",
        source="2505.11711 (early masks predict late ones)",
        goal="rounding and Adam explain it when the mask after one step holds ≥ "
        f"{facts.goals.first_step_coverage:g} of the final one, with shuffled rewards too; it reproduces "
        f"when the bf16 masks hold less than {_FOUND_LATE:g} of theirs then",
        numbers=tuple(
            (
                run,
                (
                    f"coverage {_three(point.coverage)} after step {point.step}, sparsity "
                    f"{_three(point.sparsity)}"
                ),
            )
            for run, point in first.items()
        ),
        verdict=verdict,
        reading=_first_step_reading(facts),
        caption="Share of the final mask that each saved step's mask holds (coverage; criterion value, as "
        "stored).",
    )


def _first_step_reading(facts: StudyFacts) -> str:
    law = next(part for part in facts.series if part.run.startswith("grpo-bf16"))
    control = next(part for part in facts.series if part.run.startswith("shuffled-bf16"))
    own, idle = (part.points[0].coverage or 0.0 for part in (law, control))
    lowest = min(point.coverage or 0.0 for point in law.points)
    return (
        f"After one step the bf16 mask holds {own:.1%} of what it will hold at the end, with shuffled "
        f"rewards {idle:.1%}; at its lowest it holds {lowest:.1%}. Adam's first update is lr · "
        "sign(gradient) whatever the gradient's size, so weights that rounding lets move at this learning "
        "rate move at once. " + _bf16_gains(facts)
    )


def _pruning(facts: StudyFacts) -> Claim:
    goals = facts.goals
    found = facts.prunings[0]
    top, drawn = found.kept_gain("top:5%"), found.kept_gain("random:5%")
    holds = top is not None and drawn is not None and top >= goals.kept_gain and drawn <= goals.random_gain
    return Claim(
        key="pruning",
        title="A small part of the update carries the gain",
        source="ours (pruning ΔW, evaluation only)",
        goal=f"the 5 % largest movements keep ≥ {goals.kept_gain:.0%} of the gain, 5 % at random ≤ "
        f"{goals.random_gain:.0%}",
        numbers=tuple(
            (
                f"{part.run}: {point.keep}",
                f"{point.accuracy.value:.3f}, {_kept(part, point.keep)} of the gain",
            )
            for part in facts.prunings
            for point in part.points
        ),
        verdict="reproduces" if holds else "does not reproduce",
        reading=f"The 5 % largest movements keep {_kept(found, 'top:5%')} of the gain of {found.run}, as "
        f"many random ones {_kept(found, 'random:5%')}."
        + (
            ""
            if len(facts.prunings) == 1
            else f" From base single, where no format is to be chosen, they keep "
            f"{_kept(facts.prunings[1], 'top:5%')}: a choice sits in fewer weights than a skill."
        ),
        caption="Accuracy of the base with a part of the update, by the share of entries that is kept. "
        "Lines: nothing and all of it kept.",
    )


def _kept(part: PruneFacts, keep: str) -> str:
    share = part.kept_gain(keep)
    return "–" if share is None else f"{share:.0%}".replace("-", "−")


def _retraining(facts: StudyFacts) -> Claim:
    goals = facts.goals
    runs = {name: run for name in _MASKED if (run := facts.run(f"masked-{name}")) is not None}
    full = facts.run("grpo-fp32-seed0")
    assert full is not None, "every study trains this run"
    shares = {name: run.gain / full.gain for name, run in runs.items()} if full.gain > 0 else {}
    verdict: Verdict = "not measured"
    if shares:
        holds = shares["top-5pct"] >= goals.kept_gain and shares["random-5pct"] <= goals.random_gain
        verdict = "reproduces" if holds else "does not reproduce"
    return Claim(
        key="retraining",
        title="Training the subnetwork alone, from a new seed, recovers the full run",
        source="2505.11711",
        goal=f"the 5 % of the largest movements recover ≥ {goals.kept_gain:.0%} of the gain, 5 % at random "
        f"≤ {goals.random_gain:.0%}",
        numbers=tuple(
            (_MASKED[name], f"accuracy {runs[name].accuracy.value:.3f}, {share:.0%} of the gain")
            for name, share in shares.items()
        ),
        verdict=verdict,
        reading=", ".join(f"{_MASKED[name]} recover {share:.0%}" for name, share in shares.items()) + "."
        if shares
        else "This study makes no masked runs.",
        caption="Accuracy of runs that may move only the entries of a mask of the first GRPO run. Lines: "
        "base and the first GRPO run."
        if shares
        else "",
    )


def _bf16_gains(facts: StudyFacts) -> str:
    """What the bf16 seeds gained: a reader must know whether the masks are of runs that learned."""
    gains = [run.gain for run in facts.runs if (run.precision, run.role) == ("bf16", "seed")]
    text = " and ".join(f"{gain:+.3f}" for gain in gains).replace("-", "−")
    return f"The bf16 seeds gained {text}."


def _pair(facts: StudyFacts, criterion: str, a: str, b: str) -> PairFacts:
    found = facts.overlap(criterion, a, b)
    assert found is not None, (criterion, a, b)
    return found


def _lift(pair: PairFacts, null: str) -> float:
    chance = pair.chance(null)
    assert chance is not None, "an overlap has this null"
    assert chance.jaccard, "a top mask is not empty"
    return (pair.jaccard or 0.0) / chance.jaccard


def _three(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}".replace("-", "−")


def _with_z(value: float, z: float | None) -> str:
    return f"{value:.3f}" + ("" if z is None else f" (z {z:.1f})")
