"""Choosing by bits equals `torch.where` on the codes, compiled or not, for every width and layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import bits_of

from sparsity_audit.training import numba_selection, selection
from sparsity_audit.training.selection import keep_selected, zero_outside

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def any_codes(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bits, so NaN with payloads, infinities, zeros of both signs and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, width), dtype=torch.uint8, generator=generator)
    values = raw.view(dtype).reshape(shape).clone()
    values[torch.rand(shape, generator=generator) < 0.1] = -0.0
    return values


@pytest.mark.parametrize("compiled", [True, False])
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 9),
    cols=st.integers(1, 70),
    seed=st.integers(0, 10_000),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    transposed=st.booleans(),
)
def test_selection_equals_torch_where_on_codes(
    compiled, dtype, rows, cols, seed, density, transposed
) -> None:
    now, kept = any_codes(dtype, (rows, cols), seed), any_codes(dtype, (rows, cols), seed + 1)
    selected = torch.rand((rows, cols), generator=torch.Generator().manual_seed(seed)) < density
    if transposed:
        now, kept, selected = now.t(), kept.t(), selected.t()
    expected = torch.where(selected, bits_of(now), bits_of(kept))
    expected_zero = torch.where(selected, bits_of(now), torch.zeros_like(bits_of(now)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_COMPILED_FROM_ENTRIES", 0 if compiled else 1 << 40)
        zeroed = now.clone()
        zero_outside(zeroed, selected)
        keep_selected(now, selected, kept)
    assert torch.equal(bits_of(now), expected)
    assert torch.equal(bits_of(zeroed), expected_zero)


def test_without_a_mask_nothing_is_selected() -> None:
    now, kept = any_codes(torch.float32, (5, 7), 0), any_codes(torch.float32, (5, 7), 1)
    keep_selected(now, None, kept)
    assert torch.equal(bits_of(now), bits_of(kept))
    zero_outside(now, None)
    assert not bits_of(now).any()


def test_large_cpu_tensors_take_the_compiled_loop(monkeypatch) -> None:
    called = []
    monkeypatch.setattr(numba_selection, "zero", lambda *_: called.append("zero"))
    monkeypatch.setattr(numba_selection, "keep", lambda *_: called.append("keep"))
    values = torch.ones(1 << 15)
    zero_outside(values, values > 2)
    keep_selected(values, values > 2, values.clone())
    keep_selected(values[1:], values[1:] > 2, values[1:].clone())
    assert called == ["zero", "keep"]
