"""The probe lets models pass that keep the protocol's promises, and names the one that is broken."""

from __future__ import annotations

import pytest
import torch
from token_models import Faulty, random_model

from sparsity_audit.errors import UnsupportedFormatError
from sparsity_audit.models.probe import probe


def _sees_ahead(hidden, _tokens, _mask):
    return hidden + hidden.mean(dim=1, keepdim=True) if hidden.shape[1] > 1 else hidden


def _counts_padding(hidden, _tokens, mask):
    return hidden + (~mask).sum(dim=1)[:, None, None] * torch.linspace(-1, 1, hidden.shape[-1])


def _forgets(hidden, tokens, mask):
    return hidden * (1.0 if tokens.shape[1] == mask.shape[1] else -1.0)


def test_a_sound_model_passes() -> None:
    assert probe(random_model(0)) is None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_sees_ahead, "is not causal"),
        (_counts_padding, "padding on the left changes its logits"),
        (_forgets, "its cache does not give what one pass gives"),
    ],
)
def test_a_broken_promise_is_named(fault, message) -> None:
    with pytest.raises(UnsupportedFormatError, match=message):
        probe(Faulty(0, hidden=fault))


def test_a_head_that_is_not_the_models_own_is_named() -> None:
    model = random_model(0)
    model.own_logits = lambda tokens: (
        -model.logits(model.hidden_states(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    )
    with pytest.raises(UnsupportedFormatError, match="head alone"):
        probe(model)


def test_logits_that_are_no_numbers_leave_a_note_and_no_verdict() -> None:
    note = probe(Faulty(0, logits=lambda logits: logits * torch.nan))
    assert note is not None
    assert "no numbers" in note
