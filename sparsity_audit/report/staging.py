"""A directory that appears under its name when all of it is written, or not at all.

Contract: content is made in `.NAME.partial` beside the target and renamed at the end, after a flush. What a
killed run left in `.NAME.partial` is removed by the next one; a lock keeps two runs apart. Nothing that
exists is replaced, and no target lies inside of an input or around one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from sparsity_audit.checkpoint.spelling import verify_local
from sparsity_audit.errors import OutputError
from sparsity_audit.masks.shards import output_error, sync_directory
from sparsity_audit.seams import reached

__all__ = ["StagedDirectory"]


class StagedDirectory:
    """A directory in the making; a context manager that removes what was not committed.

    Args:
        target: Where it shall be: a name that is free, or an empty directory.
        inputs: Directories that are read.

    Attributes:
        content: The directory to fill; `commit` gives it the target's name.
        scratch: A directory for what is needed meanwhile.

    Raises:
        OutputError: Something is there, another run writes it, an input is in the way, or it cannot be made.
    """

    def __init__(self, target: Path, inputs: Iterable[Path]) -> None:
        verify_local(target)
        # `.` and `a/..` have no name of their own to put beside.
        self.target = target.expanduser().resolve()
        self._verify(target, [path.resolve() for path in inputs])
        self._stage = self.target.with_name(f".{self.target.name}.partial")
        self.content, self.scratch = self._stage / "content", self._stage / "scratch"
        try:
            self._stage.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._stage, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise output_error(target, error) from error
        try:
            _lock(self._descriptor, self._stage)
            for left in (self.content, self.scratch):
                if left.exists():
                    shutil.rmtree(left)
                left.mkdir()
        except OutputError:
            os.close(self._descriptor)
            raise
        except OSError as error:
            os.close(self._descriptor)
            raise output_error(target, error) from error

    def commit(self) -> None:
        """Give the content its name. Raises OutputError."""
        try:
            for folder, _, _ in os.walk(self.content):
                sync_directory(Path(folder))
            reached("checkpoints written")
            self.content.replace(self.target)
            sync_directory(self.target.parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise OutputError(
                    str(self.target), "was filled by somebody else meanwhile", remedy="choose another -o"
                ) from error
            raise output_error(self.target, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._stage, ignore_errors=True)
        os.close(self._descriptor)

    def _verify(self, typed: Path, inputs: list[Path]) -> None:
        for path in inputs:
            if self.target == path or path in self.target.parents or self.target in path.parents:
                raise OutputError(
                    str(typed),
                    f"is inside of the input {path}, or holds it",
                    expected="a directory apart from what is read",
                    remedy="choose another -o",
                )
        try:
            found = "is a file" if self.target.is_file() else None
            if self.target.is_dir() and any(self.target.iterdir()):
                found = "exists and is not empty"
        except OSError as error:
            raise output_error(typed, error) from error
        if found is not None:
            raise OutputError(
                str(typed),
                found,
                expected="a new or empty directory",
                remedy="choose another -o, or delete this one first",
            )


def _lock(descriptor: int, path: Path) -> None:
    """Hold the directory until the descriptor is closed. File systems without locks are left unguarded."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        in_use = True
    except OSError:
        return
    else:
        # The run that held it may have ended just now, and removed the name.
        held, named = os.fstat(descriptor), path.stat() if path.exists() else None
        in_use = named is None or (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino)
    if in_use:
        raise OutputError(
            str(path), "another run is writing here", remedy="wait for it, or choose another output"
        )
