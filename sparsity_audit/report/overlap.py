"""The versioned record of overlaps, and its JSON.

Contract: exact counts, fractions in [0, 1]; None is undefined, never 0. Every figure of chance stands under
the name of its null. Where no base was given the magnitude null is absent, and `notes` says how to get it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsity_audit.report.across_runs import FactorTable, OverlapMatrix, OverRuns
from sparsity_audit.stats.agreement import DeltaAgreement
from sparsity_audit.stats.consensus import Consensus
from sparsity_audit.stats.finer import ConvergenceRow
from sparsity_audit.stats.ladder import Ladder
from sparsity_audit.stats.overlap import PairOverlap
from sparsity_audit.stats.phantom import PhantomDensity
from sparsity_audit.stats.uncertainty import Heterogeneity

__all__ = [
    "OVERLAP_FORMAT",
    "OVERLAP_VERSION",
    "GroupOverlap",
    "LeftOutTensor",
    "OverlapReport",
    "PairRecord",
    "RunRecord",
    "WalkRecord",
    "overlap_json_schema",
    "overlap_to_json",
]

OVERLAP_FORMAT = "sparsity-audit/overlap"
OVERLAP_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run.

    Args:
        label: What tables and figures call it.
        reference: As it was given.
        kind: `mask`, or `checkpoint` whose mask was made for this comparison.
        changed: Entries changed, among those compared.
        density: Update density: changed ÷ compared; None when nothing was compared.
        is_reference: Whether it is the run that learned nothing.
    """

    label: str
    reference: str
    kind: Literal["mask", "checkpoint"]
    changed: int
    density: float | None
    is_reference: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOverlap:
    """Overlap within a part of the model.

    Args:
        key: A layer, a module type, or a tensor.
        overlap: Its overlap and chance levels; `uniform` is uniform within the part.
    """

    key: str
    overlap: PairOverlap


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """Two runs.

    Args:
        a: Label of the first.
        b: Label of the second.
        overall: Over all compared entries.
        ladder: What accounts for it, beside the reference run where there is one.
        by_layer: The same by layer; tensors outside of layers are left out.
        by_module: By module type.
        by_tensor: By tensor.
        convergence: Chance under coarser and finer strata than `magnitude`; empty where not counted.
        phantom: Densities of the phantoms; None where there is no phantom null.
        heterogeneity: How the excess share over the ladder's highest rung varies over tensors.
        delta: Signs and cosine of the two Δ; None where not both runs are checkpoints.
    """

    a: str
    b: str
    overall: PairOverlap
    ladder: Ladder
    by_layer: tuple[GroupOverlap, ...]
    by_module: tuple[GroupOverlap, ...]
    by_tensor: tuple[GroupOverlap, ...]
    convergence: tuple[ConvergenceRow, ...]
    phantom: PhantomDensity | None
    heterogeneity: Heterogeneity | None
    delta: DeltaAgreement | None

    @property
    def name(self) -> str:
        """Both labels."""
        return f"{self.a} × {self.b}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkRecord:
    """Two simulated walks of weights stored in bf16, which know nothing but base, steps and step size.

    Args:
        steps: Number of steps, each rounded to bf16.
        lr: Size of each; its sign is a fair coin.
        seed: Of the coins.
        entries: Weights that walk: those stored in bf16.
        density: Share of them that ends elsewhere; the walk's own, to be read beside the runs'.
        jaccard: Of two walks.
    """

    steps: int
    lr: float
    seed: int
    entries: int
    density: float | None
    jaccard: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOutTensor:
    """A tensor that a forced comparison could not use."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapReport:
    """Overlaps of two or more runs.

    Args:
        format: `sparsity-audit/overlap`.
        version: Version of this record.
        tool: Name and version of the writer.
        criterion: What "changed" means.
        view: `native` or `served`.
        base: The base that gave the strata of |w_base|; None where none was given.
        compared: Entries compared in every run.
        runs: The runs.
        pairs: Every pair; the first one is the headline.
        walk: The walk that was asked for.
        left_out: Tensors that were not used.
        notes: What a reader must know: forced differences, nulls that are absent and why.
        consensus: In how many runs other than the reference an entry changed; None below three of them.
        over_runs: Means over the pairs of these runs, with intervals over runs or the reason for none.
        matrix: All pairs in the order of a clustering; None below three runs.
        factors: What runs have in common by design, and what it does; None without a file that says so.
    """

    format: str = OVERLAP_FORMAT
    version: int = OVERLAP_VERSION
    tool: str
    criterion: str
    view: str
    base: str | None
    compared: int
    runs: tuple[RunRecord, ...]
    pairs: tuple[PairRecord, ...]
    walk: WalkRecord | None
    left_out: tuple[LeftOutTensor, ...]
    notes: tuple[str, ...]
    consensus: Consensus | None = None
    over_runs: OverRuns | None = None
    matrix: OverlapMatrix | None = None
    factors: FactorTable | None = None

    @property
    def headline(self) -> PairRecord:
        """The first pair without the reference run, or the first one."""
        return self.pairs[0]

    @property
    def reference_pair(self) -> PairRecord | None:
        """The headline's first run against the reference."""
        label = next((run.label for run in self.runs if run.is_reference), None)
        if label is None or label in (self.headline.a, self.headline.b):
            return None
        return next(pair for pair in self.pairs if {pair.a, pair.b} == {self.headline.a, label})


def overlap_to_json(report: OverlapReport) -> bytes:
    """`overlap.json`: indented UTF-8 with a final newline."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def overlap_json_schema() -> dict[str, Any]:
    """The JSON Schema of `overlap.json`."""
    schema = _adapter().json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{OVERLAP_FORMAT} {OVERLAP_VERSION}",
        **schema,
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(OverlapReport)
