"""What the lab's measurements refuse before they begin: numbers that cannot be, folders that are taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsity_audit.errors import OutputError, UsageError

__all__ = ["verify_counts", "verify_folder"]


def verify_counts(*, num_prompts: int, num_samples: int, betas: Sequence[float] = ()) -> None:
    """Refuse an evaluation of nothing. Raises UsageError."""
    for name, number in (("prompts", num_prompts), ("samples", num_samples)):
        if number < 1:
            raise UsageError(name, str(number), expected="at least 1")
    if not all(beta > 0 for beta in betas):
        raise UsageError("betas", ", ".join(map(str, betas)), expected="numbers greater than 0")


def verify_folder(folder: Path, names: Sequence[str], *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse a folder that is a file, is read, or holds what would be replaced. Raises OutputError."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(str(folder), "is a file", expected="a directory", remedy="choose another -o")
    if folder.resolve() in [path.resolve() for path in inputs]:
        raise OutputError(str(folder), "holds what is read", remedy="choose another -o")
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise OutputError(
            str(folder),
            f"holds {', '.join(there[:3])}, which would be replaced",
            remedy="choose another -o, or add --overwrite",
        )
