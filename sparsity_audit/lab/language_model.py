"""The lab's models as the token audits ask for them.

Contract: arithmetic is `Llama`'s, in fp32 on the CPU; the context counts tokens and not padding. Nothing of
`transformers` is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.folder import load_model, resolve_base
from sparsity_audit.lab.model import KVCache, Llama
from sparsity_audit.lab.vocabulary import EOS, PAD, TOKENS, decode, encode, encode_prompt
from sparsity_audit.models.protocol import Cache

__all__ = ["LabModel", "LabTokenizer", "load_lab_model"]


class LabTokenizer:
    """One token a character; a prompt begins with `<bos>`."""

    pad_id = PAD
    eos_ids = (EOS,)

    def encode_prompt(self, text: str) -> list[int]:
        """`<bos>` and the text. Raises UsageError on a character outside the alphabet."""
        return encode_prompt(text)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Raises UsageError: the lab's models have no chat template."""
        raise UsageError(
            f"{len(messages)} chat messages",
            "the lab's models have no chat template",
            remedy="give `prompt` instead of `messages`",
        )

    def encode_completion(self, text: str) -> list[int]:
        """The text alone. Raises UsageError on a character outside the alphabet."""
        return encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens included."""
        return decode(ids)

    def vocabulary(self) -> dict[str, int]:
        """Token text → id."""
        return {text: number for number, text in enumerate(TOKENS)}


class LabModel:
    """A `Llama` of the lab behind the protocol `LanguageModel`.

    Args:
        llama: The model.
        name: What reports and errors call it.
    """

    tokenizer = LabTokenizer()
    device = torch.device("cpu")

    def __init__(self, llama: Llama, *, name: str) -> None:
        self.llama, self.name = llama, name

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.llama.config.vocab_size

    @property
    def context_tokens(self) -> int:
        """`max_position_embeddings`."""
        return self.llama.config.max_position_embeddings

    @property
    def module(self) -> Llama:
        """The model itself."""
        return self.llama

    def new_cache(self, *, batch: int, capacity: int) -> KVCache:
        """An empty cache."""
        return KVCache(self.llama.config, batch=batch, capacity=capacity)

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor, attention_mask: Tensor, *, cache: Cache | None = None) -> Tensor:
        """float32[batch, seq, hidden]; see the protocol. Raises UsageError beyond the context."""
        assert cache is None or isinstance(cache, KVCache)
        longest = int(attention_mask.sum(dim=1).max())
        if longest > self.context_tokens:
            raise UsageError(
                f"{self.name}: sequence", f"{longest} tokens", expected=f"at most {self.context_tokens}"
            )
        # The trunk itself: `Llama.hidden_states` counts padding, which has no position, as context.
        return self.llama.model(tokens, attention_mask, cache)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32[..., vocab]."""
        return self.llama.lm_head(hidden)

    def head(self) -> Callable[[Tensor], Tensor]:
        """The head alone."""
        return torch.no_grad()(self.llama.lm_head)


def load_lab_model(reference: str | Path) -> LabModel:
    """The model of a folder, or a shipped base by its name. Raises as `load_model`."""
    return LabModel(load_model(resolve_base(reference)), name=str(reference))
