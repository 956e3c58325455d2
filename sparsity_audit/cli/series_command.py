"""`sparsity-audit series`: what happens to the weights along a run."""

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
    engine_options,
    format_options,
    stream_option,
)
from sparsity_audit.types import View

__all__ = ["series"]


class _LagsType(click.ParamType):
    name = "lags"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            lags = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            lags = (0,)
        if min(lags) < 1:
            self.fail(f"{value!r} is not a list of numbers of saved steps, for instance 1,2,5", param, ctx)
        return lags


@click.command()
@click.argument("base", metavar="BASE")
@click.argument("steps", metavar="STEP...", nargs=-1, required=True)
@click.option(
    "--criterion",
    type=CRITERION,
    default="value",
    show_default=True,
    help="What changed means against the base, as in diff.",
)
@click.option(
    "--view",
    type=click.Choice([v.value for v in View]),
    default=View.NATIVE.value,
    show_default=True,
    help="As stored, or with both sides rounded to bf16.",
)
@click.option(
    "--lags",
    type=_LagsType(),
    default="1,2,5",
    show_default=True,
    metavar="K,K,...",
    help="Step-to-step sparsity over so many saved steps; 1 is always among them.",
)
@click.option(
    "--map",
    "maps",
    type=MAP_RULE,
    multiple=True,
    help="Rename tensors of the steps: REGEX=REPL, as in re.sub.",
)
@click.option("-o", "--output", type=OUTPUT_PATH, help="Directory for record, tables and figures.")
@click.option("--figures/--no-figures", default=True, show_default=True, help="With -o: draw figures/*.")
@click.option(
    "--overwrite", is_flag=True, help="Replace the results of an earlier run in the output directory."
)
@engine_options
@stream_option
@format_options
@config_option
def series(*, output_format: str, as_json: bool, **options: Any) -> None:
    """Follow the weights from BASE along the saved steps of a run.

    A STEP is a checkpoint, or a folder that holds checkpoint-500, checkpoint-1000, … (also step-N,
    global_step_N), which are taken by number.
    Reported are update sparsity against the base, sparsity from step to step, entries that never changed,
    that changed and came back, that are changed at the end, how much of the final mask each step holds, and
    what a sparse patch from step to step would cost. Each byte is read once. Without -o nothing is written.

    \b
    Example:
      sparsity-audit series base run/checkpoint-100 run/checkpoint-200 -o series
    """
    output_format = "json" if as_json else output_format
    from sparsity_audit.api.series import series as run

    report = run(**options, on_note=echo_note)
    if output_format == "json":
        from sparsity_audit.report.series import series_to_json

        sys.stdout.buffer.write(series_to_json(report))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.series_terminal import print_series

        print_series(report, output=options["output"])
