"""What a live audit counts is what `diff` counts on the saved checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import token_model

import sparsity_audit as sa
from sparsity_audit.errors import UsageError
from sparsity_audit.training.live_audit import BaseCopy
from sparsity_audit.types import Criterion

CRITERIA = ("bitwise", "value", "atol:1e-5", "rel:1e-3", "ulp:2")


def saved(model: torch.nn.Module, folder: Path) -> Path:
    folder.mkdir()
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_counts_are_those_of_diff(tmp_path, dtype) -> None:
    model = token_model(0, dtype=dtype, tied=True)
    base = saved(model, tmp_path / "base")
    copy = BaseCopy(model)
    with torch.no_grad():
        model.up.bias[0], model.up.bias[1] = -0.0, float("nan")
        model.down.bias *= 1 + 2**-20
    optimizer = torch.optim.SGD([model.embed.weight, model.up.weight], lr=0.01)
    model.up.weight.grad = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    optimizer.step()
    tuned = saved(model, tmp_path / "tuned")
    found = copy.count([Criterion.parse(text) for text in CRITERIA], step=7)
    headlines = sa.diff(base, tuned, criteria=list(CRITERIA)).headlines
    expected = {row.criterion: row for row in headlines if row.view == "native"}
    assert found.step == 7
    assert set(found.changed) == set(CRITERIA)
    for key in CRITERIA:
        assert found.changed[key] == expected[key].changed > 0, key
        assert found.compared == expected[key].compared
        assert found.sparsity(key) == expected[key].sparsity


def test_a_given_base_must_fit_the_model() -> None:
    model = token_model(0)
    base = token_model(1).state_dict()
    assert BaseCopy(model, base=base).count([Criterion.parse("value")], step=0).changed["value"] > 200
    with pytest.raises(UsageError, match=r"base tensor 'up.bias': torch.float16 of shape \[9\]"):
        BaseCopy(model, base=base | {"up.bias": base["up.bias"].half()})
    with pytest.raises(UsageError, match=r"base tensor 'embed.weight': not there"):
        BaseCopy(model, base={})
