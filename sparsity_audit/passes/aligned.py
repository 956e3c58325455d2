"""Several checkpoints matched with one base, and read together.

Contract: a tensor is read when every run matches it with the same slice of the base and all hold float
numbers; any other is named with the reason. Nothing is read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsity_audit.align.match import match
from sparsity_audit.align.records import Pair
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.passes.plan import Plan, WorkUnit, make_plan
from sparsity_audit.types import Criterion, View

__all__ = ["AlignedRuns", "align_runs"]

_UNIT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedRuns:
    """A base and K runs.

    Args:
        plans: The plan of each run.
        numbers: For each run, name of a pair → its place in the plan.
        left_out: Pair → why it is not read.
    """

    plans: tuple[Plan, ...]
    numbers: tuple[Mapping[str, int], ...]
    left_out: Mapping[str, str]

    @property
    def units(self) -> list[WorkUnit]:
        """Work units, of the first run's plan."""
        return [unit for unit in self.plans[0].units if self.name(unit) not in self.left_out]

    def name(self, unit: WorkUnit) -> str:
        """The pair of a unit."""
        return self.plans[0].pairs[unit.pair].name

    def pairs(self, name: str) -> tuple[Pair, ...]:
        """That pair of every run."""
        return tuple(
            plan.pairs[numbers[name]] for plan, numbers in zip(self.plans, self.numbers, strict=True)
        )

    def specs(self, name: str) -> tuple[PairSpec, ...]:
        """Its questions, of every run."""
        return tuple(
            plan.specs[numbers[name]] for plan, numbers in zip(self.plans, self.numbers, strict=True)
        )


def align_runs(
    base: Catalogue, runs: Sequence[Catalogue], *, maps: Sequence[tuple[str, str]], view: View
) -> AlignedRuns:
    """Match every run with the base.

    Args:
        base: The checkpoint all runs started from.
        runs: The runs, at least one.
        maps: Rules that rename tensors of the runs to base names.
        view: The view whose numbers count.

    Raises:
        AlignmentError: As `match`.
    """
    plans = tuple(_plan(base, run, maps, view) for run in runs)
    numbers = tuple({pair.name: number for number, pair in enumerate(plan.pairs)} for plan in plans)
    aligned = AlignedRuns(plans=plans, numbers=numbers, left_out={})
    left_out = {}
    for name in sorted({name for names in numbers for name in names}):
        reason = _why_not(aligned, name)
        if reason is not None:
            left_out[name] = reason
    return AlignedRuns(plans=plans, numbers=numbers, left_out=left_out)


def _why_not(aligned: AlignedRuns, name: str) -> str | None:
    if not all(name in names for names in aligned.numbers):
        return "not matched in every run"
    pairs, specs = aligned.pairs(name), aligned.specs(name)
    if any(_place(pair) != _place(pairs[0]) for pair in pairs):
        return "matched with different slices of the base"
    if any(pair.is_scaled for pair in pairs):
        return "values are scaled: its Δ are not read"
    if any(spec.native_dtype.kind != "float" for spec in specs):
        return "no float numbers"
    return None


def _place(pair: Pair) -> tuple[int, tuple[int, ...], int, int]:
    return pair.base.start_entry, pair.base.shape, pair.base.num_runs, pair.base.step


def _plan(base: Catalogue, run: Catalogue, maps: Sequence[tuple[str, str]], view: View) -> Plan:
    alignment = match(base, run, maps=tuple(maps))
    criteria = (Criterion.parse("bitwise"), Criterion.parse("value"))
    specs = tuple(
        PairSpec(base=p.base.spec.dtype, tuned=p.tuned.spec.dtype, criteria=criteria, view=view)
        for p in alignment.pairs
    )
    return make_plan(base, run, alignment, specs=specs, unit_bytes=_UNIT_BYTES)
