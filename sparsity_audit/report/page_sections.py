"""The sections of the page as rows of text: what the template lays out, and nothing it has to compute.

Contract: pure; every number is the record's, printed as the other tables print it. Long lists are cut at
stated lengths and say how much was left out and where it stands.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsity_audit.report.page_table import MAX_ROWS, Table, cut_note, natural, share_of, view_label
from sparsity_audit.report.schema import DiffReport
from sparsity_audit.report.spectral_rows import (
    OVERLAP_HEAD,
    SPECTRAL_HEAD,
    overlap_rows,
    refusal_lines,
    spectral_rows,
)
from sparsity_audit.report.structure import STRIPE_HEAD, stripe_rows
from sparsity_audit.stats.rollup import Rollup

__all__ = [
    "accounts_table",
    "decay_table",
    "losses_table",
    "provenance",
    "rollup_tables",
    "spectral_tables",
    "stripes_table",
    "top_table",
]


def accounts_table(report: DiffReport) -> Table:
    """Where every entry of both sides went."""
    sides = (("base", report.accounts.base), ("tuned", report.accounts.tuned))
    return Table(
        title="Entries: compared + skipped + left over = total",
        head=("side", "compared", "skipped", "left over", "total"),
        rows=tuple(
            (side, f"{a.compared:,}", f"{a.skipped:,}", f"{a.leftover:,}", f"{a.total:,}")
            for side, a in sides
        ),
    )


def losses_table(report: DiffReport) -> Table | None:
    """What was skipped or left over, with reasons."""
    rows = [
        (
            x.name,
            f"left over in {x.side}",
            f"{x.num_entries:,}",
            f"{x.reason}: {x.detail}" if x.detail else x.reason,
        )
        for x in report.leftovers
    ]
    rows += [(x.name, "skipped", f"{x.num_entries:,}", x.reason) for x in report.skipped]
    if not rows:
        return None
    return Table(
        title="Skipped and left over",
        head=("tensor", "what", "entries", "reason"),
        rows=tuple(rows[:MAX_ROWS]),
        words=(1, 3),
        more=cut_note(len(rows)),
    )


def rollup_tables(report: DiffReport) -> tuple[tuple[str, tuple[Table, ...]], ...]:
    """View label → tables by part, by module and by layer."""
    return tuple(
        (
            view_label(report, rollups.view),
            tuple(
                _rollup_table(title, groups, report.mask_criterion)
                for title, groups in (
                    ("part", rollups.totals),
                    ("module", rollups.by_module),
                    ("layer", tuple(sorted(rollups.by_layer, key=lambda group: natural(group.key)))),
                )
                if groups
            ),
        )
        for rollups in report.rollups
    )


def _rollup_table(title: str, groups: Sequence[Rollup], criterion: str) -> Table:
    rows = []
    for group in groups[:MAX_ROWS]:
        found = next((c for c in group.counts if c.total.criterion == criterion), None)
        head = (group.key, f"{group.num_tensors:,}", f"{group.num_identical:,}", f"{group.entries:,}")
        tail = ("–", "–", "–")
        if found is not None:
            total = found.total
            mean = "–" if found.mean_sparsity is None else f"{100 * found.mean_sparsity:.1f} %"
            tail = (f"{total.changed:,}", share_of(total.compared - total.changed, total.compared), mean)
        relative = "–" if group.relative_l2 is None else f"{group.relative_l2:.3g}"
        rows.append((*head, *tail, relative))
    return Table(
        title=f"By {title} ({criterion})",
        head=(
            title,
            "tensors",
            "identical",
            "entries",
            "changed",
            "sparsity",
            "mean over tensors",
            "‖Δ‖₂ ÷ ‖w‖₂",
        ),
        rows=tuple(rows),
        more=cut_note(len(groups)),
    )


def decay_table(report: DiffReport) -> Table | None:
    """Tensors on which a shrink was tested, with the mirror control; those with a verdict first."""
    tested = [(t.name, t.decay) for t in report.tensors if t.decay is not None]
    if not tested:
        return None
    tested.sort(key=lambda row: row[1].verdict != "decay")
    return Table(
        title="Entries that shrank by about (1 − c), beside those that grew as much",
        head=(
            "tensor",
            "verdict",
            "shrink c",
            "unchanged",
            "band (c/2 … 2c)",
            "mirror",
            "moved",
            "decay-only rows",
        ),
        rows=tuple(
            (
                name,
                v.verdict,
                f"{v.shrink:.2g}",
                share_of(v.unchanged, v.entries),
                share_of(v.band, v.entries),
                share_of(v.mirror, v.entries),
                share_of(v.moved, v.entries),
                "–" if v.decay_only_rows is None else f"{v.decay_only_rows:,}",
            )
            for name, v in tested[:MAX_ROWS]
        ),
        words=(1,),
        more=cut_note(len(tested)),
    )


def stripes_table(report: DiffReport) -> Table | None:
    """Stripe scores beside what magnitudes give, most uneven first."""
    found = report.structure
    if found is None or not found.stripes:
        return None
    return Table(
        title=f"Variance of row and column densities ÷ that of independent entries, beside what magnitudes "
        f"give ({found.criterion}, {found.view}; most uneven of {len(found.stripes):,})",
        head=tuple(STRIPE_HEAD),
        rows=tuple(tuple(row) for row in stripe_rows(found)),
        more=found.stripes_note,
    )


def spectral_tables(report: DiffReport) -> tuple[Table, ...]:
    """Spectra of the update beside random references, and what was refused."""
    if not report.spectral:
        return ()
    spectra, overlaps = spectral_rows(report.spectral), overlap_rows(report.spectral)
    refused = "; ".join(refusal_lines(report.spectral))
    tables = (
        Table(
            title="Spectrum of the update, beside its entries in random places (mean ± sd)",
            head=tuple(SPECTRAL_HEAD),
            rows=tuple(tuple(row) for row in spectra[:MAX_ROWS]),
            words=(1,),
            more=" ".join(
                text for text in (cut_note(len(spectra)), refused and f"No spectrum of {refused}.") if text
            ),
        ),
        Table(
            title=f"Changed entries ({report.spectral[0].criterion}) that lie in masks made from the base",
            head=tuple(OVERLAP_HEAD),
            rows=tuple(tuple(row) for row in overlaps[:MAX_ROWS]),
            words=(1,),
            more=cut_note(len(overlaps)),
        ),
    )
    return tuple(table for table in tables if table.rows or table.more)


def top_table(report: DiffReport) -> Table | None:
    """Selections of the largest movements."""
    if not report.top:
        return None
    return Table(
        title="Largest movements",
        head=(
            "criterion",
            "asked",
            "selected",
            "eligible",
            "smallest |Δ| selected",
            "ties at the cut",
            "of these selected",
        ),
        rows=tuple(
            (
                top.criterion,
                f"{top.asked:,}",
                f"{top.selected:,}",
                f"{top.eligible:,}",
                "–" if top.threshold is None else f"{top.threshold:.6g}",
                f"{top.ties_at_cut:,}",
                f"{top.ties_selected:,}",
            )
            for top in report.top[:MAX_ROWS]
        ),
        more=cut_note(len(report.top)),
    )


def provenance(report: DiffReport) -> tuple[Table, ...]:
    """What was read, and how the pairs were matched."""
    sides = (("base", report.base), ("tuned", report.tuned))
    rules: dict[str, int] = {}
    for tensor in report.tensors:
        rules[tensor.rule] = rules.get(tensor.rule, 0) + 1
    facts = [
        ("tool", report.tool),
        ("record", f"{report.format} {report.version}, level {report.level}"),
        ("criteria", ", ".join(report.criteria)),
        ("mask and gates", f"{report.mask_criterion}, {report.view.value} view"),
        ("pairs by matching rule", ", ".join(f"{name}: {count:,}" for name, count in sorted(rules.items()))),
    ]
    for side, record in sides:
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in record.entries_by_dtype.items())
        facts += [
            (f"{side}, as given", record.reference),
            (f"{side}, resolved", record.resolved),
            (f"{side}, stored", f"{record.num_tensors:,} tensors, {record.num_bytes:,} bytes: {dtypes}"),
        ]
        facts += [(f"{side}, note", note) for note in record.notes]
        ties = [f"{name} = {target}" for name, target in record.aliases.items()]
        if ties:
            facts.append((f"{side}, tied names", "; ".join(ties[:MAX_ROWS])))
    files = [(file.name, side, f"{file.num_bytes:,}") for side, record in sides for file in record.files]
    return (
        Table(title="The run", head=("what", ""), rows=tuple(facts), words=(1,)),
        Table(
            title="Files",
            head=("file", "side", "bytes"),
            rows=tuple(files[:MAX_ROWS]),
            words=(1,),
            more=cut_note(len(files)),
        ),
    )
