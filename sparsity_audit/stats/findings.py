"""What the numbers of a diff mean, in sentences with numbers, for the top of a report.

Contract: pure; every sentence is true of the tallies it was made from and names its counts, its
criterion and its precision. No sentence claims a cause: rounding *hides*, decay *accounts for*. The
order is fixed, and nothing is said where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsity_audit.stats.decay import DecayVerdict
from sparsity_audit.stats.precision import hidden_ulps, merge_views, rel_equals_value
from sparsity_audit.stats.rollup import TensorTally
from sparsity_audit.stats.visible import visible_share
from sparsity_audit.types import Criterion, DType, View, common_dtype

__all__ = ["findings", "percent"]

_MAX_NAMES = 5


def findings(
    tensors: Sequence[TensorTally], *, decay: Mapping[str, DecayVerdict] | None = None
) -> tuple[str, ...]:
    """The sentences that a reader of this diff must not miss.

    Args:
        tensors: Every compared tensor.
        decay: Tensor name → verdict, for the tensors on which a shrink was tested.
    """
    return (
        *_mixed_dtypes(tensors),
        *_unchanged(tensors),
        *_codes_only(tensors),
        *_scaled(tensors),
        *_not_finite(tensors),
        *_rel_is_value(tensors),
        *_hidden(tensors),
        *_invisible(tensors),
        *_decayed(decay or {}),
    )


def percent(part: int, whole: int) -> str:
    """part/whole as a percentage with one decimal, never rounded to 0 or 100 when it is neither."""
    assert 0 <= part <= whole, (part, whole)
    assert whole > 0, whole
    text = f"{100 * part / whole:.1f} %"
    if text == "0.0 %" and part:
        return "less than 0.1 %"
    return "more than 99.9 %" if text == "100.0 %" and part < whole else text


def _mixed_dtypes(tensors: Sequence[TensorTally]) -> list[str]:
    groups: dict[tuple[DType, DType, DType], int] = {}
    for t in tensors:
        if t.base_dtype is not t.tuned_dtype:
            key = (t.base_dtype, t.tuned_dtype, t.native_dtype)
            groups[key] = groups.get(key, 0) + 1
    return [
        f"{_plural(count, 'tensor is', 'tensors are')} stored in {base.label} in the base and in "
        f"{tuned.label} in the tuned checkpoint; the native view compares them as {native.label}."
        for (base, tuned, native), count in groups.items()
    ]


def _unchanged(tensors: Sequence[TensorTally]) -> list[str]:
    names = [
        t.name
        for t in tensors
        if t.tally.native.entries and not any(t.tally.native.changed[key] for key in ("bitwise", "value"))
    ]
    if not names:
        return []
    if len(names) == len(tensors):
        return [f"All {len(names):,} compared tensors are identical, bit for bit."]
    listed = ", ".join(names[:_MAX_NAMES])
    if len(names) > _MAX_NAMES:
        listed += f" and {len(names) - _MAX_NAMES:,} more"
    return [f"{len(names):,} of {len(tensors):,} tensors did not change at all (bitwise): {listed}."]


def _codes_only(tensors: Sequence[TensorTally]) -> list[str]:
    opaque = sum(t.tally.native.entries for t in tensors if t.native_dtype.kind == "opaque")
    numbers = [t.tally.native for t in tensors if t.native_dtype.kind != "opaque" and not _is_scaled(t)]
    codes_only = sum(view.changed["bitwise"] - view.changed["value"] for view in numbers)
    sentences = []
    if opaque:
        sentences.append(
            f"{_plural(opaque, 'entry is', 'entries are')} stored in a format whose values are not "
            f"interpreted: there every criterion is bitwise."
        )
    if codes_only:
        sentences.append(
            f"{_plural(codes_only, 'entry differs', 'entries differ')} in the stored code but not as a "
            f"number (the sign of zero, a NaN payload): changed under bitwise alone."
        )
    return sentences


def _scaled(tensors: Sequence[TensorTally]) -> list[str]:
    views = [t.tally.native for t in tensors if _is_scaled(t)]
    if not views:
        return []
    value, codes = (sum(view.changed[key] for view in views) for key in ("value", "bitwise"))
    return [
        (
            f"{_plural(len(views), 'fp8 tensor is', 'fp8 tensors are')} compared by value, code × block "
            f"scale, as fp64: {value:,} entries changed under value, {codes:,} under bitwise. ULPs and |Δ| "
            f"of the native view are those of fp64 values; the served view rounds them to bf16."
        )
    ]


def _is_scaled(tensor: TensorTally) -> bool:
    """Whether values are codes times scales: only then is the native dtype not the sides' common one."""
    return tensor.native_dtype is not common_dtype(tensor.base_dtype, tensor.tuned_dtype)


def _not_finite(tensors: Sequence[TensorTally]) -> list[str]:
    sides = [
        [t.tally.native.base_specials for t in tensors],
        [t.tally.native.tuned_specials for t in tensors],
    ]
    base, tuned = (sum(s.nan + s.inf for s in side) for side in sides)
    if not base and not tuned:
        return []
    return [
        (
            f"{_plural(tuned, 'entry is', 'entries are')} NaN or infinite in the tuned checkpoint, "
            f"{base:,} in the base."
        )
    ]


def _rel_is_value(tensors: Sequence[TensorTally]) -> list[str]:
    sentences = []
    for criterion in _criteria(tensors, "rel"):
        for view in _views(tensors):
            dtype = _single_float_dtype(tensors, view)
            if dtype is None or not rel_equals_value(criterion, dtype):
                continue
            sentences.append(
                f"{criterion} equals value on {dtype.label} weights ({view} view): neighbouring numbers "
                f"differ by at least 2^-{dtype.layout.mantissa_bits + 1} relative, so one column "
                f"stands for both."
            )
    return sentences


def _hidden(tensors: Sequence[TensorTally]) -> list[str]:
    sentences = []
    for criterion in _criteria(tensors, "atol"):
        for view in _views(tensors):
            tallies = [t.view(view).changed for t in tensors]
            value = sum(changed["value"] for changed in tallies)
            hidden = value - sum(changed[criterion.key] for changed in tallies)
            if not hidden:
                continue
            note = _hidden_note(criterion, _single_float_dtype(tensors, view))
            sentences.append(
                f"{criterion} hides {percent(hidden, value)} of the entries changed under value "
                f"in the {view} view ({hidden:,} of {value:,}){note}."
            )
    return sentences


def _hidden_note(criterion: Criterion, dtype: DType | None) -> str:
    # In wider dtypes the list would run to thousands of ULPs and tell nothing.
    if dtype is None or dtype.itemsize > 2 or not (rows := hidden_ulps(criterion.parameter, dtype)):
        return ""
    steps = ", ".join(f"{row.ulps} ULP below |w| < 2^{row.below_exponent}" for row in rows)
    return f": changes of up to {steps} in {dtype.label}"


def _invisible(tensors: Sequence[TensorTally]) -> list[str]:
    sentences = []
    for dtype in dict.fromkeys(t.native_dtype for t in tensors if t.tally.served is not None):
        pairs = [
            (t.tally.native, t.tally.served)
            for t in tensors
            if t.native_dtype is dtype and t.tally.served is not None
        ]
        visible = visible_share(
            merge_views(native for native, _ in pairs), merge_views(served for _, served in pairs), dtype
        )
        lost = visible.native_changed - visible.served_changed
        if lost:
            sentences.append(
                f"{percent(lost, visible.native_changed)} of the {dtype.label} changes are invisible in bf16 "
                f"({lost:,} of {visible.native_changed:,} entries changed under value round to the same "
                f"number)."
            )
    return sentences


def _decayed(decay: Mapping[str, DecayVerdict]) -> list[str]:
    sentences = []
    for name, verdict in decay.items():
        if verdict.verdict != "decay":
            continue
        net = percent(max(0, verdict.band - verdict.mirror), verdict.entries)
        shrink = f"(c = {_short(verdict.shrink)})"
        if verdict.decay_only_rows:
            rows = _plural(verdict.decay_only_rows, "row", "rows")
            text = f"{rows} moved by weight decay only {shrink}; it accounts for {net} of the entries"
        else:
            text = f"weight decay alone accounts for {net} of the entries {shrink}"
        sentences.append(f"{name}: {text}.")
    return sentences


def _views(tensors: Sequence[TensorTally]) -> list[View]:
    """Both views, or the native one alone where nothing is wider than bf16."""
    return list(View) if any(t.tally.served is not None for t in tensors) else [View.NATIVE]


def _single_float_dtype(tensors: Sequence[TensorTally], view: View) -> DType | None:
    dtypes = {t.view_dtype(view) for t in tensors if t.view_dtype(view).kind == "float"}
    return dtypes.pop() if len(dtypes) == 1 else None


def _criteria(tensors: Sequence[TensorTally], kind: str) -> list[Criterion]:
    keys = tensors[0].tally.native.changed if tensors else ()
    return [criterion for key in keys if (criterion := Criterion.parse(key)).kind == kind]


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _short(value: float) -> str:
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
