"""Measure the spectra of chosen updates: read whole matrices, one pair at a time.

Contract: the choice and its cost are known before anything is read. Each pair becomes two float64 matrices in
the asked view and the mask of the criterion (`value` where the criterion is a `top` selection, which has no
rule for a single entry). What is not a float matrix gets a record that says so. Runs in the calling thread,
so the result does not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import numpy as np

from sparsity_audit.align.records import Pair
from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.convert import widen
from sparsity_audit.compare.numpy_kernel import NumpyKernel, to_float64
from sparsity_audit.errors import UsageError
from sparsity_audit.passes.execute import read_values
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import Plan, WorkUnit
from sparsity_audit.stats.spectral import (
    SpectralCost,
    SpectralQuestion,
    spectral_cost,
    spectral_record,
)
from sparsity_audit.stats.spectral_records import SpectralRecord
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import Criterion, DType, View

__all__ = ["SpectralPlan", "choose_spectral", "measure_spectra"]

_FLOPS_PER_S = (2e10, 2e9)
"""Dense float64 factorisations on a few cores and on a slow or busy one; for the note alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralPlan:
    """Which pairs are measured, and how.

    Args:
        pairs: Indices into the plan's pairs, in plan order.
        refusals: Reason for each of `pairs` that cannot be measured; "" where it can.
        max_dim: A side longer than this is measured by a sketch.
        num_draws: Scattered updates drawn for the reference.
        cost: Operations of all, and bytes of the largest.
    """

    pairs: tuple[int, ...]
    refusals: tuple[str, ...]
    max_dim: int
    num_draws: int
    cost: SpectralCost

    @property
    def note(self) -> str:
        """The cost in a line for the user."""
        refused = len(self.pairs) - self.refusals.count("")
        measured = len(self.pairs) - refused
        matrices = f"{measured} matrix" if measured == 1 else f"{measured} matrices"
        matrices += f" ({refused} more refused)" if refused else ""
        times = dict.fromkeys(_time_text(self.cost.flops / rate) for rate in _FLOPS_PER_S)
        return (
            f"--spectral: {matrices}, each with {self.num_draws} random references: about "
            f"{self.cost.flops:.1e} float64 operations, {' to '.join(times)}; at the peak "
            f"{-(-self.cost.num_bytes // 2**20):,} MiB"
        )


def choose_spectral(plan: Plan, patterns: Sequence[str], *, max_dim: int, num_draws: int = 3) -> SpectralPlan:
    """The pairs that the globs name, and what they cost.

    Args:
        plan: The plan of the run.
        patterns: Globs of pair names; `*` matches dots as well.
        max_dim: A side longer than this is measured by a sketch.
        num_draws: Scattered updates to draw for each matrix.

    Raises:
        UsageError: A glob that matches no compared pair.
    """
    for pattern in patterns:
        if not any(fnmatchcase(pair.name, pattern) for pair in plan.pairs):
            raise UsageError(
                f"--spectral {pattern!r}",
                "matches no compared tensor",
                remedy="`sparsity-audit inspect BASE` lists the names; * matches dots as well",
            )
    chosen = tuple(
        i for i, pair in enumerate(plan.pairs) if any(fnmatchcase(pair.name, pattern) for pattern in patterns)
    )
    refusals = tuple(_refusal(plan, i) for i in chosen)
    costs = [
        spectral_cost(*plan.pairs[i].base.shape, max_dim=max_dim, num_draws=num_draws)
        for i, refusal in zip(chosen, refusals, strict=True)
        if not refusal
    ]
    return SpectralPlan(
        pairs=chosen,
        refusals=refusals,
        max_dim=max_dim,
        num_draws=num_draws,
        cost=SpectralCost(
            flops=sum(cost.flops for cost in costs), num_bytes=max((c.num_bytes for c in costs), default=0)
        ),
    )


def measure_spectra(
    plan: Plan, tallies: Sequence[Tally], chosen: SpectralPlan, *, criterion: Criterion, view: View
) -> tuple[SpectralRecord, ...]:
    """One record for each chosen pair, in plan order.

    Args:
        plan: The plan of the run.
        tallies: The pairs' tallies; their fingerprints seed the references.
        chosen: What `choose_spectral` returned.
        criterion: Decides the mask.
        view: The view to measure.

    Raises:
        ChangedInputError: A file changed during the run.
    """
    criterion = Criterion(kind="value") if criterion.kind == "top" else criterion
    base, tuned = OpenFiles(plan.base), OpenFiles(plan.tuned)
    records = []
    try:
        for number, refusal in zip(chosen.pairs, chosen.refusals, strict=True):
            pair, spec = plan.pairs[number], plan.specs[number]
            served = view is View.SERVED and spec.has_served_view
            if refusal:
                records.append(
                    SpectralRecord(
                        name=pair.name,
                        shape=pair.base.shape,
                        view=View.SERVED if served else View.NATIVE,
                        criterion=criterion.key,
                        refused=refusal,
                    )
                )
                continue
            matrices = _Matrices(plan, number, criterion, served=served)
            matrices.read(base, tuned)
            question = SpectralQuestion(
                name=pair.name,
                view=View.SERVED if served else View.NATIVE,
                dtype=_grid(pair, spec.tuned, served=served),
                criterion=criterion.key,
                max_dim=chosen.max_dim,
                num_draws=chosen.num_draws,
                seed=_seed(pair.name, tallies[number]),
            )
            records.append(spectral_record(matrices.base, matrices.tuned, matrices.mask, question))
    finally:
        base.close()
        tuned.close()
    return tuple(records)


class _Matrices:
    """Both sides of a pair in float64, and its mask."""

    def __init__(self, plan: Plan, number: int, criterion: Criterion, *, served: bool) -> None:
        self._plan, self._number, self._served = plan, number, served
        self._kernel = NumpyKernel()
        spec = plan.specs[number].of_values
        standard = (Criterion(kind="bitwise"), Criterion(kind="value"))
        criteria = tuple(dict.fromkeys((*standard, criterion)))
        self._dtype = DType.BF16 if served else spec.native_dtype
        self._question = KernelSpec(
            dtype=self._dtype, criteria=criteria, mask=criteria.index(criterion), level="counts"
        )
        shape = plan.pairs[number].base.shape
        self.base, self.tuned = np.empty(shape), np.empty(shape)
        self.mask = np.empty(shape, dtype=np.bool_)

    def read(self, base: OpenFiles, tuned: OpenFiles) -> None:
        """Fill the matrices block by block."""
        spec = self._plan.specs[self._number].of_values
        for unit in (unit for unit in self._plan.units if unit.pair == self._number):
            for block, base_codes, tuned_codes in read_values(self._plan, unit, base=base, tuned=tuned):
                place = (
                    slice(block.row, block.row + block.num_rows),
                    slice(block.col, block.col + block.num_cols),
                )
                sides = self._codes(base_codes, spec.base), self._codes(tuned_codes, spec.tuned)
                self.base[place], self.tuned[place] = (to_float64(codes, self._dtype) for codes in sides)
                self.mask[place] = self._changed(unit, *sides)

    def _codes(self, codes: np.ndarray, stored: DType) -> np.ndarray:
        if not self._served:
            return widen(codes, stored, self._dtype)
        rounded = np.empty(codes.shape, dtype=CODE_DTYPE[2])
        self._kernel.to_bf16(codes, stored, rounded)
        return rounded

    def _changed(self, unit: WorkUnit, base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
        packed = np.zeros((len(base), -(-base.shape[1] // 8)), dtype=np.uint8)
        counts = Accumulator(self._question, rows=unit.rows[1] - unit.rows[0], cols=unit.total_cols)
        self._kernel.compare(base, tuned, counts, first_row=0, first_col=0, bits=packed)
        return np.unpackbits(packed, axis=1, count=base.shape[1], bitorder="little").astype(np.bool_)


def _refusal(plan: Plan, number: int) -> str:
    pair, dtype = plan.pairs[number], plan.specs[number].native_dtype
    if dtype.kind != "float":
        return f"{dtype.label} entries: only float matrices have a spectrum here"
    if len(pair.base.shape) != 2:
        return f"shape {list(pair.base.shape)} is no matrix"
    if prod(pair.base.shape) == 0:
        return "it has no entries"
    return ""


def _grid(pair: Pair, stored: DType, *, served: bool) -> DType | None:
    """The dtype whose steps the tuned values follow; none does where they are codes times scales."""
    if served:
        return DType.BF16
    return None if pair.tuned.scale is not None else stored


def _seed(name: str, tally: Tally) -> int:
    text = f"spectral\0{name}\0{tally.base_fingerprint:016x}\0{tally.tuned_fingerprint:016x}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _time_text(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
