"""`sparsity-audit tokens diverge`: where two models' next-token distributions differ."""

from __future__ import annotations

import sys
from typing import Any

import click

from sparsity_audit.cli.options import OUTPUT_PATH, config_option, echo_note, format_options
from sparsity_audit.cli.tokens_options import model_options, progress, prompt_options, sampling_options

__all__ = ["diverge"]


@click.command()
@click.argument("base")
@click.argument("tuned")
@prompt_options
@sampling_options
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Tokens of the overlap, and of the page's hover.",
)
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), help="Nucleus for a second JS.")
@model_options
@click.option(
    "--sequential", is_flag=True, help="Hold one model in memory at a time; hidden states go to disk."
)
@click.option("-o", "--output", type=OUTPUT_PATH, help="Directory for record, positions, figures and page.")
@click.option("--figures/--no-figures", default=True, show_default=True, help="With -o: draw figures/*.")
@click.option("--parquet", is_flag=True, help="With -o: positions.parquet instead of positions.csv.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in the output directory.")
@format_options
@config_option
def diverge(*, output_format: str, as_json: bool, **options: Any) -> None:
    """Find the positions where the next-token distributions of BASE and TUNED differ.

    Both models complete the prompts, unless the file has completions, and both are scored on all of them.
    Each position gets the Jensen–Shannon divergence over the full vocabulary, KL both ways, entropies and
    ranks; the two sets of completions are reported side by side. Models are folders, Hub references, or mix
    and single for the lab's bases; those beyond the lab's need the extra [lab]. Without -o nothing is
    written.

    \b
    Example:
      sparsity-audit tokens diverge mix single --task addition --num-prompts 16
    """
    output_format = "json" if as_json else output_format
    from sparsity_audit.api.tokens_diverge import tokens_diverge

    report = tokens_diverge(**options, on_progress=progress(output_format), on_note=echo_note)
    if output_format == "json":
        from sparsity_audit.report.tokens import tokens_to_json

        sys.stdout.buffer.write(tokens_to_json(report))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.tokens_terminal import print_tokens

        print_tokens(report, output=options["output"])
