"""Say in our own words what went wrong with the Hub.

Contract: no text of a library exception or of a server's answer enters a message, because both can hold
tokens, signed addresses or pages of HTML; what enters are status codes, class names and the operating
system's own words. Works for the `requests`-based (0.x) and the `httpx`-based (1.x, 2.x) Hub library, whose
exceptions share names but not bases.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator

from sparsity_audit.checkpoint.hub_reference import SCHEME, HubReference
from sparsity_audit.errors import HubError, SparsityAuditError

__all__ = ["is_transient", "library_errors", "translate"]

_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_MAX_CHAIN = 20
_SIGN_IN = "run `hf auth login` or set HF_TOKEN"


def library_errors() -> tuple[type[Exception], ...]:
    """What a call of the Hub library may raise for reasons that lie outside this program.

    The transport's base class is not exported; it is the first base of `HfHubHTTPError` in every version.
    RuntimeError is what `hf_xet` raises; ValueError and KeyError come from answers that are not a Hub's.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    transport = HfHubHTTPError.__mro__[1]
    return (OSError, EntryNotFoundError, transport, RuntimeError, ValueError, KeyError)


def is_transient(error: BaseException) -> bool:
    """Whether asking again may help: a busy or failing server, a timeout, a cut connection."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return error.__cause__ is not None and is_transient(error.__cause__)
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    return not _is_local(error) and not isinstance(error, ValueError | KeyError)


def translate(
    error: BaseException, reference: HubReference, *, file: str | None = None
) -> SparsityAuditError:
    """The error to show for a library exception about `reference`, or about one `file` of it."""
    from huggingface_hub import errors as lib

    subject = reference.text if file is None else f"{reference.text}, file {file}"
    no_path = "" if reference.text.startswith(SCHEME) else "no such local path, and "
    if isinstance(error, lib.OfflineModeIsEnabled):
        return HubError(
            subject,
            f"{no_path}not in the Hub cache, while HF_HUB_OFFLINE forbids to ask the Hub",
            remedy="unset HF_HUB_OFFLINE, or fetch it where there is a network",
        )
    if isinstance(error, lib.LocalEntryNotFoundError | lib.FileMetadataError):
        if isinstance(error.__cause__, Exception) and not isinstance(error.__cause__, lib.FileMetadataError):
            return translate(error.__cause__, reference, file=file)
        return _not_a_hub(subject)
    if isinstance(error, lib.GatedRepoError):
        return HubError(
            subject,
            f"{reference.repo_id} is gated: its licence has not been accepted by this account",
            remedy=f"accept it on the model's page, then {_SIGN_IN}",
        )
    if isinstance(error, lib.RevisionNotFoundError):
        return HubError(
            subject,
            f"{reference.repo_id} has no revision {reference.revision!r}",
            expected="a branch, a tag or a commit of that repository",
        )
    if isinstance(error, lib.EntryNotFoundError):
        return HubError(subject, f"{reference.repo_id} has no such file or folder", expected="a path in it")
    if isinstance(error, lib.RepositoryNotFoundError):
        return HubError(
            subject,
            f"{no_path}no model {reference.repo_id} on the Hub that this account may see",
            remedy=f"check the name; for a private model {_SIGN_IN}",
        )
    if _status(error) is not None:
        return _from_status(_status(error), subject)
    return _from_cause(error, subject, no_path=no_path)


def _from_status(status: int | None, subject: str) -> HubError:
    if status == 401:
        return HubError(subject, "the Hub refused the access token (401)", remedy=f"{_SIGN_IN} anew")
    if status == 403:
        return HubError(
            subject,
            "the Hub forbids access (403)",
            remedy=f"accept the model's conditions on its page, or {_SIGN_IN} with a token that may read it",
        )
    if status == 404:
        return HubError(subject, "not found on the Hub (404)", remedy="check the name")
    if status in _TRANSIENT_STATUS:
        return HubError(subject, f"the Hub answered {status}, several times", remedy="try again later")
    return HubError(subject, f"the Hub answered {status}", remedy="check HF_ENDPOINT and proxies")


def _from_cause(error: BaseException, subject: str, *, no_path: str) -> HubError:
    if isinstance(error, UnicodeError):
        return HubError(subject, "the access token holds characters that cannot be sent", remedy=_SIGN_IN)
    if isinstance(error, ValueError | KeyError):
        return _not_a_hub(subject)
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return HubError(
            subject,
            f"no space left in the Hub cache ({error.strerror})",
            remedy="free some, or set HF_HOME to a larger disk; nothing half-written is used",
        )
    if isinstance(error, OSError) and _is_local(error):
        return HubError(
            subject,
            f"the Hub cache cannot be used: {error.strerror or type(error).__name__}",
            remedy="set HF_HOME to a folder that can be written",
        )
    return HubError(
        subject,
        f"{no_path}the connection to the Hub failed: {_reason(error)}",
        remedy="check network, proxies and HF_ENDPOINT, then run again; HF_HUB_OFFLINE=1 uses a cached copy",
    )


def _not_a_hub(subject: str) -> HubError:
    return HubError(subject, "the answer is not a Hub's", remedy="check HF_ENDPOINT, proxies and firewalls")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_local(error: BaseException) -> bool:
    """Whether the file system said no: sockets raise subclasses of ConnectionError or TimeoutError."""
    return (
        isinstance(error, OSError)
        and isinstance(error.errno, int)
        and not isinstance(error, ConnectionError | TimeoutError)
    )


def _reason(error: BaseException) -> str:
    for link in itertools.islice(_chain(error), _MAX_CHAIN):
        if isinstance(link, OSError) and isinstance(link.errno, int) and link.strerror:
            return link.strerror
    return type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
