"""`sparsity-audit inspect`: what the headers of one checkpoint say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from sparsity_audit.cli.options import echo_note, format_options, stream_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparsity_audit.api.inspect import Inspection

__all__ = ["inspect"]

_HEAD = ("tensor", "dtype", "shape", "entries", "bytes", "file")
_RIGHT = (False, False, False, True, True, False)


@click.command()
@click.argument("reference")
@stream_option
@format_options
def inspect(reference: str, *, output_format: str, as_json: bool) -> None:
    """Print a checkpoint's headers: tensors, dtypes, shapes, ties, shards, bytes. No tensor data is read.

    REFERENCE is a directory, a file, org/model[@revision], or hf://org/model[@revision][/subfolder].

    \b
    Example:
      sparsity-audit inspect examples/addition/base
    """
    from sparsity_audit.api.inspect import inspect as inspect_reference
    from sparsity_audit.api.inspect import tensor_rows

    record = inspect_reference(reference)
    for line in record.notes:
        echo_note(f"note: {line}")
    for line in record.warnings:
        echo_note(f"warning: {line}")
    if as_json or output_format == "json":
        click.echo(json.dumps(record.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
    elif output_format == "human":
        _print_summary(record)
        _print_rows(tensor_rows(record))


def _print_summary(record: Inspection) -> None:
    click.echo(record.resolved)
    click.echo(
        f"  {record.num_parameters:,} parameters; {record.num_entries:,} entries in "
        f"{record.num_tensors:,} tensors, {record.num_bytes:,} bytes, {len(record.ties):,} tied names"
    )
    for total in record.dtypes:
        click.echo(
            f"  {total.dtype}: {total.num_entries:,} entries, {total.num_tensors:,} tensors, "
            f"{total.num_bytes:,} bytes"
        )
    for file in record.files:
        click.echo(f"  {file.name}: {file.num_tensors:,} tensors, {file.num_bytes:,} bytes")
    config = record.config
    facts = {
        "model_type": config.model_type,
        "dtype": config.dtype,
        "tie_word_embeddings": config.tie_word_embeddings,
        "quantization": config.quantization,
    }
    said = [f"{name} {value}" for name, value in facts.items() if value is not None]
    click.echo(f"  config.json claims: {', '.join(said) or 'nothing of this'}")
    click.echo()


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    table = [_HEAD, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEAD))]
    for row in table:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, _RIGHT, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())
