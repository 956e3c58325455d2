"""Masks of the largest movements: exact selection of the k entries of largest |Δ|.

Contract: |Δ| is float64 and never rounded for the order; entries with Δ = 0 or NaN are never selected, so the
mask may hold fewer than asked. Ties at the cut are broken by a hash of (tensor, fingerprints of the pair,
position), never by position alone, which would make two runs agree where they do not.

Method: radix selection. An entry's key is (|Δ| code, 63 bits, descending; hash, 64 bits, ascending). Each
histogram pass resolves one digit of the key; it stops as soon as the bin that holds the cut is small
enough to collect; a group of few entries is collected at once. One pass collects it, and one writes bits
with the exact threshold. On bf16 pairs the first digit (exponent and 11 mantissa bits) is nearly always
the whole of |Δ|: three passes do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_audit.compare.deltas import codes_in_view, float_deltas
from sparsity_audit.compare.numpy_kernel import integer_distance
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.passes.ahead import Reads
from sparsity_audit.passes.engine import BitSink, Workers, map_bits, map_units
from sparsity_audit.passes.execute import read_values
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import Plan, WorkUnit
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import Criterion, View

__all__ = ["PairSelection", "TopSelection", "delta_codes", "select_all_but_smallest", "select_top"]

_DIGIT_BITS = (22, 21, 20, 22, 21, 21)  # of the 63-bit code, then of the 64-bit hash
_CODE_DIGITS = 3
_COLLECT_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TopSelection:
    """What a top-k selection found.

    Args:
        criterion: Its key, `top:…`.
        asked: Entries asked for; of `select_all_but_smallest`, asked to be left out.
        selected: Entries selected; fewer than asked when fewer moved.
        eligible: Entries with Δ neither 0 nor NaN.
        threshold: Smallest selected |Δ|; None when nothing was selected, or when it is infinite.
        ties_at_cut: Entries whose |Δ| equals the threshold.
        ties_selected: How many of them were selected.
    """

    criterion: str
    asked: int
    selected: int
    eligible: int
    threshold: float | None
    ties_at_cut: int
    ties_selected: int


@dataclass(slots=True, kw_only=True)
class PairSelection:
    """What was selected of one pair: entries in all, per row and per column (int64)."""

    count: int
    rows: np.ndarray
    cols: np.ndarray

    @classmethod
    def empty(cls, rows: int, cols: int) -> PairSelection:
        """Nothing selected of a rows × cols pair."""
        return cls(count=0, rows=np.zeros(rows, dtype=np.int64), cols=np.zeros(cols, dtype=np.int64))

    def add(self, unit: WorkUnit, part: PairSelection) -> None:
        """Add what was selected of one unit."""
        self.count += part.count
        self.rows[unit.rows[0] : unit.rows[1]] += part.rows
        self.cols[unit.cols[0] : unit.cols[1]] += part.cols


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """Entries with a key before (code, hash) in the order are selected, and that one."""

    code: int
    hash: int


def select_top(
    plan: Plan,
    tallies: Sequence[Tally],
    criterion: Criterion,
    *,
    view: View,
    workers: Workers,
    bits: BitSink | None,
) -> tuple[tuple[TopSelection, ...], tuple[PairSelection, ...]]:
    """Select the largest movements and write their bits.

    Args:
        plan: The pairs; read again, three times or more (docs/design/top-k.md counts the passes).
        tallies: The pairs' tallies, for their fingerprints.
        criterion: A `top` criterion.
        view: The view whose Δ counts.
        workers: Threads.
        bits: Where mask bits go; None to count only.

    Returns:
        One selection over the checkpoint, or one a pair when the criterion is per tensor; and what was
        selected of each pair.
    """

    def asked_of(num_entries: int, eligible: int) -> tuple[int, int]:
        asked = max(min(_amount(criterion, num_entries), num_entries), min(1, num_entries))
        return asked, min(asked, eligible)

    return _select_groups(plan, tallies, criterion, asked_of, view=view, workers=workers, bits=bits)


def select_all_but_smallest(
    plan: Plan,
    tallies: Sequence[Tally],
    amount: Criterion,
    *,
    view: View,
    workers: Workers,
    bits: BitSink | None,
) -> tuple[tuple[TopSelection, ...], tuple[PairSelection, ...]]:
    """Select the entries with Δ ≠ 0 that are not among the smallest of them, and write their bits.

    So `amount` entries that moved, or that fraction of *those that moved*, are not selected: the complement
    of a top selection, with ties at the cut broken by the same hash. Arguments and result as of `select_top`;
    `asked` counts the entries left out.
    """

    def asked_of(_num_entries: int, eligible: int) -> tuple[int, int]:
        asked = max(min(_amount(amount, eligible), eligible), min(1, eligible))
        return asked, eligible - asked

    return _select_groups(plan, tallies, amount, asked_of, view=view, workers=workers, bits=bits)


_AskedOf = Callable[[int, int], tuple[int, int]]
"""Entries of a group and those that moved → how many are asked for, and how many to select."""


def _amount(criterion: Criterion, of: int) -> int:
    return round(criterion.parameter * of) if criterion.is_fraction else int(criterion.parameter)


def _select_groups(
    plan: Plan,
    tallies: Sequence[Tally],
    criterion: Criterion,
    asked_of: _AskedOf,
    *,
    view: View,
    workers: Workers,
    bits: BitSink | None,
) -> tuple[tuple[TopSelection, ...], tuple[PairSelection, ...]]:
    seeds = [_seed(pair.name, tally) for pair, tally in zip(plan.pairs, tallies, strict=True)]
    groups = [[i] for i in range(len(plan.pairs))] if criterion.per_tensor else [list(range(len(plan.pairs)))]
    selected = [PairSelection.empty(*pair.base.rows_cols) for pair in plan.pairs]
    units_of: list[list[WorkUnit]] = [[] for _ in plan.pairs]
    for unit in plan.units:
        units_of[unit.pair].append(unit)
    selections = []
    base, tuned = OpenFiles(plan.base), OpenFiles(plan.tuned)
    try:
        for group in groups:
            units = [unit for pair in group for unit in units_of[pair]]
            reader = _Reader(plan, units, seeds, view, workers, base, tuned)
            num_entries = sum(plan.pairs[i].base.num_entries for i in group)
            selection, cut = _select(reader, criterion, num_entries, asked_of)
            selections.append(selection)
            for unit, part in reader.write(cut, bits):
                selected[unit.pair].add(unit, part)
    finally:
        base.close()
        tuned.close()
    assert sum(part.count for part in selected) == sum(s.selected for s in selections), selections
    return tuple(selections), tuple(selected)


def _select(
    reader: _Reader, criterion: Criterion, num_entries: int, asked_of: _AskedOf
) -> tuple[TopSelection, _Cut | None]:
    prefix: list[int] = []
    if num_entries <= _COLLECT_LIMIT:
        codes, hashes = reader.collect(())
        eligible = len(codes)
        asked, wanted = asked_of(num_entries, eligible)
        remaining = wanted
    else:
        counts, has_more = reader.histogram(prefix=(), digit=0)
        eligible = int(counts.sum())
        asked, wanted = asked_of(num_entries, eligible)
        prefix, remaining = _find_bin(reader, counts, has_more, wanted) if wanted else ([], 0)
        codes, hashes = reader.collect(tuple(prefix)) if wanted else _no_keys()
    if wanted == 0:
        return _selection(criterion, asked, 0, eligible, None, 0, 0), None
    order = np.lexsort((hashes, ~codes))
    last = order[remaining - 1]
    code = int(codes[last])
    before_ties = int(np.count_nonzero(codes > codes[last]))
    ties = (
        int(np.count_nonzero(codes == codes[last]))
        if len(prefix) <= _CODE_DIGITS
        else reader.count_code(code)
    )
    cut = _Cut(code=code, hash=int(hashes[last]))
    ties_selected = remaining - before_ties if len(prefix) <= _CODE_DIGITS else reader.count_before(cut)
    return _selection(criterion, asked, wanted, eligible, code, ties, ties_selected), cut


def _find_bin(
    reader: _Reader, counts: np.ndarray, has_more: np.ndarray, wanted: int
) -> tuple[list[int], int]:
    """Prefix of the keys in the bin that holds the cut, and how many of them are selected."""
    prefix: list[int] = []
    remaining, digit = wanted, 0
    while True:
        # Codes are ordered from the largest, hashes from the smallest.
        order = counts[::-1] if digit < _CODE_DIGITS else counts
        before = np.cumsum(order)
        place = int(np.searchsorted(before, remaining))
        remaining -= int(before[place] - order[place])
        found = len(counts) - 1 - place if digit < _CODE_DIGITS else place
        prefix.append(found)
        inside = int(counts[found])
        if digit < _CODE_DIGITS and not has_more[found]:
            prefix += [0] * (_CODE_DIGITS - len(prefix))  # every entry of the bin has these very bits
        digit = len(prefix)
        if inside <= _COLLECT_LIMIT or digit == len(_DIGIT_BITS):
            return prefix, remaining
        counts, has_more = reader.histogram(prefix=tuple(prefix), digit=digit)


def _selection(
    criterion: Criterion,
    asked: int,
    selected: int,
    eligible: int,
    code: int | None,
    ties: int,
    ties_selected: int,
) -> TopSelection:
    threshold = None if code is None else float(np.uint64(code).view(np.float64))
    return TopSelection(
        criterion=criterion.key,
        asked=asked,
        selected=selected,
        eligible=eligible,
        threshold=threshold if threshold is not None and np.isfinite(threshold) else None,
        ties_at_cut=ties,
        ties_selected=ties_selected,
    )


class _Reader:
    """Passes over the keys of a group of pairs."""

    def __init__(
        self,
        plan: Plan,
        units: list[WorkUnit],
        seeds: list[int],
        view: View,
        workers: Workers,
        base: OpenFiles,
        tuned: OpenFiles,
    ) -> None:
        self._plan, self._units, self._seeds, self._view = plan, units, seeds, view
        self._workers, self._base, self._tuned = workers, base, tuned

    def histogram(self, *, prefix: tuple[int, ...], digit: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts by one digit among the entries that have the prefix; and which bins hold lower code bits."""
        counts = np.zeros(1 << _DIGIT_BITS[digit], dtype=np.int64)
        has_more = np.zeros(len(counts), dtype=np.bool_)
        for _, found in self._map(lambda c, h: self._digits(c, h, prefix, digit)):
            for bins, numbers, more in found:
                counts[bins] += numbers
                has_more[more] = True
        return counts, has_more

    def collect(self, prefix: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Codes and hashes of all entries with the prefix."""
        parts = [p for _, found in self._map(lambda c, h: _with_prefix(c, h, prefix)) for p in found]
        parts.append(_no_keys())
        return np.concatenate([c for c, _ in parts]), np.concatenate([h for _, h in parts])

    def count_code(self, code: int) -> int:
        """Entries whose |Δ| has exactly this code."""
        return sum(
            sum(found) for _, found in self._map(lambda c, _h: int(np.count_nonzero(c == np.uint64(code))))
        )

    def count_before(self, cut: _Cut) -> int:
        """Entries with the cut's code that are selected."""
        code, last = np.uint64(cut.code), np.uint64(cut.hash)
        return sum(
            sum(f) for _, f in self._map(lambda c, h: int(np.count_nonzero((c == code) & (h <= last))))
        )

    def write(self, cut: _Cut | None, bits: BitSink | None) -> Iterator[tuple[WorkUnit, PairSelection]]:
        """Write mask bits; yields what was selected of each unit."""

        def work(unit: WorkUnit, bits: BitSink | None) -> PairSelection:
            part = PairSelection.empty(unit.rows[1] - unit.rows[0], unit.cols[1] - unit.cols[0])
            for block, base_codes, tuned_codes in self._blocks(unit):
                codes, hashes = self._keys(unit, block.row, block.col, base_codes, tuned_codes)
                chosen = np.zeros(codes.shape, dtype=np.bool_)
                if cut is not None:
                    code = np.uint64(cut.code)
                    chosen = (codes > code) | ((codes == code) & (hashes <= np.uint64(cut.hash)))
                chosen = chosen.reshape(base_codes.shape)
                part.count += int(np.count_nonzero(chosen))
                row, col = block.row - unit.rows[0], block.col - unit.cols[0]
                part.rows[row : row + block.num_rows] += np.count_nonzero(chosen, axis=1)
                part.cols[col : col + block.num_cols] += np.count_nonzero(chosen, axis=0)
                if bits is not None:
                    packed = np.packbits(chosen, axis=-1, bitorder="little")
                    bits.write(
                        self._plan.pairs[unit.pair], first_row=block.row, first_col=block.col, bits=packed
                    )
            return part

        reads = self._reads
        return map_bits(work, reads.ordered(self._units), workers=self._workers, bits=bits, ahead=reads)

    def _map(self, function):
        def work(unit: WorkUnit) -> list:
            found = []
            for block, base_codes, tuned_codes in self._blocks(unit):
                codes, hashes = self._keys(unit, block.row, block.col, base_codes, tuned_codes)
                eligible = codes > 0
                found.append(function(codes[eligible], hashes[eligible]))
            return found

        reads = self._reads
        return map_units(work, reads.ordered(self._units), workers=self._workers, ahead=reads)

    @property
    def _reads(self) -> Reads:
        return Reads(self._plan.parts_of, (self._base, self._tuned))

    def _blocks(self, unit: WorkUnit):
        return read_values(self._plan, unit, base=self._base, tuned=self._tuned)

    def _keys(
        self, unit: WorkUnit, row: int, col: int, base: np.ndarray, tuned: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        codes = delta_codes(base, tuned, self._plan.specs[unit.pair].of_values, self._view).reshape(-1)
        first = row * unit.total_cols + col
        return codes, _hashes(self._seeds[unit.pair], first, len(codes))

    @staticmethod
    def _digits(
        codes: np.ndarray, hashes: np.ndarray, prefix: tuple[int, ...], digit: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes, hashes = _with_prefix(codes, hashes, prefix)
        value, below = _digit(codes, hashes, digit)
        bins, counts = np.unique(value, return_counts=True)
        return bins, counts, np.unique(value[below != 0])


def _no_keys() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint64)


def _digit(codes: np.ndarray, hashes: np.ndarray, digit: int) -> tuple[np.ndarray, np.ndarray]:
    """One digit of the keys, and the bits of the same word below it."""
    first, word, width = (0, codes, 63) if digit < _CODE_DIGITS else (_CODE_DIGITS, hashes, 64)
    shift = width - sum(_DIGIT_BITS[first : digit + 1])
    value = (word >> np.uint64(shift)) & np.uint64((1 << _DIGIT_BITS[digit]) - 1)
    return value.astype(np.int64), word & np.uint64((1 << shift) - 1)


def _with_prefix(
    codes: np.ndarray, hashes: np.ndarray, prefix: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    for digit, value in enumerate(prefix):
        keep = _digit(codes, hashes, digit)[0] == value
        codes, hashes = codes[keep], hashes[keep]
    return codes, hashes


def delta_codes(base: np.ndarray, tuned: np.ndarray, spec: PairSpec, view: View) -> np.ndarray:
    """float64 codes of |Δ|; 0 where Δ is 0 or NaN and for opaque storage. Larger code, larger |Δ|."""
    base, tuned, dtype = codes_in_view(base, tuned, spec, view)
    if dtype.kind == "opaque":
        return np.zeros(base.shape, dtype=np.uint64)
    if dtype.kind != "float":
        return integer_distance(base, tuned, dtype).astype(np.float64).view(np.uint64)
    delta = np.abs(float_deltas(base, tuned, dtype))
    return np.where(np.isnan(delta), 0.0, delta).view(np.uint64)


def _seed(name: str, tally: Tally) -> int:
    text = f"{name}\0{tally.base_fingerprint:016x}\0{tally.tuned_fingerprint:016x}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _hashes(seed: int, first: int, count: int) -> np.ndarray:
    """splitmix64 of the position, keyed by the pair."""
    x = (np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
