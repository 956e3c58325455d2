"""`sparsity-audit tokens cross-sample`: which tokens carry the gain."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sparsity_audit.cli.options import OUTPUT_PATH, config_option, echo_note, format_options
from sparsity_audit.cli.tokens_options import model_options, progress, prompt_options

__all__ = ["NUMBERS", "SHARES", "WORDS", "cross_sample", "verifier_option"]


class _Numbers(click.ParamType):
    """Numbers between commas; `5%` is .05 where shares are meant."""

    def __init__(self, kind: Callable[[str], float], name: str) -> None:
        self._kind, self.name = kind, name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, (tuple, list)):
            return tuple(value)
        try:
            return tuple(self._kind(part.strip()) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not {self.name}", param, ctx)


def _share(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


NUMBERS = _Numbers(float, "x,x,…")
COUNTS = _Numbers(int, "n,n,…")
SHARES = _Numbers(_share, "5%,…")


class _Words(click.ParamType):
    name = "name,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        _ = param, ctx
        if isinstance(value, (tuple, list)):
            return tuple(value)
        return tuple(part.strip() for part in str(value).split(",") if part.strip() not in ("", "none"))


WORDS = _Words()


def verifier_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Who judges."""
    return click.option(
        "--verifier",
        metavar="MODULE:FUNCTION",
        help="Judge of the completions of --prompts: f(JSON object, completion) → truth value or number in "
        "[0, 1]; also path/to/file.py:function. A task judges by itself.",
    )(command)


@click.command("cross-sample")
@click.argument("base")
@click.argument("tuned")
@prompt_options
@verifier_option
@click.option(
    "--thresholds",
    type=NUMBERS,
    help="JS in nats above which the other model takes over [default: 0.4 to 0.001, without the two below].",
)
@click.option("--shares", type=SHARES, default="", help="Shares of positions, such as 2%,5%.")
@click.option(
    "--budgets",
    type=COUNTS,
    help="Tokens a completion at most [default: 1,2,4 without the two above].",
)
@click.option(
    "--directions", type=WORDS, default="forward,reverse", show_default=True, help="Who writes first."
)
@click.option(
    "--controls",
    type=WORDS,
    default="random,entropy,first",
    show_default=True,
    help="Beside every rule, with as many interventions; or none.",
)
@click.option(
    "--num-samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Completions of each prompt.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Of the distributions drawn from and compared; 0 takes the most probable token.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Limit of a completion [default: 512, or what fits the task].",
)
@model_options
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of problems, noise, random positions and resamples.",
)
@click.option(
    "-o",
    "--output",
    type=OUTPUT_PATH,
    help="Directory for points, record, table and figure; a killed run goes on.",
)
@click.option("--figures/--no-figures", default=True, show_default=True, help="With -o: draw figures/*.")
@click.option("--overwrite", is_flag=True, help="Replace what a run with other settings left there.")
@format_options
@config_option
def cross_sample(*, output_format: str, as_json: bool, **options: Any) -> None:
    """Let one model write and the other take over where the two differ, and judge what comes out.

    Forward, BASE writes and TUNED takes over: which tokens suffice for the gain. Reverse, TUNED writes: which
    are necessary. Each rule is shown with controls that make as many interventions at random positions, at
    the writer's most uncertain ones, or at the beginning. Both models draw with the same noise, so that
    switched tokens and changed ones are told apart. Without -o nothing is written.

    \b
    Example:
      sparsity-audit tokens cross-sample mix single --task addition --num-prompts 16 --thresholds 0.1
    """
    output_format = "json" if as_json else output_format
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, for verifiers beside the user
    from sparsity_audit.api.tokens_cross import tokens_cross_sample

    report = tokens_cross_sample(**options, on_progress=progress(output_format), on_note=echo_note)
    if output_format == "json":
        from sparsity_audit.report.cross import cross_to_json

        sys.stdout.buffer.write(cross_to_json(report))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        from sparsity_audit.report.cross_terminal import print_cross

        print_cross(report, output=options["output"])
