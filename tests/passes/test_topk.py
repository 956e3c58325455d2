"""Top-k selection equals a sort, and breaks ties without favouring positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BitCollector, plan_of

from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.passes import topk
from sparsity_audit.passes.execute import run_plan
from sparsity_audit.types import Criterion, View


def _select(plan, text: str, *, workers: int = 1):
    tallies = run_plan(plan, kernel=NumpyKernel())
    bits = BitCollector()
    selections, counts = topk.select_top(
        plan, tallies, Criterion.parse(text), view=View.NATIVE, workers=workers, bits=bits
    )
    return selections, counts, bits.masks


def _pair(write_checkpoint, base: dict, tuned: dict, **kwargs):
    return plan_of(write_checkpoint("base", base), write_checkpoint("tuned", tuned), **kwargs)


@pytest.mark.parametrize("limit", [1 << 20, 3])
@pytest.mark.parametrize("k", [1, 7, 100, 1500, 1990])
def test_the_selection_is_the_k_largest_of_a_sort(write_checkpoint, monkeypatch, limit: int, k: int) -> None:
    monkeypatch.setattr(topk, "_COLLECT_LIMIT", limit)
    rng = np.random.default_rng(k)
    base = {
        "a": rng.normal(size=(20, 70)).astype(np.float32),
        "b": rng.normal(size=(600,)).astype(np.float32),
    }
    tuned = {n: (w + rng.normal(size=w.shape) * 1e-3).astype(np.float32) for n, w in base.items()}
    (selection,), counts, masks = _select(_pair(write_checkpoint, base, tuned, unit_bytes=512), f"top:{k}")
    delta = np.concatenate(
        [np.abs(tuned[n].astype(float) - base[n].astype(float)).ravel() for n in ("a", "b")]
    )
    chosen = np.concatenate([masks["a"][:, :70].ravel(), masks["b"][0, :600]])
    assert selection.selected == k == chosen.sum() == sum(part.count for part in counts)
    assert np.array_equal(np.sort(delta[chosen]), np.sort(delta)[len(delta) - k :])
    assert selection.threshold == delta[chosen].min()
    assert np.array_equal(counts[0].rows, masks["a"].sum(axis=1))
    assert np.array_equal(counts[0].cols, masks["a"][:, :70].sum(axis=0))


@pytest.mark.parametrize("limit", [1 << 20, 5])
def test_ties_at_the_cut_are_counted_and_exactly_enough_are_taken(
    write_checkpoint, monkeypatch, limit
) -> None:
    monkeypatch.setattr(topk, "_COLLECT_LIMIT", limit)
    base = np.zeros((40, 40), dtype=np.float32)
    tuned = np.full((40, 40), 0.5, dtype=np.float32)
    tuned[:5] = 1.0
    (selection,), _, masks = _select(_pair(write_checkpoint, {"w": base}, {"w": tuned}), "top:700")
    assert (selection.selected, selection.ties_at_cut, selection.ties_selected) == (700, 1400, 500)
    assert masks["w"][:5].all()
    per_row = masks["w"][5:].sum(axis=1)
    assert per_row.max() < 30, "ties are spread over the rows, not taken from the first ones"
    assert masks["w"].sum() == 700


def test_two_runs_with_all_ties_do_not_agree_more_than_chance(write_checkpoint) -> None:
    base = np.zeros((100, 100), dtype=np.float32)
    masks = []
    for run in range(2):
        tuned = np.full((100, 100), 0.5 + run, dtype=np.float32)
        plan = plan_of(write_checkpoint(f"b{run}", {"w": base}), write_checkpoint(f"t{run}", {"w": tuned}))
        masks.append(_select(plan, "top:10%")[2]["w"][:, :100])
    # Both: 1000 of 10000; expected 100 in common, sd 9; 5 sd.
    assert abs(int((masks[0] & masks[1]).sum()) - 100) < 45


def test_zero_and_nan_are_never_selected_and_k_is_clamped(write_checkpoint) -> None:
    base = np.array([[0.0, 1.0, np.nan, np.inf, 2.0, 1.0]], dtype=np.float32)
    tuned = np.array([[-0.0, 1.0, 1.0, 5.0, np.nan, 1.5]], dtype=np.float32)
    (selection,), _, masks = _select(_pair(write_checkpoint, {"w": base}, {"w": tuned}), "top:6")
    assert (selection.asked, selection.selected, selection.eligible) == (6, 2, 2)
    assert masks["w"][0, :6].tolist() == [False, False, False, True, False, True]


@pytest.mark.parametrize("limit", [1 << 20, 2])
def test_tensors_of_few_entries_and_none_are_selected_each_for_itself(
    write_checkpoint, monkeypatch, limit
) -> None:
    monkeypatch.setattr(topk, "_COLLECT_LIMIT", limit)
    if limit > 2:  # 32 MB of counts for each of ten thousand small tensors would take minutes
        monkeypatch.setattr(topk._Reader, "histogram", lambda *_a, **_k: pytest.fail("a table was made"))
    base = {"a": np.zeros((3, 2)), "b": np.zeros((0, 4)), "c": np.zeros(5), "d": np.ones(())}
    tuned = {
        "a": np.array([[1.0, 5.0], [0.0, 3.0], [2.0, 4.0]]),
        "b": base["b"],
        "c": base["c"],
        "d": np.zeros(()),
    }
    sides = [{n: t.astype(np.float32) for n, t in side.items()} for side in (base, tuned)]
    selections, counts, masks = _select(_pair(write_checkpoint, *sides), "top:3:tensor")
    assert [(s.asked, s.eligible, s.selected, s.threshold) for s in selections] == [
        (3, 5, 3, 3.0),
        (0, 0, 0, None),
        (3, 0, 0, None),
        (1, 1, 1, 1.0),
    ]
    assert [part.count for part in counts] == [3, 0, 0, 1]
    assert masks["a"][:, :2].tolist() == [[False, True], [False, True], [False, True]]


def test_an_update_that_moved_nothing_selects_nothing(write_checkpoint) -> None:
    same = np.ones((4, 4), dtype=np.float32)
    plan = _pair(write_checkpoint, {"w": same, "v": same}, {"w": same, "v": same})
    (selection,), counts, masks = _select(plan, "top:50%")
    assert (selection.selected, selection.threshold, [part.count for part in counts]) == (0, None, [0, 0])
    assert not masks["w"].any()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 60))
def test_bf16_selections_per_tensor_equal_a_sort(tmp_path_factory, seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    base, tuned = (rng.integers(0x3F00, 0x3F20, size=(6, 10)).astype(np.uint16) for _ in range(2))
    folder = tmp_path_factory.mktemp("top")
    import json

    for name, codes in (("base", base), ("tuned", tuned)):
        text = json.dumps({"w": {"dtype": "BF16", "shape": [6, 10], "data_offsets": [0, 120]}}).encode()
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(
            len(text).to_bytes(8, "little") + text + codes.tobytes()
        )
    (selection,), _, masks = _select(plan_of(folder / "base", folder / "tuned"), f"top:{k}:tensor")
    values = [(codes.astype(np.uint32) << 16).view(np.float32).astype(float) for codes in (base, tuned)]
    delta = np.abs(values[1] - values[0]).ravel()
    chosen = masks["w"][:, :10].ravel()
    wanted = min(k, int((delta > 0).sum()))
    assert selection.selected == chosen.sum() == wanted
    assert np.array_equal(np.sort(delta[chosen]), np.sort(delta)[len(delta) - wanted :])


def test_the_result_does_not_depend_on_workers_or_units(addition) -> None:
    found = []
    for unit_bytes, workers in ((1 << 26, 1), (4096, 2)):
        plan = plan_of(addition / "base-bf16", addition / "grpo-bf16-seed0", unit_bytes=unit_bytes)
        selections, counts, masks = _select(plan, "top:5%", workers=workers)
        lines = [(part.count, part.rows.tolist(), part.cols.tolist()) for part in counts]
        found.append((selections, lines, {n: m.tobytes() for n, m in masks.items()}))
    assert found[0] == found[1]
