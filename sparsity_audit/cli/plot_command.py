"""`sparsity-audit plot`: figures of finished audits, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsity_audit.cli.options import OUTPUT_PATH, config_option

__all__ = ["plot"]

_FORMATS = ("pdf", "svg", "png")
_WIDTHS = {"3.25": 3.25, "5.5": 5.5, "6.75": 6.75}


class _FormatsType(click.ParamType):
    name = "pdf,svg,png"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        found = tuple(dict.fromkeys(part.strip() for part in str(value).split(",")))
        unknown = [part for part in found if part not in _FORMATS]
        if unknown:
            self.fail(f"no such format: {', '.join(unknown)}; expected some of pdf,svg,png", param, ctx)
        return found


@click.command()
@click.argument("directories", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=OUTPUT_PATH, help="Directory for the figures.")
@click.option(
    "--figure",
    "figures",
    multiple=True,
    metavar="NAME",
    help="headline, change-rate, density, layers, ulps, delta or tolerance [default: all that have something "
    "to show].",
)
@click.option("--format", "formats", type=_FormatsType(), default="pdf,svg,png", show_default=True)
@click.option(
    "--width",
    type=click.Choice(list(_WIDTHS)),
    default="5.5",
    show_default=True,
    help="Inches: a column of two, a text block, a page.",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="NAME",
    help="Name of an audit in the figures, once for each DIR in order [default: from the tuned references].",
)
@click.option("--overwrite", is_flag=True, help="Replace figures of the same names.")
@config_option
def plot(*, width: str, **options: Any) -> None:
    """Draw the figures of finished audits, several side by side.

    Each DIR is an output directory of `diff`. Beside each figure lies NAME.txt: what it shows, with
    criterion, view, dtypes and references, as a start for the caption. The paths are printed.

    \b
    Example:
      sparsity-audit diff examples/addition/base examples/addition/grpo-seed0 -o audit
      sparsity-audit plot audit --figure change-rate --format svg -o figures
    """
    from sparsity_audit.api.render import plot as run

    for path in run(width=_WIDTHS[width], **options):
        click.echo(path)
