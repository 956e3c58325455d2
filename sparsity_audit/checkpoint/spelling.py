"""What a reference may be spelled like beside a path or a Hub reference: `BASE+ADAPTER`, `REF#master`.

Contract: a path that exists is always that path, whatever characters it holds.
"""

from __future__ import annotations

import re
from pathlib import Path

from sparsity_audit.checkpoint.hub_reference import SCHEME, parse_reference
from sparsity_audit.checkpoint.layout import ADAPTER_CONFIG
from sparsity_audit.checkpoint.object_store import is_object_reference
from sparsity_audit.errors import CheckpointNotFoundError, OutputError, UsageError

__all__ = ["MASTER", "adapted_parts", "local_path", "scheme_remedy", "verify_local"]

MASTER = "#master"
"""Asks, after a reference, for weights before rounding: a trainer's fp32 copy, an adapter's sum."""

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/+(?P<rest>.*)")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


def local_path(reference: str | Path) -> Path:
    """The path that a reference spells. Raises CheckpointNotFoundError where it cannot be looked up."""
    try:
        path = Path(reference).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:
        # An unknown ~user, a name longer than the file system takes, a directory that may not be entered.
        found = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointNotFoundError(
            str(reference)[:200], found or "cannot be looked up", expected="a path or a Hub reference"
        ) from error
    return path


def verify_local(path: Path) -> None:
    """Refuse a path that was a reference: `Path("s3://b/x")` is the folder `s3:/b/x`. Raises OutputError."""
    scheme = path.parts[0] if path.parts else ""
    if scheme.endswith(":") and is_object_reference(f"{scheme}//"):
        reference = f"{scheme}//{'/'.join(path.parts[1:])}"
        raise OutputError(
            reference,
            "is no path on this machine",
            remedy=f"with sparsity_audit.object_output({reference!r}) as folder: write to `folder`",
        )


def adapted_parts(text: str) -> tuple[str, str] | None:
    """Base and adapter of `BASE+ADAPTER`; the latter is a directory with a configuration, or remote."""
    places = [place for place, character in enumerate(text) if character == "+"]
    for place in reversed(places):
        base, adapter = text[:place], text[place + 1 :]
        if base and local_path(adapter).joinpath(ADAPTER_CONFIG).is_file():
            return base, adapter
    base, plus, adapter = text.rpartition("+")
    if not plus or not base:
        return None
    if is_object_reference(base):  # a key may hold a plus: there the adapter says what store it is in
        return (base, adapter) if is_object_reference(adapter) or adapter.startswith(SCHEME) else None
    if not (is_object_reference(adapter) or _names_hub(adapter)):
        return None
    return (base, adapter) if _names_hub(base) or local_path(base).exists() else None


def _names_hub(text: str) -> bool:
    try:
        return parse_reference(text) is not None
    except UsageError:
        return False


def scheme_remedy(text: str) -> str | None:
    """How an address of a kind that is not read may be spelled; None where the text looks like none."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return None
    scheme, rest = found["scheme"].lower(), found["rest"]
    if scheme == "file":
        return f"write the path alone: /{rest}"
    if scheme in ("http", "https"):
        host, _, path = rest.partition("/")
        model = path.split("/")[:2]
        if host in _HUB_HOSTS and len(model) == 2:
            return f"write {SCHEME}{'/'.join(model)}"
        return "download it first; models on the Hub are written org/model"
    if is_object_reference(f"{scheme}://") or f"{scheme}://" == SCHEME:
        return f"write {scheme}://{rest}"
    return None
