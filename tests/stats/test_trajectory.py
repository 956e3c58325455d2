"""Trajectories from counts: a case by hand, what must hold of any, merging, undefined figures."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.stats.trajectory import TrajectoryCounts, trajectory_record

FIELDS = ("entries", "changed", "born", "died", "seen", "kept", "moved")


def test_a_run_of_three_steps_by_hand():
    codes = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 2, 0], [3, 0, 2, 0]], dtype=np.uint16)
    masks = codes[1:] != codes[0]
    counts = TrajectoryCounts.from_masks(masks, codes, lags=(1, 2), itemsize=2)
    run = trajectory_record([counts], labels=["a", "b", "c"], lags=(1, 2))
    assert (run.never, run.cancelled, run.final) == (1, 1, 2)
    assert (run.never_frac, run.cancelled_frac, run.final_frac) == (0.25, 0.25, 0.5)
    assert [step.changed for step in run.steps] == [2, 2, 2]
    assert [(step.born, step.died) for step in run.steps] == [(2, 0), (1, 1), (0, 0)]
    assert [step.seen for step in run.steps] == [2, 3, 3]
    assert [(step.coverage, step.precision) for step in run.steps] == [(0.5, 0.5), (1, 1), (1, 1)]
    assert [step.jaccard for step in run.steps] == [1 / 3, 1, 1]
    assert [[(lag.lag, lag.moved) for lag in step.lags] for step in run.steps] == [
        [(1, 2)],
        [(1, 2), (2, 2)],
        [(1, 1), (2, 3)],
    ]
    assert run.steps[2].lags[1].sparsity == 0.25
    # A position of four bytes and a value of two for each entry whose code differs.
    assert [step.patch_bytes for step in run.steps] == [12, 12, 6]
    assert {step.dense_bytes for step in run.steps} == {8}


def test_nothing_changed_and_nothing_compared_leave_figures_undefined():
    still = np.zeros((2, 3), dtype=np.uint16)
    run = trajectory_record(
        [TrajectoryCounts.from_masks(still[1:] != 0, still, lags=(1,), itemsize=2)], labels=["a"], lags=(1,)
    )
    assert (run.never, run.steps[0].sparsity, run.steps[0].patch_bytes) == (3, 1.0, 0)
    assert (run.steps[0].coverage, run.steps[0].precision, run.steps[0].jaccard) == (None, None, None)
    empty = np.zeros((2, 0), dtype=np.uint16)
    none = trajectory_record(
        [TrajectoryCounts.from_masks(empty[1:] != 0, empty, lags=(1,), itemsize=2)], labels=["a"], lags=(1,)
    )
    assert (none.never_frac, none.steps[0].sparsity, none.steps[0].lags[0].sparsity) == (None, None, None)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 6), size=st.integers(0, 60), cut=st.integers(0, 60)
)
def test_counts_add_over_parts_and_obey_their_identities(seed, steps, size, cut):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (steps + 1, size)).astype(np.uint16)
    masks = codes[1:] != codes[0]
    lags = (1, 2, 5)
    whole = TrajectoryCounts.from_masks(masks, codes, lags=lags, itemsize=2)
    whole.check()
    parts = [
        TrajectoryCounts.from_masks(masks[:, part], codes[:, part], lags=lags, itemsize=2)
        for part in (slice(0, cut), slice(cut, None))
    ]
    merged = parts[0].merge(parts[1])
    for field in FIELDS:
        assert np.array_equal(getattr(merged, field), getattr(whole, field)), field
    run = trajectory_record([whole], labels=[str(n) for n in range(steps)], lags=lags)
    assert trajectory_record(parts, labels=[str(n) for n in range(steps)], lags=lags) == run
    assert run.never + run.cancelled + run.final == run.entries == size
    for before, step in zip([0, *(s.changed for s in run.steps)], run.steps, strict=False):
        assert step.born - step.died == step.changed - before
    # Against the base a lag of t is the mask itself, under a criterion that compares codes.
    assert run.steps[0].lags[0].moved == run.steps[0].changed
