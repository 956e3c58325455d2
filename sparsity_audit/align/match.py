"""Match two catalogues by name and shape.

Contract: see `records`; ambiguity raises `AlignmentError` with the candidates, it is never resolved by order.
Rules in turn: the user's, exact names, normalised names (`rules`), fused ↔ split, one vocabulary matrix under
two names. Pairs stand in plain sorted order of their names, leftovers by side and name. Swapping the sides
(without user rules) mirrors the result.
"""

from __future__ import annotations

from collections import Counter

from sparsity_audit.align.fusing import Fusions, find_fusions
from sparsity_audit.align.linking import Linker
from sparsity_audit.align.naming import NamedSide, name_side
from sparsity_audit.align.pairing import Ledger
from sparsity_audit.align.records import Alignment, LeftoverReason, Side
from sparsity_audit.checkpoint.store import Catalogue

__all__ = ["match"]


def match(base: Catalogue, tuned: Catalogue, *, maps: tuple[tuple[str, str], ...] = ()) -> Alignment:
    """Pairs, skipped pairs and leftovers of two checkpoints, with what a user must know about them.

    Args:
        base: The base side.
        tuned: The tuned side.
        maps: User rules (REGEX, REPL), applied with `re.sub` to each tuned name before matching.

    Raises:
        AlignmentError: A tensor could be matched in more than one way, or a user rule does not apply.
    """
    one, other = name_side("base", base), name_side("tuned", tuned, maps)
    linker = Linker(one, other)
    linker.link_exact()
    fusions, findings = Fusions(), list(other.findings)
    if linker.unlinked("base") or linker.unlinked("tuned"):
        base_keys, tuned_keys = one.keys(linker.settled("base")), other.keys(linker.settled("tuned"))
        linker.link_normalised(base_keys, tuned_keys)
        fusions = find_fusions(linker, base_keys, tuned_keys)
        findings += linker.renames()
        findings += linker.link_tied()
    ledger = Ledger(one, other)
    for link in linker.links["base"].values():
        ledger.add_link(link)
    for fusion in fusions.found:
        ledger.add_fusion(fusion)
    findings += _leave(linker, fusions, ledger)
    alignment = Alignment(
        pairs=tuple(sorted(ledger.pairs, key=lambda pair: pair.name)),
        skipped=tuple(sorted(ledger.skipped, key=lambda pair: pair.name)),
        leftovers=tuple(sorted(ledger.leftovers, key=lambda left: (left.side, left.name))),
        findings=(*findings, *_fused(fusions), *sorted(ledger.findings), *ledger.summarise()),
        totals={"base": base.num_entries, "tuned": tuned.num_entries},
    )
    alignment.verify_accounts()
    return alignment


def _leave(linker: Linker, fusions: Fusions, ledger: Ledger) -> list[str]:
    """Everything that found no partner becomes a leftover; returns what to say about ties."""
    findings: list[str] = []
    scaled_by = ledger.scaled_by() if linker.unlinked("base") or linker.unlinked("tuned") else {}
    for named in (linker.base, linker.tuned):
        side = named.side
        for name in sorted(linker.unlinked(side)):
            if (side, name) in fusions.members:
                continue
            rival = linker.rivals[side].get(name)
            if rival is not None:
                findings.append(_untied(named, name, rival))
                ledger.leave(side, name, LeftoverReason.UNTIED, f"the other side stores it as {rival!r}")
            else:
                used = scaled_by.get((side, name))
                only = "" if used is None else f"its factors make the values of {used!r}, which are compared"
                reason, detail = fusions.why_not.get((side, name), (LeftoverReason.ONLY_HERE, only))
                ledger.leave(side, name, reason, detail)
    if not ledger.pairs and not ledger.skipped:
        findings.append(
            "no tensor of one side matches one of the other: look at both with `inspect`, use --map"
        )
    return findings


def _untied(named: NamedSide, name: str, rival: str) -> str:
    other: Side = "tuned" if named.side == "base" else "base"
    entries = named.spec(name).num_entries
    return (
        f"tied in {other} only: {name!r} of {named.side} ({entries} entries) would be compared with "
        f"{rival!r}, which is counted once and has a partner already; it is left over. To compare it, "
        f"save both sides tied or both untied"
    )


def _fused(fusions: Fusions) -> list[str]:
    counts = Counter((f.side, f.module, f.kinds, f.groups, f.is_stack) for f in fusions.found)
    return [
        f"{count} {module} of {side} compared in parts with {kinds}"
        + (" of single experts" if is_stack else "")
        + (f", whose rows alternate in {groups} groups (told by the configuration)" if groups > 1 else "")
        for (side, module, kinds, groups, is_stack), count in sorted(counts.items())
    ]
