"""What `diff` and `merge` do with a finished report: print it, send it, judge it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_audit.cli.options import echo_note
from sparsity_audit.cli.pairs_options import echo_preset, send_report

if TYPE_CHECKING:
    from sparsity_audit.api.gates import Expectations
    from sparsity_audit.report.schema import DiffReport

__all__ = ["show_report", "take_expectations"]


def show_report(
    report: DiffReport,
    output_format: str,
    loggers: Sequence[str],
    *,
    project: str,
    output: Path | None,
    mask: Path | None,
) -> int:
    """Print and send a report; the exit status is 1 when an expectation failed."""
    if output_format == "json":
        from sparsity_audit.report.schema import to_json

        sys.stdout.buffer.write(to_json(report))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.terminal import print_report

        print_report(report, output=output, mask=mask)
        echo_preset(report.preset)
    send_report(report, loggers, project=project, output=output)
    failed = [gate for gate in report.gates if not gate.passed]
    for gate in failed:
        echo_note(f"expectation failed: {gate.gate}: {gate.detail}")
    return 1 if failed else 0


def take_expectations(options: dict[str, Any]) -> Expectations:
    """Remove the gates from the options."""
    from sparsity_audit.api.gates import Expectations

    return Expectations(
        frozen=options.pop("expect_frozen"),
        changed=options.pop("expect_changed"),
        min_sparsity=options.pop("min_sparsity"),
        max_sparsity=options.pop("max_sparsity"),
        no_leftover=options.pop("fail_on_leftover"),
    )
