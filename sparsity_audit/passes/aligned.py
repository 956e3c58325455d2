"""Several tuned checkpoints matched with one base: the slices that all of them compare.

Contract: nothing is read. A tensor that is not compared in every run, or not alike, is named with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparsity_audit.align.match import match
from sparsity_audit.align.records import Alignment, Pair, TensorSlice
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.passes.plan import WorkUnit, make_plan
from sparsity_audit.types import Criterion, View

__all__ = ["AlignedRuns", "AlignedTensor", "align_runs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedTensor:
    """A slice of the base and its counterpart in every run.

    Args:
        name: The pair's name, in base coordinates.
        base: The base's slice.
        tuned: The runs' slices, parallel to the runs.
        specs: What is asked of each.
    """

    name: str
    base: TensorSlice
    tuned: tuple[TensorSlice, ...]
    specs: tuple[PairSpec, ...]

    @property
    def is_float(self) -> bool:
        """Whether all sides hold floats."""
        return all(spec.native_dtype.kind == "float" for spec in self.specs)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedRuns:
    """What all runs compare.

    Args:
        tensors: By name, in base order.
        units: Work units over them; `pair` indexes `tensors`.
        left_out: Tensor → why it is not among them.
    """

    tensors: tuple[AlignedTensor, ...]
    units: tuple[WorkUnit, ...]
    left_out: Mapping[str, str]

    def parts_of(self, unit: WorkUnit) -> tuple[TensorSlice, ...]:
        """What a unit reads of the base and of every run."""
        tensor = self.tensors[unit.pair]
        return tensor.base, *tensor.tuned


def align_runs(
    base: Catalogue,
    runs: Sequence[Catalogue],
    *,
    maps: Sequence[tuple[str, str]],
    criteria: tuple[Criterion, ...],
    mask: int,
    view: View,
    unit_bytes: int,
    refuse: Callable[[AlignedTensor], str | None] = lambda _tensor: None,
) -> AlignedRuns:
    """Match every run with the base and keep what they have in common.

    Args:
        base: The checkpoint all runs started from.
        runs: The tuned checkpoints.
        maps: Rules that rename tensors of the runs to base names.
        criteria: As in `PairSpec`.
        mask: As in `PairSpec`.
        view: As in `PairSpec`.
        unit_bytes: Aim for at most so many bytes a side and unit.
        refuse: Why the caller cannot take a tensor; None where it can.

    Raises:
        AlignmentError: Names of a run are ambiguous.
    """
    alignments = [match(base, run, maps=tuple(maps)) for run in runs]
    question = {"criteria": criteria, "mask": mask, "view": view}
    plans = [
        make_plan(base, run, found, specs=_specs(found, **question), unit_bytes=unit_bytes)
        for run, found in zip(runs, alignments, strict=True)
    ]
    by_name = [{pair.name: number for number, pair in enumerate(plan.pairs)} for plan in plans]
    left_out: dict[str, str] = {}
    tensors: list[AlignedTensor] = []
    for name in dict.fromkeys(name for names in by_name for name in names):
        if not all(name in names for names in by_name):
            left_out[name] = "not matched in every run"
            continue
        pairs = [plan.pairs[names[name]] for plan, names in zip(plans, by_name, strict=True)]
        tensor = AlignedTensor(
            name=name,
            base=pairs[0].base,
            tuned=tuple(pair.tuned for pair in pairs),
            specs=tuple(plan.specs[names[name]] for plan, names in zip(plans, by_name, strict=True)),
        )
        if any(_place(pair) != _place(pairs[0]) for pair in pairs):
            left_out[name] = "matched with different slices of the base"
        elif any(pair.is_scaled for pair in pairs):
            left_out[name] = "values are codes times block scales, which only `diff` reads"
        elif (reason := refuse(tensor)) is not None:
            left_out[name] = reason
        else:
            tensors.append(tensor)
    place = {tensor.name: number for number, tensor in enumerate(tensors)}
    units = tuple(
        WorkUnit(
            pair=place[plans[0].pairs[unit.pair].name],
            rows=unit.rows,
            cols=unit.cols,
            total_cols=unit.total_cols,
        )
        for unit in plans[0].units
        if plans[0].pairs[unit.pair].name in place
    )
    for run, found in zip(runs, alignments, strict=True):
        for name, reason in _unmatched(run, found):
            left_out.setdefault(name, reason)
    return AlignedRuns(tensors=tuple(tensors), units=units, left_out=left_out)


def _specs(
    alignment: Alignment, *, criteria: tuple[Criterion, ...], mask: int, view: View
) -> tuple[PairSpec, ...]:
    return tuple(
        PairSpec(
            base=p.base.spec.dtype,
            tuned=p.tuned.spec.dtype,
            criteria=criteria,
            mask=mask,
            view=view,
            level="counts",
        )
        for p in alignment.pairs
    )


def _unmatched(run: Catalogue, alignment: Alignment) -> Iterator[tuple[str, str]]:
    """Leftovers and skipped pairs of one run, with the side that holds them."""
    for left in alignment.leftovers:
        side = "the base" if left.side == "base" else run.reference
        yield left.name, f"{left.reason} ({side}, {left.num_entries:,} entries)"
    for pair in alignment.skipped:
        yield pair.name, pair.reason


def _place(pair: Pair) -> tuple[int, tuple[int, ...], int, int]:
    return pair.base.start_entry, pair.base.shape, pair.base.num_runs, pair.base.step
