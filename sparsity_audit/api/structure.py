"""When a diff reads the base a second time, for the stripe scores that magnitudes alone give.

Contract: the choice is made here and stated: an expectation that was left out carries the reason and the
option that counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from sparsity_audit.compare.accumulate import Level
from sparsity_audit.errors import UsageError
from sparsity_audit.passes.engine import Workers
from sparsity_audit.passes.margins import magnitude_nulls, margin_bytes
from sparsity_audit.passes.plan import Plan
from sparsity_audit.stats.stripes import MatrixNull
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import View

__all__ = ["MAX_AUTO_BYTES", "StructureChoice", "count_nulls", "verify_choice"]

StructureChoice = Literal["auto", "on", "off"]

MAX_AUTO_BYTES = 2_000_000_000
"""`auto` reads bases below this size again."""


def verify_choice(choice: str, level: Level) -> None:
    """Raise UsageError for a choice that is unknown, or that the level cannot serve."""
    if choice not in ("auto", "on", "off"):
        raise UsageError("--structure", repr(choice), expected="auto, on or off")
    if choice == "on" and level == "counts":
        raise UsageError(
            "--structure on", "rows and columns are not counted at --stats counts", remedy="give --stats full"
        )


def count_nulls(
    plan: Plan,
    tallies: tuple[Tally, ...],
    *,
    choice: StructureChoice,
    view: View,
    workers: Workers,
    on_note: Callable[[str], None],
) -> tuple[tuple[MatrixNull | None, ...] | None, str]:
    """What magnitudes alone give for each pair, or None and the reason why it was left out.

    Args:
        plan: The plan that was run.
        tallies: Its tallies.
        choice: `on`, `off`, or `auto`: a base below `MAX_AUTO_BYTES`.
        view: The view in which rows and columns were counted.
        workers: Threads.
        on_note: Told when much is read again.
    """
    if all(tally.axes is None for tally in tallies):
        return None, ""
    num_bytes = margin_bytes(plan)
    if choice == "off" or (choice == "auto" and plan.base.num_bytes >= MAX_AUTO_BYTES):
        return None, (
            f"What magnitudes alone give was not counted: --structure on reads the base's matrices a second "
            f"time for it ({num_bytes:,} bytes)."
        )
    if num_bytes >= MAX_AUTO_BYTES:
        on_note(f"structure: reading {num_bytes:,} bytes of the base a second time")
    return magnitude_nulls(plan, tallies, view=view, workers=workers), ""
