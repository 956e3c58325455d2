"""A Llama in one file: the lab's policy, reference and base.

Contract: parameter names, shapes and arithmetic are those of Hugging Face's `LlamaForCausalLM` with an untied
head and full multi-head attention, so that `state_dict()` is the content of an ordinary checkpoint; the
logits are checked against `transformers`. Weights start at zero and come from `initialise` or from a file:
nothing here touches the global random state. Padding on either side changes no logit of a token that is not
padding.

Source: RMSNorm 1910.07467, RoPE 2104.09864, SwiGLU 2002.05202, Llama 2302.13971.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from sparsity_audit.errors import UsageError

__all__ = ["SIZES", "KVCache", "Llama", "LlamaConfig", "initialise", "round_to_bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The shape of a model, by the names of Hugging Face's `config.json`.

    Args:
        hidden_size: Width of the residual stream; a multiple of `num_attention_heads`.
        intermediate_size: Width of the SwiGLU layer.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads; each has its own keys and values.
        vocab_size: Rows of the embedding and of the head.
        max_position_embeddings: Longest sequence, prompt and completion together, in tokens.
        rms_norm_eps: ε of RMSNorm.
        rope_theta: Base of the rotary frequencies.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 20
    max_position_embeddings: int = 160
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads


def _size(hidden: int, intermediate: int, *, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


SIZES = {
    "tiny": _size(64, 168, layers=3, heads=4),
    "small": _size(128, 336, layers=4, heads=4),
    "medium": _size(256, 672, layers=4, heads=8),
}
"""148,928, 784,512 and 3,125,504 parameters."""


class KVCache:
    """Keys and values of the tokens a model has seen, for generation one token at a time.

    Args:
        config: The model's shape.
        batch: Sequences.
        capacity: Tokens there is room for.
    """

    def __init__(self, config: LlamaConfig, *, batch: int, capacity: int) -> None:
        shape = (config.num_hidden_layers, batch, config.num_attention_heads, capacity, config.head_size)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer once the new ones stand behind the old ones."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop the sequences where bool[batch] is false."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class _Step(NamedTuple):
    """What all layers of one forward pass share: rotations, visible keys, the cache."""

    cos: Tensor
    sin: Tensor
    visible: Tensor
    cache: KVCache | None


class Linear(nn.Module):
    """x ↦ x Wᵀ, without bias."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """One row a token."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_rows, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """x ↦ g · x / sqrt(mean x² + ε)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def _rotate(x: Tensor, step: _Step) -> Tensor:
    """Rotary embedding; dimension i of a head is paired with i + half, as Hugging Face stores it."""
    first, second = x.chunk(2, dim=-1)
    return x * step.cos + torch.cat((-second, first), dim=-1) * step.sin


class Attention(nn.Module):
    """Multi-head attention over what `step.visible` allows."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer, self.num_heads = layer, config.num_attention_heads
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.o_proj = Linear(width, width), Linear(width, width)

    def forward(self, x: Tensor, step: _Step) -> Tensor:
        queries, keys, values = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = _rotate(queries, step), _rotate(keys, step)
        if step.cache is not None:
            keys, values = step.cache.extend(self.layer, keys, values)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=step.visible)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """x ↦ down(silu(gate x) · up x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and SwiGLU, each on the normalised stream and added to it."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, step: _Step) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """The model without its head: tokens to hidden states."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_size, 2) / config.head_size)
        angles = torch.outer(torch.arange(config.max_position_embeddings), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, attention_mask: Tensor, cache: KVCache | None) -> Tensor:
        step = self._step(tokens.shape[1], attention_mask, cache)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, step)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def _step(self, num_new: int, attention_mask: Tensor, cache: KVCache | None) -> _Step:
        num_keys = attention_mask.shape[1]
        positions = (attention_mask.cumsum(1)[:, num_keys - num_new :] - 1).clamp(min=0)
        rows = torch.arange(num_keys - num_new, num_keys).unsqueeze(1)
        cols = torch.arange(num_keys)
        # A token always sees itself: where padding saw nothing at all, softmax would give NaN.
        visible = ((cols <= rows) & attention_mask[:, None, :]) | (cols == rows)
        return _Step(
            self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1), visible.unsqueeze(1), cache
        )


class Llama(nn.Module):
    """A causal language model; `model(tokens, attention_mask)` gives the logits of each next token.

    Args:
        config: Its shape.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def hidden_states(
        self, tokens: Tensor, attention_mask: Tensor | None = None, *, cache: KVCache | None = None
    ) -> Tensor:
        """What the head reads, after the last norm: float32[batch, seq, hidden].

        Args:
            tokens: int64[batch, seq]; with a cache only the new ones.
            attention_mask: bool[batch, keys], true where there is a token and not padding, over the tokens
                in the cache and the new ones; None where nothing is padded.
            cache: Where keys and values are kept; it grows by the new tokens.

        Raises:
            UsageError: The sequence is longer than the model's positions.
        """
        num_keys = tokens.shape[1] + (cache.length if cache is not None else 0)
        if num_keys > self.config.max_position_embeddings:
            raise UsageError(
                "sequence",
                f"{num_keys} tokens",
                expected=f"at most {self.config.max_position_embeddings} (max_position_embeddings)",
                remedy="fewer digits, or a lower limit of new tokens",
            )
        if attention_mask is None:
            attention_mask = torch.ones(len(tokens), num_keys, dtype=torch.bool)
        return self.model(tokens, attention_mask, cache)

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, *, cache: KVCache | None = None
    ) -> Tensor:
        """Logits float32[batch, seq, vocab] of the token after each; arguments as for `hidden_states`."""
        return self.lm_head(self.hidden_states(tokens, attention_mask, cache=cache))


def initialise(config: LlamaConfig, *, generator: torch.Generator) -> Llama:
    """A model with normal weights of variance 1 / fan-in, embedding rows of unit variance, and a zero head.

    A zero head makes the first prediction uniform, so that the first loss is ln(vocab) whatever the seed.
    """
    model = Llama(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "lm_head.weight" or weight.ndim < 2:
                continue
            scale = 1.0 if name == "model.embed_tokens.weight" else weight.shape[1] ** -0.5
            weight.normal_(std=scale, generator=generator)
    return model


@torch.no_grad()
def round_to_bf16(model: nn.Module) -> None:
    """Round every weight to the nearest bf16 value, ties to even; weights stay fp32 tensors."""
    for weight in model.parameters():
        weight.copy_(weight.to(torch.bfloat16))
