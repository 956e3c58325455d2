"""What is asked about a pair: everything that shapes the report, and the plan that follows from it.

Contract: two runs with equal inputs and equal questions write equal bytes. The question is plain JSON, so
that the shares of a split run carry it and `merge` needs no arguments; nothing is read but headers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from sparsity_audit.align.match import match
from sparsity_audit.align.records import Alignment
from sparsity_audit.api.gates import Expectations
from sparsity_audit.api.presets import preset_criteria
from sparsity_audit.api.sides import open_sides
from sparsity_audit.api.structure import StructureChoice, verify_choice
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.accumulate import Level
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.errors import AlignmentError, UsageError
from sparsity_audit.passes.plan import Plan, default_criteria, make_plan
from sparsity_audit.passes.probe import probe_shrinks
from sparsity_audit.types import Criterion, DType, View

__all__ = ["SPECTRAL_MAX_DIM", "DiffQuestion", "Prepared", "counted_criteria", "prepare"]

SPECTRAL_MAX_DIM = 4096
_UNIT_BYTES = 64 << 20
_WEIGHTS_DTYPES = {"bf16": DType.BF16, "fp32": DType.F32}


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffQuestion:
    """The options of `diff` that shape its report and mask; see there what each means."""

    criteria: tuple[Criterion, ...] = ()
    view: View = View.NATIVE
    maps: tuple[tuple[str, str], ...] = ()
    stats: Level = "full"
    structure: StructureChoice = "auto"
    spectral: tuple[str, ...] = ()
    spectral_max_dim: int = SPECTRAL_MAX_DIM
    lr: float | None = None
    weights_dtype: str | None = None
    preset: str | None = None
    figures: bool = False
    parquet: bool = False
    expectations: Expectations = field(default_factory=Expectations)
    unit_bytes: int | None = None

    @classmethod
    def of(
        cls,
        *,
        criteria: Sequence[Criterion | str] = (),
        view: View | str = View.NATIVE,
        maps: Sequence[tuple[str, str]] = (),
        spectral: Sequence[str] = (),
        preset: str | None = None,
        expectations: Expectations | None = None,
        **others: Any,
    ) -> DiffQuestion:
        """The question in the words of `diff`, a preset's criteria among its own. Raises UsageError."""
        if preset is not None:
            criteria = preset_criteria(preset, criteria)
        return cls(
            criteria=tuple(c if isinstance(c, Criterion) else Criterion.parse(c) for c in criteria),
            view=View(view),
            maps=tuple((pattern, replacement) for pattern, replacement in maps),
            spectral=tuple(spectral),
            preset=preset,
            expectations=expectations or Expectations(),
            **others,
        )

    @property
    def half_ulp(self) -> tuple[float, DType] | None:
        """Learning rate and stored dtype, where the half-ULP law is asked for. Raises UsageError."""
        lr, weights_dtype = self.lr, self.weights_dtype
        if (lr is None) != (weights_dtype is None):
            raise UsageError(
                "--lr and --weights-dtype",
                "one is given without the other",
                expected="both: the half-ULP law holds for weights stored in bf16 between steps",
            )
        if lr is None or weights_dtype is None:
            return None
        if not 0 < lr < float("inf"):
            raise UsageError("--lr", f"{lr} is no learning rate", expected="a positive number")
        if weights_dtype not in _WEIGHTS_DTYPES:
            raise UsageError("--weights-dtype", repr(weights_dtype), expected=" or ".join(_WEIGHTS_DTYPES))
        return lr, _WEIGHTS_DTYPES[weights_dtype]

    def verify(self, alignment: Alignment) -> None:
        """Refuse what would only fail at the end of a run. Raises UsageError or MissingExtraError."""
        self.expectations.verify_patterns(alignment)
        _ = self.half_ulp
        verify_choice(self.structure, self.stats)
        if self.parquet:
            from sparsity_audit.report.parquet import verify_parquet

            verify_parquet()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            name: getattr(self, name)
            for name in ("stats", "structure", "spectral_max_dim", "lr", "weights_dtype", "preset")
        } | {
            "criteria": [criterion.key for criterion in self.criteria],
            "view": self.view.value,
            "maps": [list(rule) for rule in self.maps],
            "spectral": list(self.spectral),
            "figures": self.figures,
            "parquet": self.parquet,
            "expectations": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(self.expectations).items()
            },
            "unit_bytes": self.unit_bytes,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> DiffQuestion:
        """The question that `to_json` wrote."""
        stated: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in record["expectations"].items()
        }
        asked = {name: value for name, value in record.items() if name not in ("expectations", "criteria")}
        asked |= {"maps": tuple((pattern, text) for pattern, text in record["maps"])}
        asked |= {"spectral": tuple(record["spectral"]), "view": View(record["view"])}
        criteria = tuple(Criterion.parse(text) for text in record["criteria"])
        return cls(criteria=criteria, expectations=Expectations(**stated), **asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Both sides, how they match, and what will be read.

    Args:
        base: The base checkpoint.
        tuned: The tuned checkpoint.
        alignment: How they match.
        plan: The work units.
        criterion: What decides the mask.
        tops: The `top` criteria among those asked for.
    """

    base: Catalogue
    tuned: Catalogue
    alignment: Alignment
    plan: Plan
    criterion: Criterion
    tops: tuple[Criterion, ...]


def prepare(
    base: str | Path | Catalogue,
    tuned: str | Path | Catalogue,
    question: DiffQuestion,
    *,
    probe: bool = True,
    skip_equal: bool = False,
) -> Prepared:
    """Open both sides and plan the comparison.

    Args:
        base: As in `diff`.
        tuned: As in `diff`.
        question: What is asked.
        probe: Read the sample that tells the shrink of fp32 pairs; without it headers alone are read, and the
            plan is one to look at, not to run.
        skip_equal: Read nothing of files whose hashes are equal, where the question allows it: masks, spectra
            and draws that are keyed by fingerprints need the bytes.

    Raises:
        AlignmentError: Nothing can be compared.
        SparsityAuditError: As `open_checkpoint` raises it.
    """
    counted = counted_criteria(question)
    chosen = question.criteria[0] if question.criteria else Criterion.parse("value")
    sides = open_sides(base, tuned)
    alignment = match(*sides, maps=question.maps)
    if not alignment.pairs:
        raise AlignmentError(
            f"{sides[0].reference} and {sides[1].reference}",
            f"no tensor of {len(sides[0].tensors)} and {len(sides[1].tensors)} can be compared",
            remedy="check that both are the same architecture; rename with --map REGEX=REPL",
        )
    shrinks: Sequence[float | None] = [None] * len(alignment.pairs)
    if probe and question.stats == "full":
        shrinks = probe_shrinks(*sides, alignment.pairs)

    @cache  # pairs by the ten thousand ask the same
    def spec_of(base: DType, tuned: DType, shrink: float | None, scaled: bool) -> PairSpec:  # noqa: FBT001
        return PairSpec(
            base=base,
            tuned=tuned,
            criteria=counted,
            mask=counted.index(chosen) if chosen in counted else 1,
            view=question.view,
            level=question.stats,
            shrink=shrink,
            scaled=scaled,
        )

    specs = tuple(
        spec_of(pair.base.spec.dtype, pair.tuned.spec.dtype, shrink, pair.is_scaled)
        for pair, shrink in zip(alignment.pairs, shrinks, strict=True)
    )
    tops = tuple(dict.fromkeys(c for c in question.criteria if c.kind == "top"))
    plan = make_plan(
        *sides,
        alignment,
        specs=specs,
        unit_bytes=question.unit_bytes or _UNIT_BYTES,
        skip_equal=skip_equal and not question.spectral and not tops,
    )
    return Prepared(
        base=sides[0],
        tuned=replace(sides[1], notes=(*sides[1].notes, *plan.notes)),
        alignment=alignment,
        plan=plan,
        criterion=chosen,
        tops=tops,
    )


def counted_criteria(question: DiffQuestion) -> tuple[Criterion, ...]:
    """What the pass counts: the published criteria and those asked for, without `top`."""
    return default_criteria(question.criteria, level=question.stats)
