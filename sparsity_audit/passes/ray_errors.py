"""What Ray's errors mean for a user of this tool, and what to set.

Contract: no import of ray; errors are told apart by the names of their classes and by what they say, because
the classes differ between the versions of Ray that are served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsity_audit.errors import ClusterError, SparsityAuditError

__all__ = ["explained", "lost", "name_of"]

_MAX_TEXT = 300


_WHAT_TO_SET = (
    "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE (default ~/.ray/auth_token) on every node before"
    " `ray start`, and here; RAY_AUTH_MODE=disabled where the cluster has none"
)


def explained(error: BaseException, subject: str, *, listens: bool = False) -> SparsityAuditError:
    """The ClusterError for what Ray said when it was asked to connect.

    Args:
        error: What Ray raised.
        subject: The cluster.
        listens: Somebody listens at its address. Ray calls a refused token a failed connection then, and
            writes the reason to its log alone.
    """
    text, kind = str(error), type(error).__name__
    if "Version mismatch" in text or "version mismatch" in text:
        return ClusterError(
            subject,
            f"runs another version of Ray or Python ({_first_lines(text)})",
            expected="the same version of Ray and of Python, here and on every node",
            remedy="pip install ray==VERSION as `ray --version` prints it on the cluster; where only the "
            "last number of Python differs, RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor lets it pass",
        )
    if "Authentication" in kind or "nauthenticated" in text or "auth token" in text.lower():
        return ClusterError(
            subject,
            f"does not accept this driver's token ({_first_lines(text)})",
            expected="one token on every node and here, and the same RAY_AUTH_MODE",
            remedy=_WHAT_TO_SET,
        )
    if listens and isinstance(error, ConnectionError):
        return ClusterError(
            subject,
            f"listens, but does not let this driver in ({_first_lines(text)})",
            expected="a Ray cluster with this driver's token",
            remedy=_WHAT_TO_SET,
        )
    if isinstance(error, (ConnectionError, TimeoutError)) or "connect" in text.lower():
        return ClusterError(
            subject,
            f"cannot be reached ({_first_lines(text)})",
            remedy="check RAY_ADDRESS (HOST:6379 from a node of the cluster, ray://HOST:10001 from outside), "
            "or unset it to use this machine alone",
        )
    return ClusterError(subject, f"cannot be used ({kind}: {_first_lines(text)})")


def lost(error: BaseException, batch: Sequence[Any], *, tries: int) -> ClusterError:
    """The ClusterError for a task that lost its worker too often."""
    kind = type(error).__name__
    remedy = "see the logs of Ray on the nodes; what is done is journaled: run again to go on"
    if "Memory" in kind:
        remedy = f"give the nodes more memory, or run fewer tasks at once with --workers; {remedy}"
    return ClusterError(
        f"{name_of(batch[0])} … {name_of(batch[-1])}" if len(batch) > 1 else name_of(batch[0]),
        f"lost its worker {tries} times ({kind}: {_first_lines(str(error))})",
        remedy=remedy,
    )


def name_of(unit: Any) -> str:
    """A unit as an error names it."""
    if isinstance(unit, tuple) and unit:  # a run of units that one device streams
        return f"{name_of(unit[0])} …"
    return f"work unit {getattr(unit, 'key', None) or getattr(unit, 'name', None) or unit!r:.80}"


def _first_lines(text: str) -> str:
    found = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return found if len(found) <= _MAX_TEXT else f"{found[:_MAX_TEXT]}…"
