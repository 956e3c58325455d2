"""What happens to entries along a training run: from exact counts of masks and codes at T saved steps.

Contract: pure; integers, which add over any split of the entries. M_t is the mask of step t against the
base, M_0 is empty. An entry is *never* changed when it is in no M_t, *final* when it is in M_T, and
*cancelled* when it was in some M_t and is not in M_T. All of it is as fine as the saved steps: what changed
and came back between two of them is not seen. What is undefined is None.

*Step-to-step sparsity* S_k(t): share of entries whose stored codes at t and at k saved steps before are equal
(2602.03839); the base is step 0. Published shape of a trajectory (2505.11711, PRIME): 72 % never, 8 %
cancelled, 20 % final.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.chance import share_of

__all__ = ["StepCounts", "StepRecord", "TrajectoryCounts", "TrajectoryRecord", "trajectory_record"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrajectoryCounts:
    """Counts over the entries of one tensor, or of a part of it.

    Args:
        entries: Entries compared.
        itemsize: Bytes of a stored entry.
        index_bytes: Bytes of a position in a patch: 4, or 8 beyond 2³¹ − 1 entries of a tensor.
        changed: |M_t|, int64[T].
        born: |M_t ∖ M_{t−1}|, int64[T].
        died: |M_{t−1} ∖ M_t|, int64[T].
        seen: |M_1 ∪ … ∪ M_t|, int64[T].
        kept: |M_t ∩ M_T|, int64[T].
        moved: Entries whose stored codes at t and at t − k differ, int64[K, T], one row a lag; −1 where
            t < k.
    """

    entries: int
    itemsize: int
    index_bytes: int
    changed: np.ndarray
    born: np.ndarray
    died: np.ndarray
    seen: np.ndarray
    kept: np.ndarray
    moved: np.ndarray

    @classmethod
    def from_masks(
        cls,
        masks: np.ndarray,
        codes: np.ndarray,
        *,
        lags: Sequence[int],
        itemsize: int,
        index_bytes: int = 4,
    ) -> TrajectoryCounts:
        """Count entry by entry: the reference for the pass.

        Args:
            masks: M_1 … M_T, bool[T, n].
            codes: Stored codes of θ_0 … θ_T, unsigned[T + 1, n].
            lags: Values of k.
            itemsize: Bytes of a stored entry.
            index_bytes: Bytes of a position in a patch.
        """
        steps, entries = masks.shape
        before = np.vstack([np.zeros((1, entries), dtype=np.bool_), masks[:-1]])
        moved = np.full((len(lags), steps), -1, dtype=np.int64)
        for row, lag in enumerate(lags):
            for step in range(lag, steps + 1):
                moved[row, step - 1] = np.count_nonzero(codes[step] != codes[step - lag])

        def count(chosen: np.ndarray) -> np.ndarray:
            return np.count_nonzero(chosen, axis=1).astype(np.int64)

        return cls(
            entries=entries,
            itemsize=itemsize,
            index_bytes=index_bytes,
            changed=count(masks),
            born=count(masks & ~before),
            died=count(before & ~masks),
            seen=count(np.logical_or.accumulate(masks, axis=0)),
            kept=count(masks & masks[-1]),
            moved=moved,
        )

    def merge(self, other: TrajectoryCounts) -> TrajectoryCounts:
        """Both parts of one tensor together."""
        assert (self.itemsize, self.index_bytes) == (other.itemsize, other.index_bytes)
        return TrajectoryCounts(
            entries=self.entries + other.entries,
            itemsize=self.itemsize,
            index_bytes=self.index_bytes,
            changed=self.changed + other.changed,
            born=self.born + other.born,
            died=self.died + other.died,
            seen=self.seen + other.seen,
            kept=self.kept + other.kept,
            moved=np.where(self.moved < 0, -1, self.moved + other.moved),
        )

    def check(self) -> None:
        """Assert what must hold of any trajectory."""
        before = np.concatenate([[0], self.changed[:-1]])
        assert (self.born - self.died == self.changed - before).all()
        assert (np.diff(self.seen) >= 0).all()
        assert (self.seen >= self.changed).all()
        assert (self.kept <= np.minimum(self.changed, self.changed[-1])).all()
        assert self.kept[-1] == self.changed[-1]
        assert self.seen[-1] <= self.entries


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """One lag of a step.

    Args:
        lag: k, in saved steps.
        moved: Entries whose stored codes differ from those k saved steps before.
        sparsity: S_k: 1 − moved ÷ entries.
    """

    lag: int
    moved: int
    sparsity: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One saved step.

    Args:
        label: Its name.
        changed: |M_t|.
        sparsity: Update sparsity against the base, 1 − |M_t| ÷ entries.
        born: Entries of M_t that were not in M_{t−1}.
        died: Entries of M_{t−1} that are not in M_t.
        seen: Entries that were in some mask up to here.
        kept: |M_t ∩ M_T|.
        coverage: kept ÷ |M_T|: how much of the final mask is there already.
        precision: kept ÷ |M_t|: how much of this mask lasts.
        jaccard: kept ÷ |M_t ∪ M_T|.
        lags: S_k, for those k that reach back no further than the base.
        patch_bytes: Size of a sparse patch from the saved step before: a position and a stored value for each
            entry whose code differs.
        dense_bytes: Size of the tensors themselves.
    """

    label: str
    changed: int
    sparsity: float | None
    born: int
    died: int
    seen: int
    kept: int
    coverage: float | None
    precision: float | None
    jaccard: float | None
    lags: tuple[StepCounts, ...]
    patch_bytes: int
    dense_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryRecord:
    """A run, or a part of the model along it.

    Args:
        entries: Entries compared.
        never: Entries in no mask.
        cancelled: Entries in some mask, and not in the last.
        final: Entries in the last mask.
        never_frac: never ÷ entries.
        cancelled_frac: cancelled ÷ entries.
        final_frac: final ÷ entries.
        steps: The saved steps, in their order.
    """

    entries: int
    never: int
    cancelled: int
    final: int
    never_frac: float | None
    cancelled_frac: float | None
    final_frac: float | None
    steps: tuple[StepRecord, ...]


def trajectory_record(
    parts: Sequence[TrajectoryCounts], *, labels: Sequence[str], lags: Sequence[int]
) -> TrajectoryRecord:
    """The record of some tensors together; `lags` begins with 1, from which patches follow.

    Args:
        parts: Their counts; at least one.
        labels: Names of the steps.
        lags: Values of k, as counted.
    """
    assert lags[0] == 1, lags
    entries = sum(part.entries for part in parts)
    totals = {
        name: np.sum([getattr(part, name) for part in parts], axis=0)
        for name in ("changed", "born", "died", "seen", "kept")
    }
    moved = np.sum([np.maximum(part.moved, 0) for part in parts], axis=0)
    patch = np.sum([part.moved[0] * (part.index_bytes + part.itemsize) for part in parts], axis=0)
    dense = sum(part.entries * part.itemsize for part in parts)
    final, seen = int(totals["changed"][-1]), int(totals["seen"][-1])

    def step(place: int) -> StepRecord:
        changed, born, died, ever, kept = (int(total[place]) for total in totals.values())
        known = [(row, lag) for row, lag in enumerate(lags) if lag <= place + 1]
        return StepRecord(
            label=labels[place],
            changed=changed,
            sparsity=share_of(entries - changed, entries),
            born=born,
            died=died,
            seen=ever,
            kept=kept,
            coverage=share_of(kept, final),
            precision=share_of(kept, changed),
            jaccard=share_of(kept, changed + final - kept),
            lags=tuple(
                StepCounts(
                    lag=lag,
                    moved=int(moved[row, place]),
                    sparsity=share_of(entries - int(moved[row, place]), entries),
                )
                for row, lag in known
            ),
            patch_bytes=int(patch[place]),
            dense_bytes=dense,
        )

    return TrajectoryRecord(
        entries=entries,
        never=entries - seen,
        cancelled=seen - final,
        final=final,
        never_frac=share_of(entries - seen, entries),
        cancelled_frac=share_of(seen - final, entries),
        final_frac=share_of(final, entries),
        steps=tuple(step(place) for place in range(len(labels))),
    )
