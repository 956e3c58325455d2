"""`sparsity-audit tokens patch`: which part of an update carries the divergent tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sparsity_audit.cli.options import OUTPUT_PATH, config_option, echo_note, format_options
from sparsity_audit.cli.tokens_cross_command import WORDS, verifier_option
from sparsity_audit.cli.tokens_options import model_options, progress, prompt_options, sampling_options

__all__ = ["patch"]


@click.command()
@click.argument("base")
@click.argument("tuned")
@prompt_options
@verifier_option
@click.option(
    "--parts",
    type=WORDS,
    default="layer,module",
    show_default=True,
    help="What is patched one at a time: layer, module; or none.",
)
@click.option("--mask", "masks", multiple=True, metavar="DIR", help="An update mask of BASE: its entries.")
@click.option(
    "--pruned", multiple=True, metavar="MODEL", help="A model with a part of the update, as prune writes it."
)
@click.option(
    "--completions",
    type=click.Choice(["base", "tuned", "both"]),
    default="both",
    show_default=True,
    help="Whose completions the divergence is measured on.",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0),
    default=0.1,
    show_default=True,
    help="JS above which a position is divergent, nats.",
)
@click.option(
    "--take-over",
    type=click.FloatRange(min=0),
    help="JS threshold of a cross-sampling with each mask and pruned update in TUNED's place.",
)
@sampling_options
@model_options
@click.option("--force", is_flag=True, help="Take masks that cannot be shown to be of BASE.")
@click.option("-o", "--output", type=OUTPUT_PATH, help="Directory for record, table and figure.")
@click.option("--figures/--no-figures", default=True, show_default=True, help="With -o: draw figures/*.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in the output directory.")
@format_options
@config_option
def patch(*, output_format: str, as_json: bool, **options: Any) -> None:
    """Put one part of the update at a time into BASE, or take it out of TUNED, and see which tokens move.

    A part is a layer, a module type, the entries of a mask, or the update that a pruned model holds. On fixed
    completions of both models: which share of the divergence between BASE and TUNED the part reproduces, or
    brings back; and, where completions can be judged, the accuracy of the patched model. Everything happens
    in memory. Without -o nothing is written.

    \b
    Example:
      sparsity-audit tokens patch mix single --task addition --num-prompts 16 --parts layer
    """
    output_format = "json" if as_json else output_format
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, for verifiers beside the user
    from sparsity_audit.api.tokens_patch import tokens_patch

    report = tokens_patch(**options, on_progress=progress(output_format), on_note=echo_note)
    if output_format == "json":
        from sparsity_audit.report.tokens_patch import patch_to_json

        sys.stdout.buffer.write(patch_to_json(report))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.tokens_patch_terminal import print_patch

        print_patch(report, output=options["output"])
