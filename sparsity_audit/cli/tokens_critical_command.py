"""`sparsity-audit tokens critical`: which tokens decide the outcome."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sparsity_audit.cli.options import OUTPUT_PATH, config_option, echo_note, format_options
from sparsity_audit.cli.tokens_cross_command import verifier_option
from sparsity_audit.cli.tokens_options import progress, prompt_options, sampling_options

__all__ = ["critical"]


@click.command()
@click.argument("model")
@prompt_options
@verifier_option
@click.option(
    "--positions",
    type=click.Path(path_type=Path, dir_okay=False),
    help='JSONL of positions: {"prompt": 0, "position": 3}, perhaps with `sample`.',
)
@click.option(
    "--divergent",
    metavar="DIR",
    help="Output of tokens diverge on these prompts: its most divergent tokens.",
)
@click.option(
    "--divergent-set",
    type=click.Choice(["base", "tuned", "given"]),
    default="base",
    show_default=True,
    help="Which completions of it.",
)
@click.option(
    "--per-completion",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Positions of each completion; without the options above, the least certain ones.",
)
@click.option(
    "--continuations",
    "num_continuations",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Continuations after each of the two tokens.",
)
@click.option(
    "--min-drop", type=float, default=0.1, show_default=True, help="Least drop of the score that is decisive."
)
@sampling_options
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Of weights and arithmetic; auto is as stored.",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=16_384,
    show_default=True,
    help="Padded tokens of a batch at most.",
)
@click.option("-o", "--output", type=OUTPUT_PATH, help="Directory for record, table and figure.")
@click.option("--figures/--no-figures", default=True, show_default=True, help="With -o: draw figures/*.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in the output directory.")
@format_options
@config_option
def critical(*, output_format: str, as_json: bool, **options: Any) -> None:
    """Force another token at positions of MODEL's completions, and see what it does to the outcome.

    At each position the completion is kept up to it, once with its own token and once with another one drawn
    from MODEL's distribution, and MODEL goes on. A group of positions is critical where MODEL is less certain
    than elsewhere and the score drops. As many random positions of the same completions stand beside it.
    Without -o nothing is written.

    \b
    Example:
      sparsity-audit tokens critical mix --task addition --num-prompts 16
    """
    output_format = "json" if as_json else output_format
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, for verifiers beside the user
    from sparsity_audit.api.tokens_critical import tokens_critical

    report = tokens_critical(**options, on_progress=progress(output_format), on_note=echo_note)
    if output_format == "json":
        from sparsity_audit.report.critical import critical_to_json

        sys.stdout.buffer.write(critical_to_json(report))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.critical_terminal import print_tokens_critical

        print_tokens_critical(report, output=options["output"])
