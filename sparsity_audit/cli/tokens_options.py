"""Options that the `tokens` commands share: prompts, sampling, models; and their progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sparsity_audit.cli.options import progress_is_wanted
from sparsity_audit.lab.names import TASK_NAMES

__all__ = ["LENGTHS", "model_options", "progress", "prompt_options", "sampling_options"]


class _Lengths(click.ParamType):
    name = "n,n,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, (tuple, list)):
            return tuple(value)
        try:
            found = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        if not found or min(found) < 1:
            self.fail(f"{value!r} is not a list of lengths such as 4 or 2,3,4", param, ctx)
        return found


LENGTHS = _Lengths()


def prompt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where prompts come from: a file, or problems of the lab."""
    for option in (
        click.option(
            "--num-prompts",
            type=click.IntRange(min=1),
            help="Problems to draw [default: 64], or lines to read at most [default: all].",
        ),
        click.option(
            "--lengths", type=LENGTHS, default="4", show_default=True, help="Digits of the task's problems."
        ),
        click.option("--task", type=click.Choice(TASK_NAMES), help="Problems of the lab instead of a file."),
        click.option(
            "--prompts",
            type=click.Path(path_type=Path, dir_okay=False),
            help="JSONL: `prompt` or `messages` on each line, perhaps `completion` or `completions`.",
        ),
    ):
        command = option(command)
    return command


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How models are loaded and their memory is bounded."""
    for option in (
        click.option(
            "--batch-tokens",
            type=click.IntRange(min=1),
            default=16_384,
            show_default=True,
            help="Padded tokens of a batch at most.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
            default="auto",
            show_default=True,
            help="Of weights and arithmetic; auto is as stored.",
        ),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …"),
        click.option(
            "--vocabulary",
            type=click.Choice(["same", "common-prefix"]),
            default="same",
            show_default=True,
            help="Refuse different vocabularies, or compare the ids before the first difference.",
        ),
        click.option(
            "--template",
            type=click.Choice(["base", "tuned"]),
            default="tuned",
            show_default=True,
            help="Whose tokenizer and chat template encodes the prompts.",
        ),
    ):
        command = option(command)
    return command


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How completions are drawn."""
    for option in (
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Of problems, noise and resamples.",
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            help="Limit of a completion [default: 512, or what fits the task].",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            default=1.0,
            show_default=True,
            help="Of the sampling alone; 0 takes the most probable token.",
        ),
        click.option(
            "--num-samples",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Completions of each prompt by each model.",
        ),
    ):
        command = option(command)
    return command


def progress(output_format: str) -> Callable[[str, int, int], None]:
    """Stage and count on stderr where that is a terminal; nothing otherwise."""
    if not progress_is_wanted(output_format):
        return lambda _stage, _done, _all: None

    def show(stage: str, done: int, total: int) -> None:
        click.echo(f"\r{stage}: {done:,} of {total:,}\x1b[K", err=True, nl=done == total)

    return show
