"""`sparsity-audit merge`, and `diff --shard-index`: a run that is split into shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsity_audit.cli.object_outputs import object_outputs
from sparsity_audit.cli.options import (
    OUTPUT_PATH,
    ByteProgress,
    config_option,
    echo_note,
    engine_options,
    format_options,
    progress_is_wanted,
    stream_option,
)
from sparsity_audit.cli.pairs_options import log_options

__all__ = ["merge", "run_share"]

_OF_A_RUN = ("output", "mask", "overwrite", "workers", "kernel", "device")
"""Options of `diff` that say where and how; the others are the question that all shares must agree on."""


@click.command()
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=OUTPUT_PATH, help="Directory for the report [default: the first DIR].")
@click.option(
    "--mask", type=OUTPUT_PATH, help="Directory for the update mask [default: what the shares were given]."
)
@engine_options
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier run.")
@stream_option
@log_options
@format_options
@config_option
def merge(
    *,
    folders: tuple[Path, ...],
    output_format: str,
    as_json: bool,
    loggers: tuple[str, ...],
    log_project: str,
    **options: Any,
) -> int:
    """Join the shares that `diff --shard-index I --num-shards N` left in each DIR.

    Writes what one `diff` would have written, byte for byte (run.json aside), prints it and applies the
    shares' expectations; then the shares are removed. Run it where the checkpoints can be opened under the
    same names: headers are read, and again what a second reading needs (`top:` criteria, structure,
    spectra).

    \b
    Exit status: 0 done, 1 a stated expectation failed, 2 shares are missing, unfinished or of different
    runs, or an I/O error, 130 interrupted.

    \b
    Example:
      sparsity-audit diff examples/addition/base examples/addition/grpo-seed0 -o shares \\
          --shard-index 0 --num-shards 1
      sparsity-audit merge shares
    """
    from sparsity_audit.api.loggers import require_logger
    from sparsity_audit.api.shares import merge as run
    from sparsity_audit.cli.diff_result import show_report

    for logger in loggers:
        require_logger(logger)
    report = run(folders, **options, on_note=echo_note)
    where = {"output": options["output"] or folders[0], "mask": options["mask"]}
    output_format = "json" if as_json else output_format
    return show_report(report, output_format, loggers, project=log_project, **where)


def run_share(
    ctx: click.Context,
    options: dict[str, Any],
    shard_index: int | None,
    num_shards: int | None,
    *,
    output_format: str,
) -> int:
    """`diff` of one share; prints where it lies."""
    if shard_index is None or num_shards is None:
        raise click.UsageError("--shard-index and --num-shards stand together.", ctx)
    if options["output"] is None:
        raise click.UsageError("A share needs -o DIR, where `merge` finds it.", ctx)
    if object_outputs(ctx):
        raise click.UsageError("A share goes to a disk, where `merge` finds it; give `merge` -o s3://….", ctx)
    from dataclasses import asdict

    from sparsity_audit.api.diff_question import DiffQuestion
    from sparsity_audit.api.shares import diff_share

    if options.pop("engine") != "threads":
        raise click.UsageError(
            "A share runs in this process: --engine and --shard-index exclude each other.", ctx
        )
    sides = [options.pop(name) for name in ("base", "tuned")]
    how = {name: options.pop(name) for name in _OF_A_RUN}
    with ByteProgress(shown=progress_is_wanted(output_format)) as progress:
        record = diff_share(
            *sides,
            shard_index=shard_index,
            num_shards=num_shards,
            question=DiffQuestion.of(**options),
            **how,
            on_note=echo_note,
            on_progress=progress.update,
        )
    if output_format == "json":
        import json

        click.echo(json.dumps(asdict(record), indent=2))
    elif output_format == "human":
        click.echo(
            f"share {record.shard_index} of {record.num_shards}: {record.num_units:,} work units, "
            f"{record.num_bytes:,} of {record.plan_bytes:,} bytes: {record.journal}"
        )
    return 0
