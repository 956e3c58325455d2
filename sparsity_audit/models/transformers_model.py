"""Causal language models of `transformers` behind the protocol. The one module of models that imports it.

Contract: the model's own trunk and head are called apart, so that logits are taken a few positions at a time;
that the two together give what the model gives itself is for `models.probe` to check, not to hope. Weights
and tokenizer come from a local folder or the Hub; code from a repository is never run. Whatever makes a model
unfit (no head of its own, an encoder, a configuration nobody knows) is one error.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsity_audit.checkpoint.hub_reference import parse_reference
from sparsity_audit.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MissingExtraError,
    UnsupportedFormatError,
    UsageError,
)
from sparsity_audit.models.facts import ModelFacts
from sparsity_audit.models.transformers_tokenizer import TransformersTokenizer

__all__ = ["ModelDType", "TransformersModel", "load_transformers_facts", "load_transformers_model"]

ModelDType = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES: dict[str, Any] = {
    "auto": "auto",
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


class _Cache:
    """A `DynamicCache`: it grows as needed, and its layers can let rows go, which static ones cannot."""

    def __init__(self, config: Any) -> None:
        self.inner: Any = _transformers().DynamicCache(config=config)

    def keep(self, rows: Tensor) -> None:
        """Drop the sequences where bool[batch] is false."""
        try:
            self.inner.batch_select_indices(rows.nonzero().flatten())
        except AttributeError as error:
            raise UnsupportedFormatError(
                "cache",
                "a layer keeps a state that rows cannot be taken from",
                expected="attention layers (recurrent and hybrid models are not supported)",
            ) from error


class TransformersModel:
    """A causal language model of `transformers` behind the protocol `LanguageModel`.

    Args:
        model: In evaluation mode, on its device.
        tokenizer: Its tokenizer.
        name: What reports and errors call it.

    Raises:
        UnsupportedFormatError: It has no trunk or no head that can be called apart.
    """

    def __init__(self, model: Any, tokenizer: TransformersTokenizer, *, name: str) -> None:
        self.inner, self.tokenizer, self.name = model, tokenizer, name
        self._head: Any = model.get_output_embeddings()
        self._trunk: Any = model.base_model
        if self._head is None or self._trunk is model or model.config.is_encoder_decoder:
            raise UnsupportedFormatError(
                name,
                f"{type(model).__name__} has no trunk and head that can be called apart",
                expected="a causal language model",
            )
        self._config: Any = model.config.get_text_config(decoder=True)
        parameters = inspect.signature(self._trunk.forward).parameters
        self._takes_positions = "position_ids" in parameters
        # Some releases of transformers 5 rename it, and warn about the old name.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.inner.device

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return int(self._head.weight.shape[0])

    @property
    def context_tokens(self) -> int | None:
        """The longest sequence its configuration promises."""
        return _context_tokens(self._config)

    @property
    def module(self) -> Any:
        """The model of `transformers` itself."""
        return self.inner

    def new_cache(self, *, batch: int, capacity: int) -> _Cache:  # noqa: ARG002  (grows as needed)
        """An empty cache."""
        return _Cache(self.inner.config)

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor, attention_mask: Tensor, *, cache: Any = None) -> Tensor:
        """What the head reads; see the protocol."""
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options[self._cache_name] = cache.inner
        if self._takes_positions:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -tokens.shape[1] :]
        found = self._trunk(input_ids=tokens, attention_mask=attention_mask.long(), **options)
        return found.last_hidden_state

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32[..., vocab], with the scale and the cap that some configurations put on logits."""
        return self.head()(hidden)

    def head(self) -> Callable[[Tensor], Tensor]:
        """`logits`, holding the head's weights alone."""
        head, config = self._head, self._config
        cap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0

        @torch.no_grad()
        def logits(hidden: Tensor) -> Tensor:
            found = head(hidden.to(head.weight.dtype)).float() * scale / divisor
            return found if not cap else torch.tanh(found / cap) * cap

        return logits

    @torch.no_grad()
    def own_logits(self, tokens: Tensor) -> Tensor:
        """float32[batch, seq, vocab] as the model gives them itself: what trunk and head are held against."""
        return self.inner(input_ids=tokens, use_cache=False).logits.float()


def load_transformers_model(
    reference: str | Path, *, device: str = "cpu", dtype: ModelDType = "auto"
) -> TransformersModel:
    """A model and its tokenizer.

    Args:
        reference: A folder, or a Hub reference such as `org/model@revision`.
        device: `cpu`, `cuda`, `cuda:1`, …
        dtype: Of weights and arithmetic; `auto` is as stored.

    Raises:
        MissingExtraError: `transformers` is not installed.
        CheckpointNotFoundError: There is no such folder, and no such repository.
        UnsupportedFormatError: It is not a causal language model, or none that `transformers` knows.
        CorruptCheckpointError: Its files cannot be read, or weights are missing.
        UsageError: The device is not there.
    """
    library, name = _transformers(), str(reference)
    place, options = _place(reference)
    config = _config(library, place, options, name)
    _check_device(device)
    model, info = _loaded(
        lambda: library.AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=_DTYPES[dtype], output_loading_info=True, **options
        ),
        name,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CorruptCheckpointError(
            name,
            f"{len(missing)} weights are missing, first {missing[0]!r}",
            expected=f"all weights of a {type(model).__name__}",
            remedy="was it saved without its head, or as another kind of model?",
        )
    tokenizer = _tokenizer(library, place, options, name)
    return TransformersModel(model.eval().to(device), tokenizer, name=name)


def load_transformers_facts(reference: str | Path) -> ModelFacts:
    """What is known of a model before its weights are read. Raises as `load_transformers_model`."""
    library, name = _transformers(), str(reference)
    place, options = _place(reference)
    config = _config(library, place, options, name).get_text_config(decoder=True)
    return ModelFacts(
        name=name,
        loader="transformers",
        tokenizer=_tokenizer(library, place, options, name),
        vocab_size=int(config.vocab_size),
        context_tokens=_context_tokens(config),
    )


def _config(library: Any, place: str, options: dict[str, Any], name: str) -> Any:
    config = _loaded(lambda: library.AutoConfig.from_pretrained(place, **options), name)
    _check_architecture(library, config, name)
    return config


def _tokenizer(library: Any, place: str, options: dict[str, Any], name: str) -> TransformersTokenizer:
    tokenizer = _loaded(lambda: library.AutoTokenizer.from_pretrained(place, **options), name)
    try:
        generation = library.GenerationConfig.from_pretrained(place, **options)
    except (OSError, ValueError):
        generation = None  # a folder need not have one; the tokenizer has its end token all the same
    return TransformersTokenizer(tokenizer, eos_ids=_eos_ids(generation, tokenizer), name=name)


def _context_tokens(config: Any) -> int | None:
    found = [getattr(config, key, None) for key in _CONTEXT_KEYS]
    return next((int(number) for number in found if number), None)


def _place(reference: str | Path) -> tuple[str, dict[str, Any]]:
    path = Path(reference).expanduser()
    if path.is_dir():
        return str(path), {"local_files_only": True}
    found = parse_reference(reference) if isinstance(reference, str) else None
    if found is None:
        raise CheckpointNotFoundError(
            str(reference),
            "is no directory" if path.exists() else "no such directory",
            expected="a model folder, or a Hub reference such as org/model@revision",
        )
    options = {"revision": found.revision, "subfolder": found.subfolder}
    return found.repo_id, {key: value for key, value in options.items() if value}


def _loaded(load: Callable[[], Any], name: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        text = str(error).strip().splitlines()
        raise CorruptCheckpointError(
            name,
            f"transformers cannot load it: {text[0] if text else type(error).__name__}",
            expected="a folder with config.json, weights and tokenizer files, or a Hub repository of one",
        ) from error


def _check_architecture(library: Any, config: Any, name: str) -> None:
    known = type(config) in library.MODEL_FOR_CAUSAL_LM_MAPPING
    if not known or getattr(config, "is_encoder_decoder", False):
        architectures = ", ".join(getattr(config, "architectures", None) or [config.model_type])
        raise UnsupportedFormatError(
            name, f"{architectures} is not a causal language model", expected="a decoder with a head"
        )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError("device", f"{device!r} is not there", expected="cpu, cuda, cuda:1, …") from error


def _eos_ids(generation: Any, tokenizer: Any) -> tuple[int, ...]:
    """From the generation config, which may name several, and the tokenizer."""
    found: list[int] = []
    for ids in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):
        found += [ids] if isinstance(ids, int) else list(ids or [])
    return tuple(dict.fromkeys(int(number) for number in found))


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(
            "models beyond the lab's",
            "transformers is not installed",
            remedy="pip install 'sparsity-audit[lab]'",
        ) from error
