"""The precision section of the page: the tables behind the charts, and what bf16 shows.

Contract: pure; a count that the record only bounds is printed as `between`, never as one number.
"""

from __future__ import annotations

from sparsity_audit.report.page_table import Table, share_of
from sparsity_audit.report.schema import DiffReport, PrecisionRecord
from sparsity_audit.report.svg_charts import between, delta_bins, power_of_two, tolerance_steps, ulp_label

__all__ = ["precision_tables", "visible_table"]

_KIND_NAMES = {"normal_or_nan": "normal or NaN", "not_float": "not float"}


def precision_tables(record: PrecisionRecord) -> dict[str, Table]:
    """The tables behind the charts of one record: `rates`, `ulps`, `delta`, `tolerance`."""
    where = f"{record.view.value}, {record.dtype.label}"
    return {
        "rates": Table(
            title=f"Change rate by |w_base| ({where})",
            head=("|w_base|", "entries", "changed (value)", "rate", "by 1 ULP"),
            rows=tuple(
                (
                    _KIND_NAMES.get(r.kind, r.kind)
                    if r.exponent is None
                    else f"from {power_of_two(r.exponent)}",
                    f"{r.entries:,}",
                    f"{r.changed:,}",
                    share_of(r.changed, r.entries),
                    f"{r.one_ulp:,}",
                )
                for r in record.rates
            ),
        ),
        "ulps": Table(
            title=f"ULP distance ({where})",
            head=("ULP", "outward", "inward", "crossing zero"),
            rows=(
                *(
                    (ulp_label(b), f"{b.outward:,}", f"{b.inward:,}", f"{b.crossing:,}")
                    for b in record.ulps.bins
                ),
            ),
            more=_not_in_bins(record),
        ),
        "delta": Table(
            title=f"Entries by |Δ| ({where})",
            head=("|Δ|", "entries"),
            rows=tuple(_delta_rows(record)),
        ),
        "tolerance": Table(
            title=f"Entries with |Δ| ≥ x ({where})",
            head=("x", "x in decimal", "entries"),
            rows=tuple(
                (power_of_two(p.exponent), f"{2.0**p.exponent:.3g}", between(p.lower, p.upper))
                for p in tolerance_steps(record)
            ),
        ),
    }


def _delta_rows(record: PrecisionRecord) -> list[tuple[str, str]]:
    steps = tolerance_steps(record)
    if not steps:
        return []
    rows = [
        (f"from {power_of_two(b.exponent)}", between(b.lower, b.upper)) for b in delta_bins(record) if b.upper
    ]
    largest, smallest = steps[0], steps[-1]
    if largest.upper:
        what = f"at least {power_of_two(largest.exponent)}, NaN or infinity"
        rows.insert(0, (what, between(largest.lower, largest.upper)))
    changed = sum(rate.changed for rate in record.rates)
    if changed > smallest.lower:
        what = f"not zero, below {power_of_two(smallest.exponent)}"
        rows.append((what, between(changed - smallest.upper, changed - smallest.lower)))
    return rows


def _not_in_bins(record: PrecisionRecord) -> str:
    ulps = record.ulps
    named = (
        (ulps.zero_sign, "+0 against −0"),
        (ulps.nan_payload, "NaN payload"),
        (ulps.special, "NaN or infinity"),
    )
    parts = [f"{count:,} {name}" for count, name in named if count]
    return f"Not in the bins: {', '.join(parts)}." if parts else ""


def visible_table(report: DiffReport) -> tuple[tuple[str, Table], ...]:
    """What bf16 shows of wider changes: a sentence with the predictions, and the table per exponent."""
    found = []
    for record in report.visible:
        seen = record.visible
        off, on = seen.predicted_off_grid, seen.predicted_on_grid
        text = (
            f"{seen.served_changed:,} of {seen.native_changed:,} {record.dtype.label} changes "
            f"({share_of(seen.served_changed, seen.native_changed)}) differ in bf16. Expected from |Δ|: "
            f"{between(off.lower, off.upper)} if the base lies anywhere between two bf16 numbers, "
            f"{between(on.lower, on.upper)} if every base is a bf16 number."
        )
        table = Table(
            title=f"Changes visible in bf16, by |w_base| as stored ({record.dtype.label})",
            head=("|w_base|", "changed (value)", "visible in bf16"),
            rows=tuple(
                (
                    f"from {power_of_two(row.exponent)}",
                    f"{row.native_changed:,}",
                    between(row.lower, row.upper),
                )
                for row in seen.by_exponent
            ),
        )
        found.append((text, table))
    return tuple(found)
