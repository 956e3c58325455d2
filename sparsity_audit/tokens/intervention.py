"""Cross-sampling: one model writes, another takes over where a rule says so, both on the mixed prefix.

Contract: at every step both models have seen the same prefix, each through its own cache, and nothing is
computed twice. Both draw with the same noise, a stream of each row: *switched* is a position where the rule
fired and the intervening model's draw was taken, *changed* one where that draw is also another token than
the primary model's would have been. A rule that never fires gives the primary model's own sample, one that
fires wherever the distributions differ the intervening model's, token for token those of `models.sample`
under the same seeds; identical models never switch on divergence. What a row draws does not depend on the
rows beside it.

Source: 2603.22446 §5, which gives neither its threshold nor the sampler's noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from sparsity_audit.errors import UsageError
from sparsity_audit.models.batches import pad, plan_batches
from sparsity_audit.models.noise import RowNoise, choose
from sparsity_audit.models.protocol import LanguageModel
from sparsity_audit.models.sample import WORTH_KEEPING, new_tokens_limit
from sparsity_audit.models.score import log_probabilities
from sparsity_audit.tokens.divergence import entropy, js_divergence
from sparsity_audit.tokens.rules import Rule, Signals

__all__ = ["CrossSamples", "cross_sample", "read_signals"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CrossSamples:
    """Completions of two models, with what was known and done at each position; on the CPU.

    Args:
        tokens: int64[rows, seq], 0 behind a completion's end.
        lengths: int64[rows], tokens of each completion, the end token included.
        js: float32[rows, seq], divergence of the two distributions there; 0 behind the end.
        entropy: float32[rows, seq], of the primary model; 0 behind the end.
        switched: bool[rows, seq], the rule fired.
        changed: bool[rows, seq], it fired and the token is not the one the primary model would have drawn.
        truncated: bool[rows], cut by the limit or a context.
        failed: bool[rows], a model's logits were not numbers after the last token.
    """

    tokens: Tensor
    lengths: Tensor
    js: Tensor
    entropy: Tensor
    switched: Tensor
    changed: Tensor
    truncated: Tensor
    failed: Tensor

    @classmethod
    def empty(cls, rows: int, seq: int) -> CrossSamples:
        """Room for `rows` completions of at most `seq` tokens."""
        return cls(
            tokens=torch.zeros(rows, seq, dtype=torch.int64),
            lengths=torch.zeros(rows, dtype=torch.int64),
            js=torch.zeros(rows, seq),
            entropy=torch.zeros(rows, seq),
            switched=torch.zeros(rows, seq, dtype=torch.bool),
            changed=torch.zeros(rows, seq, dtype=torch.bool),
            truncated=torch.zeros(rows, dtype=torch.bool),
            failed=torch.zeros(rows, dtype=torch.bool),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> CrossSamples:
        """What `to_arrays` gave."""
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return cls(**tensors | {"tokens": tensors["tokens"].long()})

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All fields as numpy arrays, ids in 32 bits."""
        arrays = {field.name: getattr(self, field.name).contiguous().numpy() for field in fields(self)}
        return arrays | {"tokens": arrays["tokens"].astype(np.int32)}

    @property
    def written(self) -> Tensor:
        """bool[rows, seq]: where there is a token."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def completion(self, row: int) -> list[int]:
        """The ids of one completion."""
        return self.tokens[row, : int(self.lengths[row])].tolist()

    def trimmed(self) -> CrossSamples:
        """Without the columns that no completion reaches."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return CrossSamples(**{n: p[:, :longest] if p.ndim == 2 else p for n, p in parts.items()})


def cross_sample(
    primary: LanguageModel,
    intervening: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    rule: Rule,
    seeds: Sequence[int],
    eos_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    batch_tokens: int,
    vocab_size: int | None = None,
    on_rows: Callable[[int], None] = lambda _rows: None,
) -> CrossSamples:
    """A mixed completion of each prompt, in the order of the prompts.

    Args:
        primary: Writes where the rule does not fire.
        intervening: Writes where it does.
        prompts: Ids, at least one each, shorter than both contexts.
        rule: See `tokens.rules`.
        seeds: One a prompt: the row's noise, which both models draw with.
        eos_ids: Ids that end a completion, whoever draws them.
        max_new_tokens: Tokens of a completion at most, the end token included.
        temperature: Of the distributions that are drawn from and compared; 0 takes the most probable token
            each time, and compares at temperature 1.
        batch_tokens: Padded tokens of a batch at most, new ones included.
        vocab_size: Ids from which on logits are ignored; the whole head by default.
        on_rows: Called with the number of rows done after each batch.

    Raises:
        UsageError: The heads have different widths and no `vocab_size` is given, a temperature below 0, or a
            limit below 1.
    """
    width = _verified_width(primary, intervening, vocab_size)
    if not 0 <= temperature < math.inf:
        raise UsageError("temperature", str(temperature), expected="0 (greedy) or more")
    if max_new_tokens < 1:
        raise UsageError("max_new_tokens", str(max_new_tokens), expected="at least 1")
    limits = [
        min(new_tokens_limit(m, prompt, max_new_tokens=max_new_tokens) for m in (primary, intervening))
        for prompt in prompts
    ]
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    found = CrossSamples.empty(len(prompts), max_new_tokens)
    for rows in plan_batches(lengths, batch_tokens=batch_tokens):
        batch = _Batch(
            primary,
            intervening,
            [prompts[row] for row in rows],
            rows=torch.tensor(rows),
            limits=torch.tensor([limits[row] for row in rows]),
            noise=_noise([seeds[row] for row in rows], primary, width, temperature),
        )
        batch.run(found, rule=rule, eos_ids=eos_ids, temperature=temperature, width=width)
        on_rows(len(rows))
    return found.trimmed()


def read_signals(left: Tensor, right: Tensor, *, temperature: float) -> Signals:
    """Divergence and entropy of next-token distributions, by the definitions of `tokens.divergence`.

    Args:
        left: The primary model's logits [rows, vocab]; −inf is probability 0.
        right: The intervening model's.
        temperature: > 0.
    """
    base, tuned = (log_probabilities(logits / temperature) for logits in (left, right))
    js = js_divergence(base, tuned)
    # Rounding must neither hide a difference nor invent one: 0 is for equal logits alone.
    js = torch.where((left == right).all(dim=-1), 0.0, js.clamp(min=torch.finfo(torch.float32).tiny))
    return Signals(js=js, entropy=entropy(base))


class _Batch:
    """Rows that are written together; row numbers are those of the whole run."""

    def __init__(
        self,
        primary: LanguageModel,
        intervening: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        rows: Tensor,
        limits: Tensor,
        noise: RowNoise | None,
    ) -> None:
        self.models = (primary, intervening)
        self.device = primary.device
        self.rows, self.limits, self.noise = rows, limits, noise
        self.pad_id = primary.tokenizer.pad_id
        self.new, prompt_mask = pad(prompts, pad_id=self.pad_id, side="left", device=self.device)
        self.steps = max(0, int(limits.max()))
        self.prompt_seq = self.new.shape[1]
        self.attention_mask = torch.cat((prompt_mask, prompt_mask.new_zeros(len(rows), self.steps)), dim=1)
        self.caches = [
            model.new_cache(batch=len(rows), capacity=self.prompt_seq + self.steps) for model in self.models
        ]
        self.held = torch.arange(len(rows))  # places in the caches: all that are going, and some that ended
        self.going = limits > 0
        self.spent = torch.zeros(len(rows), dtype=torch.int64)

    def run(
        self, found: CrossSamples, *, rule: Rule, eos_ids: Sequence[int], temperature: float, width: int
    ) -> None:
        """Write every row into `found`."""
        found.truncated[self.rows] = True
        ends = torch.tensor(list(eos_ids), dtype=torch.int64)
        for step in range(self.steps):
            if not self.going.any():
                return
            self._write(found, step, rule=rule, ends=ends, temperature=temperature, width=width)
            self._advance(found, step)

    def _write(
        self, found: CrossSamples, step: int, *, rule: Rule, ends: Tensor, temperature: float, width: int
    ) -> None:
        """One token of each row that is going."""
        live = self.going[self.held]
        places = self.held[live]
        left, right = (logits[:, :width] for logits in self._logits(step, live))
        broken = _no_distribution(left) | _no_distribution(right)
        signals = read_signals(left, right, temperature=temperature or 1.0)
        noise = None if self.noise is None else self.noise.draw(places.tolist())
        own, other = (choose(logits, noise, temperature=temperature).cpu() for logits in (left, right))
        rows = self.rows[places]
        fired = rule.fires(
            step,
            Signals(js=signals.js.cpu(), entropy=signals.entropy.cpu()),
            rows=rows,
            spent=self.spent[places],
        )
        fine = ~broken.cpu()
        rows, places, fired = rows[fine], places[fine], fired[fine]
        token = torch.where(fired, other[fine], own[fine])
        found.failed[self.rows[self.held[live]][~fine]] = True
        found.tokens[rows, step] = token
        found.js[rows, step] = signals.js.cpu()[fine].float()
        found.entropy[rows, step] = signals.entropy.cpu()[fine].float()
        found.switched[rows, step] = fired
        found.changed[rows, step] = fired & (token != own[fine])
        found.lengths[rows] += 1
        self.spent[places] += fired
        ended = torch.isin(token, ends)
        found.truncated[rows[ended]] = False
        self.going[self.held[live]] = False
        self.going[places] = ~ended & (step + 1 < self.limits[places])

    def _logits(self, step: int, live: Tensor) -> list[Tensor]:
        """Both models' logits of the rows that are going, after the prefix."""
        mask = self.attention_mask[self.held.to(self.device), : self.prompt_seq + step]
        hidden = [
            model.hidden_states(self.new, mask, cache=cache)[:, -1]
            for model, cache in zip(self.models, self.caches, strict=True)
        ]
        if not live.all():
            hidden = [part[live.to(part.device)] for part in hidden]
        return [model.logits(part) for model, part in zip(self.models, hidden, strict=True)]

    def _advance(self, found: CrossSamples, step: int) -> None:
        """Let rows that ended leave the caches when it is worth a copy, and lay out the next tokens."""
        still = self.going[self.held]
        if int(still.sum()) < WORTH_KEEPING * len(self.held):
            for cache in self.caches:
                cache.keep(still.to(self.device))
            self.held = self.held[still]
        self.attention_mask[:, self.prompt_seq + step] = self.going.to(self.device)
        token = found.tokens[self.rows[self.held], step]
        self.new = torch.where(self.going[self.held], token, self.pad_id)[:, None].to(self.device)


def _verified_width(primary: LanguageModel, intervening: LanguageModel, vocab_size: int | None) -> int:
    widths = (primary.vocab_size, intervening.vocab_size)
    if vocab_size is None and widths[0] != widths[1]:
        raise UsageError(
            f"{primary.name} and {intervening.name}",
            f"heads of {widths[0]} and {widths[1]} rows",
            expected="one vocabulary",
        )
    if vocab_size is not None and not 1 <= vocab_size <= min(widths):
        raise UsageError("vocab_size", str(vocab_size), expected=f"1 to {min(widths)}")
    return widths[0] if vocab_size is None else vocab_size


def _noise(seeds: Sequence[int], model: LanguageModel, width: int, temperature: float) -> RowNoise | None:
    return RowNoise(seeds, vocab_size=width, device=model.device) if temperature > 0 else None


def _no_distribution(logits: Tensor) -> Tensor:
    """bool[rows]: logits that are no distribution."""
    return logits.isnan().any(dim=-1) | logits.isposinf().any(dim=-1) | logits.isneginf().all(dim=-1)
