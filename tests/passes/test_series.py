"""One pass over many checkpoints, against counting entry by entry."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparsity_audit import diff
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.masks.bitmask import unpack_bits
from sparsity_audit.masks.reader import MaskReader, open_mask
from sparsity_audit.passes.series import count_series
from sparsity_audit.stats.trajectory import TrajectoryCounts
from sparsity_audit.types import Criterion, View

FIELDS = ("entries", "itemsize", "index_bytes", "changed", "born", "died", "seen", "kept", "moved")
CODES = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.int8: torch.int8}
LAGS = (1, 2, 5)


def _save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def _same(found: TrajectoryCounts, expected: TrajectoryCounts) -> None:
    found.check()
    for field in FIELDS:
        assert np.array_equal(getattr(found, field), getattr(expected, field)), field


def _codes(tensors: list[torch.Tensor]) -> np.ndarray:
    return np.stack([tensor.view(CODES[tensor.dtype]).numpy().reshape(-1) for tensor in tensors])


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 7),
    shape=st.sampled_from([(7, 13), (3, 200), (90,), (2, 3, 17), ()]),
    dtype=st.sampled_from(list(CODES)),
    criterion=st.sampled_from(["value", "bitwise", "atol:1e-2", "ulp:1"]),
    unit_bytes=st.sampled_from([1, 64, 1 << 20]),
    workers=st.sampled_from([1, 3]),
)
def test_counts_are_those_of_the_entry_by_entry_reference_for_any_split(
    seed, steps, shape, dtype, criterion, unit_bytes, workers
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=generator) * 3).to(dtype)
    tensors = [base]
    for _ in range(steps):
        moved = torch.rand(shape, generator=generator) < 0.3
        back = torch.rand(shape, generator=generator) < 0.2
        step = (torch.randn(shape, generator=generator) * 3).to(dtype)
        tensors.append(torch.where(back, base, torch.where(moved, step, tensors[-1])))
    with tempfile.TemporaryDirectory() as folder:
        folders = [_save(Path(folder) / str(n), {"w": tensor}) for n, tensor in enumerate(tensors)]
        catalogues = [open_checkpoint(path) for path in folders]
        found = count_series(
            catalogues[0],
            catalogues[1:],
            criterion=Criterion.parse(criterion),
            view=View.NATIVE,
            lags=LAGS,
            unit_bytes=unit_bytes,
            workers=workers,
        )
        masks = []
        for number, path in enumerate(folders[1:]):
            target = Path(folder) / f"mask{number}"
            diff(folders[0], path, criteria=[criterion], stats="counts", kernel="reference", mask=target)
            with MaskReader(open_mask(target)) as reader:
                masks.append(unpack_bits(reader.read_packed("w"), shape).reshape(-1))
    assert found.left_out == {}
    expected = TrajectoryCounts.from_masks(
        np.stack(masks), _codes(tensors), lags=LAGS, itemsize=base.element_size()
    )
    _same(found.counts["w"], expected)


@pytest.mark.parametrize("view", [View.NATIVE, View.SERVED])
def test_real_runs_as_steps_have_the_masks_of_diff(addition, tmp_path, view) -> None:
    base = addition / "base-fp32"
    runs = [addition / name for name in ("grpo-fp32-seed0", "grpo-fp32-seed1", "sft-fp32")]
    found = count_series(
        open_checkpoint(base),
        [open_checkpoint(run) for run in runs],
        criterion=Criterion.parse("value"),
        view=view,
        lags=(1,),
        workers=2,
    )
    for number, run in enumerate(runs):
        report = diff(base, run, stats="counts", view=view)
        changed = sum(int(counts.changed[number]) for counts in found.counts.values())
        assert changed == next(
            h.changed for h in report.headlines if (h.view, h.criterion) == (view, "value")
        )


def test_tensors_that_steps_do_not_share_are_named_with_the_reason(tmp_path) -> None:
    ones = {"w": torch.ones(4, 6), "v": torch.ones(5), "u": torch.ones(2, 8)}
    base = _save(tmp_path / "base", ones)
    first = _save(tmp_path / "first", {**ones, "u": torch.ones(2, 8).bfloat16()})
    second = _save(tmp_path / "second", {"w": torch.zeros(4, 6), "u": torch.ones(2, 8), "x": torch.ones(1)})
    found = count_series(
        open_checkpoint(base),
        [open_checkpoint(first), open_checkpoint(second)],
        criterion=Criterion.parse("value"),
        view=View.NATIVE,
        lags=(1,),
    )
    assert list(found.counts) == ["w"]
    assert found.left_out["u"] == "stored as BF16 and F32"
    assert found.left_out["v"] == "not matched in every run"
    assert "only on this side" in found.left_out["x"]


def test_split_projections_are_followed_in_the_slices_of_a_fused_base(tmp_path) -> None:
    hidden = 8
    fused = torch.arange(3 * hidden * hidden, dtype=torch.float32).reshape(3 * hidden, hidden)
    name = "model.layers.0.self_attn.{}_proj.weight"
    base = _save(tmp_path / "base", {name.format("qkv"): fused})
    parts = {name.format(p): fused[i * hidden : (i + 1) * hidden].clone() for i, p in enumerate("qkv")}
    parts[name.format("k")][0, 0] += 1
    step = _save(tmp_path / "step", parts)
    found = count_series(
        open_checkpoint(base),
        [open_checkpoint(step)],
        criterion=Criterion.parse("value"),
        view=View.NATIVE,
        lags=(1,),
    )
    assert {key.rpartition(":")[2]: int(counts.changed[0]) for key, counts in found.counts.items()} == {
        "q_proj": 0,
        "k_proj": 1,
        "v_proj": 0,
    }
