"""Δ of several checkpoints in one pass, against torch on whole tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsity_audit import diff
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.masks.reader import open_mask
from sparsity_audit.passes import deltas as passes
from sparsity_audit.passes.deltas import sum_deltas
from sparsity_audit.types import View

RUNS = ("grpo-{}-seed0", "grpo-{}-seed1", "shuffled-reward-{}")


def _found(base, runs, folder, *, view=View.NATIVE, criterion="value", workers=1):
    folder.mkdir(exist_ok=True)
    masks = []
    for number, run in enumerate(runs):
        diff(base, run, stats="counts", criteria=[criterion], view=view, mask=folder / str(number))
        masks.append(open_mask(folder / str(number)))
    catalogues = [open_checkpoint(run) for run in runs]
    return sum_deltas(open_checkpoint(base), catalogues, masks, maps=(), view=view, workers=workers)


def _flat(path, *, served) -> torch.Tensor:
    (file,) = path.glob("*.safetensors")
    parts = [tensor.reshape(-1) for _, tensor in sorted(load_file(file).items())]
    return torch.cat([(part.bfloat16() if served else part).double() for part in parts])


@pytest.mark.parametrize(
    ("kind", "view"), [("bf16", View.NATIVE), ("fp32", View.NATIVE), ("fp32", View.SERVED)]
)
def test_sums_are_those_of_whole_tensors(addition, tmp_path, monkeypatch, kind, view) -> None:
    monkeypatch.setattr(passes, "_UNIT_BYTES", 1 << 12)  # many units
    base, runs = addition / f"base-{kind}", [addition / run.format(kind) for run in RUNS]
    found = _found(base, runs, tmp_path, view=view, workers=2)
    assert found.left_out == {}
    served = view is View.SERVED
    before = _flat(base, served=served)
    deltas = torch.stack([_flat(run, served=served) - before for run in runs]).numpy()
    masks = deltas != 0
    for r in range(3):
        for q in range(3):
            inside = masks[r] & masks[q]
            assert found.sums.both[r, q] == inside.sum()
            signs = np.sign(deltas[r]) * np.sign(deltas[q])
            assert found.sums.same_sign[r, q] == (signs[inside] > 0).sum()
            # Relative to the lengths: sums of 1.5e5 products in another order.
            size = np.linalg.norm(deltas[r]) * np.linalg.norm(deltas[q])
            assert abs(found.sums.dot[r, q] - deltas[r] @ deltas[q]) < 1e-12 * size
            assert abs(found.sums.dot_both[r, q] - deltas[r][inside] @ deltas[q][inside]) < 1e-12 * size


def test_sums_do_not_depend_on_workers(addition, tmp_path) -> None:
    base, runs = addition / "base-bf16", [addition / run.format("bf16") for run in RUNS]
    one = _found(base, runs, tmp_path / "one", workers=1).sums
    three = _found(base, runs, tmp_path / "three", workers=3).sums
    for field in type(one).__dataclass_fields__:
        assert np.array_equal(getattr(one, field), getattr(three, field)), field


def test_the_intersection_is_that_of_the_masks_criterion(addition, tmp_path) -> None:
    runs = [addition / run.format("fp32") for run in RUNS[:2]]
    found = _found(addition / "base-fp32", runs, tmp_path, criterion="top:1%").sums
    assert found.both[0, 0] == 1489
    assert found.both[0, 1] == 1184


def _save(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_tensors_that_cannot_be_compared_are_named_with_the_reason(tmp_path) -> None:
    ones = {"w": torch.ones(4, 6), "n": torch.ones(3, dtype=torch.int64), "v": torch.ones(5)}
    base = _save(tmp_path / "base", ones)
    full = _save(tmp_path / "full", {name: tensor + 1 for name, tensor in ones.items()})
    short = _save(tmp_path / "short", {"w": torch.zeros(4, 6), "n": ones["n"] + 2})
    found = _found(base, [full, short], tmp_path)
    assert found.left_out == {"n": "no float numbers", "v": "not matched in every run"}
    assert found.sums.entries == 24
    assert found.sums.dot[0, 1] == -24.0


def test_infinite_and_undefined_deltas_are_counted_and_left_out(tmp_path) -> None:
    base = _save(tmp_path / "base", {"w": torch.tensor([[0.0, 1.0, float("inf")]])})
    first = _save(tmp_path / "first", {"w": torch.tensor([[1.0, float("nan"), float("inf")]])})
    second = _save(tmp_path / "second", {"w": torch.tensor([[2.0, 3.0, 4.0]])})
    sums = _found(base, [first, second], tmp_path).sums
    assert sums.not_finite.tolist() == [2, 1]
    assert sums.dot.tolist() == [[1.0, 2.0], [2.0, 8.0]]
