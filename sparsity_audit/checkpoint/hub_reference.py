"""Recognise what names a repository on the Hub.

Contract: pure and light (no Hub library). `hf://…` is always a Hub reference or a UsageError; a bare
`org/model` is one only where no local path of that name exists, which the caller checks first. The grammar is
that of the Hub's own URIs, for models: https://huggingface.co/docs/huggingface_hub/package_reference/hf_uris
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from sparsity_audit.errors import UsageError

__all__ = ["SCHEME", "HubReference", "is_commit", "parse_reference"]

SCHEME = "hf://"

_FORMS = "org/model, org/model@revision, hf://org/model[@revision][/subfolder]"
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REF_WITH_SLASH = re.compile(r"refs/(?:pr/\d+|convert/[\w.-]+)(?=/|$)")
_NOT_IN_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/-]|/$")
_NOT_IN_FOLDER = re.compile(r"[\x00-\x1f\x7f\\]|(?:^|/)\.{0,2}(?:/|$)")
_LOCAL_FILE = re.compile(r".+\.(safetensors|bin|pt|pth|ckpt|gguf|json|h5|msgpack|onnx|npz)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubReference:
    """A model repository, a revision of it, and a folder in it.

    Args:
        text: What the user typed.
        repo_id: `org/model`.
        revision: Branch, tag or commit; None is the default branch.
        subfolder: Folder inside the repository, without slashes at its ends; "" is the top.
    """

    text: str
    repo_id: str
    revision: str | None = None
    subfolder: str = ""

    def pinned(self, commit: str) -> HubReference:
        """The same place at `commit`."""
        return replace(self, revision=commit)

    @property
    def uri(self) -> str:
        """Canonical spelling; parsing it gives the same place."""
        revision = "" if self.revision is None else f"@{_quote_revision(self.revision)}"
        return f"{SCHEME}{self.repo_id}{revision}" + (f"/{self.subfolder}" if self.subfolder else "")

    def path_of(self, name: str) -> str:
        """Path in the repository of the file `name` of this folder."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def is_commit(revision: str | None) -> bool:
    """Whether `revision` is a full commit hash, which can never move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def parse_reference(text: str) -> HubReference | None:
    """The Hub reference that `text` spells, or None when it can only be a local path.

    Without the scheme exactly one slash before `@` makes a Hub reference; text that begins with `.`, `/` or
    `~`, or ends like a weights file, is a path.

    Raises:
        UsageError: The text has the shape of a Hub reference but a part of it is not allowed.
    """
    has_scheme = text.startswith(SCHEME)
    body = text.removeprefix(SCHEME)
    head, at, tail = body.partition("@")
    if not has_scheme:
        if head.count("/") != 1 or head[0] in "./~" or "\\" in head or _LOCAL_FILE.fullmatch(body):
            return None
        repo_id, folder = head, ""
    else:
        parts = head.split("/", 2)
        if len(parts) < 2:
            raise _refused(text, "a model is named by two parts, org/model")
        if at and len(parts) == 3:
            raise _refused(text, "the revision follows the model's name, before the folder")
        repo_id, folder = "/".join(parts[:2]), parts[2] if len(parts) == 3 else ""
    _check_repo_id(text, repo_id)
    revision = None
    if at:
        revision, folder = _split_revision(text, tail)
    folder = folder.removesuffix("/")
    if folder and not has_scheme:
        raise _refused(text, "a folder needs the hf:// form", remedy=f"write {SCHEME}{body}")
    if folder and _NOT_IN_FOLDER.search(folder):
        raise _refused(text, f"{folder!r} is not a folder inside a repository")
    return HubReference(text=text, repo_id=repo_id, revision=revision, subfolder=folder)


def _check_repo_id(text: str, repo_id: str) -> None:
    for part in repo_id.split("/"):
        if not part:
            raise _refused(text, "an empty name")
        if not _NAME.fullmatch(part) or "--" in part or ".." in part or part.endswith(".git"):
            raise _refused(
                text,
                f"{part!r} is not a name on the Hub (letters, digits, '_', '-', '.'; no '--' or '..')",
            )


def _split_revision(text: str, tail: str) -> tuple[str, str]:
    special = _REF_WITH_SLASH.match(tail)
    if special:
        revision, folder = special[0], tail[special.end() :].removeprefix("/")
    else:
        revision, _, folder = tail.partition("/")
        revision = unquote(revision)
    if not revision:
        raise _refused(text, "an empty revision after '@'")
    if _NOT_IN_REVISION.search(revision) or "@" in tail:
        raise _refused(text, f"{revision!r} is not a branch, tag or commit")
    return revision, folder


def _quote_revision(revision: str) -> str:
    return revision if _REF_WITH_SLASH.fullmatch(revision) else quote(revision, safe="")


def _refused(text: str, found: str, *, remedy: str | None = None) -> UsageError:
    return UsageError(f"reference {text!r}", found, expected=f"a local path, or {_FORMS}", remedy=remedy)
