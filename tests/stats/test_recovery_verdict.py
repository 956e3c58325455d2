"""What is said of a recovery, and what must not be concluded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsity_audit.stats.recovery_verdict import (
    ControlFigures,
    RecoveryFigures,
    recovery_sentence,
    recovery_warnings,
)
from sparsity_audit.stats.scores import Interval, RecoveredShare


def _share(value: float | None, *ends: float) -> RecoveredShare:
    interval = Interval(low=ends[0], high=ends[1]) if ends else None
    return RecoveredShare(value=value, interval=interval, reason=None if ends else "too few trials")


RANDOM = ControlFigures(label="random", share=_share(0.3, 0.21, 0.4), lead=Interval(low=0.2, high=0.3))
CLEAN = RecoveryFigures(
    share=_share(1.0, 0.88, 1.13),
    controls=(RANDOM,),
    density=0.05,
    run_inside={"bitwise": 0.62, "atol:1e-4": 0.9},
    base_inside={"bitwise": 0.0, "atol:1e-4": 0.1},
    run_overall={"bitwise": 0.98},
    frozen_moved={"sub": 0},
    same_seed=False,
    is_bf16=True,
)


def test_the_verdict_names_the_share_every_control_and_agreement_beside_the_base() -> None:
    assert recovery_sentence(CLEAN) == (
        "the mask recovers 100 % of the gain [95 %: 88 to 113 %]; random 30 % of the gain [95 %: 21 to 40 %]"
        "; inside it 62.0 % of the entries are the full run's bit for bit (the base has 0.0 %)"
    )
    assert recovery_sentence(replace(CLEAN, share=_share(0.4))).startswith(
        "the mask recovers 40 % of the gain [no interval: too few trials]"
    )
    assert recovery_sentence(replace(CLEAN, share=_share(None))).startswith(
        "the mask recovers an undefined share"
    )
    silent = replace(CLEAN, share=None, controls=(replace(RANDOM, share=None, lead=None),))
    assert recovery_sentence(silent).startswith("inside it 62.0 %")
    assert recovery_sentence(replace(silent, run_inside={"bitwise": None})) == "the mask is empty"


def test_of_a_clean_recovery_only_the_free_agreement_is_said() -> None:
    (found,) = recovery_warnings(CLEAN)
    assert found.startswith(
        "of the overall agreement (98.0 % bit for bit), entries outside the mask (95.0 % of all)"
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"frozen_moved": {"sub": 7}},
            "sub is not frozen: 7 entries outside of its mask differ from the base",
        ),
        ({"same_seed": True}, "same seed and weights rounded to bf16: what the mask leaves out did not move"),
        ({"same_seed": True, "is_bf16": False}, "full and retrained run have one seed"),
        ({"same_seed": None}, "the seeds are not known"),
        ({"share": None}, "no task metrics"),
        ({"controls": ()}, "no control: random masks of this density"),
        (
            {"controls": (replace(RANDOM, lead=Interval(low=-0.02, high=0.1)),)},
            "random is not shown to be worse",
        ),
        ({"density": 0.62}, "the mask holds 62.0 % of the entries: random masks this dense"),
        ({"base_inside": {"bitwise": 0.0, "atol:1e-4": 0.83}}, "under atol:1e-4 the untrained base agrees"),
    ],
)
def test_each_trap_is_said_where_it_applies(change, text) -> None:
    before, after = recovery_warnings(CLEAN), recovery_warnings(replace(CLEAN, **change))
    assert sum(line.startswith(text) for line in after) == 1
    assert not any(line.startswith(text) for line in before)


def test_shares_that_are_neither_nothing_nor_all_are_not_printed_as_such() -> None:
    figures = replace(CLEAN, run_inside={"bitwise": 0.99999}, base_inside={"bitwise": 1e-5})
    assert (
        "inside it >99.9 % of the entries are the full run's bit for bit (the base has <0.1 %)"
        in recovery_sentence(figures)
    )
