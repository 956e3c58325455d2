"""A policy whose next-token distributions are written down, for the token audits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sparsity_audit.lab.language_model import LabTokenizer


class _Seen:
    """Tokens of each row so far."""

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None

    def keep(self, rows: torch.Tensor) -> None:
        """Drop rows."""
        assert self.rows is not None
        self.rows = self.rows[rows]


class WrittenModel:
    """A model whose next-token probabilities are a function of the number of tokens it has seen.

    Args:
        probabilities: (number of tokens seen) → probabilities of the ids from 0.
        vocab_size: Ids.
    """

    tokenizer = LabTokenizer()
    device = torch.device("cpu")
    context_tokens = None

    def __init__(
        self, probabilities: Callable[[int], Mapping[int, float] | Sequence[float]], *, vocab_size: int = 6
    ) -> None:
        self._probabilities, self.vocab_size, self.name = probabilities, vocab_size, "written"

    def new_cache(self, *, batch: int, capacity: int) -> _Seen:
        """Nothing is cached but the number of calls."""
        return _Seen()

    def hidden_states(
        self, tokens: torch.Tensor, attention_mask: torch.Tensor, *, cache=None
    ) -> torch.Tensor:
        """The number of tokens up to each position: [batch, seq, 1]."""
        seen = attention_mask.cumsum(1)[:, -tokens.shape[1] :].float()
        if cache is not None:
            cache.rows = seen[:, -1]
        return seen[..., None]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """log p, −inf where p is 0."""
        out = torch.full((*hidden.shape[:-1], self.vocab_size), -torch.inf)
        for place in range(hidden.shape[0]):
            found = self._probabilities(int(hidden[place, 0]))
            pairs = found.items() if isinstance(found, Mapping) else enumerate(found)
            for token, p in pairs:
                out[place, token] = torch.tensor(float(p)).log()
        return out

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`logits`."""
        return self.logits
