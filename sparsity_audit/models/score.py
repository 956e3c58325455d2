"""Teacher forcing: what two models say at every position of given completions.

Contract: the trunk runs over a batch of sequences, the head over a chunk of positions; memory is one batch's
hidden states and one chunk of `chunk_bytes`, never batch × length × vocabulary. Chunks and batches change
logits by rounding only. Both models need not be in memory at once: hidden states of one can be *spilled* to
disk, and of that model only the head is kept.

Hidden states are spilled and not logits because they are smaller by vocabulary ÷ width (20 to 40 times for
today's models: 150,000 against 4,096), exact in the model's own dtype, and the head that turns them into
logits is a small part of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsity_audit.models.batches import pad, plan_batches
from sparsity_audit.models.protocol import LanguageModel

__all__ = [
    "BYTES_PER_LOGIT",
    "Chunk",
    "Resident",
    "Scored",
    "Side",
    "Spilled",
    "log_probabilities",
    "score",
    "spill",
]

BYTES_PER_LOGIT = 128
"""Of working memory for each position and vocabulary entry: float32 logits and float64 log-probabilities of
two models, and what the divergences make of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A sequence to score.

    Args:
        prompt: Ids, at least one.
        completion: Ids whose distributions are asked for.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Positions of completions, aligned over both models.

    Args:
        sequence: int64[n]: which sequence each is of.
        position: int64[n]: which token of the completion it predicts, from 0.
        token: int64[n]: that token's id.
        base: float64[n, vocab]: natural log-probabilities before it is seen; NaN where the logits were.
        tuned: The same of the tuned model.
    """

    sequence: Tensor
    position: Tensor
    token: Tensor
    base: Tensor
    tuned: Tensor


class Side(Protocol):
    """One model of a comparison: hidden states of a batch, and a head."""

    def hidden(self, number: int, sequences: Sequence[Scored]) -> Tensor:
        """[positions, hidden] of batch `number`: the completions' positions, one sequence after another."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """float32[n, vocab]."""
        ...


class Resident:
    """A side whose model is in memory.

    Args:
        model: The model.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def hidden(self, number: int, sequences: Sequence[Scored]) -> Tensor:  # noqa: ARG002  (see Spilled)
        """Computed now."""
        return _hidden_states(self._model, sequences)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's."""
        return self._model.logits(hidden)


class Spilled:
    """A side whose hidden states lie on disk and of whose model the head is left.

    Args:
        folder: Where they lie.
        head: The head.
        device: Where the head is.
    """

    def __init__(self, folder: Path, *, head: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._folder, self._head, self._device = folder, head, device

    def hidden(self, number: int, sequences: Sequence[Scored]) -> Tensor:  # noqa: ARG002  (see Resident)
        """Read from disk."""
        return load_file(self._folder / _file_name(number))["hidden"].to(self._device)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's."""
        return self._head(hidden)


def spill(
    model: LanguageModel,
    sequences: Sequence[Scored],
    folder: Path,
    *,
    batch_tokens: int,
    on_sequences: Callable[[int], None] = lambda _num: None,
) -> Spilled:
    """Write a model's hidden states at all completion positions to a folder, a file a batch.

    Args:
        model: The model; once this returns it may be let go.
        sequences: As they will be given to `score`.
        folder: An empty folder; the caller removes it.
        batch_tokens: As for `score`.
        on_sequences: Called with the number of sequences done after each batch.
    """
    for number, rows in enumerate(_batches(sequences, batch_tokens)):
        hidden = _hidden_states(model, [sequences[row] for row in rows])
        save_file({"hidden": hidden.cpu().contiguous()}, folder / _file_name(number))
        on_sequences(len(rows))
    return Spilled(folder, head=model.head(), device=model.device)


@torch.no_grad()
def score(
    base: Side,
    tuned: Side,
    sequences: Sequence[Scored],
    *,
    vocab_size: int,
    batch_tokens: int,
    chunk_bytes: int,
    on_sequences: Callable[[int], None] = lambda _num: None,
) -> Iterator[Chunk]:
    """Log-probabilities of both models at every completion position, a chunk at a time.

    Args:
        base: The base.
        tuned: The tuned model.
        sequences: Prompts with completions, none longer than a model's context.
        vocab_size: Ids from 0 that are compared; log-probabilities are renormalised over them.
        batch_tokens: Padded tokens of a batch at most.
        chunk_bytes: Working memory of a chunk of positions at most, at `BYTES_PER_LOGIT`, but one position.
        on_sequences: Called with the number of sequences done after each batch.

    Yields:
        Chunks in the order of the batches, which group sequences of like length.
    """
    num = max(1, chunk_bytes // (BYTES_PER_LOGIT * vocab_size))
    for number, rows in enumerate(_batches(sequences, batch_tokens)):
        batch = [sequences[row] for row in rows]
        hidden = base.hidden(number, batch), tuned.hidden(number, batch)
        lengths = torch.tensor([len(one.completion) for one in batch])
        sequence = torch.tensor(rows).repeat_interleave(lengths)
        position = torch.cat([torch.arange(int(length)) for length in lengths])
        token = torch.tensor([ids for one in batch for ids in one.completion])
        for start in range(0, len(token), num):
            part = slice(start, start + num)
            log_base = log_probabilities(base.logits(hidden[0][part]), vocab_size=vocab_size)
            log_tuned = log_probabilities(tuned.logits(hidden[1][part]), vocab_size=vocab_size)
            chunk = Chunk(
                sequence=sequence[part],
                position=position[part],
                token=token[part],
                base=log_base,
                tuned=log_tuned.to(log_base.device),
            )
            del log_base, log_tuned
            yield chunk
            del chunk
        on_sequences(len(rows))


def log_probabilities(logits: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """float64[..., vocab]: log softmax over the first `vocab_size` ids, or all.

    NaN where a row has a NaN or +inf logit, or none above −inf; −inf for a token that cannot occur.
    """
    kept = logits if vocab_size is None else logits[..., :vocab_size]
    return torch.log_softmax(kept.double(), dim=-1)


def _batches(sequences: Sequence[Scored], batch_tokens: int) -> list[list[int]]:
    lengths = [len(one.prompt) + len(one.completion) for one in sequences]
    return plan_batches(lengths, batch_tokens=batch_tokens)


@torch.no_grad()
def _hidden_states(model: LanguageModel, sequences: Sequence[Scored]) -> Tensor:
    """[positions, hidden], where each completion token is predicted; the last token predicts nothing."""
    rows = [(*one.prompt, *one.completion)[:-1] for one in sequences]
    tokens, mask = pad(rows, pad_id=model.tokenizer.pad_id, side="right", device=model.device)
    hidden = model.hidden_states(tokens, mask)
    return torch.cat(
        [
            hidden[number, len(one.prompt) - 1 : len(one.prompt) - 1 + len(one.completion)]
            for number, one in enumerate(sequences)
        ]
    )


def _file_name(number: int) -> str:
    return f"hidden-{number:06d}.safetensors"
