"""Every error the package raises on purpose.

Contract: each class is a `SparsityAuditError` and also the builtin a caller would expect to catch;
`exit_code` is what the command line returns. A message names the subject, what was found, what was
expected and the remedy, in one to three lines; it never holds a token or a secret.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AlignmentError",
    "ChangedInputError",
    "CheckpointNotFoundError",
    "ClusterError",
    "CorruptCheckpointError",
    "FrozenEntryChangedError",
    "HubError",
    "MaskError",
    "MissingExtraError",
    "ObjectStoreError",
    "OutputError",
    "SparsityAuditError",
    "UnsafePickleError",
    "UnsupportedFormatError",
    "UsageError",
]


class SparsityAuditError(Exception):
    """Base of all errors raised on purpose; `exit_code` is the process status it maps to.

    Args:
        subject: What the error is about: a file, a tensor, an option.
        found: What was found there.
        expected: What should have been there; left out of the message when None.
        remedy: What the user can do; left out of the message when None.
    """

    exit_code = 2

    def __init__(
        self, subject: str, found: str, *, expected: str | None = None, remedy: str | None = None
    ) -> None:
        self.subject, self.found, self.expected, self.remedy = subject, found, expected, remedy
        text = f"{subject}: {found}"
        if expected is not None:
            text += f"\n  expected: {expected}"
        if remedy is not None:
            text += f"\n  remedy: {remedy}"
        super().__init__(text)

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by parts, so that a worker process can raise it in its parent."""
        return (_rebuilt, (type(self), self.subject, self.found, self.expected, self.remedy))


def _rebuilt(
    kind: type[SparsityAuditError], subject: str, found: str, expected: str | None, remedy: str | None
) -> SparsityAuditError:
    return kind(subject, found, expected=expected, remedy=remedy)


class UsageError(SparsityAuditError, ValueError):
    """An argument or option has a value that cannot be used."""


class CheckpointNotFoundError(SparsityAuditError, FileNotFoundError):
    """A reference leads to no checkpoint, or an index names a shard that is missing."""


class ClusterError(SparsityAuditError, RuntimeError):
    """The cluster cannot be reached or used, or lost a worker too often."""


class CorruptCheckpointError(SparsityAuditError, ValueError):
    """A file is truncated, or its header contradicts itself or the file."""


class UnsupportedFormatError(SparsityAuditError, ValueError):
    """A file is readable but of a kind this tool refuses, with the way to convert it."""


class UnsafePickleError(SparsityAuditError, ValueError):
    """A pickle asks for something that is not on the allow-list; nothing was executed."""


class AlignmentError(SparsityAuditError, ValueError):
    """Two tensors claim the same partner, or a user rule does not apply."""


class ChangedInputError(SparsityAuditError, RuntimeError):
    """An input file changed while it was being read."""


class HubError(SparsityAuditError, OSError):
    """The Hub refused, was not reachable, or does not have what was asked for."""


class ObjectStoreError(SparsityAuditError, OSError):
    """An object store refused, was not reachable, or answered with something else."""


class MaskError(SparsityAuditError, ValueError):
    """A mask file is malformed, or masks that do not belong together were combined."""


class FrozenEntryChangedError(SparsityAuditError, RuntimeError):
    """An entry outside the update mask does not have the bits it had when it was frozen."""


class OutputError(SparsityAuditError, OSError):
    """An output cannot be written: exists already, no space, no permission."""


class MissingExtraError(SparsityAuditError, ImportError):
    """An optional dependency is absent; the remedy names the extra to install."""
