"""Which files of a folder make the checkpoint, decided from their names alone.

Contract: pure; the same choice serves a local directory and a Hub repository, so that both read the same
files. The order is: safetensors index, `model*.safetensors`, other `*.safetensors`, `pytorch_model.bin`
index, `pytorch_model.bin` or its shards, other torch files. What trainers leave beside the weights
(optimizer, scheduler, arguments) is never chosen.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "ADAPTER_CONFIG",
    "Layout",
    "abridged",
    "choose_layout",
    "has_model_files",
    "is_adapter",
    "missing_shards",
    "unread_note",
    "unread_weights",
]

_INDEXES = {"safetensors": "model.safetensors.index.json", "torch": "pytorch_model.bin.index.json"}
ADAPTER_CONFIG = "adapter_config.json"
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_TRAINER_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)([_.-].*)?\.(bin|pt|pth)"
)
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The files that make a checkpoint.

    Args:
        index: Name of the index whose shards are the checkpoint, or None.
        files: The files that are the checkpoint, in name order; empty when there is an index.
    """

    index: str | None
    files: tuple[str, ...]


def choose_layout(names: Iterable[str]) -> Layout | None:
    """The layout that the file `names` of one folder (not below it) amount to; None without weights."""
    present = {name for name in names if not name.startswith(".")}
    torch_files = [n for n in present if n.endswith(_TORCH_SUFFIXES) and not _TRAINER_STATE.fullmatch(n)]
    candidates = {
        "safetensors": _main_family([n for n in present if n.endswith(".safetensors")], "model"),
        "torch": ["pytorch_model.bin"]
        if "pytorch_model.bin" in present
        else _main_family(torch_files, "pytorch_model"),
    }
    for kind, files in candidates.items():
        if _INDEXES[kind] in present:
            return Layout(index=_INDEXES[kind], files=())
        if files:
            return Layout(index=None, files=tuple(sorted(files)))
    return None


def has_model_files(names: Collection[str]) -> bool:
    """Whether among the `names` are files that `save_pretrained` writes, or any safetensors."""
    return any(n.endswith(".safetensors") or _family(n) == "pytorch_model" for n in names) or any(
        index in names for index in _INDEXES.values()
    )


def is_adapter(files: Iterable[str]) -> bool:
    """Whether the chosen files are those of a PEFT adapter."""
    return all(_family(name) == "adapter_model" for name in files)


def unread_weights(names: Iterable[str], chosen: Iterable[str]) -> tuple[str, ...]:
    """Files of weights among `names` that are not `chosen`, sorted; trainer state is no weight."""
    suffixes = (*_TORCH_SUFFIXES, ".safetensors")
    left = {n for n in names if n.endswith(suffixes) and not n.startswith(".")} - set(chosen)
    return tuple(sorted(n for n in left if not _TRAINER_STATE.fullmatch(n)))


def unread_note(reference: str, names: Iterable[str], chosen: Sequence[str]) -> tuple[str, ...]:
    """What the user is told of weights among `names` that are not read; nothing where there are none."""
    unread = unread_weights(names, chosen)
    if not unread or not chosen:
        return ()
    more = " …" if len(chosen) > 1 else ""
    return (f"{reference}: read {chosen[0]}{more}; ignored {abridged(unread)}",)


def abridged(names: Sequence[str], *, limit: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _main_family(files: list[str], family: str) -> list[str]:
    """The file or shards of that name where there are any: adapters and `consolidated` copies stay out."""
    return [n for n in files if _family(n) == family] or files


def _family(name: str) -> str:
    numbered = _NUMBERED.fullmatch(name)
    return numbered[1] if numbered else name.rpartition(".")[0]


def missing_shards(files: Iterable[str]) -> tuple[str, ...]:
    """Names that a numbering `…-0000i-of-0000N` promises and that are not among `files`, sorted."""
    present = set(files)
    missing: set[str] = set()
    for match in filter(None, map(_NUMBERED.fullmatch, present)):
        stem, total, suffix = match[1], match[3], match[4]
        missing |= {f"{stem}-{i:05}-of-{total}{suffix}" for i in range(1, int(total) + 1)} - present
    return tuple(sorted(missing))
