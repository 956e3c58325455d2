"""`sparsity-audit diff` and `sparsity-audit mask export`: the audit of one pair."""

from __future__ import annotations

from typing import Any

import click

from sparsity_audit.api.sides import open_sides
from sparsity_audit.cli.diff_result import show_report, take_expectations
from sparsity_audit.cli.options import (
    CRITERION,
    MAP_RULE,
    OUTPUT_PATH,
    ByteProgress,
    config_option,
    echo_note,
    engine_options,
    format_options,
    progress_is_wanted,
    stream_option,
)
from sparsity_audit.cli.pairs_options import (
    log_options,
    pairs_options,
    run_pairs,
    take_one_pair,
)
from sparsity_audit.types import View

__all__ = ["diff"]

_FRACTION = click.FloatRange(0, 1)


@click.command()
@click.argument("base", required=False)
@click.argument("tuned", required=False)
@click.option(
    "-o",
    "--output",
    type=OUTPUT_PATH,
    help="Directory for report, tables and journal; s3://…, gs://… or az://…: uploaded when finished.",
)
@click.option(
    "--figures/--no-figures",
    default=True,
    show_default=True,
    help="With -o: write figures/*.pdf, svg and png. They take about three seconds, whatever the size of the "
    "checkpoint; `sparsity-audit plot` makes them later as well.",
)
@click.option("--parquet", is_flag=True, help="With -o: write tensors.parquet; needs the extra `parquet`.")
@click.option("--mask", "mask", type=OUTPUT_PATH, help="Directory for the update mask, or s3://….")
@click.option(
    "--criterion",
    "criteria",
    type=CRITERION,
    multiple=True,
    help="Criterion to count beside bitwise, value, atol:1e-5 and rel:1e-3; the first one given decides "
    "mask and sparsity gates (default value). Forms: bitwise, value, atol:X, rel:X, ulp:K, top:K, top:P%, "
    "top:…:tensor.",
)
@click.option(
    "--view",
    type=click.Choice([v.value for v in View]),
    default=View.NATIVE.value,
    show_default=True,
    help="As stored, or with both sides rounded to bf16: decides mask and gates. Both are reported.",
)
@click.option(
    "--map", "maps", type=MAP_RULE, multiple=True, help="Rename tuned tensors: REGEX=REPL, as in re.sub."
)
@click.option(
    "--stats",
    type=click.Choice(["full", "counts"]),
    default="full",
    show_default=True,
    help="All statistics, or only counts, fingerprints and masks.",
)
@click.option(
    "--structure",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Read the base's matrices a second time, for the stripe scores that magnitudes alone give; auto "
    "does so for a base below 2 GB. Heads, experts and observed scores cost nothing and are always there.",
)
@click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), help="Peak learning rate, for the half-ULP law."
)
@click.option(
    "--weights-dtype",
    type=click.Choice(["bf16", "fp32"]),
    help="Dtype in which the trainer stored the weights between steps; the half-ULP law holds for bf16.",
)
@click.option(
    "--spectral",
    multiple=True,
    metavar="GLOB",
    help="Rank, spectral drift, angles and overlaps of these matrices, each beside a random reference; the "
    "cost is printed first.",
)
@click.option(
    "--spectral-max-dim",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Matrices with a longer side are estimated from a sketch.",
)
@click.option("--expect-frozen", multiple=True, metavar="GLOB", help="Fail unless these are bit-identical.")
@click.option("--expect-changed", multiple=True, metavar="GLOB", help="Fail unless each of these changed.")
@click.option("--min-sparsity", type=_FRACTION, help="Fail below this update sparsity (0 … 1).")
@click.option("--max-sparsity", type=_FRACTION, help="Fail above this update sparsity (0 … 1).")
@click.option(
    "--fail-on-leftover", is_flag=True, help="Fail when a tensor has no counterpart or cannot be compared."
)
@engine_options
@click.option(
    "--kernel",
    type=click.Choice(["auto", "numpy", "numba", "reference"]),
    default="auto",
    show_default=True,
    help="CPU kernel; all give the same bytes.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--unit-bytes", type=click.IntRange(min=1), help="Aim of a work unit's bytes a side.", hidden=True
)
@click.option(
    "--shard-index",
    type=click.IntRange(min=0),
    help="Compare this share of the work alone, counted from 0, and leave it in -o for `merge`.",
)
@click.option("--num-shards", type=click.IntRange(min=1), help="How many shares the work is cut into.")
@pairs_options
@log_options
@click.option("--dry-run", is_flag=True, help="Print what would be read and compared, and stop.")
@click.option(
    "--overwrite", is_flag=True, help="Replace the results of an earlier run in the output directories."
)
@stream_option
@format_options
@config_option
@click.pass_context
def diff(ctx: click.Context, *, output_format: str, as_json: bool, dry_run: bool, **options: Any) -> int:
    """Compare BASE with TUNED: update sparsity by criterion, precision, layer and module.

    BASE and TUNED are a checkpoint directory, a .safetensors or .bin file, or a Hub reference
    (org/model, org/model@revision, hf://org/model). Without -o nothing is written.

    \b
    Exit status: 0 done, 1 a stated expectation failed, 2 usage, input or I/O error (with --pairs: of any
    pair), 130 interrupted.

    \b
    Example:
      sparsity-audit diff examples/addition/base examples/addition/grpo-seed0
      sparsity-audit diff --pairs published:zhu2025 --dry-run
    """
    output_format = "json" if as_json else output_format
    if options["pairs"] is not None:
        return run_pairs(ctx, options, output_format=output_format, dry_run=dry_run)
    loggers, project = take_one_pair(ctx, options)
    shard_index, num_shards = options.pop("shard_index"), options.pop("num_shards")
    options["base"], options["tuned"] = open_sides(options["base"], options["tuned"])
    if dry_run:
        return _dry_run(options, output_format)
    if shard_index is not None or num_shards is not None:
        from sparsity_audit.cli.merge_command import run_share

        if loggers:
            raise click.UsageError("--log tells of a finished report: give it to `merge`.", ctx)
        options["expectations"] = take_expectations(options)
        return run_share(ctx, options, shard_index, num_shards, output_format=output_format)
    from sparsity_audit.api.diff import diff as run

    options["expectations"] = take_expectations(options)
    with ByteProgress(shown=progress_is_wanted(output_format)) as progress:
        report = run(**options, on_note=echo_note, on_progress=progress.update)
    where = {"output": options["output"], "mask": options["mask"]}
    return show_report(report, output_format, loggers, project=project, **where)


def _dry_run(options: dict[str, Any], output_format: str) -> int:
    from sparsity_audit.api.diff import plan_diff

    names = ("base", "tuned", "criteria", "view", "maps", "stats", "unit_bytes")
    arguments = {name: options[name] for name in (*names, "spectral", "spectral_max_dim")}
    if options["preset"] is not None:
        from sparsity_audit.api.presets import preset_criteria

        arguments["criteria"] = preset_criteria(options["preset"], options["criteria"])
    summary = plan_diff(**arguments)
    if output_format == "json":
        import json

        click.echo(json.dumps(summary.to_json(), indent=2))
    elif output_format == "human":
        from sparsity_audit.report.terminal import print_plan

        print_plan(summary)
    return 0
