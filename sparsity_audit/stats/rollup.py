"""From tallies to records: one per tensor, one per group, one headline per view and criterion.

Contract: counts are exact integers, shares are in [0, 1] and None where the denominator is zero, no
float is NaN or infinite. *Size-weighted* is Σchanged ÷ Σcompared; *unweighted* is the mean over tensors
that have entries, in which a norm of 4096 entries weighs as much as a matrix of 58 million: both are
always given, each by its name. Results do not depend on the order of the tensors but for their own order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparsity_audit.stats.exact_sum import to_float, to_sqrt
from sparsity_audit.stats.tally import SpecialCounts, Tally, ViewTally
from sparsity_audit.types import DType, View

__all__ = [
    "QUANTILES",
    "AxisSummary",
    "Headline",
    "Rollup",
    "RollupCount",
    "TensorKind",
    "TensorSummary",
    "TensorTally",
    "ViewSummary",
    "by_kind",
    "by_layer",
    "by_layer_and_module",
    "by_module",
    "headlines",
    "roll_up",
    "summarise",
    "totals",
]

TensorKind = Literal["matrix", "embedding", "head", "norm", "bias", "router", "other"]

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Levels of the row and column density quantiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTally:
    """A compared pair with its labels: what every roll-up starts from.

    Args:
        name: The pair's name in base coordinates.
        layer: Layer number, or None outside the layer stack.
        stack: Name of the layer stack where a model has several (text and vision); else empty.
        module: Module type without the layer number: `self_attn.q_proj`, `mlp.down_proj`, …
        kind: What the tensor is; norms, biases, embeddings and head are totalled apart.
        base_dtype: Stored dtype of the base.
        tuned_dtype: Stored dtype of the tuned side.
        native_dtype: Dtype of the native view: the stored one, or that both were upcast to.
        tally: The merged counts.
    """

    name: str
    layer: int | None
    module: str
    kind: TensorKind
    base_dtype: DType
    tuned_dtype: DType
    native_dtype: DType
    tally: Tally
    stack: str = ""

    @property
    def layer_label(self) -> str | None:
        """The layer as roll-ups name it: `3`, or `vision_model.encoder.layers.3` beside other stacks."""
        if self.layer is None:
            return None
        return f"{self.stack}.{self.layer}" if self.stack else str(self.layer)

    def view(self, view: View) -> ViewTally:
        """Counts of a view; the served view of a tensor that is not wider than bf16 is the native one."""
        if view is View.SERVED and self.tally.served is not None:
            return self.tally.served
        return self.tally.native

    def view_dtype(self, view: View) -> DType:
        """Dtype of the codes that `view` compared."""
        return DType.BF16 if view is View.SERVED and self.tally.served is not None else self.native_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """How sparse an update is: never without its view, criterion and denominator.

    Source: sparsity = 1 − ‖θ_tuned − θ_base‖₀/n, 2505.11711.

    Args:
        view: Which view was compared.
        criterion: Key of the rule that decides "changed".
        compared: Entries in the denominator.
        changed: Entries changed under the criterion.
        density: changed ÷ compared.
        sparsity: (compared − changed) ÷ compared.
    """

    view: View
    criterion: str
    compared: int
    changed: int
    density: float | None
    sparsity: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSummary:
    """One view of one tensor. Norms are over finite differences; `nonfinite_deltas` counts the others.

    Args:
        dtype: Dtype of the compared codes.
        counts: One headline per criterion, in the order they were asked for.
        sign_flips: Entries whose sign changed, both sides non-zero.
        nonfinite_deltas: Changed entries left out of the norms.
        base_specials: NaN, Inf, ±0 and subnormals of the base.
        tuned_specials: The same of the tuned side.
        l1: ‖Δ‖₁, correctly rounded; None beyond float64.
        l2: ‖Δ‖₂.
        max_abs: max|Δ|.
        base_l2: ‖w_base‖₂.
        relative_l2: ‖Δ‖₂ ÷ ‖w_base‖₂; None where the base is zero.
    """

    dtype: DType
    counts: tuple[Headline, ...]
    sign_flips: int
    nonfinite_deltas: int
    base_specials: SpecialCounts
    tuned_specials: SpecialCounts
    l1: float | None
    l2: float
    max_abs: float
    base_l2: float
    relative_l2: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisSummary:
    """Rows (or columns) of a matrix under the mask criterion.

    Args:
        lines: Number of rows.
        touched: Rows with at least one change.
        touched_share: touched ÷ lines.
        density_quantiles: Density of a row at `QUANTILES`, as observed values (no interpolation);
            empty where there are no entries.
    """

    lines: int
    touched: int
    touched_share: float | None
    density_quantiles: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSummary:
    """Everything a report says about one tensor; see `TensorTally` for the labels.

    Args:
        is_identical: No stored code differs.
        rows: Row statistics; None at level `counts`, as for the next two.
        cols: Column statistics.
        decay_only_rows: Rows changed by weight decay alone; None as well where no shrink was tested.
    """

    name: str
    layer: int | None
    module: str
    kind: TensorKind
    base_dtype: DType
    tuned_dtype: DType
    is_identical: bool
    native: ViewSummary
    served: ViewSummary | None
    rows: AxisSummary | None
    cols: AxisSummary | None
    decay_only_rows: int | None


def summarise(tensor: TensorTally) -> TensorSummary:
    """The record of one tensor."""
    tally, axes = tensor.tally, tensor.tally.axes
    return TensorSummary(
        name=tensor.name,
        layer=tensor.layer,
        module=tensor.module,
        kind=tensor.kind,
        base_dtype=tensor.base_dtype,
        tuned_dtype=tensor.tuned_dtype,
        is_identical=tally.native.changed.get("bitwise", 0) == 0,
        native=_summarise_view(tally.native, View.NATIVE, tensor.native_dtype),
        served=None if tally.served is None else _summarise_view(tally.served, View.SERVED, DType.BF16),
        rows=None if axes is None else _summarise_axis(axes.rows, num_across=len(axes.cols)),
        cols=None if axes is None else _summarise_axis(axes.cols, num_across=len(axes.rows)),
        decay_only_rows=None if axes is None or tally.native.decay is None else axes.decay_only_rows,
    )


def _summarise_view(tally: ViewTally, view: View, dtype: DType) -> ViewSummary:
    l2, base_l2 = to_sqrt(tally.sq_sum), to_sqrt(tally.base_sq_sum)
    return ViewSummary(
        dtype=dtype,
        counts=tuple(
            _headline(view, criterion, compared=tally.entries, changed=changed)
            for criterion, changed in tally.changed.items()
        ),
        sign_flips=tally.sign_flips,
        nonfinite_deltas=tally.nonfinite_deltas,
        base_specials=tally.base_specials,
        tuned_specials=tally.tuned_specials,
        l1=_finite(to_float(tally.abs_sum)),
        l2=l2,
        max_abs=tally.max_abs,
        base_l2=base_l2,
        relative_l2=_finite(l2 / base_l2) if base_l2 else None,
    )


def _summarise_axis(changed: np.ndarray, *, num_across: int) -> AxisSummary:
    lines, touched = len(changed), int(np.count_nonzero(changed))
    quantiles: tuple[float, ...] = ()
    if lines and num_across:
        values = np.quantile(changed, QUANTILES, method="inverted_cdf")
        quantiles = tuple(int(value) / num_across for value in values)
    return AxisSummary(
        lines=lines,
        touched=touched,
        touched_share=touched / lines if lines else None,
        density_quantiles=quantiles,
    )


def _headline(view: View, criterion: str, *, compared: int, changed: int) -> Headline:
    return Headline(
        view=view,
        criterion=criterion,
        compared=compared,
        changed=changed,
        density=changed / compared if compared else None,
        sparsity=(compared - changed) / compared if compared else None,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RollupCount:
    """One criterion over a group of tensors.

    Args:
        total: Size-weighted: all entries of the group taken together.
        mean_density: Unweighted mean of the tensors' densities; empty tensors have none and are left out.
        mean_sparsity: 1 − mean_density.
    """

    total: Headline
    mean_density: float | None
    mean_sparsity: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollup:
    """A group of tensors in one view.

    Args:
        key: What the tensors share.
        num_tensors: Tensors in the group, empty ones included.
        num_identical: Those in which no stored code differs.
        entries: Entries compared.
        counts: One per criterion.
        sign_flips: Entries whose sign changed.
        l2: ‖Δ‖₂ over the group.
        relative_l2: ‖Δ‖₂ ÷ ‖w_base‖₂ over the group.
    """

    key: str
    num_tensors: int
    num_identical: int
    entries: int
    counts: tuple[RollupCount, ...]
    sign_flips: int
    l2: float
    relative_l2: float | None


def roll_up(
    tensors: Iterable[TensorTally], *, key: Callable[[TensorTally], str | None], view: View = View.NATIVE
) -> tuple[Rollup, ...]:
    """Group tensors by `key`, in order of first appearance; a key of None leaves a tensor out."""
    groups: dict[str, list[TensorTally]] = {}
    everyone = list(tensors)
    for tensor in everyone:
        name = key(tensor)
        if name is not None:
            groups.setdefault(name, []).append(tensor)
    criteria = _counted_by_all(everyone, view)
    return tuple(_roll_up_group(name, members, view, criteria) for name, members in groups.items())


def by_layer(tensor: TensorTally) -> str | None:
    """Key: the layer number; tensors outside the stack are left out."""
    return tensor.layer_label


def by_module(tensor: TensorTally) -> str:
    """Key: the module type."""
    return tensor.module


def by_kind(tensor: TensorTally) -> str:
    """Key: matrix, embedding, head, norm, bias or other."""
    return tensor.kind


def by_layer_and_module(tensor: TensorTally) -> str | None:
    """Key: layer number and module type, as `3/mlp.down_proj`."""
    return None if tensor.layer is None else f"{tensor.layer_label}/{tensor.module}"


_TOTALS: dict[str, frozenset[TensorKind]] = {
    "all": frozenset(("matrix", "embedding", "head", "norm", "bias", "router", "other")),
    "matrices": frozenset(("matrix",)),
    "embeddings+head": frozenset(("embedding", "head")),
    "norms": frozenset(("norm",)),
    "biases": frozenset(("bias",)),
    "routers": frozenset(("router",)),
    "other": frozenset(("other",)),
}


def totals(tensors: Sequence[TensorTally], *, view: View = View.NATIVE) -> tuple[Rollup, ...]:
    """`all`, then the parts that add up to it; a part without tensors is left out."""
    groups = {name: [t for t in tensors if t.kind in kinds] for name, kinds in _TOTALS.items()}
    criteria = _counted_by_all(tensors, view)
    return tuple(_roll_up_group(name, members, view, criteria) for name, members in groups.items() if members)


def headlines(tensors: Sequence[TensorTally]) -> tuple[Headline, ...]:
    """Update sparsity of the whole pair: native under every criterion, then served where it differs."""
    views = [View.NATIVE]
    if any(t.tally.served is not None for t in tensors):
        views.append(View.SERVED)
    return tuple(
        count.total for view in views for rollup in totals(tensors, view=view)[:1] for count in rollup.counts
    )


def _counted_by_all(tensors: Sequence[TensorTally], view: View) -> tuple[str, ...]:
    """Criteria that every tensor counted in this view: a `top` criterion is counted in one view only."""
    counted = [tensor.view(view).changed for tensor in tensors]
    return tuple(key for key in (counted[0] if counted else ()) if all(key in keys for keys in counted))


def _roll_up_group(key: str, members: list[TensorTally], view: View, criteria: tuple[str, ...]) -> Rollup:
    tallies = [member.view(view) for member in members]
    entries = sum(tally.entries for tally in tallies)
    counts = []
    for criterion in criteria:
        changed = sum(tally.changed[criterion] for tally in tallies)
        densities = [tally.changed[criterion] / tally.entries for tally in tallies if tally.entries]
        mean = math.fsum(densities) / len(densities) if densities else None
        counts.append(
            RollupCount(
                total=_headline(view, criterion, compared=entries, changed=changed),
                mean_density=mean,
                mean_sparsity=None if mean is None else 1 - mean,
            )
        )
    base_l2 = to_sqrt(sum(tally.base_sq_sum for tally in tallies))
    l2 = to_sqrt(sum(tally.sq_sum for tally in tallies))
    return Rollup(
        key=key,
        num_tensors=len(members),
        num_identical=sum(m.tally.native.changed.get("bitwise", 0) == 0 for m in members),
        entries=entries,
        counts=tuple(counts),
        sign_flips=sum(tally.sign_flips for tally in tallies),
        l2=l2,
        relative_l2=_finite(l2 / base_l2) if base_l2 else None,
    )
