"""Match two catalogues by name and shape.

Contract: see `records`; ambiguity raises `AlignmentError` with both candidates, it is never resolved by order.
"""

from __future__ import annotations

from sparsity_audit.align.records import Alignment, Leftover, LeftoverReason, Pair, TensorSlice
from sparsity_audit.checkpoint.store import Catalogue

__all__ = ["match"]


def match(base: Catalogue, tuned: Catalogue, *, maps: tuple[tuple[str, str], ...] = ()) -> Alignment:
    """Pairs and leftovers of two checkpoints.

    Args:
        base: The base side.
        tuned: The tuned side.
        maps: User rules (REGEX, REPL) applied to tuned names before matching.
    """
    assert not maps
    pairs, leftovers = [], []
    for name, spec in base.tensors.items():
        other = tuned.tensors.get(name)
        if other is not None and other.shape == spec.shape:
            pairs.append(
                Pair(name=name, base=TensorSlice.whole(spec), tuned=TensorSlice.whole(other), rule="exact")
            )
        else:
            leftovers.append(_left("base", spec.name, spec.num_entries, other is not None))
    for name, spec in tuned.tensors.items():
        other = base.tensors.get(name)
        if other is None or other.shape != spec.shape:
            leftovers.append(_left("tuned", spec.name, spec.num_entries, other is not None))
    return Alignment(
        pairs=tuple(pairs),
        skipped=(),
        leftovers=tuple(leftovers),
        findings=(),
        totals={"base": base.num_entries, "tuned": tuned.num_entries},
    )


def _left(side, name, num_entries, shape_differs) -> Leftover:
    reason = LeftoverReason.SHAPE if shape_differs else LeftoverReason.ONLY_HERE
    return Leftover(side=side, name=name, num_entries=num_entries, reason=reason)
