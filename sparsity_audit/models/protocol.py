"""What the token audits ask of a causal language model, whoever computes it.

Contract: hidden states and logits are two calls, so that a caller can take the head over a few positions at
a time and never holds batch × length × vocabulary. Padding on either side changes no logit of a token that
is not padding, but for rounding; positions count tokens, not padding. Nothing here draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Cache", "LanguageModel", "Tokenizer"]


class Cache(Protocol):
    """Keys and values of the tokens a model has seen."""

    def keep(self, rows: Tensor) -> None:
        """Drop the sequences where bool[batch] is false."""
        ...


class Tokenizer(Protocol):
    """Texts to ids and back."""

    @property
    def pad_id(self) -> int:
        """The id that fills rows up; never looked at."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a completion."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt as the model expects one, with what it puts in front."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant begins. Raises UsageError without a template."""
        ...

    def encode_completion(self, text: str) -> list[int]:
        """Ids of a given completion: nothing is put in front or behind."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        ...

    def vocabulary(self) -> Mapping[str, int]:
        """Every token's own text with its id: what two tokenizers are compared by."""
        ...


class LanguageModel(Protocol):
    """A model on one device, in inference mode."""

    @property
    def name(self) -> str:
        """The reference it was loaded from, for reports and errors."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        ...

    @property
    def vocab_size(self) -> int:
        """Width of the logits: rows of the head, which may exceed the tokenizer's vocabulary."""
        ...

    @property
    def context_tokens(self) -> int | None:
        """Longest sequence it takes, prompt and completion together; None where nothing says."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its inputs must be."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """What holds its weights; writing into them changes what it computes."""
        ...

    def new_cache(self, *, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` sequences of at most `capacity` tokens."""
        ...

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor, *, cache: Cache | None = None) -> Tensor:
        """What the head reads: [batch, seq, hidden].

        Args:
            tokens: int64[batch, seq]; with a cache only the new ones.
            attention_mask: bool[batch, keys], true where there is a token, over those in the cache and the
                new ones.
            cache: Grows by the new tokens.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """float32[..., vocab] of the token after each position, from hidden states [..., hidden]."""
        ...

    def head(self) -> Callable[[Tensor], Tensor]:
        """`logits`, holding nothing of the model but its head: the rest can be let go."""
        ...
