"""Every position of a token divergence, as CSV or Parquet.

Contract: one row a position, sets in the record's order, then by prompt, sample, position; floats with 9
significant digits in CSV and in full in Parquet. pyarrow (extra `parquet`) is imported where it is asked for.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sparsity_audit.report.parquet import import_arrow
from sparsity_audit.tokens.positions import COLUMNS, Measured

__all__ = ["positions_csv", "positions_parquet"]

Decode = Callable[[Sequence[int]], str]
FoundSets = Sequence[tuple[str, Sequence[tuple[int, int]], Measured]]
"""Name, (prompt, sample) of each sequence, positions."""


def positions_csv(found: FoundSets, *, decode: Decode) -> bytes:
    """`positions.csv`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, columns in enumerate(_columns(found, decode)):
        if number == 0:
            writer.writerow(columns)
        writer.writerows(zip(*[_texts(values) for values in columns.values()], strict=True))
    return text.getvalue().encode()


def positions_parquet(found: FoundSets, *, decode: Decode) -> bytes:
    """`positions.parquet`. Raises MissingExtraError without pyarrow."""
    arrow, parquet = import_arrow()
    tables = [arrow.table(columns) for columns in _columns(found, decode)]
    data = io.BytesIO()
    parquet.write_table(arrow.concat_tables(tables), data, compression="zstd")
    return data.getvalue()


def _columns(found: FoundSets, decode: Decode) -> Iterator[dict[str, np.ndarray | list[str]]]:
    """The columns of each set."""
    texts: dict[int, str] = {}
    with_nucleus = any("js_nucleus" in measured.columns for _, _, measured in found)
    for name, places, measured in found:
        if not measured.num:
            continue
        columns = measured.columns
        prompt, sample = np.array(places)[columns["sequence"]].T
        for number in np.unique(columns["token"]).tolist():
            texts.setdefault(number, decode([number]))
        kept = [
            c for c in COLUMNS if c not in ("sequence", "js_nucleus") or (c == "js_nucleus" and with_nucleus)
        ]
        yield {
            "set": [name] * measured.num,
            "prompt": prompt,
            "sample": sample,
            "text": [texts[number] for number in columns["token"].tolist()],
            **{column: columns[column] for column in kept},
        }


def _texts(values: np.ndarray | list[str]) -> list[str]:
    if isinstance(values, list):
        return values
    if values.dtype.kind == "f":
        return [f"{value:.9g}" for value in values.tolist()]
    return [str(value) for value in values.tolist()]
