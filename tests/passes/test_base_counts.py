"""What phantoms and walks read of the base, and its finer strata, against whole tensors."""

from __future__ import annotations

import numpy as np
import pytest
from addition_runs import load, values

from sparsity_audit import diff
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.masks.bitmask import blocks_of
from sparsity_audit.masks.reader import MaskReader, open_mask
from sparsity_audit.passes.base_counts import count_magnitudes, count_rooms
from sparsity_audit.passes.base_strata import MagnitudeGrouping, StrataGrouping
from sparsity_audit.stats.rooms import rooms_of_values


@pytest.fixture
def opened(addition, tmp_path):
    """Mask reader and base of a run, by precision and view."""

    def make(kind: str, view: str):
        diff(
            addition / f"base-{kind}",
            addition / f"grpo-{kind}-seed0",
            stats="counts",
            view=view,
            mask=tmp_path / "m",
        )
        return MaskReader(open_mask(tmp_path / "m")), open_checkpoint(addition / f"base-{kind}")

    return make


def test_rooms_of_a_wide_base_are_those_of_its_values(opened) -> None:
    like, base = opened("fp32", "served")
    tensors = list(like.tensors.values())
    found = count_rooms(tensors, StrataGrouping(like, base), workers=2)
    for name, numbers in load("base-fp32").items():
        expected = rooms_of_values(numbers)
        for field in ("up", "down", "entries"):
            assert np.array_equal(getattr(found[name], field), getattr(expected, field)), (name, field)


def test_magnitudes_are_counted_over_all_tensors(opened) -> None:
    like, base = opened("bf16", "native")
    found, entries = count_magnitudes(list(like.tensors.values()), MagnitudeGrouping(like, base), workers=2)
    numbers = np.concatenate([np.abs(values(codes)).reshape(-1) for codes in load("base-bf16").values()])
    expected, counts = np.unique(numbers, return_counts=True)
    assert found.tolist() == expected.astype(np.float64).tolist()
    assert entries.tolist() == counts.tolist()


@pytest.mark.parametrize(("kind", "view"), [("bf16", "native"), ("fp32", "native"), ("fp32", "served")])
def test_finer_strata_ascend_with_magnitude_and_refine_exponents(opened, kind, view) -> None:
    like, base = opened(kind, view)
    finer, coarse = MagnitudeGrouping(like, base), StrataGrouping(like, base)
    for name, stored in load(f"base-{kind}").items():
        tensor = like.tensors[name]
        groups = np.concatenate([finer.groups(name, block) for block in blocks_of(tensor.shape)])
        strata = np.concatenate([coarse.groups(name, block) for block in blocks_of(tensor.shape)])
        assert groups.max() < finer.num_groups(name)
        numbers = np.abs(values(stored) if kind == "bf16" else stored).reshape(-1)
        order = np.argsort(numbers, kind="stable")
        assert (np.diff(groups[order]) >= 0).all()
        assert np.array_equal(groups >> 7, strata >> 1)
        lowest = finer.magnitudes(name, groups)
        if view == "native":
            assert (lowest <= numbers).all()
            assert kind == "fp32" or (lowest == numbers).all()
