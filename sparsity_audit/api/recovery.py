"""Recovery of masked retraining, end to end: how far a retrained model comes to the full run.

Contract: `recovery` matches base, full run, retrained run and controls, reads each once in one pass, and
returns a `RecoveryReport`; with `output` it also writes it. What does not belong together is refused before
anything is read. Defaults live here and nowhere below.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsity_audit.api.recovery_build import RecoveryBuild, RecoveryMasks
from sparsity_audit.api.recovery_inputs import read_metrics, verify_labels
from sparsity_audit.api.sides import open_against, open_base, open_sides
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.dispatch import load_kernel
from sparsity_audit.errors import AlignmentError
from sparsity_audit.passes.recovery import align_recovery, measure_recovery
from sparsity_audit.report.output import verify_free, write_below
from sparsity_audit.report.recovery import RecoveryReport
from sparsity_audit.report.recovery_files import FILE_NAMES, render_recovery
from sparsity_audit.types import View

__all__ = ["recovery"]

_MAX_WORKERS = 8


def recovery(
    base: str | Path | Catalogue,
    full: str | Path | Catalogue,
    sub: str | Path | Catalogue,
    *,
    mask: str | Path | None = None,
    controls: Mapping[str, str | Path] | None = None,
    control_masks: Mapping[str, str | Path] | None = None,
    metrics: str | Path | Mapping[str, Any] | None = None,
    view: View | str = View.NATIVE,
    maps: Sequence[tuple[str, str]] = (),
    force: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    figures: bool = False,
    workers: int | None = None,
    on_note: Callable[[str], None] | None = None,
) -> RecoveryReport:
    """Compare a run that trained a subnetwork alone, and controls, with the full run.

    Args:
        base: The checkpoint all runs started from.
        full: The run that trained every entry.
        sub: The run that trained the entries of the mask alone.
        mask: The mask it was trained in; default what `full` changed (`value`, in the view).
        controls: Name → run: another seed of the full run, random masks, the complement, another run's mask.
        control_masks: Name → the mask that control was trained in, to check that the rest was frozen.
        metrics: Task scores: a JSON file, or what it holds, as `docs/guide/recovery.md` describes.
        view: As stored, or with all sides rounded to bf16.
        maps: (REGEX, REPL) rules that rename tensors of the runs to base names.
        force: Take masks whose base cannot be shown to be this one.
        output: Directory for record, tables and figure; nothing is written without it.
        overwrite: Replace what an earlier run left there.
        figures: Draw the figure into `output` as well.
        workers: Threads; default one a core, at most 8. The result is the same.
        on_note: Called with lines for the user.

    Raises:
        UsageError: Two sides are one checkpoint, a name of a control is taken, or metrics are of other runs.
        AlignmentError: Nothing of all runs can be compared.
        MaskError: A mask is not one of this base.
        OutputError: `output` holds what would be replaced, or cannot be written.
        SparsityAuditError: As `open_checkpoint` of a side.
    """
    note = on_note or (lambda _text: None)
    controls, control_masks = dict(controls or {}), dict(control_masks or {})
    verify_labels(list(controls), list(control_masks))
    labels = ("base", "full", "sub", *controls)
    scores = None if metrics is None else read_metrics(metrics, labels=labels)
    sides = _open_all((base, full, sub, *controls.values()))
    if output is not None:
        inputs = [file.path.parent for side in sides for file in side.files]
        inputs += [Path(path) for path in (mask, *control_masks.values()) if path is not None]
        verify_free(Path(output), FILE_NAMES, inputs=inputs, overwrite=overwrite)
    for text in dict.fromkeys(text for side in sides for text in side.notes):
        note(text)
    aligned = align_recovery(sides[0], sides[1], sides[2:], maps=maps, view=View(view))
    if not aligned.units:
        raise AlignmentError(
            " and ".join(side.reference for side in sides),
            f"no tensor that all of them hold can be compared ({len(aligned.left_out)} left out)",
            remedy="check that all are of one architecture; rename with --map REGEX=REPL",
        )
    of_controls = [control_masks.get(name) for name in controls]
    opened = RecoveryMasks.open(sides, mask, of_controls, maps=maps, force=force)
    note(f"reading {len(sides)} checkpoints")
    found = measure_recovery(
        sides[0],
        sides[1],
        sides[2:],
        aligned,
        mask=opened.mask,
        own_masks=opened.own,
        view=View(view),
        kernel=load_kernel("auto", num_bytes=sum(side.num_bytes for side in sides)),
        workers=workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0))),
    )
    report = RecoveryBuild(
        sides=sides, labels=labels, aligned=aligned, masks=opened, found=found, scores=scores, view=View(view)
    ).report()
    if output is not None:
        for name, data in render_recovery(report, figures=figures).items():
            write_below(Path(output), name, data)
    return report


def _open_all(references: Sequence[str | Path | Catalogue]) -> tuple[Catalogue, ...]:
    """All checkpoints. Raises UsageError where two are one."""
    base = open_base(references[0])
    sides = (base, *(open_against(base, reference) for reference in references[1:]))
    for number, side in enumerate(sides):
        for other in sides[:number]:
            open_sides(other, side)
    return sides
