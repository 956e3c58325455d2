"""`sparsity-audit prune`: a base plus a part of an update, as a checkpoint."""

from __future__ import annotations

import sys
from typing import Any

import click

from sparsity_audit.cli.options import MAP_RULE, OUTPUT_PATH, config_option, echo_note, format_options
from sparsity_audit.types import View

__all__ = ["prune"]


@click.command()
@click.argument("base")
@click.argument("tuned")
@click.option(
    "-o",
    "--output",
    type=OUTPUT_PATH,
    required=True,
    help="New directory: the checkpoint, or with several --keep one directory for each below it.",
)
@click.option(
    "--keep",
    multiple=True,
    required=True,
    metavar="KEEP",
    help="top:5%, random:5% of the compared entries; bottom:80% of the entries that moved; or a count of "
    "entries; mask:DIR; all; none.",
)
@click.option("--per-tensor", is_flag=True, help="Select within each tensor, not over the whole checkpoint.")
@click.option("--complement", is_flag=True, help="Keep the compared entries that are not selected.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random selections."
)
@click.option(
    "--view",
    type=click.Choice([v.value for v in View]),
    default=View.NATIVE.value,
    show_default=True,
    help="Whose |Δ| orders the entries: as stored, or with both sides rounded to bf16.",
)
@click.option(
    "--like",
    type=click.Choice(["tuned", "base"]),
    default="tuned",
    show_default=True,
    help="The side that gives names, shapes, configuration, tokenizer and entries without a counterpart.",
)
@click.option(
    "--upcast", is_flag=True, help="Where the sides' dtypes differ: store the one that holds both exactly."
)
@click.option(
    "--map", "maps", type=MAP_RULE, multiple=True, help="Rename tuned tensors: REGEX=REPL, as in re.sub."
)
@click.option("--force", is_flag=True, help="Take a mask that cannot be shown to be one of BASE.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads [default: one a core, at most 8].")
@format_options
@config_option
def prune(*, output_format: str, as_json: bool, **options: Any) -> None:
    """Write BASE with a part of the update to TUNED: entries kept have TUNED's stored value, others BASE's.

    Without training, this asks which entries of an update carry what was learned: evaluate the checkpoints of
    the largest movements, of the smallest, and of as many at random. Nothing is computed, so that `diff BASE`
    of the result is exactly the selection. All selections are written in one pass; the output appears whole
    or not at all, and nothing that exists is replaced. Each checkpoint has a prune.json that says what it
    keeps.

    \b
    Example:
      sparsity-audit prune base tuned -o pruned --keep top:5% --keep random:5% --keep bottom:80%
    """
    output_format = "json" if as_json else output_format
    from sparsity_audit.api.prune import prune as run

    written = run(**options, on_note=echo_note)
    if output_format == "json":
        from sparsity_audit.report.prune import prune_to_json

        records = tuple(checkpoint.record for checkpoint in written)
        sys.stdout.buffer.write(prune_to_json(records[0] if len(records) == 1 else records))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.prune import print_prune

        print_prune(written)
