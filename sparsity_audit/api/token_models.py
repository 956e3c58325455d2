"""Which loader a model reference of the token audits gets.

Contract: a shipped base's name, or a folder the lab can compute, on the CPU in fp32, is read by the lab, with
no `transformers`; everything else goes through `transformers` (extra `[lab]`). The choice is a function of
the folder's `config.json` and the options; it is never made by trying. Each model is probed once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.names import BASES

if TYPE_CHECKING:
    from sparsity_audit.models.protocol import LanguageModel

__all__ = ["ModelDType", "is_lab_reference", "load_token_model"]

ModelDType = Literal["auto", "fp32", "bf16", "fp16"]


def is_lab_reference(reference: str | Path) -> bool:
    """Whether a reference is a shipped base, or a folder of the lab's architecture and alphabet."""
    if str(reference) in BASES:
        return True
    try:
        config = json.loads((Path(reference).expanduser() / "config.json").read_bytes())
        tokenizer = json.loads((Path(reference).expanduser() / "tokenizer.json").read_bytes())
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
    """A model with its tokenizer, probed.

    Args:
        reference: A folder, a shipped base's name, or a Hub reference.
        device: `cpu`, `cuda`, `cuda:1`, …
        dtype: Of weights and arithmetic; `auto` is as stored, and fp32 for the lab's models.
        on_note: Called with what a reader must know.

    Raises:
        SparsityAuditError: It cannot be read, is not a causal language model, or needs a missing extra.
    """
    if dtype not in ("auto", "fp32", "bf16", "fp16"):
        raise UsageError("dtype", repr(dtype), expected="auto, fp32, bf16 or fp16")
    from sparsity_audit.models.probe import probe

    if is_lab_reference(reference) and device == "cpu" and dtype in ("auto", "fp32"):
        from sparsity_audit.lab.language_model import load_lab_model

        model: LanguageModel = load_lab_model(reference)
    else:
        from sparsity_audit.lab.folder import resolve_base
        from sparsity_audit.models.transformers_model import load_transformers_model

        place = resolve_base(reference) if str(reference) in BASES else reference
        model = load_transformers_model(place, device=device, dtype=dtype)
    note = probe(model)
    if note is not None:
        on_note(note)
    return model
