"""The one place where tests interrupt a run.

Contract: production code calls `reached` with a point's name; it does nothing. A test replaces
`sparsity_audit.seams.observer` in a subprocess and kills the process at the point it wants.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["POINTS", "observer", "reached"]

POINTS = (
    "unit compared",  # mask bits are written, the journal line is not
    "unit journaled",
    "unit done by a worker",  # of an engine: its result is in the worker's memory alone
    "pass finished",
    "mask finished",
    "unit pruned",  # its entries are in the files of every checkpoint, which have no name yet
    "checkpoints written",  # complete and flushed, but not under the name that was asked for
    "file written",  # one of the report's files stands under its final name
    "tensor encoded",  # a patch's tensor waits in scratch files
    "tensor patched",  # a tensor is written and its hash is right, the checkpoint has no name yet
    "step recorded",  # a training step's metrics are appended, its weights are only in memory
    "checkpoint written",
    "training state written",
    "final weights written",
    "metrics table written",  # all of a training run but its result stands
    "point written",  # one rule of a cross-sampling is kept, the record is not
    "parameters stepped",  # an optimizer has written, entries outside the mask are not restored
    "parameter scattered",  # a subnetwork optimizer has written one parameter, others not
)

observer: Callable[[str], None] | None = None


def reached(point: str) -> None:
    """Tell the observer, if there is one, that a named point was reached."""
    if observer is not None:
        assert point in POINTS, point
        observer(point)
