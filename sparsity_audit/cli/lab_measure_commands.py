"""`lab track`, `lab critical` and `lab study`: along a run, where it is decided, and all of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsity_audit.cli.options import OUTPUT_PATH, echo_note
from sparsity_audit.lab.names import TASK_NAMES

if TYPE_CHECKING:
    from sparsity_audit.lab.critical import Critical
    from sparsity_audit.lab.track import Track

__all__ = ["critical", "study", "track"]

_OUTPUT = click.option("-o", "--output", type=OUTPUT_PATH, help="Directory for record, table and figures.")
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what an earlier call left there.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the full record as JSON.")
_SEED = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of problems and noise."
)


def _prompts(default: int, least: int) -> Any:
    return click.option(
        "--prompts",
        "num_prompts",
        type=click.IntRange(min=least),
        default=default,
        show_default=True,
        help="Problems.",
    )


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@_prompts(256, 1)
@click.option(
    "--samples",
    "num_samples",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Samples of each problem.",
)
@_SEED
@_OUTPUT
@_OVERWRITE
@_JSON
def track(*, as_json: bool, **options: Any) -> None:
    """Follow the outputs of RUN along its saved steps: formats, best of k, entropy, drift.

    RUN is a folder that `lab train` wrote. Every saved step is judged on the same problems.

    \b
    Example:
      sparsity-audit lab track grpo-seed0 --prompts 64 -o grpo-seed0-outputs
    """
    from sparsity_audit.api.lab_track import lab_track

    found = lab_track(**options, on_point=_counter("saved step"))
    if as_json:
        _print_json(found.to_json())
    else:
        _print_track(found)


def _print_track(found: Track) -> None:
    first = found.points[0].evaluation
    names = [row.format for row in first.formats]
    most = max(first.pass_at)
    click.echo(f"{found.run}: {first.num_prompts} prompts × {first.num_samples} samples")
    best = f"pass@{most}".rjust(8), f"maj@{most}".rjust(8)
    shares = "  ".join(name.rjust(5) for name in names)
    click.echo(f"  step  pass@1  greedy  {best[0]}  {best[1]}  entropy  KL(base)  {shares}")
    for point in found.points:
        row = point.evaluation
        assert row.drift is not None, "a track is judged against its base"
        parts = "  ".join(f"{part.share:5.3f}" for part in row.formats)
        click.echo(
            f"  {point.step:4d}  {row.accuracy.value:6.3f}  {row.greedy_accuracy.value:6.3f}"
            f"  {row.pass_at[most].value:8.3f}  {row.majority_at[most].value:8.3f}"
            f"  {row.entropy_per_token:7.4f}  {row.drift.kl_per_completion:8.3f}  {parts}"
        )


@click.command()
@click.argument("checkpoint")
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    help="Run whose saved steps are followed at the positions that are found.",
)
@click.option(
    "--task", type=click.Choice(TASK_NAMES), default="addition", show_default=True, help="What is asked."
)
@click.option(
    "--digits", type=click.IntRange(min=1), default=4, show_default=True, help="Length of the problems."
)
@click.option("--solution-format", default="S", show_default=True, help="Format of the written solutions.")
@_prompts(256, 2)
@click.option(
    "--min-drop", type=float, default=0.1, show_default=True, help="Least drop of accuracy that is decisive."
)
@_SEED
@_OUTPUT
@_OVERWRITE
@_JSON
def critical(*, as_json: bool, **options: Any) -> None:
    """Find the positions where CHECKPOINT hesitates and the outcome hangs on the token.

    CHECKPOINT is mix, single, or a path. At each position of a written solution the right and a wrong token
    are forced, and the policy goes on from there.

    \b
    Example:
      sparsity-audit lab critical mix --prompts 32
    """
    from sparsity_audit.api.lab_critical import lab_critical

    found = lab_critical(**options, on_position=_counter("position"))
    if as_json:
        _print_json(found.to_json())
    else:
        _print_critical(found)


def _print_critical(found: Critical) -> None:
    click.echo(
        f"{found.checkpoint}: {len(found.critical)} of {len(found.positions)} positions are critical; "
        f"{found.num_prompts} prompts, mean J {found.mean_certainty:.3f}"
    )
    click.echo("     at  token  ΔJ                      right  wrong  p(right token)")
    for row in found.positions:
        delta = row.delta_certainty
        click.echo(
            f"  {'*' if row.critical else ' '} {row.index:3d}  {row.example:<5}"
            f"  {delta.value:+.3f} ({delta.low:+.3f} to {delta.high:+.3f})"
            f"  {row.accuracy_right.value:.3f}  {row.accuracy_wrong.value:.3f}  {row.right_probability:.3f}"
        )
    for step in found.steps:
        if step.critical is not None and step.others is not None:
            click.echo(
                f"  step {step.step}: p(right token) {step.critical.value:.3f} at critical positions, "
                f"{step.others.value:.3f} at the others"
            )


@click.command()
@click.option(
    "-o", "--output", type=OUTPUT_PATH, required=True, help="The study's folder; a killed one goes on."
)
@click.option("--smoke", is_flag=True, help="Short runs and two arms: about a minute of CPU.")
@click.option("--full", is_flag=True, help="Sweeps for the papers' further claims: about 75 minutes of CPU.")
@click.option(
    "--only",
    metavar="PARTS",
    help="With --full: parts by comma. a sparsity, b grid of runs, c formats, d critical tokens, e KL "
    "frontier, f divergence weights.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Jobs at a time, one thread each.",
)
def study(*, full: bool, only: str | None, **options: Any) -> None:
    """Run the papers' claims on runs of a few minutes, and write one page with the verdicts.

    Trains GRPO on two seeds, other algorithms, the shuffled control and the bf16 arm, compares and prunes
    the updates, trains within masks, and writes index.html, study.json and figures/. Verdicts are computed
    from the numbers and goals that are stated on the page; a claim that fails is no error.

    --full runs sweeps instead, one for each further question, part by part; what it will cost is said first,
    and the page grows with every part. With --smoke it has a few steps of a few prompts.

    \b
    Example:
      sparsity-audit lab study --smoke -o study
    """
    from sparsity_audit.api.lab_study import lab_study
    from sparsity_audit.api.lab_study_full import lab_study_full

    if only is not None and not full:
        raise click.UsageError("--only chooses parts of --full.")

    def show(name: str, done: int, num: int) -> None:
        echo_note(f"{done} of {num}: {name}")

    if full:
        chosen = None if only is None else [part.strip() for part in only.split(",")]
        found = lab_study_full(**options, only=chosen, on_job=show, on_note=echo_note)
        rows = [(claim.shown_verdict, claim.title) for claim in found.claims]
    else:
        rows = [(claim.verdict, claim.title) for claim in lab_study(**options, on_job=show).claims]
    click.echo(str(options["output"] / "index.html"))
    for verdict, title in rows:
        click.echo(f"  {verdict:<25} {title}")


def _counter(what: str) -> Any:
    """On a terminal a counter that is written over; elsewhere nothing."""
    is_live = sys.stderr.isatty()

    def show(done: int, num: int) -> None:
        if is_live:
            click.echo(f"\r{what} {done} of {num}", nl=done == num, err=True)

    return show


def _print_json(record: dict[str, Any]) -> None:
    click.echo(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False))
