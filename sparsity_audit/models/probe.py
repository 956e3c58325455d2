"""A model tried on a few tokens before anything is computed with it.

Contract: the protocol's promises are checked on one short sequence: a later token changes nothing before it
(the model is causal), padding on the left changes nothing, the cache gives what a single pass gives, and
trunk and head give what the model gives itself where it can be asked. Each failure is one error that says
which. Where the logits are no numbers nothing can be told, and the probe says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_audit.errors import UnsupportedFormatError
from sparsity_audit.models.protocol import LanguageModel

__all__ = ["probe"]

_LENGTH, _PADDING = 6, 3
_TOLERANCE = 0.05
"""Of logits, relative to their spread: fp16 and bf16 arithmetic differ by 1e-2, a broken promise by 1."""


@torch.no_grad()
def probe(model: LanguageModel) -> str | None:
    """Check a model; None when it keeps its promises, else a note on why that could not be told.

    Raises:
        UnsupportedFormatError: It is not causal, or padding, cache or head do not do what is relied on.
    """
    ids = [1 + (7 * place) % max(1, min(model.vocab_size, 512) - 1) for place in range(_LENGTH)]
    tokens = torch.tensor([ids], device=model.device)
    plain = _logits(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    if not plain.isfinite().any() or plain.isnan().any():
        return f"{model.name}: its logits on a probe are no numbers, so nothing could be checked"
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % model.vocab_size
    changed = _logits(model, other, torch.ones_like(tokens, dtype=torch.bool))
    _compare(
        plain[:, :-1],
        changed[:, :-1],
        model.name,
        "is not causal: the last token of a sequence changes logits before it",
        remedy="name a decoder, such as a Llama or Qwen model",
    )
    own = getattr(model, "own_logits", None)
    if own is not None:
        _compare(plain, own(tokens), model.name, "its head alone does not give its own logits")
    _compare(plain, _padded(model, tokens), model.name, "padding on the left changes its logits")
    _compare(plain[:, -1], _cached(model, tokens), model.name, "its cache does not give what one pass gives")
    return None


def _logits(model: LanguageModel, tokens: Tensor, mask: Tensor) -> Tensor:
    return model.logits(model.hidden_states(tokens, mask))


def _padded(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits of the tokens behind padding, beside a row that has none."""
    padding = torch.full((1, _PADDING), model.tokenizer.pad_id, device=model.device)
    padded = torch.cat((padding, tokens), dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :_PADDING] = False
    rows = torch.cat((padded, padded)), torch.cat((mask, torch.ones_like(mask)))
    return _logits(model, *rows)[:1, _PADDING:]


def _cached(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits after the last token, two rows in a cache, one of them dropped on the way."""
    cache = model.new_cache(batch=2, capacity=_LENGTH)
    mask = torch.ones(2, _LENGTH, dtype=torch.bool, device=model.device)
    model.hidden_states(tokens[:, :-1].repeat(2, 1), mask[:, :-1], cache=cache)
    cache.keep(torch.tensor([True, False], device=model.device))
    return model.logits(model.hidden_states(tokens[:, -1:], mask[:1], cache=cache)[:, -1])


def _compare(wanted: Tensor, found: Tensor, name: str, text: str, *, remedy: str | None = None) -> None:
    spread = float((wanted.amax(dim=-1) - wanted.amin(dim=-1)).max())
    difference = float((wanted - found).abs().nan_to_num(nan=torch.inf).max())
    if difference > _TOLERANCE * max(spread, 1e-3):
        raise UnsupportedFormatError(name, f"{text} (by {difference:.3g} of {spread:.3g})", remedy=remedy)
