"""The nulls that need more than one pass over the bits: which apply to a comparison, and their expectations.

Contract: every null of the default table is either computed or absent with its reason among the notes. `auto`
leaves out what would take longer than `AUTO_VISITS` visits of an entry; `all` never does; `counts` keeps to
what follows from the counts of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from sparsity_audit.masks.metadata import MaskTensor
from sparsity_audit.masks.reader import MaskCatalogue
from sparsity_audit.passes.base_counts import count_magnitudes, count_rooms
from sparsity_audit.passes.base_strata import MagnitudeGrouping, StrataGrouping
from sparsity_audit.passes.engine import Workers
from sparsity_audit.passes.many import count_overlaps
from sparsity_audit.passes.matrices import matrix_expectations
from sparsity_audit.report.overlap import WalkRecord
from sparsity_audit.stats.chance import Expectation, hypergeometric
from sparsity_audit.stats.finer import ConvergenceRow, convergence, quantiles_of_magnitudes
from sparsity_audit.stats.overlap import PHANTOM, ROW_COLUMN, ROW_COLUMN_MAGNITUDE, StratumTable
from sparsity_audit.stats.phantom import Phantom, PhantomDensity, phantom_of_table
from sparsity_audit.stats.rooms import Rooms
from sparsity_audit.stats.walks import walk_overlap
from sparsity_audit.types import DType, View

__all__ = ["AUTO_VISITS", "Compared", "MoreNulls", "NullChoice", "WalkQuestion", "more_nulls", "random_walk"]

NullChoice = Literal["auto", "all", "counts"]

AUTO_VISITS = 1 << 28
"""Entries × (runs + pairs) up to which `auto` fits rows and columns: about a minute of one core."""

_ROUNDED = (DType.BF16, DType.F16)
_QUANTILES = (20, 100, 400)
_WALKERS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkQuestion:
    """A walk to be simulated: `steps` steps of ±`lr`, each rounded to bf16, from `seed`."""

    steps: int
    lr: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What is compared, as the first pass found it.

    Args:
        masks: The runs' masks.
        tensors: What is compared.
        tables: Counts by tensor and stratum.
        pairs: Pairs of runs.
        criterion: Key of the masks' criterion.
        view: Their view.
        strata: Strata of the base; None without a base.
        finer: Finer strata of it.
        workers: Threads.
    """

    masks: Sequence[MaskCatalogue]
    tensors: Mapping[str, MaskTensor]
    tables: Sequence[StratumTable]
    pairs: Sequence[tuple[int, int]]
    criterion: str
    view: str
    strata: StrataGrouping | None
    finer: MagnitudeGrouping | None
    workers: Workers


@dataclass(slots=True, kw_only=True)
class MoreNulls:
    """Expectations and what belongs to them, by pair of runs.

    Args:
        expectations: Tensor → null → expectation.
        phantoms: Densities of the phantoms.
        convergence: Chance under finer and coarser strata.
        notes: Why a null is absent.
    """

    expectations: dict[tuple[int, int], dict[str, dict[str, Expectation]]] = field(default_factory=dict)
    phantoms: dict[tuple[int, int], PhantomDensity] = field(default_factory=dict)
    convergence: dict[tuple[int, int], tuple[ConvergenceRow, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, pair: tuple[int, int], found: Mapping[str, Mapping[str, Expectation]]) -> None:
        """Further nulls of a pair."""
        known = self.expectations.setdefault(pair, {})
        for tensor, nulls in found.items():
            known.setdefault(tensor, {}).update(nulls)


def more_nulls(compared: Compared, choice: NullChoice, *, on_note: Callable[[str], None]) -> MoreNulls:
    """All nulls beside `uniform`, `per-tensor` and `magnitude`, and the convergence table.

    Raises:
        MaskError: A mask is damaged.
        ChangedInputError: A file changed during a pass.
    """
    found = MoreNulls()
    if choice == "counts":
        found.notes.append(
            f"no {ROW_COLUMN}, {ROW_COLUMN_MAGNITUDE} and {PHANTOM} nulls: left out by request"
        )
        return found
    visits = sum(int(table.entries.sum()) for table in compared.tables)
    visits *= len(compared.masks) + len(compared.pairs)
    is_small = choice == "all" or visits <= AUTO_VISITS
    if is_small:
        _add_matrices(found, compared, on_note)
        _add_convergence(found, compared)
    else:
        found.notes.append(
            f"no {ROW_COLUMN} and {ROW_COLUMN_MAGNITUDE} nulls and no finer strata: they would take "
            f"{visits:.2g} visits of an entry, about {visits / AUTO_VISITS:.0f} minutes of one core; "
            "--nulls all asks for them"
        )
    _add_phantoms(found, compared)
    return found


def _add_matrices(found: MoreNulls, compared: Compared, on_note: Callable[[str], None]) -> None:
    nulls = [ROW_COLUMN] if compared.strata is None else [ROW_COLUMN, ROW_COLUMN_MAGNITUDE]
    on_note(f"fitting rows and columns of {len(compared.masks)} masks")
    matrices = matrix_expectations(
        compared.masks,
        compared.tensors,
        compared.tables,
        nulls=nulls,
        pairs=compared.pairs,
        grouping=compared.strata,
        workers=compared.workers,
    )
    for pair, by_tensor in matrices.by_pair.items():
        found.add(pair, by_tensor)
    for null, names in matrices.unfitted.items():
        found.notes.append(f"no {null} null: its fit meets not every margin of {', '.join(names[:3])}")


def _add_phantoms(found: MoreNulls, compared: Compared) -> None:
    reason = _no_phantom(compared)
    if reason is not None:
        found.notes.append(f"no {PHANTOM} null: {reason}")
        return
    strata = compared.strata
    assert strata is not None
    rounded = [t.tensor for t in compared.tables if strata.view_dtype(t.tensor) in _ROUNDED]
    wide = [name for name in rounded if strata.view_dtype(name) is not strata.stored_dtype(name)]
    rooms = count_rooms([compared.tensors[name] for name in wide], strata, workers=compared.workers)
    for pair in compared.pairs:
        phantoms: dict[str, Phantom] = {}
        by_tensor: dict[str, dict[str, Expectation]] = {}
        for table in compared.tables:
            if table.tensor in rounded:
                phantom = _phantom(table, pair, strata.view_dtype(table.tensor), rooms.get(table.tensor))
                phantoms[table.tensor] = phantom
                by_tensor[table.tensor] = {PHANTOM: phantom.expectation}
            else:
                a, b = (table.changed[run] for run in pair)
                by_tensor[table.tensor] = {PHANTOM: hypergeometric(table.entries, a, b)}
        found.add(pair, by_tensor)
        found.phantoms[pair] = PhantomDensity.total(list(phantoms.values()))
    apart = len(compared.tables) - len(rounded)
    if apart:
        found.notes.append(
            f"{PHANTOM}: {apart} tensors that are not stored in 16 bits count as under `magnitude`"
        )


def _phantom(table: StratumTable, pair: tuple[int, int], dtype: DType, rooms: Rooms | None) -> Phantom:
    return phantom_of_table(table, *pair, dtype=dtype, rooms=rooms)


def _no_phantom(compared: Compared) -> str | None:
    if compared.strata is None:
        return "it redraws updates on the weights of the base; --base BASE adds it"
    if compared.criterion not in ("value", "bitwise"):
        return f"it says what rounding lets through, and {compared.criterion} asks for something else"
    if not any(compared.strata.view_dtype(name) in _ROUNDED for name in compared.tensors):
        return f"in the {compared.view} view no weight is stored in 16 bits, so that nothing is rounded"
    return None


def _add_convergence(found: MoreNulls, compared: Compared) -> None:
    finer = compared.finer
    if finer is None:
        return
    tables = count_overlaps(compared.masks, compared.tensors, grouping=finer, workers=compared.workers)
    magnitudes = {table.tensor: finer.magnitudes(table.tensor, table.strata) for table in tables}
    schemes: dict[str, Sequence[StratumTable]] = {
        "tensor × exponent": [table.coarsen(lambda strata: strata // 2) for table in compared.tables],
        "tensor × exponent × power of two (magnitude)": compared.tables,
    }
    for count in _QUANTILES:
        schemes[f"tensor × {count} quantiles"] = [
            quantiles_of_magnitudes(table, magnitudes[table.tensor], count) for table in tables
        ]
    schemes["tensor × code (15 bits)"] = tables
    for pair in compared.pairs:
        found.convergence[pair] = convergence(schemes, *pair)


def random_walk(compared: Compared, question: WalkQuestion) -> tuple[WalkRecord | None, list[str]]:
    """Two walks over the bf16 weights of the base, and why there are none.

    A walk knows nothing but the base, the number of steps and their size; its density is its own.
    """
    finer = compared.finer
    if finer is None:
        return None, ["no walk: it starts from the weights of the base; --base BASE adds it"]
    if compared.view != View.NATIVE.value:
        return None, ["no walk: it is that of weights stored in bf16, in the native view"]
    tensors = [t for name, t in compared.tensors.items() if finer.stored_dtype(name) is DType.BF16]
    if not tensors:
        return None, ["no walk: no weight of the base is stored in bf16"]
    magnitudes, entries = count_magnitudes(tensors, finer, workers=compared.workers)
    walk = walk_overlap(
        magnitudes.astype(np.float32),
        entries,
        steps=question.steps,
        lr=question.lr,
        walkers=_WALKERS,
        rng=np.random.default_rng(question.seed),
    )
    total = int(entries.sum())
    record = WalkRecord(
        steps=question.steps,
        lr=question.lr,
        seed=question.seed,
        entries=total,
        density=walk.expected_each / total if total else None,
        jaccard=walk.jaccard,
    )
    apart = len(compared.tensors) - len(tensors)
    return record, [f"walk: {apart} tensors are not stored in bf16 and stay out of it"] if apart else []
