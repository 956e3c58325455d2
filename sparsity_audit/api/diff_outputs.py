"""What a run of `diff` writes: opened before the pass, finished after it.

Contract: the journal's lock comes before anything of an earlier run is touched. Mask files and the report
get their names only when the run has all of them; until then a next run of the same question goes on where
this one stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sparsity_audit.api.diff_question import Prepared
from sparsity_audit.checkpoint.spelling import verify_local
from sparsity_audit.errors import OutputError
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.share_bits import copy_share_bits
from sparsity_audit.passes.journal import Journal
from sparsity_audit.passes.mask_sink import MaskSink, mask_fingerprints, mask_metadata, mask_tensors
from sparsity_audit.report.output import OutputDirectory
from sparsity_audit.report.schema import DiffReport
from sparsity_audit.seams import reached
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import View

__all__ = ["DiffOutputs"]


class DiffOutputs:
    """Report directory, mask and journal of a run: opened before the pass, finished after it."""

    def __init__(
        self,
        prepared: Prepared,
        stack: ExitStack,
        *,
        output: str | Path | None,
        mask: str | Path | None,
        overwrite: bool,
        view: View,
    ) -> None:
        self._prepared = prepared
        self._directory = None
        if output is not None:
            inputs = [file.path for file in (*prepared.base.files, *prepared.tuned.files)]
            self._directory = OutputDirectory(Path(output), overwrite=overwrite, inputs=inputs)
        self._writer: MaskWriter | None = None
        self.sink: MaskSink | None = None
        self.journal: Journal | None = None
        journal_path = self._journal_path(mask)
        if journal_path is None:
            return
        may_resume = journal_path.exists() and not overwrite
        suffix = "" if mask is None else f":mask:{prepared.criterion.key}"
        # The journal's lock comes before anything of an earlier run is touched.
        self.journal = Journal(journal_path, plan_key=prepared.plan.key + suffix, restart=overwrite)
        stack.callback(self.journal.close)
        if mask is not None:
            try:
                writer = self._open_mask(Path(mask), view=view, overwrite=overwrite, may_resume=may_resume)
            except OutputError:
                if not may_resume:
                    journal_path.unlink()  # or the next run would take what is there for its own
                raise
            stack.callback(writer.close)
            if not writer.reused:
                self.journal.restart()  # its units' bits are gone
        if overwrite and self._directory is not None:
            self._directory.clear()

    @property
    def num_resumed(self) -> int:
        """Units found done."""
        return 0 if self.journal is None else len(self.journal.done)

    def copy_bits(self, paths: Sequence[Path]) -> None:
        """Take the mask bits from the files of finished shares. Raises MaskError."""
        assert self._writer is not None, "a mask was asked for"
        copy_share_bits(paths, self._writer, plan_key=self._prepared.plan.key)

    def finish(
        self,
        report: DiffReport,
        tallies: Sequence[Tally],
        *,
        facts: dict[str, Any],
        figures: bool,
        parquet: bool,
    ) -> None:
        """Name the mask's files, write the report's, remove the journal."""
        if self._writer is not None:
            self._writer.finish(mask_fingerprints(self._prepared.plan.pairs, tallies))
            reached("mask finished")
        if self._directory is not None:
            from sparsity_audit.report.files import render_files

            files = render_files(
                report, self._prepared.plan.pairs, tallies, facts=facts, figures=figures, parquet=parquet
            )
            self._directory.finish(files)
        if self.journal is not None:
            self.journal.path.unlink(missing_ok=True)

    def _journal_path(self, mask: str | Path | None) -> Path | None:
        if self._directory is not None:
            return self._directory.journal
        if mask is None:
            return None
        verify_local(Path(mask))
        path = Path(mask) if Path(mask).name not in ("", "..") else Path(mask).resolve()
        return path.parent / f"{path.name}.journal.jsonl"

    def _open_mask(self, path: Path, *, view: View, overwrite: bool, may_resume: bool) -> MaskWriter:
        if overwrite:
            _remove_mask(path)
        prepared = self._prepared
        self._writer = MaskWriter(
            path,
            mask_tensors(prepared.base, prepared.alignment),
            mask_metadata(prepared.base, prepared.tuned, criterion=prepared.criterion, view=view),
            resume=may_resume,
        )
        self.sink = MaskSink(self._writer)
        return self._writer


def _remove_mask(path: Path) -> None:
    """Remove the files of a mask, finished or not, and nothing else."""
    if not path.is_dir():
        return
    try:
        for file in (*path.glob("mask-*-of-*.safetensors*"), *path.glob("mask.safetensors.index.json*")):
            file.unlink()
    except OSError as error:
        raise OutputError(str(path), error.strerror or "cannot be written") from error
