"""Which loader a model reference of the token audits gets.

Contract: a shipped base's name, or a folder the lab can compute, on the CPU in fp32, is read by the lab, with
no `transformers`; everything else goes through `transformers` (extra `[lab]`). The choice is a function of
the folder's files and the options; it is never made by trying. Each model is probed when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.names import BASES

if TYPE_CHECKING:
    from sparsity_audit.models.facts import ModelFacts
    from sparsity_audit.models.protocol import LanguageModel

__all__ = ["ModelDType", "ModelSource", "is_lab_reference", "load_token_model"]

ModelDType = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that can be loaded, more than once where two do not fit in memory.

    Args:
        reference: A folder, a shipped base's name, or a Hub reference.
        device: `cpu`, `cuda`, `cuda:1`, …
        dtype: Of weights and arithmetic; `auto` is as stored, and fp32 for the lab's models.
    """

    reference: str | Path
    device: str
    dtype: ModelDType

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise UsageError("dtype", repr(self.dtype), expected=", ".join(_DTYPES))

    @property
    def is_lab(self) -> bool:
        """Whether the lab's own code computes it."""
        return self.device == "cpu" and self.dtype in ("auto", "fp32") and is_lab_reference(self.reference)

    def facts(self) -> ModelFacts:
        """Tokenizer, width and context, without the weights where they need not be read."""
        if self.is_lab:
            from sparsity_audit.lab.language_model import load_lab_model
            from sparsity_audit.models.facts import ModelFacts

            model = load_lab_model(self.reference)
            return ModelFacts(
                name=model.name,
                loader="lab",
                tokenizer=model.tokenizer,
                vocab_size=model.vocab_size,
                context_tokens=model.context_tokens,
            )
        from sparsity_audit.models.transformers_model import load_transformers_facts

        return load_transformers_facts(self._place())

    def load(self, *, on_note: Callable[[str], None] = lambda _note: None) -> LanguageModel:
        """The model with its weights, probed.

        Raises:
            SparsityAuditError: It cannot be read, is not a causal language model, or needs a missing extra.
        """
        from sparsity_audit.models.probe import probe

        if self.is_lab:
            from sparsity_audit.lab.language_model import load_lab_model

            model: LanguageModel = load_lab_model(self.reference)
        else:
            from sparsity_audit.models.transformers_model import load_transformers_model

            model = load_transformers_model(self._place(), device=self.device, dtype=self.dtype)
        note = probe(model)
        if note is not None:
            on_note(note)
        return model

    def _place(self) -> str | Path:
        if str(self.reference) not in BASES:
            return self.reference
        from sparsity_audit.lab.folder import resolve_base

        return resolve_base(self.reference)


def is_lab_reference(reference: str | Path) -> bool:
    """Whether a reference is a shipped base, or a folder of the lab's architecture and alphabet."""
    if str(reference) in BASES:
        return True
    folder = Path(reference).expanduser()
    try:
        config = json.loads((folder / "config.json").read_bytes())
        tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict) or config.get("architectures") != ["LlamaForCausalLM"]:
        return False
    from sparsity_audit.lab.vocabulary import TOKENS

    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return vocabulary == {text: number for number, text in enumerate(TOKENS)}


def load_token_model(
    reference: str | Path,
    *,
    device: str = "cpu",
    dtype: ModelDType = "auto",
    on_note: Callable[[str], None] = lambda _note: None,
) -> LanguageModel:
    """A model with its tokenizer, probed; see `ModelSource`.

    Args:
        reference: A folder, a shipped base's name, or a Hub reference.
        device: `cpu`, `cuda`, `cuda:1`, …
        dtype: Of weights and arithmetic; `auto` is as stored, and fp32 for the lab's models.
        on_note: Called with what a reader must know.
    """
    return ModelSource(reference=reference, device=device, dtype=dtype).load(on_note=on_note)
