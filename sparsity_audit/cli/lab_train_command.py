"""`sparsity-audit lab train`: fine-tune a base, by an algorithm of the literature or a control."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sparsity_audit.cli.mixture_type import MixtureType
from sparsity_audit.cli.options import (
    OUTPUT_PATH,
    config_option,
    echo_note,
    format_options,
    progress_is_wanted,
)
from sparsity_audit.lab.names import TASK_NAMES

if TYPE_CHECKING:
    from sparsity_audit.lab.metrics import StepMetrics
    from sparsity_audit.lab.runs import TrainResult

__all__ = ["train"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _number(flag: str, default: float, text: str) -> Callable[[_Command], _Command]:
    return click.option(flag, type=float, default=default, show_default=True, help=text)


def _count(flag: str, default: int | None, text: str) -> Callable[[_Command], _Command]:
    return click.option(
        flag, type=click.IntRange(min=1), default=default, show_default=default is not None, help=text
    )


def _choice(flag: str, *names: str, text: str) -> Callable[[_Command], _Command]:
    """The first name is the default."""
    return click.option(flag, type=click.Choice(names), default=names[0], show_default=True, help=text)


_OPTIONS = (
    click.option(
        "-o", "--output", type=OUTPUT_PATH, required=True, help="The run's folder; a killed run goes on."
    ),
    click.option(
        "--algorithm",
        default="grpo",
        show_default=True,
        help="grpo, rloo, ppo, a2c, prime, sft, expert-iteration, dpo, simpo, kto or orpo.",
    ),
    click.option("--base", default="mix", show_default=True, help="mix, single or a model folder."),
    _choice("--task", *TASK_NAMES, text="What is asked."),
    click.option(
        "--digits",
        "lengths",
        type=MixtureType(int),
        default="4",
        show_default=True,
        help="Length, or lengths by weight.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Of problems, samples, shuffles.",
    ),
    _choice("--precision", "bf16", "fp32", text="bf16 rounds the weights after every update."),
    _count("--steps", 40, "Training steps."),
    _count("--prompts", 16, "Problems of a step."),
    _count("--samples", 8, "Completions of each problem."),
    _count("--max-new-tokens", None, "Length limit of a completion [default: the task's]."),
    _number("--temperature", 1.0, "Of sampling."),
    _choice("--optimizer", "adamw", "sgd", text="Without momentum for sgd."),
    _number("--lr", 3e-4, "Learning rate; 1e-3 collapses, 1e-5 does nothing in 40 steps."),
    _number("--weight-decay", 0.0, "Decoupled for adamw."),
    _number("--grad-clip", 1.0, "Limit of the gradient norm."),
    _count("--epochs", None, "Passes over a step's data [default: 1; sft 4, expert-iteration 8]."),
    _count("--minibatches", 1, "Updates of a pass; with one update a step --clip is never active."),
    _number("--clip", 0.2, "ε of the ratio clip."),
    _choice("--normalisation", "token-mean", "sequence-mean", text="How token losses are averaged."),
    click.option(
        "--divide-by-std/--no-divide-by-std",
        default=None,
        help="grpo: by the group's deviation [default: yes].",
    ),
    _number("--gae-lambda", 1.0, "λ of ppo and a2c."),
    click.option("--critic-lr", type=float, help="Of the value head [1e-2], or prime's reward model [--lr]."),
    _choice("--kl", "none", "exact", "k1", "k2", "k3", text="Penalty against the base; k1: in the reward."),
    click.option("--kl-coefficient", type=float, help="β_KL, with --kl [default: 0.1]."),
    _choice("--kl-priority", "none", "shannon", "max-prob", text="Weight positions by the base's certainty."),
    _number("--kl-exponent", 10.0, "Power of the certainty."),
    _number("--kl-temperature", 1.0, "Of the max-prob certainty."),
    _number("--divergence-weight", 0.0, "s of divergence-weighted advantages; 0 is off."),
    _number("--divergence-alpha", 1.0, "α of the same; its sign says what is stressed."),
    _choice("--divergence-control", "none", "mean-normalised", "shuffled", text="Control of the same."),
    _number("--entropy-top", 1.0, "Policy loss on this share of tokens, by entropy."),
    click.option("--shuffle-rewards", is_flag=True, help="The control that must not learn."),
    click.option(
        "--sample-from",
        type=click.Choice(["policy", "base"]),
        help="Who completes [default: the policy; for sft the base].",
    ),
    click.option(
        "--solutions",
        type=click.Choice(["verified", "written"]),
        help="sft: imitate what [default: verified].",
    ),
    click.option("--formats", type=MixtureType(str), help="Of written solutions, by weight [default: S]."),
    _count("--rounds", None, "expert-iteration: restarts from the base [default: 4]."),
    click.option("--beta", type=float, help="The algorithm's β [default: its paper's]."),
    click.option("--margin", type=float, help="γ of simpo [default: 0.5]."),
    _choice("--checkpoints", "log", "last", text="Keep steps 0, 1, 2, 4, … or the last one."),
    click.option("--overwrite", is_flag=True, help="Remove what another run left in the folder."),
)


def _with_options(command: _Command) -> _Command:
    return reduce(lambda wrapped, option: option(wrapped), reversed(_OPTIONS), command)


@click.command()
@_with_options
@format_options
@config_option
def train(*, output_format: str, as_json: bool, **options: Any) -> None:
    """Fine-tune a base on a verifiable task.

    Writes final/ and log-spaced checkpoint-N/ (Hugging Face folders), metrics.jsonl, metrics.csv, run.json
    and result.json. The same command goes on where a killed run stopped, and ends in the same bytes.

    \b
    Example:
      sparsity-audit lab train --algorithm grpo --base mix --seed 0 --steps 2 -o grpo-seed0
    """
    output_format = "json" if as_json else output_format
    from sparsity_audit.api.lab_train import lab_train

    is_live = progress_is_wanted(output_format)
    result = lab_train(
        **options, on_note=echo_note, on_step=lambda metrics: _print_step(metrics, options, is_live=is_live)
    )
    if output_format == "json":
        plain = {name: value for name, value in asdict(result).items() if name != "output"}
        click.echo(json.dumps({"output": str(result.output), **plain}, indent=2))
    elif output_format == "human":
        _print_result(result)


def _print_step(metrics: StepMetrics, options: dict[str, Any], *, is_live: bool) -> None:
    """On a terminal a line that is written over; elsewhere one at each checkpoint's step."""
    step, steps = metrics.step, options["steps"]
    seen = "" if metrics.reward is None else f", reward {metrics.reward:.3f}, entropy {metrics.entropy:.3f}"
    drift = "" if metrics.kl_reference is None else f", KL {metrics.kl_reference:.4f}"
    line = f"step {step} of {steps}{seen}{drift}"
    if is_live:
        click.echo(f"\r{line:<78}", nl=step == steps, err=True)
    elif step == steps or step & (step - 1) == 0:
        echo_note(line)


def _print_result(result: TrainResult) -> None:
    base, tuned = result.base_accuracy, result.accuracy
    click.echo(str(result.output / "final"))
    click.echo(
        f"accuracy {tuned.value:.3f} ({tuned.low:.3f}–{tuned.high:.3f}), base {base.value:.3f}; "
        f"{result.updates} updates in {result.steps} steps"
    )
    if result.steps_without_signal:
        click.echo(f"{result.steps_without_signal} steps without a gradient")
    sys.stdout.flush()
