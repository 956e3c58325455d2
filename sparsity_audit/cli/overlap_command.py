"""`sparsity-audit overlap`: what several runs changed in common, against named chance levels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsity_audit.cli.options import (
    CRITERIA,
    MAP_RULE,
    OUTPUT_PATH,
    config_option,
    echo_note,
    engine_options,
    format_options,
    stream_option,
)
from sparsity_audit.types import Criterion, View

if TYPE_CHECKING:
    from sparsity_audit.report.overlap import OverlapReport

__all__ = ["overlap"]


class _WalkType(click.ParamType):
    name = "steps:lr"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        steps, _, lr = str(value).partition(":")
        try:
            return int(steps), float(lr)
        except ValueError:
            self.fail(f"{value!r} is not STEPS:LR, for instance 120:1e-4", param, ctx)


WALK = _WalkType()


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
    "criteria",
    type=CRITERIA,
    metavar="CRITERIA",
    help="For checkpoints: what changed means, as in diff; top:1% for the largest movements. Several are "
    "compared one by one: top:1%,5%,20% [default: that of the masks, else value].",
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
    "--nulls",
    type=click.Choice(["auto", "all", "counts"]),
    default="auto",
    show_default=True,
    help="auto fits rows and columns where that takes about a minute of a core, all always does, counts "
    "stops at the nulls that follow from counts.",
)
@click.option(
    "--walk",
    type=WALK,
    metavar="STEPS:LR",
    help="Simulate weights stored in bf16 that take STEPS steps of ±LR: 120:1e-4.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the walk and of resamples."
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
@engine_options
@stream_option
@format_options
@config_option
def overlap(*, output_format: str, as_json: bool, **options: Any) -> None:
    """Compare what several runs changed with what chance would give.

    A RUN is a mask directory, or a checkpoint; checkpoints need --base, and their masks are made on the fly.
    A single RUN that ends in .yaml lists runs, their question and their factors (seed, data, algorithm, …):
    then pairs that agree on a factor are compared with pairs that differ in it. Flags win over the file.

    Each pair is held against the nulls `uniform`, `per-tensor`, `row-column` and, with --base, `magnitude`,
    `row-column-magnitude` and `phantom`: how much of the overlap follows from how many entries each run
    changed, in which tensors, at which weights, in which rows and columns, and from rounding. A null that
    does not apply is named with the reason. Signs and cosine of the updates stand beside it where runs are
    checkpoints. Three runs and more also give a matrix and their consensus. Without -o nothing is written.

    \b
    Example:
      sparsity-audit overlap seed0 seed1 --base base --reference shuffled-rewards -o overlap
      sparsity-audit overlap runs.yaml -o overlap
    """
    output_format = "json" if as_json else output_format
    criteria = options.pop("criteria") or ()
    if len(criteria) > 1:
        _print_several(_several(criteria, options), output_format, output=options["output"])
        return
    from sparsity_audit.api.overlap import overlap as run

    report = run(**options, criterion=criteria[0] if criteria else None, on_note=echo_note)
    if output_format == "json":
        from sparsity_audit.report.overlap import overlap_to_json

        sys.stdout.buffer.write(overlap_to_json(report))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.overlap_terminal import print_overlap

        print_overlap(report, output=options["output"])


def _several(criteria: Sequence[Criterion], options: dict[str, Any]) -> Sequence[OverlapReport]:
    from sparsity_audit.api.overlap import overlap_criteria

    return overlap_criteria(**options, criteria=criteria, on_note=echo_note)


def _print_several(reports: Sequence[OverlapReport], output_format: str, *, output: Path | None) -> None:
    if output_format == "json":
        from sparsity_audit.report.overlap import overlap_to_json

        sys.stdout.buffer.write(b"[\n" + b",\n".join(map(overlap_to_json, reports)) + b"]\n")
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.overlap_terminal import print_criteria

        print_criteria(reports, output=output)
