"""From a study's numbers to its verdicts. Pure; each claim is one function of the facts.

Contract: a verdict is a comparison with the goal that the claim states; no number in a sentence is written by
hand. Claims about weights are in `study_claims_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsity_audit.lab.evaluation import Evaluation
from sparsity_audit.report.study import Claim, RunFacts, StudyFacts, Verdict
from sparsity_audit.report.study_claims_weights import weight_claims
from sparsity_audit.report.study_tokens import tokens_claim

__all__ = ["study_claims"]


def study_claims(facts: StudyFacts) -> tuple[Claim, ...]:
    """All claims, those of behaviour first."""
    return (
        _learning(facts),
        _format(facts),
        _algorithms(facts),
        _critical(facts),
        tokens_claim(facts),
        *weight_claims(facts),
    )


def _runs(facts: StudyFacts, role: str, *, base: str = "mix", precision: str = "fp32") -> list[RunFacts]:
    return [r for r in facts.runs if (r.role, r.base, r.precision) == (role, base, precision)]


def _held(holds: bool | None) -> Verdict:  # noqa: FBT001 - the comparison itself
    if holds is None:
        return "not measured"
    return "reproduces" if holds else "does not reproduce"


def _gains(runs: Sequence[RunFacts]) -> str:
    return ", ".join(f"{run.gain:+.3f}".replace("-", "−") for run in runs)


def _learning(facts: StudyFacts) -> Claim:
    goals = facts.goals
    seeds, control = _runs(facts, "seed"), _runs(facts, "shuffled")
    learned = min(run.gain for run in seeds) >= goals.gain
    idle = max(run.gain for run in control) <= goals.shuffled_gain
    rows = [(run.name, _accuracy(run)) for run in facts.runs if run.role in ("seed", "shuffled")]
    return Claim(
        key="learning",
        title="RL with verifiable rewards improves the policy, and the rewards are what it learns from",
        source="all four papers; the control is ours",
        goal=f"every fp32 GRPO seed gains ≥ {goals.gain:g}; with shuffled rewards the gain is ≤ "
        f"{goals.shuffled_gain:g}",
        numbers=(("base mix", f"{seeds[0].base_accuracy.value:.3f}"), *rows),
        verdict=_held(learned and idle),
        reading=f"GRPO gains {_gains(seeds)}; the control, whose rewards are permuted within the batch, "
        f"{_gains(control)}. Everything below that the control shows as well is no trace of learning.",
        caption=f"Accuracy of every run: pass@1 at temperature 1 on {facts.num_prompts} held-out problems "
        "of four digits, two samples each, 95 % intervals over problems. Lines: the bases.",
    )


def _accuracy(run: RunFacts) -> str:
    figure = run.accuracy
    return f"{figure.value:.3f} ({figure.low:.3f}–{figure.high:.3f})"


def _format(facts: StudyFacts) -> Claim:
    goals = facts.goals
    seeds, control = _runs(facts, "seed"), _runs(facts, "shuffled")
    won = min(run.share for run in seeds) >= goals.share
    unmoved = max(run.share for run in control) < min(run.share for run in seeds)
    track = next(iter(facts.tracks.values()))
    first, last = track.points[0].evaluation, track.points[-1].evaluation
    most = max(first.pass_at)
    drift = last.drift
    assert drift is not None, "a track is judged against its base"
    return Claim(
        key="format",
        title="RL collapses the outputs to one format of the pretraining mixture",
        source="2504.07912",
        goal=f"format S, a share of {seeds[0].base_share:.2f} in the base, has ≥ {goals.share:g} at the end "
        "in every seed, and less with shuffled rewards",
        numbers=(
            ("share of S, base", f"{seeds[0].base_share:.3f}"),
            *((f"share of S, {run.name}", f"{run.share:.3f}") for run in (*seeds, *control)),
            (
                "greedy pass@1, base → end",
                f"{first.greedy_accuracy.value:.3f} → {last.greedy_accuracy.value:.3f}",
            ),
            (f"pass@{most}, base → end", f"{first.pass_at[most].value:.3f} → {last.pass_at[most].value:.3f}"),
            ("entropy, nats a token", f"{first.entropy_per_token:.3f} → {last.entropy_per_token:.3f}"),
            ("KL(policy‖base), nats a completion", f"{drift.kl_per_completion:.2f}"),
        ),
        verdict=_held(won and unmoved),
        reading=f"The base has the answers already: its pass@{most} is {first.pass_at[most].value:.2f}. With "
        "the accuracies it has within each format, the shares at the end alone would take it from "
        f"{first.accuracy.value:.2f} to {_with_shares(first, last):.2f}; the run reaches "
        f"{last.accuracy.value:.2f}.",
        caption=f"Format shares{' with true and with shuffled rewards' * (len(facts.tracks) > 1)}, and "
        f"accuracy within each format of the run with true rewards; {first.num_prompts} prompts × "
        f"{first.num_samples} samples at the saved steps, thin lines: the run's own rollouts.",
    )


def _with_shares(first: Evaluation, last: Evaluation) -> float:
    """The accuracy of the base's formats, mixed as at the end: what the choice of format alone would give."""
    return sum(
        (old.accuracy or 0.0) * new.share for old, new in zip(first.formats, last.formats, strict=True)
    )


def _algorithms(facts: StudyFacts) -> Claim:
    others, goals = _runs(facts, "algorithm"), facts.goals
    holds = all(r.gain >= goals.algorithm_gain and r.share > r.base_share for r in others)
    return Claim(
        key="algorithms",
        title="The format is chosen whatever the algorithm",
        source="2504.07912 (PPO, GRPO, expert iteration)",
        goal=f"PPO, expert iteration, SFT and DPO each gain ≥ {goals.algorithm_gain:g}, and raise the share "
        "of S",
        numbers=tuple((r.name, f"accuracy {_accuracy(r)}, share of S {r.share:.2f}") for r in others),
        verdict=_held(holds if others else None),
        reading="Gains and shares at the end: "
        + ", ".join(f"{r.algorithm} {_gains([r])} ({r.share:.2f})" for r in others)
        + "."
        if others
        else "This study trains GRPO alone.",
        caption="",
    )


def _critical(facts: StudyFacts) -> Claim:
    found = facts.critical
    assert found is not None, "every study looks for critical positions"
    chosen = [position for position in found.positions if position.critical]
    last = found.steps[-1]
    rose = last.gain is not None and last.gain.low > 0
    numbers = [
        (
            f"position {p.index} ({p.example!r} in the example)",
            f"ΔJ {p.delta_certainty.value:+.3f}, accuracy {p.accuracy_right.value:.2f} right, "
            f"{p.accuracy_wrong.value:.2f} wrong".replace("-", "−"),
        )
        for p in chosen
    ]
    if last.gain is not None:
        numbers.append(
            ("rise of p(right token), critical − others", f"{last.gain.value:+.3f} (≥ {last.gain.low:+.3f})")
        )
    return Claim(
        key="critical",
        title="A few critical tokens decide the outcome where the base hesitates, and RL moves those",
        source="2502.06533",
        goal="there are positions with ΔJ < 0 and a decisive drop; at the end p(right token) has risen "
        "more there than elsewhere (interval above 0)",
        numbers=tuple(numbers),
        verdict=_held(bool(chosen) and rose),
        reading=f"{len(chosen)} of {len(found.positions)} positions are critical: the format's letter, and "
        "digits that must be computed rather than copied. Nearly every wrong token is fatal here, so what "
        "singles these positions out is the base's uncertainty."
        if chosen
        else "No position is both uncertain and decisive.",
        caption="",
    )
