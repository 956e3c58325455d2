"""The versioned record of a pruned update, `prune.json` beside its weights, and its table on a terminal.

Contract: exact counts, fractions in [0, 1]; None is undefined, never 0. The record holds nothing about the
run that made it, so that the same question gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_audit.passes.topk import TopSelection

__all__ = [
    "PRUNE_FILE",
    "PRUNE_FORMAT",
    "PRUNE_VERSION",
    "PruneRecord",
    "PrunedCheckpoint",
    "PrunedTensor",
    "UnmatchedTensor",
    "print_prune",
    "prune_json_schema",
    "prune_to_json",
]

PRUNE_FORMAT = "sparsity-audit/prune"
PRUNE_VERSION = 1
PRUNE_FILE = "prune.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedTensor:
    """A pair: what its update is, and what of it is kept.

    Args:
        name: Name in base coordinates.
        tuned_name: Its counterpart.
        rule: What matched them.
        dtype: Stored dtype of the result.
        base_fingerprint: Of the base's stored codes, 16 hexadecimal digits.
        tuned_fingerprint: Of the tuned side's.
        entries: Entries compared.
        changed: Entries whose stored codes differ.
        moved: Entries with Δ neither 0 nor NaN.
        kept: Entries with the tuned value.
        kept_moved: Of these, entries that moved.
        square: Σ Δ².
        square_kept: Σ Δ² over entries kept.
    """

    name: str
    tuned_name: str
    rule: str
    dtype: str
    base_fingerprint: str
    tuned_fingerprint: str
    entries: int
    changed: int
    moved: int
    kept: int
    kept_moved: int
    square: float
    square_kept: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmatchedTensor:
    """Entries without a counterpart on the other side, or with one that cannot be compared.

    Args:
        side: Whose entries.
        name: The tensor, or the pair that was skipped.
        entries: How many.
        reason: Why.
        written: Whether they stand in the result, as they are.
    """

    side: str
    name: str
    entries: int
    reason: str
    written: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneRecord:
    """A base with a part of an update.

    Args:
        format: `sparsity-audit/prune`.
        version: Version of this record.
        tool: Name and version of the writer.
        base: The base, with its revision where it has one.
        tuned: The tuned side.
        like: The side that gave names, shapes, configuration and what has no counterpart.
        keep: What was asked for, `top:5%` for instance.
        complement: Whether the compared entries that are not selected are kept instead.
        sentence: What is kept, in words.
        seed: Of a random selection; None elsewhere.
        view: The view whose Δ is counted and ordered.
        compared: Entries compared.
        changed: Entries whose stored codes differ between base and tuned.
        moved: Entries with Δ neither 0 nor NaN.
        not_finite: Of these, entries whose Δ² is not finite, left out of squares.
        kept: Entries with the tuned value.
        kept_changed: Of these, entries whose code differs from the base's.
        kept_moved: Of these, entries that moved.
        kept_share: kept ÷ compared.
        update_density: kept_changed ÷ compared: the bitwise update density of the result.
        square_share: Σ Δ² over entries kept ÷ Σ Δ²; None without an update.
        selections: Cuts of `top` and `bottom`, one or one a pair. Of `bottom`, `selected` counts the entries
            that moved and are *not* kept, and `threshold` is the smallest |Δ| among them.
        selected_unmatched: Entries a given mask selects where nothing was compared.
        tensors: Every pair.
        unmatched: What no pair covers.
        aliases: Second names of tied tensors, which are not written → the name that is.
        files: Files copied from the side `like`.
        files_left: Files beside its weights that were not.
        findings: What a reader must know of the matching.
        notes: What a reader must know of the result.
    """

    format: str = PRUNE_FORMAT
    version: int = PRUNE_VERSION
    tool: str
    base: str
    tuned: str
    like: str
    keep: str
    complement: bool
    sentence: str
    seed: int | None
    view: str
    compared: int
    changed: int
    moved: int
    not_finite: int
    kept: int
    kept_changed: int
    kept_moved: int
    kept_share: float | None
    update_density: float | None
    square_share: float | None
    selections: tuple[TopSelection, ...]
    selected_unmatched: int
    tensors: tuple[PrunedTensor, ...]
    unmatched: tuple[UnmatchedTensor, ...]
    aliases: dict[str, str]
    files: tuple[str, ...]
    files_left: tuple[str, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedCheckpoint:
    """A checkpoint that was written, and what it keeps."""

    path: Path
    record: PruneRecord


def prune_to_json(record: PruneRecord | Sequence[PruneRecord]) -> bytes:
    """`prune.json`, or a list of such records: indented UTF-8 with a final newline."""
    from pydantic import TypeAdapter

    kind: Any = PruneRecord if isinstance(record, PruneRecord) else tuple[PruneRecord, ...]
    return TypeAdapter(kind).dump_json(record, indent=1) + b"\n"


def prune_json_schema() -> dict[str, Any]:
    """The JSON Schema of `prune.json`."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(PruneRecord).json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{PRUNE_FORMAT} {PRUNE_VERSION}",
        **schema,
    }


def print_prune(written: Sequence[PrunedCheckpoint]) -> None:
    """Print one row a checkpoint, then what is unmatched and to be known, to stdout."""
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 240)
    records = [checkpoint.record for checkpoint in written]
    first = records[0]
    console.print(Text(f"{first.base} + a part of the update to {first.tuned}", style="bold"), soft_wrap=True)
    console.print(
        f"{first.compared:,} entries compared, {first.moved:,} moved ({first.view} view)\n", soft_wrap=True
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, head in enumerate(("kept", "entries", "of them moved", "share", "of Σ Δ²", "written to")):
        table.add_column(head, justify="right" if 0 < number < 5 else "left", overflow="fold")
    for checkpoint in written:
        record = checkpoint.record
        kept = record.keep + (" (complement)" if record.complement else "")
        cells = [kept, f"{record.kept:,}", f"{record.kept_moved:,}"]
        cells += [_percent(record.kept_share), _percent(record.square_share), str(checkpoint.path)]
        table.add_row(*map(Text, cells))
    console.print(table)
    lines = [
        f"{lost.side} {lost.name}: {lost.entries:,} entries {'written as they are' * lost.written}"
        f"{'not written' * (not lost.written)}: {lost.reason}"
        for lost in first.unmatched
    ]
    lines += dict.fromkeys((*first.findings, *(note for record in records for note in record.notes)))
    for line in lines:
        console.print(Text(f"• {line}"), soft_wrap=True)


def _percent(share: float | None) -> str:
    """Two decimals, never 0 or 100 for what is neither."""
    if share is None:
        return "–"
    text = f"{100 * share:.2f}"
    if share > 0 and text == "0.00":
        text = "<0.01"
    elif share < 1 and text == "100.00":
        text = ">99.99"
    return f"{text} %"
