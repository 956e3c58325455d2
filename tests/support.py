"""Code that several test modules use: collect mask bits, plan a comparison of two folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparsity_audit.align.match import match
from sparsity_audit.align.records import Pair
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.passes.plan import Plan, default_criteria, make_plan
from sparsity_audit.types import Criterion, View


class BitCollector:
    """Keeps packed bits as whole boolean matrices."""

    def __init__(self) -> None:
        self.masks: dict[str, np.ndarray] = {}

    def write(self, pair: Pair, *, first_row: int, first_col: int, bits: np.ndarray) -> None:
        rows, cols = pair.base.rows_cols
        mask = self.masks.setdefault(pair.name, np.zeros((rows, -(-cols // 8) * 8), dtype=bool))
        wide = np.unpackbits(bits, axis=1, bitorder="little").astype(bool)
        mask[first_row : first_row + len(bits), first_col : first_col + wide.shape[1]] |= wide


class WholeGroups:
    """Groups of whole tensors, cut into blocks; OUTSIDE where the rows are not compared."""

    def __init__(self, groups: dict[str, np.ndarray]) -> None:
        self._groups = groups

    def num_groups(self, name: str) -> int:
        return int(self._groups[name].max(initial=0)) + 1

    def groups(self, name, block) -> np.ndarray:
        flat = self._groups[name].reshape(-1)
        return flat[block.first_entry : block.first_entry + block.num_entries].astype(np.int16)

    def selected(self, name, block) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        pass


def plan_of(
    base: Path, tuned: Path, *, unit_bytes: int = 1 << 26, view: View = View.NATIVE, mask: str = "value"
) -> Plan:
    sides = open_checkpoint(base), open_checkpoint(tuned)
    alignment = match(*sides)
    criteria = default_criteria((Criterion.parse(mask),))
    specs = tuple(
        PairSpec(
            base=p.base.spec.dtype,
            tuned=p.tuned.spec.dtype,
            criteria=criteria,
            mask=criteria.index(Criterion.parse(mask)),
            view=view,
        )
        for p in alignment.pairs
    )
    return make_plan(*sides, alignment, specs=specs, unit_bytes=unit_bytes)
