"""`diff --pairs`, `--preset` and `--log`: their options, and the printing of many pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from sparsity_audit.checkpoint.access import Access, current_access, hub_access
from sparsity_audit.cli.options import echo_note
from sparsity_audit.errors import OutputError

if TYPE_CHECKING:
    from sparsity_audit.api.pairs_file import PairEntry
    from sparsity_audit.report.pairs import PairsReport
    from sparsity_audit.report.preset import PresetResult
    from sparsity_audit.report.schema import DiffReport

__all__ = ["echo_preset", "log_options", "pairs_options", "run_pairs", "send_report", "take_one_pair"]

_Command = TypeVar("_Command", bound=Callable[..., Any])

_WITH_PAIRS = frozenset(
    {
        *(
            "pairs",
            "only",
            "evict",
            "stream",
            "output",
            "overwrite",
            "figures",
            "workers",
            "kernel",
            "device",
        ),
        *("loggers", "log_project", "dry_run", "output_format", "as_json"),
    }
)
"""Options that speak of a run of many pairs; what is asked about a pair stands in the YAML file."""


def pairs_options(command: _Command) -> _Command:
    """Add `--pairs`, `--only`, `--evict` and `--preset`."""
    for option in (
        click.option(
            "--preset",
            type=click.Choice(["mukherjee2025", "zhu2025"]),
            help="Also compute what this paper computes: 2505.11711 or 2511.08567.",
        ),
        click.option(
            "--evict",
            is_flag=True,
            help="Download a file when it is read and remove it from the Hub cache after that; with --pairs: "
            "remove what a pair downloaded, once no later pair needs it. What was cached before stays.",
        ),
        click.option(
            "--only",
            multiple=True,
            metavar="NAME",
            help="With --pairs: run these pairs alone (globs). One that the file skips needs its full name.",
        ),
        click.option(
            "--pairs",
            metavar="FILE",
            help="Compare the pairs of a YAML file, or of published:mukherjee2025 or published:zhu2025, into "
            "one directory, table and figure.",
        ),
    ):
        command = option(command)
    return command


def log_options(command: _Command) -> _Command:
    """Add `--log` and `--log-project`."""
    command = click.option(
        "--log-project", default="sparsity-audit", show_default=True, help="Project or experiment for --log."
    )(command)
    return click.option(
        "--log",
        "loggers",
        type=click.Choice(["wandb", "trackio", "tensorboard", "mlflow"]),
        multiple=True,
        help="Send headline numbers, per-layer sparsity and figures to a tracker; an extra of its name.",
    )(command)


def take_one_pair(ctx: click.Context, options: dict[str, Any]) -> tuple[Sequence[str], str]:
    """Remove what is not for `diff` of one pair; returns trackers and project.

    Raises:
        UsageError: BASE or TUNED is missing, or an option of many pairs stands without --pairs.
    """
    for name in ("base", "tuned"):
        if options[name] is None:
            raise click.UsageError(f"Missing argument '{name.upper()}'.", ctx)
    if options.pop("only"):
        raise click.UsageError("--only needs --pairs.", ctx)
    if options.pop("evict"):
        if current_access() is Access.STREAM:
            raise click.UsageError("--evict and --stream exclude each other: a stream leaves nothing.", ctx)
        ctx.with_resource(hub_access(Access.SHARDS))
    options.pop("pairs")
    loggers, project = options.pop("loggers"), options.pop("log_project")
    _require(loggers)
    return loggers, project


def run_pairs(ctx: click.Context, options: dict[str, Any], *, output_format: str, dry_run: bool) -> int:
    """`diff --pairs`; the exit status is 2 when a pair failed to run, else 1 when an expectation failed."""
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name not in _WITH_PAIRS and ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None):
            raise click.UsageError(
                f"{parameter.opts[0]} cannot stand beside --pairs: put it into the file.", ctx
            )
    if dry_run:
        return _dry_run(options, output_format)
    if options["output"] is None:
        raise click.UsageError("--pairs needs -o DIR.", ctx)
    _require(options["loggers"])
    from sparsity_audit.api.pairs import diff_pairs

    unsent: list[str] = []

    def send(entry: PairEntry, report: DiffReport) -> None:
        where = {"project": options["log_project"], "output": options["output"] / entry.name}
        try:
            send_report(report, options["loggers"], name=entry.name, **where)
        except OutputError as error:
            unsent.append(entry.name)
            echo_note(f"{entry.name}: {error}")

    names = ("output", "only", "evict", "overwrite", "figures", "workers", "kernel", "device")
    result = diff_pairs(
        options["pairs"],
        **{name: options[name] for name in names},
        on_pair=lambda number, count, entry: echo_note(f"[{number}/{count}] {entry.name}"),
        on_report=send if options["loggers"] else None,
        on_note=echo_note,
    )
    _print(result, output_format, options["output"])
    for row in result.missed:
        expected = row.expected
        assert expected is not None
        echo_note(
            f"expectation failed: {row.name}: {expected.difference_points:+.1f} points from "
            f"{expected.sparsity_percent:g} ± {expected.tolerance_points:g} %"
        )
    return 2 if result.failed or unsent else 1 if result.missed else 0


def send_report(
    report: DiffReport,
    loggers: Sequence[str],
    *,
    project: str,
    output: Path | None,
    name: str | None = None,
) -> None:
    """Send a finished report to the trackers, with the figures that lie in its directory."""
    if not loggers:
        return
    from sparsity_audit.api.loggers import log_report

    figures = [] if output is None else sorted((output / "figures").glob("*.png"))
    for logger in loggers:
        log_report(report, logger, project=project, name=name, figures=figures)
        echo_note(f"sent to {logger}, project {project}")


def echo_preset(preset: PresetResult | None) -> None:
    """The paper's number, what it means, what it leaves out."""
    if preset is None:
        return
    share = "–" if preset.sparsity is None else f"{100 * preset.sparsity:.2f} %"
    click.echo(
        f"{preset.preset}: update sparsity {share} of {preset.compared:,} entries\n  {preset.rule}\n"
        f"  source: {preset.source}"
    )
    for tensor in preset.dropped:
        click.echo(f"  left out: {tensor.name} ({tensor.entries:,} entries): {tensor.reason}")
    for caveat in preset.caveats:
        click.echo(f"  caveat: {caveat}")


def _require(loggers: Sequence[str]) -> None:
    """Fail before hours of reading, not after them."""
    if loggers:
        from sparsity_audit.api.loggers import require_logger

        for logger in loggers:
            require_logger(logger)


def _dry_run(options: dict[str, Any], output_format: str) -> int:
    """What would be compared; nothing is opened or downloaded."""
    from sparsity_audit.api.pairs_file import read_pairs

    found = read_pairs(options["pairs"])
    if output_format == "json":
        import json
        from dataclasses import asdict

        click.echo(json.dumps(asdict(found), indent=2))
    elif output_format == "human":
        for entry in found.pairs:
            click.echo(f"{entry.name}: {entry.base} → {entry.tuned}")
            if entry.skip is not None:
                click.echo(f"  skipped unless named by --only: {entry.skip}")
    return 0


def _print(result: PairsReport, output_format: str, output: Path) -> None:
    if output_format == "json":
        from sparsity_audit.report.pairs import pairs_to_json

        click.echo(pairs_to_json(result).decode(), nl=False)
    elif output_format == "human":
        from sparsity_audit.report.pairs_tables import pairs_markdown

        click.echo(pairs_markdown(result).decode(), nl=False)
        click.echo(f"\ntable, figure and reports written to {output}")
