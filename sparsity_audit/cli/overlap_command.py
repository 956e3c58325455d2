"""`sparsity-audit overlap`: what several runs changed in common, against named chance levels."""

from __future__ import annotations

import sys
from typing import Any

import click

from sparsity_audit.cli.options import (
    CRITERION,
    MAP_RULE,
    OUTPUT_PATH,
    config_option,
    echo_note,
    format_options,
)
from sparsity_audit.types import View

__all__ = ["overlap"]


@click.command()
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
@click.option(
    "--base", metavar="BASE", help="The checkpoint that all runs started from: gives the magnitude null."
)
@click.option(
    "--reference",
    metavar="RUN",
    help="A run that learned nothing (shuffled rewards): shown beside the others; a path, or a label of the "
    "YAML file.",
)
@click.option(
    "--criterion",
    type=CRITERION,
    help="For checkpoints: what changed means, as in diff; top:1% for the largest movements [default: that "
    "of the masks, else value].",
)
@click.option(
    "--view",
    type=click.Choice([v.value for v in View]),
    help="For checkpoints: as stored, or with both sides rounded to bf16 [default: that of the masks, else "
    "native].",
)
@click.option(
    "--map",
    "maps",
    type=MAP_RULE,
    multiple=True,
    help="Rename tensors of checkpoints: REGEX=REPL, as in re.sub.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Compare masks of different bases, criteria, views or tensors; what differs is printed.",
)
@click.option("-o", "--output", type=OUTPUT_PATH, help="Directory for record, tables and figures.")
@click.option(
    "--figures/--no-figures",
    default=True,
    show_default=True,
    help="With -o: draw ladder, matrix, parts and consensus.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace the results of an earlier run in the output directory."
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads [default: one a core, at most 8].")
@format_options
@config_option
def overlap(*, output_format: str, as_json: bool, **options: Any) -> None:
    """Compare what several runs changed with what chance would give.

    A RUN is a mask directory, or a checkpoint; checkpoints need --base, and their masks are made on the fly.
    A single RUN that ends in .yaml lists runs, their question and their factors (seed, data, algorithm, …):
    then pairs that agree on a factor are compared with pairs that differ in it. Flags win over the file.

    Each pair is held against the nulls `uniform`, `per-tensor` and, with --base, `magnitude`: how much of the
    overlap follows from how many entries each run changed, in which tensors, at which weights. Bits are read
    once for all pairs. Three runs and more also give a matrix and their consensus. Without -o nothing is
    written.

    \b
    Example:
      sparsity-audit overlap seed0 seed1 --base base --reference shuffled-rewards -o overlap
      sparsity-audit overlap runs.yaml -o overlap
    """
    output_format = "json" if as_json else output_format
    from sparsity_audit.api.overlap import overlap as run

    report = run(**options, on_note=echo_note)
    if output_format == "json":
        from sparsity_audit.report.overlap import overlap_to_json

        sys.stdout.buffer.write(overlap_to_json(report))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.overlap_terminal import print_overlap

        print_overlap(report, output=options["output"])
