"""From merged tallies to the report's record; pure."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

from sparsity_audit.align.records import Alignment, Pair
from sparsity_audit.align.roles import Role, role_of
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.accumulate import Level
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.passes.topk import TopSelection
from sparsity_audit.report.schema import (
    AccountRecord,
    DiffReport,
    PrecisionRecord,
    TensorRecord,
    ViewRollups,
    VisibleRecord,
    describe_checkpoint,
    describe_losses,
)
from sparsity_audit.report.structure import StructureRecord, build_structure, structure_findings
from sparsity_audit.stats.decay import decay_verdict
from sparsity_audit.stats.findings import findings
from sparsity_audit.stats.precision import change_rates, hidden_by_tolerance, merge_views, ulp_histogram
from sparsity_audit.stats.rollup import (
    TensorTally,
    by_layer,
    by_layer_and_module,
    by_module,
    headlines,
    roll_up,
    summarise,
    totals,
)
from sparsity_audit.stats.rounding import fit_displacement, half_ulp_interval
from sparsity_audit.stats.stripes import MatrixNull
from sparsity_audit.stats.structure import StructuredTensor
from sparsity_audit.stats.tally import Tally
from sparsity_audit.stats.tolerance import tolerance_curve
from sparsity_audit.stats.visible import visible_share
from sparsity_audit.types import Criterion, DType, View

__all__ = ["ReportInputs", "build_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInputs:
    """What a finished pass hands over.

    Args:
        base: The base side.
        tuned: The tuned side.
        alignment: How they match.
        specs: What was asked of each pair.
        tallies: Merged tallies, parallel to the alignment's pairs.
        criterion: The mask criterion.
        tops: Selections of the largest movements.
        view: The view that decides the mask.
        level: How much was counted.
        half_ulp: Learning rate and dtype of the stored weights, when they were given.
        nulls: What magnitudes alone give, parallel to the pairs; None where the base was not read for it.
        nulls_note: Why it was not.
    """

    base: Catalogue
    tuned: Catalogue
    alignment: Alignment
    specs: Sequence[PairSpec]
    tallies: Sequence[Tally]
    criterion: Criterion
    tops: tuple[TopSelection, ...]
    view: View
    level: Level
    half_ulp: tuple[float, DType] | None
    nulls: Sequence[MatrixNull | None] | None = None
    nulls_note: str = ""


def build_report(inputs: ReportInputs) -> DiffReport:
    """The record of one audit, without gates."""
    alignment = inputs.alignment
    roles = [role_of(pair.name, inputs.base.config) for pair in alignment.pairs]
    has_stacks = len({role.stack for role in roles if role.layer is not None}) > 1
    tensors = [
        _label(pair, spec, tally, role, stack=role.stack if has_stacks else "")
        for pair, spec, tally, role in zip(alignment.pairs, inputs.specs, inputs.tallies, roles, strict=True)
    ]
    records = tuple(
        _tensor_record(pair, spec, tensor)
        for pair, spec, tensor in zip(alignment.pairs, inputs.specs, tensors, strict=True)
    )
    rows = headlines(tensors)
    leftovers, skipped = describe_losses(alignment)
    decay = {record.name: record.decay for record in records if record.decay is not None}
    structure = None if inputs.level == "counts" else _structure(inputs, roles, tensors)
    return DiffReport(
        tool=f"sparsity-audit {importlib.metadata.version('sparsity-audit')}",
        base=describe_checkpoint(inputs.base),
        tuned=describe_checkpoint(inputs.tuned),
        criteria=tuple(dict.fromkeys(row.criterion for row in rows)),
        mask_criterion=inputs.criterion.key,
        view=inputs.view,
        level=inputs.level,
        accounts=AccountRecord(base=alignment.account("base"), tuned=alignment.account("tuned")),
        headlines=rows,
        rollups=tuple(_rollups(tensors, view) for view in dict.fromkeys(row.view for row in rows)),
        precision=() if inputs.level == "counts" else _precision(tensors, inputs.half_ulp),
        visible=() if inputs.level == "counts" else _visible(tensors),
        top=inputs.tops,
        tensors=records,
        leftovers=leftovers,
        skipped=skipped,
        findings=(
            *alignment.findings,
            *findings(tensors, decay=decay),
            *(() if structure is None else structure_findings(structure)),
        ),
        structure=structure,
    )


def _structure(
    inputs: ReportInputs, roles: Sequence[Role], tensors: Sequence[TensorTally]
) -> StructureRecord:
    counted = [
        StructuredTensor(
            name=pair.name, role=role, layer=tensor.layer_label, shape=pair.base.shape, axes=axes
        )
        for pair, role, tensor in zip(inputs.alignment.pairs, roles, tensors, strict=True)
        if (axes := tensor.tally.axes) is not None
    ]
    assert len(counted) == len(tensors), "level `full` counts rows and columns of every pair"
    return build_structure(
        counted,
        inputs.base.config,
        criterion=inputs.criterion.key,
        view=inputs.view,
        nulls=inputs.nulls,
        note=inputs.nulls_note,
    )


def _label(pair: Pair, spec: PairSpec, tally: Tally, role: Role, *, stack: str) -> TensorTally:
    return TensorTally(
        name=pair.name,
        layer=role.layer,
        module=role.module,
        kind=role.kind,
        base_dtype=spec.base,
        tuned_dtype=spec.tuned,
        native_dtype=spec.native_dtype,
        tally=tally,
        stack=stack,
    )


def _tensor_record(pair: Pair, spec: PairSpec, tensor: TensorTally) -> TensorRecord:
    tally, dtype = tensor.tally, tensor.native_dtype
    fits = spec.level == "full" and dtype in (DType.BF16, DType.F16)
    return TensorRecord(
        name=pair.name,
        tuned_name=pair.tuned.spec.name,
        rule=pair.rule,
        shape=pair.base.shape,
        base_fingerprint="" if spec.unread else f"{tally.base_fingerprint:016x}",
        tuned_fingerprint="" if spec.unread else f"{tally.tuned_fingerprint:016x}",
        summary=summarise(tensor),
        displacement=fit_displacement(tally.native, dtype) if fits else None,
        decay=None if spec.shrink is None else decay_verdict(tally, shrink=spec.shrink),
    )


def _rollups(tensors: Sequence[TensorTally], view: View) -> ViewRollups:
    return ViewRollups(
        view=view,
        totals=totals(tensors, view=view),
        by_layer=roll_up(tensors, key=by_layer, view=view),
        by_module=roll_up(tensors, key=by_module, view=view),
        by_layer_and_module=roll_up(tensors, key=by_layer_and_module, view=view),
    )


def _precision(
    tensors: Sequence[TensorTally], half_ulp: tuple[float, DType] | None
) -> tuple[PrecisionRecord, ...]:
    records = []
    for view in View:
        groups: dict[DType, list[TensorTally]] = {}
        for tensor in tensors:
            shown = view is View.NATIVE or tensor.tally.served is not None
            if shown and tensor.native_dtype.kind == "float":
                groups.setdefault(tensor.view_dtype(view), []).append(tensor)
        for dtype, members in groups.items():
            merged = merge_views(member.view(view) for member in members)
            tolerances = [
                c for key in merged.changed if (c := Criterion.parse(key)).kind in ("atol", "rel", "ulp")
            ]
            law = None
            if half_ulp is not None:
                law = half_ulp_interval(merged, dtype, lr=half_ulp[0], weights_dtype=half_ulp[1])
            records.append(
                PrecisionRecord(
                    view=view,
                    dtype=dtype,
                    num_tensors=len(members),
                    entries=merged.entries,
                    rates=change_rates(merged, dtype),
                    ulps=ulp_histogram(merged),
                    hidden=tuple(hidden_by_tolerance(merged, criterion) for criterion in tolerances),
                    half_ulp=law,
                    tolerance=tolerance_curve(merged, dtype),
                )
            )
    return tuple(records)


def _visible(tensors: Sequence[TensorTally]) -> tuple[VisibleRecord, ...]:
    groups: dict[DType, list[TensorTally]] = {}
    for tensor in tensors:
        if tensor.tally.served is not None:
            groups.setdefault(tensor.native_dtype, []).append(tensor)
    return tuple(
        VisibleRecord(
            dtype=dtype,
            num_tensors=len(members),
            visible=visible_share(
                merge_views(t.tally.native for t in members),
                merge_views(t.tally.served for t in members if t.tally.served is not None),
                dtype,
            ),
        )
        for dtype, members in groups.items()
    )
