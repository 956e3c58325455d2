"""The versioned record of many pairs, and its JSON.

Contract: exact counts and fractions in [0, 1]; percentages are for print (`pairs_tables`) and for what was
expected. A pair that failed, or was not run, has a row that says so. Rows stand in the order of the file they
come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsity_audit.report.preset import PresetResult
from sparsity_audit.stats.rollup import Headline
from sparsity_audit.types import View

__all__ = [
    "PAIRS_FORMAT",
    "PAIRS_VERSION",
    "ExpectedRecord",
    "Measured",
    "PairRow",
    "PairsReport",
    "pairs_json_schema",
    "pairs_to_json",
]

PAIRS_FORMAT = "sparsity-audit/pairs"
PAIRS_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The number that stands for a pair.

    Args:
        rule: The preset's name, or the criterion's key.
        view: The view it is counted in.
        compared: Entries in the denominator.
        changed: Entries changed.
        sparsity: (compared − changed) ÷ compared; None when nothing was compared.
    """

    rule: str
    view: View
    compared: int
    changed: int
    sparsity: float | None

    @property
    def percent(self) -> float | None:
        """The sparsity in percent, rounded once."""
        return 100 * (self.compared - self.changed) / self.compared if self.compared else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedRecord:
    """What a pair's number was held against.

    Args:
        sparsity_percent: The expected value.
        tolerance_points: Allowed distance.
        measured: The number held against it.
        difference_points: Measured − expected in percentage points.
        passed: |difference| ≤ tolerance; None where nothing was measured.
    """

    sparsity_percent: float
    tolerance_points: float
    measured: Measured | None = None
    difference_points: float | None = None
    passed: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """One pair.

    Args:
        name: Its name, and the sub-directory of its report.
        algorithm: What trained it.
        kind: RL, SFT, …
        base: Base as given.
        tuned: Tuned side as given.
        status: `done`, `failed` or `skipped`.
        message: The error, or why it was not run; empty when done.
        base_resolved: What the base led to, with the commit.
        tuned_resolved: The same for the tuned side.
        base_dtypes: Stored dtypes of the base.
        tuned_dtypes: The same for the tuned side.
        headlines: Update sparsity by view and criterion.
        preset: The number of the paper, where one was asked for.
        measured: The number that stands for the pair.
        expected: What it was held against.
        source: Where the expected value stands.
        note: What a reader should know.
        report: Path of the pair's report.json, relative to the record's directory.
    """

    name: str
    algorithm: str
    kind: str
    base: str
    tuned: str
    status: Literal["done", "failed", "skipped"]
    message: str = ""
    base_resolved: str | None = None
    tuned_resolved: str | None = None
    base_dtypes: tuple[str, ...] = ()
    tuned_dtypes: tuple[str, ...] = ()
    headlines: tuple[Headline, ...] = ()
    preset: PresetResult | None = None
    measured: Measured | None = None
    expected: ExpectedRecord | None = None
    source: str = ""
    note: str = ""
    report: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsReport:
    """Many pairs.

    Args:
        format: `sparsity-audit/pairs`.
        version: Version of this record.
        tool: Name and version of the writer.
        label: The file or the published set.
        title: Its title.
        source: Where the expected values come from.
        note: What holds for all pairs.
        rows: One a pair.
    """

    format: str = PAIRS_FORMAT
    version: int = PAIRS_VERSION
    tool: str
    label: str
    title: str
    source: str
    note: str
    rows: tuple[PairRow, ...]

    @property
    def failed(self) -> tuple[PairRow, ...]:
        """Pairs that could not be compared."""
        return tuple(row for row in self.rows if row.status == "failed")

    @property
    def missed(self) -> tuple[PairRow, ...]:
        """Pairs whose number is not the expected one."""
        return tuple(row for row in self.rows if row.expected is not None and row.expected.passed is False)


def pairs_to_json(report: PairsReport) -> bytes:
    """`pairs.json`: indented UTF-8 with a final newline."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def pairs_json_schema() -> dict[str, Any]:
    """The JSON Schema of `pairs.json`."""
    schema = _adapter().json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{PAIRS_FORMAT} {PAIRS_VERSION}",
        **schema,
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(PairsReport)
