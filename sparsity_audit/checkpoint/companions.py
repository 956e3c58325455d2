"""What lies beside the weights of a checkpoint: configuration, tokenizer, code.

Contract: decided from names alone. A checkpoint made of another one takes those files along, and nothing that
speaks of weights, training state or the run that made them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["Companions", "choose_companions"]

_TAKEN = (
    *(
        "*config*.json",
        "tokenizer*",
        "*.model",
        "*.tiktoken",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
    ),
    *("added_tokens.json", "chat_template*", "*.jinja", "*.py", "LICENSE*", "NOTICE*"),
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json", "*.partial")


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """Names of files beside the weights, sorted.

    Args:
        taken: Those a new checkpoint takes along.
        left: The others, without weights and their indexes, and without hidden files.
    """

    taken: tuple[str, ...]
    left: tuple[str, ...]


def choose_companions(names: Iterable[str]) -> Companions:
    """Sort the file names of one directory."""
    others = sorted(n for n in names if not n.startswith(".") and not _matches(n, _WEIGHTS))
    return Companions(
        taken=tuple(name for name in others if _matches(name, _TAKEN)),
        left=tuple(name for name in others if not _matches(name, _TAKEN)),
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
