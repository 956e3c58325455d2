"""`sparsity-audit tokens series`: how the divergence from the base grows along a run."""

from __future__ import annotations

import sys
from typing import Any

import click

from sparsity_audit.cli.options import OUTPUT_PATH, config_option, echo_note, format_options
from sparsity_audit.cli.tokens_options import model_options, progress, prompt_options, sampling_options

__all__ = ["series"]


@click.command()
@click.argument("base")
@click.argument("steps", nargs=-1, required=True)
@prompt_options
@sampling_options
@model_options
@click.option("-o", "--output", type=OUTPUT_PATH, help="Directory for record, table and figure.")
@click.option("--figures/--no-figures", default=True, show_default=True, help="With -o: draw figures/*.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in the output directory.")
@format_options
@config_option
def series(*, base: str, steps: tuple[str, ...], output_format: str, as_json: bool, **options: Any) -> None:
    """Follow the divergence from BASE over the saved STEPS of a run, on fixed completions.

    STEPS are models in order, or a folder that holds checkpoint-1, checkpoint-2, …. BASE and the last step
    complete the prompts, unless the file has completions; every step is scored on these. Says how mean and
    percentiles grow, and how early the positions that end divergent are found (Jaccard index with the last
    step's set, beside chance). Without -o nothing is written.

    \b
    Example:
      sparsity-audit tokens series mix mix single --task addition --num-prompts 8
    """
    output_format = "json" if as_json else output_format
    from sparsity_audit.api.tokens_series import tokens_series

    report = tokens_series(base, *steps, **options, on_progress=progress(output_format), on_note=echo_note)
    if output_format == "json":
        from sparsity_audit.report.tokens_series import tokens_series_to_json

        sys.stdout.buffer.write(tokens_series_to_json(report))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.tokens_series_files import print_tokens_series

        print_tokens_series(report, output=options["output"])
