"""The record of `lab study --full`: its facts, and what each published claim becomes on them.

Contract: everything a claim says is computed from the facts in the same record. Claims of a part that was not
run are `not measured`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsity_audit.report.study_full_facts import FullFacts

__all__ = [
    "STUDY_FULL_FORMAT",
    "STUDY_FULL_VERSION",
    "FullClaim",
    "FullReport",
    "FullVerdict",
    "Table",
    "study_full_json_schema",
    "study_full_to_json",
]

STUDY_FULL_FORMAT = "sparsity-audit/lab-study-full"
STUDY_FULL_VERSION = 1

FullVerdict = Literal["reproduces", "does not reproduce", "is explained", "undecided", "not measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows for a reader.

    Args:
        title: What it shows.
        head: Column names.
        rows: Cells as printed.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FullClaim:
    """A published claim, and what becomes of it here.

    Args:
        key: Short name; its figure's as well.
        part: The part it belongs to.
        title: The claim, a full sentence.
        source: Where it was published.
        goal: What the numbers must show for each verdict.
        verdict: Computed from the numbers and the goal.
        explained_by: By what, where the verdict is `is explained`; else empty.
        reading: What the numbers say.
        tables: The numbers.
        caption: What the figure shows; empty without one.
    """

    key: str
    part: str
    title: str
    source: str
    goal: str
    verdict: FullVerdict
    explained_by: str = ""
    reading: str
    tables: tuple[Table, ...]
    caption: str

    @property
    def shown_verdict(self) -> str:
        """The verdict in words."""
        return f"is explained by {self.explained_by}" if self.verdict == "is explained" else self.verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class FullReport:
    """A full study.

    Args:
        format: `sparsity-audit/lab-study-full`.
        version: Version of this record.
        tool: Name and version of the writer.
        size: `full`, or `smoke` for a test of the machinery.
        facts: What was measured.
        claims: What follows.
    """

    format: str = STUDY_FULL_FORMAT
    version: int = STUDY_FULL_VERSION
    tool: str
    size: Literal["full", "smoke"]
    facts: FullFacts
    claims: tuple[FullClaim, ...]

    def claim(self, key: str) -> FullClaim:
        """The claim of that name."""
        return next(claim for claim in self.claims if claim.key == key)


def study_full_to_json(report: FullReport) -> bytes:
    """`study.json`: indented UTF-8 with a final newline."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def study_full_json_schema() -> dict[str, Any]:
    """The JSON Schema of a full study's `study.json`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{STUDY_FULL_FORMAT} {STUDY_FULL_VERSION}",
        **_adapter().json_schema(mode="serialization"),
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(FullReport)
