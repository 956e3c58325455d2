"""`sparsity-audit report`: tables, page and figures of finished audits, rendered again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsity_audit.cli.options import OUTPUT_PATH, config_option

__all__ = ["report"]


@click.command()
@click.argument("directories", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=OUTPUT_PATH,
    help="Directory to write to; several audits get a folder each in it, beside tables/ and figures/ with "
    "all of them side by side [default: into each DIR itself].",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="NAME",
    help="Name of an audit, once for each DIR in order [default: from the tuned references].",
)
@click.option("--figures/--no-figures", default=True, show_default=True, help="With figures.")
@click.option("--parquet", is_flag=True, help="With tensors.parquet; needs the extra `parquet`.")
@click.option("--overwrite", is_flag=True, help="Replace files in the -o directory.")
@config_option
def report(**options: Any) -> None:
    """Write tables, page and figures of finished audits again, from report.json.

    Each DIR is an output directory of `diff`; the checkpoints are not needed. The paths are printed.

    \b
    Example:
      sparsity-audit diff examples/addition/base examples/addition/grpo-seed0 -o finished
      sparsity-audit report finished -o rendered
    """
    from sparsity_audit.api.render import render

    for path in render(**options):
        click.echo(path)
