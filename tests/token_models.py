"""Small language models for the token audits' tests: random ones of the lab, and ones with a fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparsity_audit.lab.folder import save_model
from sparsity_audit.lab.language_model import LabModel
from sparsity_audit.lab.model import Llama, LlamaConfig, initialise

__all__ = ["Faulty", "random_llama", "random_model", "save_random"]


def random_llama(seed: int, *, context: int = 64, spread: float = 2.0) -> Llama:
    """A tiny model whose logits have about that standard deviation."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
    )
    generator = torch.Generator().manual_seed(seed)
    llama = initialise(config, generator=generator)
    with torch.no_grad():
        llama.lm_head.weight.normal_(std=spread / 4, generator=generator)
    return llama


def random_model(seed: int, *, context: int = 64, spread: float = 2.0) -> LabModel:
    """The same behind the protocol."""
    return LabModel(random_llama(seed, context=context, spread=spread), name=f"random {seed}")


def save_random(folder: Path, seed: int, *, context: int = 64) -> Path:
    """The same as a folder."""
    save_model(random_llama(seed, context=context), folder, dtype="fp32")
    return folder


class Faulty(LabModel):
    """A random model whose hidden states or logits go through a fault."""

    def __init__(
        self,
        seed: int,
        *,
        hidden: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda hidden, _tokens, _mask: hidden,
        logits: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__(random_llama(seed), name="faulty")
        self._hidden, self._logits = hidden, logits

    def hidden_states(self, tokens, attention_mask, *, cache=None):
        return self._hidden(
            super().hidden_states(tokens, attention_mask, cache=cache), tokens, attention_mask
        )

    def logits(self, hidden):
        return self._logits(super().logits(hidden))

    def head(self):
        return self.logits
