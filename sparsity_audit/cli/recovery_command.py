"""`sparsity-audit recovery`: how far a retrained subnetwork comes to the full run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sparsity_audit.cli.options import (
    MAP_RULE,
    OUTPUT_PATH,
    config_option,
    echo_note,
    format_options,
    stream_option,
)
from sparsity_audit.errors import UsageError
from sparsity_audit.types import View

__all__ = ["recovery"]


class _NamedPath(click.ParamType):
    name = "name=path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, _, path = str(value).partition("=")
        if not name or not path:
            self.fail(f"{value!r} is not NAME=PATH, for instance random=RUN", param, ctx)
        return name, path


NAMED_PATH = _NamedPath()


@click.command()
@click.argument("base")
@click.argument("full")
@click.argument("sub")
@click.option("--mask", metavar="DIR", help="The mask SUB was trained in [default: what FULL changed].")
@click.option(
    "--control",
    "controls",
    type=NAMED_PATH,
    multiple=True,
    metavar="NAME=RUN",
    help="A run to hold SUB against: another seed, a random mask of equal density, the complement.",
)
@click.option(
    "--control-mask",
    "control_masks",
    type=NAMED_PATH,
    multiple=True,
    metavar="NAME=DIR",
    help="The mask that control was trained in, to check that the rest was frozen.",
)
@click.option(
    "--metrics",
    type=click.Path(path_type=Path, dir_okay=False),
    help='Task scores as JSON: {"base": {"accuracy": 0.36, "n": 512}, "full": …, "sub": …, NAME: …}.',
)
@click.option(
    "--view",
    type=click.Choice([v.value for v in View]),
    default=View.NATIVE.value,
    show_default=True,
    help="As stored, or with all sides rounded to bf16.",
)
@click.option(
    "--map",
    "maps",
    type=MAP_RULE,
    multiple=True,
    help="Rename tensors of the runs: REGEX=REPL, as in re.sub.",
)
@click.option("--force", is_flag=True, help="Take masks that cannot be shown to be of BASE.")
@click.option("-o", "--output", type=OUTPUT_PATH, help="Directory for record, tables and figure.")
@click.option(
    "--figures/--no-figures", default=True, show_default=True, help="With -o: draw figures/recovery.*."
)
@click.option(
    "--overwrite", is_flag=True, help="Replace the results of an earlier run in the output directory."
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads [default: one a core, at most 8].")
@stream_option
@format_options
@config_option
def recovery(*, output_format: str, as_json: bool, **options: Any) -> None:
    """Judge a run that trained a subnetwork alone (SUB) against the full run (FULL), both from BASE.

    Says which share of the entries of SUB equal FULL's, inside and outside the mask, with BASE against FULL
    beside it; how alike the two updates are; whether the entries outside were frozen; and, with --metrics,
    which share of the gain SUB has, with a confidence interval, beside every control. Agreement outside the
    mask holds by construction, and one seed in bf16 proves nothing: what must not be concluded is printed.
    Without -o nothing is written.

    \b
    Example:
      sparsity-audit recovery base full sub --mask mask --control random=other --metrics scores.json
    """
    output_format = "json" if as_json else output_format
    for key in ("controls", "control_masks"):
        options[key] = _as_map(options[key], f"--{key[:-1].replace('_', '-')}")
    from sparsity_audit.api.recovery import recovery as run

    report = run(**options, on_note=echo_note)
    if output_format == "json":
        from sparsity_audit.report.recovery import recovery_to_json

        sys.stdout.buffer.write(recovery_to_json(report))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.recovery_terminal import print_recovery

        print_recovery(report, output=options["output"])


def _as_map(pairs: tuple[tuple[str, str], ...], option: str) -> dict[str, str]:
    names = [name for name, _ in pairs]
    doubled = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if doubled is not None:
        raise UsageError(option, f"{doubled!r} is given twice", expected="a name for each")
    return dict(pairs)
