"""The mergeable result of comparing entries: integers only, so that any split gives the same whole.

Contract: `merge` is associative and commutative; a unit's tally written to the journal and read back
is equal to itself. Counts are entries. Sums are exact (see `exact_sum`). Nothing here knows files.
"""

from __future__ import annotations

import base64
import dataclasses
import zlib
from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

__all__ = ["AxisCounts", "CellTable", "DecayCounts", "SpecialCounts", "Tally", "ViewTally"]

_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialCounts:
    """Entries of one side by class. All other entries are normal numbers."""

    nan: int = 0
    inf: int = 0
    pos_zero: int = 0
    neg_zero: int = 0
    subnormal: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayCounts:
    """Entries of an fp32/fp64 pair judged against a multiplicative shrink by 1 − c.

    Args:
        within_one_ulp: Changed entries at most 1 ULP from (1 − c)·base rounded to the dtype.
        band: Changed entries with c/2 ≤ (base − tuned)/base ≤ 2c.
        mirror: Changed entries that *grew* by as much: the false positives to expect in `band`.
    """

    within_one_ulp: int = 0
    band: int = 0
    mirror: int = 0


_Counts = TypeVar("_Counts", SpecialCounts, DecayCounts)


class CellTable(Mapping[tuple[int, int], int]):
    """Cells of a finished tally in 14 bytes each; as a dict they take about 200.

    A model has hundreds to ninety thousand tensors with up to a thousand cells each.

    Args:
        cells: (stratum, column) → entries.
    """

    __slots__ = ("_columns", "_counts", "_strata")
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, cells: Mapping[tuple[int, int], int]) -> None:
        keys = sorted(cells)
        self._strata = np.array([stratum for stratum, _ in keys], dtype=np.int32)
        self._columns = np.array([column for _, column in keys], dtype=np.int16)
        self._counts = np.array([cells[key] for key in keys], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._counts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._strata.tolist(), self._columns.tolist(), strict=True)

    def __getitem__(self, key: tuple[int, int]) -> int:
        first, stop = np.searchsorted(self._strata, [key[0], key[0] + 1])
        place = first + np.searchsorted(self._columns[first:stop], key[1])
        if place == stop or self._columns[place] != key[1]:
            raise KeyError(key)
        return int(self._counts[place])

    def items(self) -> ItemsView[tuple[int, int], int]:
        """Keys and counts, without a search for each."""
        return dict(zip(self, self._counts.tolist(), strict=True)).items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self.items()) == dict(other.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewTally:
    """What one view of a pair (or a part of it) counted.

    Args:
        entries: Entries compared.
        changed: Criterion key → entries changed under it.
        strata: Stratum of the base code → entries (see `strata`); empty at level `counts`.
        cells: (stratum, column) → entries whose codes differ; empty at level `counts`.
        base_specials: Classes on the base side (float dtypes, level `full`).
        tuned_specials: Classes on the tuned side.
        sign_flips: Entries non-zero and not NaN on both sides whose signs differ.
        nonfinite_deltas: Changed entries left out of the sums because Δ, or its square, is not finite.
        abs_sum: Σ|Δ| in units of 2⁻¹⁰⁷⁴, Δ in float64.
        sq_sum: ΣΔ², each square rounded to float64.
        base_sq_sum: Σw_base² over finite entries, each square rounded to float64.
        max_abs: Largest finite |Δ|.
        decay: Decay counts, where a shrink was tested.
    """

    entries: int = 0
    changed: Mapping[str, int] = field(default_factory=dict)
    strata: Mapping[int, int] = field(default_factory=dict)
    cells: Mapping[tuple[int, int], int] = field(default_factory=dict)
    base_specials: SpecialCounts = SpecialCounts()
    tuned_specials: SpecialCounts = SpecialCounts()
    sign_flips: int = 0
    nonfinite_deltas: int = 0
    abs_sum: int = 0
    sq_sum: int = 0
    base_sq_sum: int = 0
    max_abs: float = 0.0
    decay: DecayCounts | None = None

    def merge(self, other: ViewTally) -> ViewTally:
        """The tally of both parts together."""
        if self.entries == 0:
            return other
        if other.entries == 0:
            return self
        assert self.changed.keys() == other.changed.keys(), (self.changed.keys(), other.changed.keys())
        assert (self.decay is None) == (other.decay is None)
        return ViewTally(
            entries=self.entries + other.entries,
            changed=_add(self.changed, other.changed),
            strata=_add(self.strata, other.strata),
            cells=_add(self.cells, other.cells),
            base_specials=_add_fields(self.base_specials, other.base_specials),
            tuned_specials=_add_fields(self.tuned_specials, other.tuned_specials),
            sign_flips=self.sign_flips + other.sign_flips,
            nonfinite_deltas=self.nonfinite_deltas + other.nonfinite_deltas,
            abs_sum=self.abs_sum + other.abs_sum,
            sq_sum=self.sq_sum + other.sq_sum,
            base_sq_sum=self.base_sq_sum + other.base_sq_sum,
            max_abs=max(self.max_abs, other.max_abs),
            decay=None if self.decay is None or other.decay is None else _add_fields(self.decay, other.decay),
        )

    def compact(self) -> ViewTally:
        """The same tally with its cells in a table."""
        return dataclasses.replace(self, cells=CellTable(self.cells))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; big integers as hexadecimal text."""
        return {
            "entries": self.entries,
            "changed": dict(self.changed),
            "strata": [[s, n] for s, n in sorted(self.strata.items())],
            "cells": [[s, c, n] for (s, c), n in sorted(self.cells.items())],
            "base_specials": dataclasses.asdict(self.base_specials),
            "tuned_specials": dataclasses.asdict(self.tuned_specials),
            "sign_flips": self.sign_flips,
            "nonfinite_deltas": self.nonfinite_deltas,
            "abs_sum": hex(self.abs_sum),
            "sq_sum": hex(self.sq_sum),
            "base_sq_sum": hex(self.base_sq_sum),
            "max_abs": self.max_abs.hex(),
            "decay": None if self.decay is None else dataclasses.asdict(self.decay),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ViewTally:
        """The tally that `to_json` wrote."""
        return cls(
            entries=record["entries"],
            changed=dict(record["changed"]),
            strata=dict(record["strata"]),
            cells={(s, c): n for s, c, n in record["cells"]},
            base_specials=SpecialCounts(**record["base_specials"]),
            tuned_specials=SpecialCounts(**record["tuned_specials"]),
            sign_flips=record["sign_flips"],
            nonfinite_deltas=record["nonfinite_deltas"],
            abs_sum=int(record["abs_sum"], 16),
            sq_sum=int(record["sq_sum"], 16),
            base_sq_sum=int(record["base_sq_sum"], 16),
            max_abs=float.fromhex(record["max_abs"]),
            decay=None if record["decay"] is None else DecayCounts(**record["decay"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AxisCounts:
    """Counts per row and per column of the pair's matrix (leading axes × last axis).

    Args:
        rows: int64[rows], entries changed under the mask criterion; zero outside the part counted.
        cols: int64[cols], the same per column.
        band: int64[rows], entries in the decay band (see `DecayCounts`); empty where none was tested.
        outside: int64[rows], entries changed under `value` outside the decay band; empty likewise.
    """

    rows: np.ndarray
    cols: np.ndarray
    band: np.ndarray
    outside: np.ndarray

    @property
    def decay_only_rows(self) -> int:
        """Rows in which something changed, and nothing but by decay."""
        return int(np.count_nonzero((self.band > 0) & (self.outside == 0)))

    def compact(self) -> AxisCounts:
        """The same counts in the narrowest unsigned type: a model has a million rows and columns."""
        return AxisCounts(**{f: _narrow(getattr(self, f)) for f in _AXIS_FIELDS})

    def merge(self, other: AxisCounts) -> AxisCounts:
        """Counts of both parts together."""
        return AxisCounts(**{f: getattr(self, f) + getattr(other, f) for f in _AXIS_FIELDS})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AxisCounts) and all(
            np.array_equal(getattr(self, f), getattr(other, f)) for f in _AXIS_FIELDS
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def to_json(self) -> dict[str, str]:
        """Compressed text."""
        return {f: _pack(getattr(self, f)) for f in _AXIS_FIELDS}

    @classmethod
    def from_json(cls, record: Mapping[str, str]) -> AxisCounts:
        """The counts that `to_json` wrote."""
        return cls(**{f: _unpack(record[f]) for f in _AXIS_FIELDS})


_AXIS_FIELDS = ("rows", "cols", "band", "outside")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Everything one pass counts about a pair, or about a part of it.

    Args:
        native: The view as stored.
        served: The view with both sides rounded to bf16; None where that is the native view.
        base_fingerprint: Σ mix(word ⊕ position·φ) mod 2⁶⁴ over the base's stored codes.
        tuned_fingerprint: The same for the tuned side.
        axes: Row and column counts; None at level `counts`.
    """

    native: ViewTally = ViewTally()
    served: ViewTally | None = None
    base_fingerprint: int = 0
    tuned_fingerprint: int = 0
    axes: AxisCounts | None = None

    def merge(self, other: Tally) -> Tally:
        """The tally of both parts together."""
        if self.native.entries == 0 and self.axes is None:
            return other
        if other.native.entries == 0 and other.axes is None:
            return self
        assert (self.served is None) == (other.served is None)
        assert (self.axes is None) == (other.axes is None)
        return Tally(
            native=self.native.merge(other.native),
            served=None if self.served is None or other.served is None else self.served.merge(other.served),
            base_fingerprint=(self.base_fingerprint + other.base_fingerprint) % 2**64,
            tuned_fingerprint=(self.tuned_fingerprint + other.tuned_fingerprint) % 2**64,
            axes=None if self.axes is None or other.axes is None else self.axes.merge(other.axes),
        )

    def with_count(
        self, criterion: str, changed: int, *, served: bool, lines: tuple[np.ndarray, np.ndarray] | None
    ) -> Tally:
        """This tally with one more criterion counted, in the served view where asked and there is one.

        Args:
            criterion: Its key.
            changed: Entries changed under it.
            served: Whether it was counted in the served view.
            lines: Row and column counts that replace the present ones, when it is the mask criterion.
        """
        if lines is not None and self.axes is not None:
            axes = dataclasses.replace(self.axes, rows=lines[0], cols=lines[1])
            selected = dataclasses.replace(self, axes=axes)
            return selected.with_count(criterion, changed, served=served, lines=None)
        if served and self.served is not None:
            counts = {**self.served.changed, criterion: changed}
            return dataclasses.replace(self, served=dataclasses.replace(self.served, changed=counts))
        counts = {**self.native.changed, criterion: changed}
        return dataclasses.replace(self, native=dataclasses.replace(self.native, changed=counts))

    def compact(self) -> Tally:
        """This tally for keeping, when no part of the pair is missing any more."""
        return dataclasses.replace(
            self,
            native=self.native.compact(),
            served=None if self.served is None else self.served.compact(),
            axes=None if self.axes is None else self.axes.compact(),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "native": self.native.to_json(),
            "served": None if self.served is None else self.served.to_json(),
            "base_fingerprint": f"{self.base_fingerprint:016x}",
            "tuned_fingerprint": f"{self.tuned_fingerprint:016x}",
            "axes": None if self.axes is None else self.axes.to_json(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Tally:
        """The tally that `to_json` wrote."""
        return cls(
            native=ViewTally.from_json(record["native"]),
            served=None if record["served"] is None else ViewTally.from_json(record["served"]),
            base_fingerprint=int(record["base_fingerprint"], 16),
            tuned_fingerprint=int(record["tuned_fingerprint"], 16),
            axes=None if record["axes"] is None else AxisCounts.from_json(record["axes"]),
        )


def _add(a: Mapping[_Key, int], b: Mapping[_Key, int]) -> dict[_Key, int]:
    total = dict(a.items())
    for key, count in b.items():
        total[key] = total.get(key, 0) + count
    return total


def _add_fields(a: _Counts, b: _Counts) -> _Counts:
    return type(a)(**{f.name: getattr(a, f.name) + getattr(b, f.name) for f in dataclasses.fields(a)})


def _narrow(array: np.ndarray) -> np.ndarray:
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))


def _pack(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.astype("<i8").tobytes(), 1)).decode("ascii")


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8").astype(np.int64)
