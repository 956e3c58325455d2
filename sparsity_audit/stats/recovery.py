"""How near a retrained model comes to the full run: agreement inside and outside a mask, and of the updates.

Contract: pure, counts and sums in, figures out. Counts are exact integers and add over any split; sums of
floats are added by `math.fsum`. *Inside* is what the mask selects. Δ_full = full − base, Δ_run = run − base,
in float64; an entry one of whose Δ, or whose distance to full, has no finite square is left out of sums and
signs and counted. A sign agrees where both Δ are non-zero and of one sign. What is undefined is None.

Agreement outside holds by construction in a run whose frozen entries were frozen, as far as the full run did
not move them either: it is no evidence. `reference_sums` is the definition, entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.agreement import cosine_of
from sparsity_audit.stats.chance import share_of
from sparsity_audit.types import Criterion

__all__ = ["CRITERIA", "PARTS", "PartRecovery", "RecoverySums", "part_recovery", "reference_sums"]

CRITERIA = tuple(Criterion.parse(text) for text in ("bitwise", "value", "atol:1e-5", "atol:1e-4", "rel:1e-3"))
"""Under each of these an entry of the run and of the full run agree or not; after `value`, which masks
use."""

PARTS = ("inside", "outside", "overall")
_INSIDE, _OUTSIDE = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecoverySums:
    """Sums over the entries of a part of the model, for one run; index 0 is inside the mask, 1 outside.

    Args:
        entries: Entries compared, int64[2].
        unequal: Entries of run and full that differ under each of `CRITERIA`, int64[2, criteria].
        not_finite: Entries left out of what follows, int64[2].
        moving: Entries with both Δ non-zero, int64[2].
        same_sign: Of these, entries whose Δ have one sign, int64[2].
        upwards_full: Of the moving ones, entries with Δ_full > 0, int64[2].
        upwards_run: The same of Δ_run.
        dot: Σ Δ_full Δ_run, float64[2].
        square_full: Σ Δ_full², float64[2].
        square_run: Σ Δ_run², float64[2].
        square_apart: Σ (run − full)², float64[2].
    """

    entries: np.ndarray
    unequal: np.ndarray
    not_finite: np.ndarray
    moving: np.ndarray
    same_sign: np.ndarray
    upwards_full: np.ndarray
    upwards_run: np.ndarray
    dot: np.ndarray
    square_full: np.ndarray
    square_run: np.ndarray
    square_apart: np.ndarray

    @classmethod
    def from_values(
        cls,
        full_delta: np.ndarray,
        run_delta: np.ndarray,
        apart: np.ndarray,
        inside: np.ndarray,
        *,
        unequal: np.ndarray,
    ) -> RecoverySums:
        """Sums of one block.

        Args:
            full_delta: full − base, float64[n].
            run_delta: run − base, float64[n].
            apart: run − full, float64[n].
            inside: Whether the mask holds an entry, bool[n].
            unequal: As of the class.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            products = {
                "dot": full_delta * run_delta,
                "square_full": full_delta * full_delta,
                "square_run": run_delta * run_delta,
                "square_apart": apart * apart,
            }
        usable = np.logical_and.reduce([np.isfinite(product) for product in products.values()])
        moving = usable & (full_delta != 0) & (run_delta != 0)
        flags = {
            "entries": np.ones(len(inside), dtype=np.bool_),
            "not_finite": ~usable,
            "moving": moving,
            "same_sign": moving & ((full_delta > 0) == (run_delta > 0)),
            "upwards_full": moving & (full_delta > 0),
            "upwards_run": moving & (run_delta > 0),
        }
        counts = {
            name: np.array(
                [np.count_nonzero(flag & inside), np.count_nonzero(flag & ~inside)], dtype=np.int64
            )
            for name, flag in flags.items()
        }
        sums = {
            name: np.array([product[usable & inside].sum(), product[usable & ~inside].sum()])
            for name, product in products.items()
        }
        return cls(**counts, **sums, unequal=unequal)

    @classmethod
    def of_blocks(cls, blocks: Sequence[RecoverySums]) -> RecoverySums:
        """The sum over blocks."""

        def counts(name: str) -> np.ndarray:
            shape = (2, len(CRITERIA)) if name == "unequal" else (2,)
            return sum((getattr(block, name) for block in blocks), np.zeros(shape, dtype=np.int64))

        def floats(name: str) -> np.ndarray:
            return np.array([math.fsum(float(getattr(b, name)[side]) for b in blocks) for side in (0, 1)])

        return cls(**{name: counts(name) for name in _COUNTS}, **{name: floats(name) for name in _SUMS})


_SUMS = ("dot", "square_full", "square_run", "square_apart")
_COUNTS = tuple(name for name in RecoverySums.__dataclass_fields__ if name not in _SUMS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecovery:
    """Agreement of a run with the full run in a part of the model.

    Args:
        entries: Entries compared.
        equal: Entries that agree, by criterion.
        shares: Those ÷ entries, by criterion; None without entries.
        moving: Entries that moved in both runs.
        sign_agreement: Share of them that moved to one side.
        independent_signs: The same expected of signs that are independent but as often upwards in each run.
        cosine: Of the two updates.
        relative_l2: ‖run − full‖ ÷ ‖full − base‖: 0 for the full run itself, 1 for the base.
        not_finite: Entries without finite Δ², in none of the last four.
    """

    entries: int
    equal: dict[str, int]
    shares: dict[str, float | None]
    moving: int
    sign_agreement: float | None
    independent_signs: float | None
    cosine: float | None
    relative_l2: float | None
    not_finite: int


def part_recovery(sums: RecoverySums, part: str) -> PartRecovery:
    """Figures of `inside`, `outside` or `overall`."""
    sides = {"inside": [_INSIDE], "outside": [_OUTSIDE], "overall": [_INSIDE, _OUTSIDE]}[part]

    def count(name: str) -> int:
        return int(getattr(sums, name)[sides].sum())

    def total(name: str) -> float:
        return math.fsum(getattr(sums, name)[sides].tolist())

    entries, moving = count("entries"), count("moving")
    equal = {c.key: entries - int(sums.unequal[sides, n].sum()) for n, c in enumerate(CRITERIA)}
    p, q = share_of(count("upwards_full"), moving), share_of(count("upwards_run"), moving)
    length = total("square_full")
    return PartRecovery(
        entries=entries,
        equal=equal,
        shares={key: share_of(number, entries) for key, number in equal.items()},
        moving=moving,
        sign_agreement=share_of(count("same_sign"), moving),
        independent_signs=None if p is None or q is None else p * q + (1 - p) * (1 - q),
        cosine=cosine_of(total("dot"), length, total("square_run")),
        relative_l2=math.sqrt(total("square_apart")) / math.sqrt(length) if length > 0 else None,
        not_finite=count("not_finite"),
    )


def reference_sums(
    entries: Iterable[tuple[int, int, int, bool]], decode: Callable[[int], float]
) -> Mapping[str, list]:
    """The fields of `RecoverySums`, one entry at a time. Slow, and the definition.

    Args:
        entries: Codes of base, full and run in one dtype, and whether the mask holds the entry.
        decode: The number of a code.
    """
    found: dict[str, list] = {name: [0, 0] for name in _COUNTS} | {name: [[], []] for name in _SUMS}
    found["unequal"] = [[0] * len(CRITERIA) for _ in range(2)]
    for base, full, run, inside in entries:
        side = _INSIDE if inside else _OUTSIDE
        w, x, y = decode(base), decode(full), decode(run)
        found["entries"][side] += 1
        for number, criterion in enumerate(CRITERIA):
            found["unequal"][side][number] += full != run and _differs(criterion, x, y)
        d_full, d_run, apart = x - w, y - w, y - x
        products = (d_full * d_run, d_full * d_full, d_run * d_run, apart * apart)
        if not all(math.isfinite(product) for product in products):
            found["not_finite"][side] += 1
            continue
        if d_full != 0 and d_run != 0:
            found["moving"][side] += 1
            found["same_sign"][side] += (d_full > 0) == (d_run > 0)
            found["upwards_full"][side] += d_full > 0
            found["upwards_run"][side] += d_run > 0
        for name, product in zip(_SUMS, products, strict=True):
            found[name][side].append(product)
    return found | {name: [math.fsum(part) for part in found[name]] for name in _SUMS}


def _differs(criterion: Criterion, x: float, y: float) -> bool:
    """Whether two numbers of different codes differ under a criterion (table in `compare.accumulate`)."""
    if criterion.kind == "bitwise":
        return True
    if math.isnan(x) or math.isnan(y):
        return math.isnan(x) != math.isnan(y)
    if x == y:
        return False
    if criterion.kind == "value" or math.isinf(x) or math.isinf(y):
        return True
    limit = criterion.parameter * (max(abs(x), abs(y)) if criterion.kind == "rel" else 1.0)
    return abs(y - x) > limit
