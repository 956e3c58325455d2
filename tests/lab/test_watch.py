"""Each kind of trouble is said once, and not without cause."""

from __future__ import annotations

from dataclasses import replace

from lab_runs import config

from sparsity_audit.lab.metrics import StepMetrics
from sparsity_audit.lab.watch import Watch

FINE = StepMetrics(
    step=1,
    updates=1,
    loss=0.1,
    grad_norm=0.5,
    clip_frac=0.0,
    weight_mean=None,
    rows=16,
    dropped_rows=0,
    rollouts=16,
    groups=4,
    zero_signal_groups=0,
    reward=0.4,
    accuracy=0.4,
    truncated_frac=0.0,
    tokens_per_completion=12.0,
    entropy=0.2,
    kl_reference=0.0,
    format_shares={"S": 1.0},
)


def _notes(steps: list[StepMetrics], algorithm: str = "grpo", **changes) -> list[str]:
    notes: list[str] = []
    watch = Watch(config(algorithm, **changes), [], on_note=notes.append)
    for number, metrics in enumerate(steps, start=1):
        watch.look(replace(metrics, step=number))
    assert sorted(f"warning: {text}" for text in watch.warnings) == sorted(notes)
    return notes


def test_a_run_in_which_all_is_well_says_nothing() -> None:
    assert _notes([FINE] * 20) == []


def test_five_steps_without_a_gradient_are_said_once() -> None:
    still = replace(FINE, updates=0)
    assert _notes([still] * 4) == []
    notes = _notes([still] * 12)
    assert len(notes) == 1
    assert "no gradient in 5 steps up to step 5: rewards did not vary" in notes[0]


def test_a_fall_to_less_than_half_the_bases_accuracy_is_said() -> None:
    low = replace(FINE, accuracy=0.1)
    assert _notes([FINE, low, FINE, low, FINE, FINE, FINE]) == []
    notes = _notes([FINE] * 3 + [low] * 8)
    assert len(notes) == 1
    assert "from 0.400 at the start: the run collapsed, or must not learn" in notes[0]


def test_completions_of_the_base_say_nothing_about_the_policy() -> None:
    assert _notes([FINE] * 3 + [replace(FINE, accuracy=0.1)] * 8, "sft") == []


def test_completions_that_are_cut_are_said_with_the_remedy() -> None:
    notes = _notes([replace(FINE, truncated_frac=0.75)] * 2)
    expected = (
        "75% of the completions of step 1 were cut at 20 tokens and have reward 0; raise --max-new-tokens"
    )
    assert notes == [f"warning: {expected}"]


def test_divergence_weights_that_cannot_act_are_said_before_the_first_step() -> None:
    assert "inert" in _notes([], divergence_scale=0.3)[0]
    assert _notes([], divergence_scale=0.3, minibatches=2) == []


def test_a_policy_far_below_its_base_at_the_end_is_said() -> None:
    notes: list[str] = []
    watch = Watch(config("sft"), [], on_note=notes.append)
    watch.judge(base=0.4, policy=0.3)
    assert notes == []
    watch.judge(base=0.4, policy=0.1)
    assert "accuracy 0.100 on held-out problems" in notes[0]


def test_a_resumed_run_has_the_warnings_of_the_whole_one_and_does_not_repeat_them() -> None:
    history = [replace(FINE, step=n, updates=0) for n in range(1, 7)]
    notes: list[str] = []
    watch = Watch(config("grpo"), history, on_note=notes.append)
    assert notes == []
    assert len(watch.warnings) == 1
    watch.look(replace(FINE, step=7, updates=0))
    assert notes == []
