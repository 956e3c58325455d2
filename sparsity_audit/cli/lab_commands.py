"""`sparsity-audit lab`: make a base, train it with RL, judge what came out."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from sparsity_audit.cli.lab_measure_commands import critical, study, track
from sparsity_audit.cli.lab_train_command import train
from sparsity_audit.cli.mixture_type import MixtureType
from sparsity_audit.cli.options import OUTPUT_PATH, echo_note
from sparsity_audit.lab.names import RECIPE_NAMES, SIZE_NAMES, TASK_NAMES

if TYPE_CHECKING:
    from sparsity_audit.lab.estimators import Estimate
    from sparsity_audit.lab.evaluation import Drift, Evaluation
    from sparsity_audit.lab.pretrain import StepRecord

__all__ = ["lab"]

_SEED = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything random."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def lab() -> None:
    """Real RL fine-tuning of a small model on one CPU core, with everything about it known.

    \b
    Example:
      sparsity-audit lab evaluate mix --prompts 64 --samples 2
    """


lab.add_command(train)
lab.add_command(track)
lab.add_command(critical)
lab.add_command(study)


@lab.command()
@click.option("--base", type=click.Choice(RECIPE_NAMES), required=True, help="Recipe: what the base learns.")
@click.option(
    "-o", "--output", type=OUTPUT_PATH, required=True, help="Folder to write; a killed run goes on."
)
@_SEED
@click.option("--size", type=click.Choice(SIZE_NAMES), default="tiny", show_default=True, help="Model size.")
@click.option("--steps", type=click.IntRange(min=1), help="Cap of steps [default: the recipe's].")
@click.option(
    "--target", type=float, nargs=2, help="Lowest and highest accuracy wanted [default: the recipe's]."
)
@click.option("--no-target", is_flag=True, help="Run all steps, whatever the accuracy.")
@click.option(
    "--formats", type=MixtureType(str), help="Solution formats by weight, such as S=.3,C=.35,R=.35."
)
@click.option("--lengths", type=MixtureType(int), help="Problem lengths by weight, such as 1=1,2=2,3=4,4=2.")
@click.option("--overwrite", is_flag=True, help="Replace a finished base, or the state of a killed run.")
@click.pass_context
def pretrain(
    ctx: click.Context, /, *, no_target: bool, target: tuple[float, float] | None, **options: Any
) -> None:
    """Pretrain a base on written solutions until it reaches its target accuracy.

    Exit status 1 where it never does; the base is written all the same.

    \b
    Example:
      sparsity-audit lab pretrain --base single -o single-seed1 --seed 1
    """
    from sparsity_audit.api.lab import lab_pretrain

    if no_target and target is not None:
        raise click.UsageError("--target and --no-target exclude each other.")
    start = time.process_time()
    goal = None if no_target else target or "recipe"
    result = lab_pretrain(**options, target=goal, on_step=_print_step)
    echo_note(f"{result.steps} steps, {time.process_time() - start:.0f} CPU s")
    click.echo(str(options["output"]))
    if result.accuracy is not None:
        click.echo(f"accuracy {_with_error(result.accuracy)}, rounded to bf16")
    if result.overshot:
        echo_note("overshot: the accuracy lies above the target, because ability came in one jump")
    if not result.converged:
        echo_note(
            "did not converge: the target accuracy was not reached; raise --steps, or try another --seed"
        )
        ctx.exit(1)


def _print_step(record: StepRecord) -> None:
    """A line a look, and on a terminal a counter between them."""
    if record.accuracy is not None:
        end = "\r" if sys.stderr.isatty() else ""
        echo_note(f"{end}step {record.step}: loss {record.loss:.4f}, accuracy {record.accuracy:.3f}")
    elif sys.stderr.isatty():
        click.echo(f"\rstep {record.step}: loss {record.loss:.4f}", nl=False, err=True)


@lab.command()
@click.argument("checkpoint")
@click.option(
    "--task", type=click.Choice(TASK_NAMES), default="addition", show_default=True, help="What is asked."
)
@click.option(
    "--digits", type=MixtureType(int), default="4", show_default=True, help="Length, or lengths by weight."
)
@click.option(
    "--prompts", "num_prompts", type=click.IntRange(min=1), default=512, show_default=True, help="Problems."
)
@click.option(
    "--samples",
    "num_samples",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Samples of each.",
)
@_SEED
@click.option("--reference", metavar="REF", help="Checkpoint to measure the KL from: mix, single or a path.")
@click.option("--json", "as_json", is_flag=True, help="Print the full record as JSON.")
def evaluate(checkpoint: str, *, as_json: bool, **options: Any) -> None:
    """Measure accuracy, formats, entropy and drift of CHECKPOINT: mix, single, or a path.

    \b
    Example:
      sparsity-audit lab evaluate mix --prompts 64 --samples 2
    """
    from sparsity_audit.api.lab import lab_evaluate

    record = lab_evaluate(checkpoint, **options)
    if as_json:
        click.echo(json.dumps(record.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print_evaluation(record)


def _print_evaluation(record: Evaluation) -> None:
    lengths = ", ".join(f"{n} digits" for n in record.lengths)
    click.echo(f"{record.task}, {lengths}: {record.num_prompts} prompts × {record.num_samples} samples")
    click.echo(f"  pass@1    {_with_error(record.accuracy)}   greedy {_with_error(record.greedy_accuracy)}")
    for k in [k for k in record.pass_at if k > 1]:
        click.echo(f"  pass@{k:<4} {record.pass_at[k].value:.3f}   maj@{k} {record.majority_at[k].value:.3f}")
    click.echo(
        f"  entropy   {record.entropy_per_token:.4f} nats a token,"
        f" {record.tokens_per_completion:.1f} tokens, {100 * record.truncated_frac:.1f} % truncated"
    )
    click.echo("  format    share  accuracy")
    for row in record.formats:
        accuracy = "–" if row.accuracy is None else f"{row.accuracy:.3f}"
        click.echo(f"  {row.format:<9} {row.share:.3f}  {accuracy}")
    if record.drift is not None:
        _print_drift(record.drift, [row.format for row in record.formats])


def _print_drift(drift: Drift, names: list[str]) -> None:
    click.echo(f"  reference {_with_error(drift.reference_accuracy)}")
    click.echo(
        f"  KL(policy‖reference) {drift.kl_per_token:.4f} nats a token,"
        f" {drift.kl_per_completion:.3f} a completion"
    )
    click.echo("  β      KL to optimum  its format shares")
    for row in drift.optima:
        shares = ", ".join(f"{name} {share:.3f}" for name, share in zip(names, row.shares, strict=True))
        click.echo(f"  {row.beta:<6g} {row.kl:<14.3f} {shares}")


def _with_error(figure: Estimate) -> str:
    error = "" if figure.standard_error is None else f" ± {figure.standard_error:.3f}"
    return f"{figure.value:.3f}{error} ({figure.low:.3f}–{figure.high:.3f})"
