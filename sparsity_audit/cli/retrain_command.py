"""`sparsity-audit retrain`: train only a subnetwork, and the controls it must be held against."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sparsity_audit.cli.options import OUTPUT_PATH, echo_note, format_options

__all__ = ["retrain"]


class _ListType(click.ParamType):
    """Values by comma."""

    def __init__(self, item: Callable[[str], Any], example: str) -> None:
        self._item, self._example, self.name = item, example, "list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._item(part.strip()) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list such as {self._example}", param, ctx)


@click.command()
@click.option(
    "--run", type=click.Path(path_type=Path), metavar="RUN", help="A finished run of `lab train`, to repeat."
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML file that says what TRL trains, instead of --run; the flags here win.",
)
@click.option("--mask", metavar="DIR", help="The mask: 1 = may be updated.")
@click.option(
    "--seed", type=click.IntRange(min=0), help="Of the retrained run [default: the full run's + 1]."
)
@click.option("--lr", type=float, help="Of the retrained run [default: the full run's].")
@click.option(
    "--controls",
    type=_ListType(str, "random,complement"),
    metavar="LIST",
    help="By comma: random, magnitude, complement, other:MASK, seed, layer:N.",
)
@click.option(
    "--control-lrs",
    type=_ListType(float, "1,3"),
    metavar="LIST",
    help="Multiples of the full run's learning rate to train masked controls at; the best on validation "
    "prompts is reported [default: 1].",
)
@click.option(
    "--prompts",
    "num_prompts",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Lab: test prompts.",
)
@click.option(
    "--validation-prompts",
    "num_validation",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Lab: prompts to choose a rate by; none is a test prompt.",
)
@click.option("--force", is_flag=True, help="Take masks that cannot be shown to be of the base.")
@click.option("-o", "--output", type=OUTPUT_PATH, help="Directory; the same command goes on after a kill.")
@click.option("--figures/--no-figures", default=True, show_default=True, help="Draw recovery/figures/*.")
@format_options
def retrain(*, output_format: str, as_json: bool, **options: Any) -> None:
    """Train again from the base with updates inside a mask alone, and judge what that recovers.

    With --run a lab run is repeated: same data, settings and number of updates, another seed. With --config
    TRL trains your model (SFT, DPO, or GRPO with a verifiable reward); needs the extra `train`. Every run is
    proven to have the base's bits outside of its mask. Random masks, the complement, another run's mask or
    one layer alone often do as well: name them as --controls. Writes runs/, masks/, scores.json, recovery/
    and retrain.json.

    \b
    Example:
      sparsity-audit retrain --run grpo --mask mask --controls random,complement,seed -o retrained
    """
    output_format = "json" if as_json else output_format
    from sparsity_audit.api.retrain import retrain as run

    found = run(**options, on_note=echo_note)
    if output_format == "json":
        from sparsity_audit.report.retrain import retrain_to_json

        sys.stdout.buffer.write(retrain_to_json(found.report))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.retrain_terminal import print_retrain

        print_retrain(found.report, output=found.output)
