"""`-o s3://…`: the stages of one call of the command line, uploaded when the command has finished.

Contract: a stage is opened while options are parsed, before any work. The command writes to its folder on the
disk, and everything it prints names the reference. Exit status 0 and 1 (a failed expectation) are finished
results and are uploaded; anything else keeps the stage for the next run. A call whose result is finished
but not uploaded uploads it and does nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsity_audit.errors import SparsityAuditError

if TYPE_CHECKING:
    from sparsity_audit.checkpoint.object_output import ObjectStage

__all__ = ["ObjectOutputs", "object_outputs"]

_KEY = "sparsity_audit.object_outputs"


def object_outputs(ctx: click.Context) -> ObjectOutputs | None:
    """Those of the call that a context belongs to."""
    return ctx.meta.get(_KEY)


class ObjectOutputs:
    """The stages of one call.

    Args:
        ctx: The context of the command group.
        command: The arguments; the same ones in the same directory are the same call.
    """

    def __init__(self, ctx: click.Context, command: Sequence[str]) -> None:
        ctx.meta[_KEY] = self
        self._command = [str(Path.cwd()), *command]
        self._stages: list[ObjectStage] = []
        self._names: dict[str, str] = {}
        self._stack = ExitStack()

    def __bool__(self) -> bool:
        return bool(self._stages)

    def take(self, reference: str) -> Path:
        """The folder on the disk for a reference. Raises SparsityAuditError, click.UsageError."""
        from sparsity_audit.checkpoint.object_output import ObjectStage

        reference = reference.rstrip("/")
        for stage in self._stages:
            if f"{reference}/".startswith(f"{stage.reference}/"):
                return stage.folder / reference.removeprefix(stage.reference).lstrip("/")
            if stage.reference.startswith(f"{reference}/"):
                raise click.UsageError(f"{stage.reference} lies in {reference}: give {reference} first.")
        stage = ObjectStage(reference)
        self._stack.callback(stage.close)
        folder = stage.begin()
        if not self._stages:
            self._stack.enter_context(redirect_stdout(_Naming(sys.stdout, self._names)))
            self._stack.enter_context(redirect_stderr(_Naming(sys.stderr, self._names)))
        self._stages.append(stage)
        self._names[str(folder)] = reference
        return folder

    def run(self, command: Callable[[], Any]) -> Any:
        """Run a command and upload what it finished; returns its exit status."""
        with self._stack:
            status = self._finish_earlier()
            if status is not None:
                return status
            try:
                status = command()
            except SparsityAuditError as error:
                self._tell_kept()
                raise _renamed(error, self._names) from error
            except BaseException:
                self._tell_kept()
                raise
            if not isinstance(status, int) or status in (0, 1):
                self._upload(status if isinstance(status, int) else 0)
            else:
                self._tell_kept()
            return status

    def _finish_earlier(self) -> int | None:
        if not any("://" in text or text.startswith("--config") for text in self._command):
            return None
        from sparsity_audit.checkpoint.object_output import finish_upload, finished_stages

        found = finished_stages(self._command)
        for reference, _ in found:
            finish_upload(reference)
            click.echo(
                f"{reference}: this command had finished before; its files are uploaded now and nothing was "
                "made again",
                err=True,
            )
        return found[0][1] if found else None

    def _upload(self, status: int) -> None:
        written = [stage for stage in self._stages if stage.files()]
        for stage in written:
            stage.seal(self._command, status=status)
        # The report tells that a mask beside it is complete.
        for stage in sorted(written, key=lambda stage: "report.json" in stage.files()):
            try:
                num_files, num_bytes = stage.upload()
            except BaseException:
                click.echo(
                    f"{stage.reference}: finished, but not uploaded: run the same command again, which "
                    "uploads and makes nothing again",
                    err=True,
                )
                raise
            click.echo(f"uploaded {num_files} files, {num_bytes:,} bytes, to {stage.reference}", err=True)

    def _tell_kept(self) -> None:
        for stage in self._stages:
            if stage.files():
                what = "not finished, so nothing was uploaded; the same command goes on from there"
                click.echo(f"{stage.reference}: {what}", err=True)


class _Naming:
    """A stream that writes references where a command writes the paths of their stages."""

    def __init__(self, stream: Any, names: Mapping[str, str]) -> None:
        self._stream, self._names = stream, names

    def write(self, data: str | bytes) -> int:
        """Write, with names."""
        for path, reference in self._names.items():
            if isinstance(data, str):
                data = data.replace(path, reference)
            else:
                data = bytes(data).replace(path.encode(), reference.encode())
        return self._stream.write(data)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    @property
    def buffer(self) -> _Naming:
        """The same for bytes."""
        return _Naming(self._stream.buffer, self._names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _renamed(error: SparsityAuditError, names: Mapping[str, str]) -> SparsityAuditError:
    """The same error, which names references."""

    def named(text: str | None) -> str | None:
        for path, reference in names.items():
            text = None if text is None else text.replace(path, reference)
        return text

    return type(error)(
        named(error.subject) or "",
        named(error.found) or "",
        expected=named(error.expected),
        remedy=named(error.remedy),
    )
