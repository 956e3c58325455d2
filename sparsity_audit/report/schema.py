"""The versioned record of one audit, and its JSON.

Contract: counts are exact integers, fractions lie in [0, 1], no JSON number is NaN or infinite, sums are
correctly rounded float64. Everything here is a function of the two checkpoints and the questions asked:
host, time and workers stand in `run.json` alone, so that the bytes of a report can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparsity_audit.align.records import Account, Alignment
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import CorruptCheckpointError
from sparsity_audit.passes.topk import TopSelection
from sparsity_audit.report.preset import PresetResult
from sparsity_audit.report.structure import StructureRecord
from sparsity_audit.stats.decay import DecayVerdict
from sparsity_audit.stats.precision import ExponentRate, HiddenByTolerance, UlpHistogram
from sparsity_audit.stats.rollup import Headline, Rollup, TensorSummary
from sparsity_audit.stats.rounding import DisplacementFit, HalfUlpPrediction
from sparsity_audit.stats.spectral_records import SpectralRecord
from sparsity_audit.stats.tolerance import TolerancePoint
from sparsity_audit.stats.visible import VisibleShare
from sparsity_audit.types import DType, View

__all__ = [
    "FORMAT",
    "VERSION",
    "AccountRecord",
    "CheckpointRecord",
    "DiffReport",
    "FileRecord",
    "GateResult",
    "LeftoverRecord",
    "PlanSummary",
    "PrecisionRecord",
    "SkippedRecord",
    "TensorRecord",
    "TolerancePoint",
    "ViewRollups",
    "VisibleRecord",
    "describe_checkpoint",
    "describe_losses",
    "from_json",
    "json_schema",
    "to_json",
]

FORMAT = "sparsity-audit/diff"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file that held tensors."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """One side of the comparison.

    Args:
        reference: What was typed.
        resolved: `hf://org/model@<commit>`, or the path as typed: absolute paths would tell machines apart.
        files: Its files.
        num_tensors: Stored tensors; tied names once.
        num_entries: Stored entries.
        num_bytes: Their bytes.
        entries_by_dtype: Stored dtype → entries.
        aliases: Tied name → the name it shares storage with.
        notes: What opening it had to say.
    """

    reference: str
    resolved: str
    files: tuple[FileRecord, ...]
    num_tensors: int
    num_entries: int
    num_bytes: int
    entries_by_dtype: dict[str, int]
    aliases: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountRecord:
    """Where every entry of both sides went: compared + skipped + leftover = total."""

    base: Account
    tuned: Account


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftoverRecord:
    """Entries without a counterpart."""

    side: Literal["base", "tuned"]
    name: str
    num_entries: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRecord:
    """A matched pair that was not compared."""

    name: str
    tuned_name: str
    num_entries: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """One compared pair.

    Args:
        name: Base name, with `:part` for slices of a fused tensor.
        tuned_name: The tuned tensor it was compared with.
        rule: The rule that matched them.
        shape: Shape compared.
        base_fingerprint: 16 hex digits over the stored codes compared; not cryptographic. Empty where hashes
            of the files prove both sides equal and nothing was read.
        tuned_fingerprint: The same of the tuned side.
        summary: Counts and norms.
        displacement: Fitted latent displacement (16-bit dtypes at level `full`).
        decay: Verdict on weight decay, where a shrink showed in a sample.
    """

    name: str
    tuned_name: str
    rule: str
    shape: tuple[int, ...]
    base_fingerprint: str
    tuned_fingerprint: str
    summary: TensorSummary
    displacement: DisplacementFit | None
    decay: DecayVerdict | None

    @property
    def entries(self) -> int:
        """Entries compared."""
        return self.summary.native.counts[0].compared if self.summary.native.counts else 0

    @property
    def bitwise_changed(self) -> int:
        """Entries whose stored codes differ."""
        return next((c.changed for c in self.summary.native.counts if c.criterion == "bitwise"), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRollups:
    """Roll-ups of one view, size-weighted and unweighted side by side.

    Args:
        view: The view.
        totals: All, then its parts by kind.
        by_layer: Per layer.
        by_module: Per module type.
        by_layer_and_module: Per layer and module type.
    """

    view: View
    totals: tuple[Rollup, ...]
    by_layer: tuple[Rollup, ...]
    by_module: tuple[Rollup, ...]
    by_layer_and_module: tuple[Rollup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionRecord:
    """How changes depend on precision, over all tensors that one view compares in one dtype.

    Args:
        view: The view.
        dtype: The dtype of the codes compared.
        num_tensors: Tensors in the group.
        entries: Their entries.
        rates: Change rate per exponent of |w_base|.
        ulps: Changed entries by ULP distance.
        hidden: What each tolerance criterion hides of the `value` changes.
        half_ulp: Frozen share that the half-ULP law predicts, when a learning rate was given.
        tolerance: Entries with |Δ| ≥ 2^k, k = -1 … -40; differences are the distribution of |Δ|.
    """

    view: View
    dtype: DType
    num_tensors: int
    entries: int
    rates: tuple[ExponentRate, ...]
    ulps: UlpHistogram
    hidden: tuple[HiddenByTolerance, ...]
    half_ulp: HalfUlpPrediction | None
    tolerance: tuple[TolerancePoint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleRecord:
    """How much of the native changes bf16 shows, over all tensors of one native dtype."""

    dtype: DType
    num_tensors: int
    visible: VisibleShare


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """A stated expectation and whether it held."""

    gate: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffReport:
    """The audit of one pair.

    Args:
        format: `sparsity-audit/diff`.
        version: Version of this record.
        tool: Name and version of the writer.
        base: The base side.
        tuned: The tuned side.
        criteria: Criteria counted, by key.
        mask_criterion: The one that decides mask, gates and axis counts.
        view: The view that decides them.
        level: `full` or `counts`.
        accounts: Where every entry went.
        headlines: Update sparsity by view and criterion.
        rollups: By kind, layer and module, per view.
        precision: Per view and dtype.
        visible: What bf16 shows of wider pairs.
        top: Selections of the largest movements.
        tensors: One record a pair, in base-name order.
        leftovers: Entries without a counterpart.
        skipped: Matched, not compared.
        findings: What a reader must know, in sentences.
        gates: Stated expectations.
        spectral: Spectra of the updates that were asked for by name.
        preset: The number of a paper, where one was asked for.
        structure: Heads, experts and stripes; None at level `counts`.
    """

    format: str = FORMAT
    version: int = VERSION
    tool: str
    base: CheckpointRecord
    tuned: CheckpointRecord
    criteria: tuple[str, ...]
    mask_criterion: str
    view: View
    level: Literal["counts", "full"]
    accounts: AccountRecord
    headlines: tuple[Headline, ...]
    rollups: tuple[ViewRollups, ...]
    precision: tuple[PrecisionRecord, ...]
    visible: tuple[VisibleRecord, ...]
    top: tuple[TopSelection, ...]
    tensors: tuple[TensorRecord, ...]
    leftovers: tuple[LeftoverRecord, ...]
    skipped: tuple[SkippedRecord, ...]
    findings: tuple[str, ...]
    gates: tuple[GateResult, ...] = ()
    spectral: tuple[SpectralRecord, ...] = ()
    preset: PresetResult | None = None
    structure: StructureRecord | None = None

    def headline(self, criterion: str, view: View) -> Headline | None:
        """The headline of one criterion; native where the pair has no served view of its own."""
        found = {(row.criterion, row.view): row for row in self.headlines}
        return found.get((criterion, view), found.get((criterion, View.NATIVE)))

    @property
    def sparsity(self) -> float | None:
        """Update sparsity under the mask criterion in the run's view; None when nothing was compared."""
        row = self.headline(self.mask_criterion, self.view)
        return None if row is None else row.sparsity


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """What a run would do.

    Args:
        base: Resolved base reference.
        tuned: Resolved tuned reference.
        num_pairs: Pairs to compare.
        num_units: Work units.
        num_entries: Entries to compare.
        num_bytes: Bytes to read, both sides.
        accounts: Where every entry of both sides would go.
        criteria: Criteria that would be counted.
        leftovers: Leftover and skipped tensors as `side name: reason`.
        findings: What alignment has to say.
        expected_s: Seconds that comparing takes one core at `rate_bytes_s`; cores and nodes divide it.
        rate_bytes_s: Bytes of both sides that a core compares in a second; stated, not measured here.
        spectral_cost: What the spectra asked for would take; "" when none were.
    """

    base: str
    tuned: str
    num_pairs: int
    num_units: int
    num_entries: int
    num_bytes: int
    accounts: AccountRecord
    criteria: tuple[str, ...]
    leftovers: tuple[str, ...]
    findings: tuple[str, ...]
    expected_s: float
    rate_bytes_s: float
    spectral_cost: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def describe_checkpoint(catalogue: Catalogue) -> CheckpointRecord:
    """The record of one side."""
    by_dtype: dict[str, int] = {}
    for spec in catalogue.tensors.values():
        by_dtype[spec.dtype.label] = by_dtype.get(spec.dtype.label, 0) + spec.num_entries
    return CheckpointRecord(
        reference=catalogue.reference,
        resolved=catalogue.resolved_label,
        files=tuple(FileRecord(name=f.name, num_bytes=f.num_bytes) for f in catalogue.stored_files),
        num_tensors=len(catalogue.tensors),
        num_entries=catalogue.num_entries,
        num_bytes=catalogue.num_bytes,
        entries_by_dtype=dict(sorted(by_dtype.items())),
        aliases=dict(sorted(catalogue.aliases.items())),
        notes=catalogue.notes,
    )


def describe_losses(
    alignment: Alignment,
) -> tuple[tuple[LeftoverRecord, ...], tuple[SkippedRecord, ...]]:
    """Leftovers and skipped pairs as records."""
    leftovers = tuple(
        LeftoverRecord(
            side=x.side, name=x.name, num_entries=x.num_entries, reason=str(x.reason), detail=x.detail
        )
        for x in alignment.leftovers
    )
    skipped = tuple(
        SkippedRecord(
            name=x.name, tuned_name=x.tuned.spec.name, num_entries=x.base.num_entries, reason=x.reason
        )
        for x in alignment.skipped
    )
    return leftovers, skipped


def to_json(report: DiffReport) -> bytes:
    """`report.json`: indented UTF-8 with a final newline, the same bytes for the same record."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def from_json(data: bytes, *, source: str = "report.json") -> DiffReport:
    """The record that `to_json` wrote. Raises CorruptCheckpointError when it is something else."""
    from pydantic import ValidationError

    try:
        found = json.loads(data)
    except ValueError as error:
        raise CorruptCheckpointError(source, "is not JSON") from error
    identity = (found.get("format"), found.get("version")) if isinstance(found, Mapping) else None
    if identity != (FORMAT, VERSION):
        raise CorruptCheckpointError(
            source, f"has format and version {identity}", expected=f"{FORMAT} {VERSION}"
        )
    try:
        return _adapter().validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptCheckpointError(source, f"field {where}: {first['msg']}") from error


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `report.json`, published in docs/."""
    schema = _adapter().json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{FORMAT} {VERSION}",
        **schema,
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(DiffReport)
