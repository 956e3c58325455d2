"""What is known of a model before its weights are read: enough to encode prompts and to refuse a pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsity_audit.models.protocol import Tokenizer

__all__ = ["ModelFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model without its weights.

    Args:
        name: The reference it is loaded from.
        loader: Who computes it: the lab's own code, or `transformers`.
        tokenizer: Its tokenizer.
        vocab_size: Width of its logits.
        context_tokens: Longest sequence it takes; None where nothing says.
    """

    name: str
    loader: Literal["lab", "transformers"]
    tokenizer: Tokenizer
    vocab_size: int
    context_tokens: int | None
