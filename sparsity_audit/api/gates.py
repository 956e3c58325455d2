"""Expectations a run is held to: what must be frozen, what must have moved, how sparse it must be.

Contract: `expect_frozen` and `expect_changed` are always judged `bitwise`, whatever the criterion;
`min_sparsity` and `max_sparsity` use the run's criterion and view over all compared entries. A pattern
that matches no tensor is an error before anything is read: a mistyped gate must not pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from sparsity_audit.align.records import Alignment
from sparsity_audit.errors import UsageError
from sparsity_audit.report.schema import DiffReport, GateResult

__all__ = ["Expectations", "judge"]

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectations:
    """What the user states about a pair.

    Args:
        frozen: Globs of base tensor names that must be bit-identical.
        changed: Globs of base tensor names each of which must have changed somewhere.
        min_sparsity: Smallest update sparsity, in [0, 1].
        max_sparsity: Largest update sparsity, in [0, 1].
        no_leftover: Every tensor must have a counterpart, and every matched pair be comparable.
    """

    frozen: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    min_sparsity: float | None = None
    max_sparsity: float | None = None
    no_leftover: bool = False

    def __post_init__(self) -> None:
        for name in ("min_sparsity", "max_sparsity"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(
                    f"--{name.replace('_', '-')}", f"{value} is not a fraction", expected="0 … 1"
                )

    def verify_patterns(self, alignment: Alignment) -> None:
        """Raise UsageError for a glob that matches no tensor of the base or the pair names."""
        names = {pair.name for pair in alignment.pairs} | {pair.name for pair in alignment.skipped}
        names |= {left.name for left in alignment.leftovers}
        for option, patterns in (("--expect-frozen", self.frozen), ("--expect-changed", self.changed)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise UsageError(
                        f"{option} {pattern!r}",
                        "matches no tensor",
                        remedy="`sparsity-audit inspect BASE` lists the names; * matches dots as well",
                    )


def judge(expectations: Expectations, report: DiffReport) -> tuple[GateResult, ...]:
    """One result per stated expectation, in a fixed order."""
    results = [_frozen(pattern, report) for pattern in expectations.frozen]
    results += [_changed(pattern, report) for pattern in expectations.changed]
    sparsity = report.sparsity
    for name, limit, sign in (
        ("min-sparsity", expectations.min_sparsity, 1),
        ("max-sparsity", expectations.max_sparsity, -1),
    ):
        if limit is not None:
            passed = sparsity is not None and sign * (sparsity - limit) >= 0
            found = "nothing was compared" if sparsity is None else f"update sparsity {sparsity:.6f}"
            detail = f"{found} ({report.mask_criterion}, {report.view}), limit {limit}"
            results.append(GateResult(gate=name, passed=passed, detail=detail))
    if expectations.no_leftover:
        lost = len(report.leftovers) + len(report.skipped)
        detail = f"{len(report.leftovers)} leftovers, {len(report.skipped)} skipped pairs"
        results.append(GateResult(gate="fail-on-leftover", passed=lost == 0, detail=detail))
    return tuple(results)


def _frozen(pattern: str, report: DiffReport) -> GateResult:
    moved = [t for t in report.tensors if fnmatchcase(t.name, pattern) and t.bitwise_changed > 0]
    unseen = _uncompared(pattern, report)
    shown = [f"{t.name} ({t.bitwise_changed} of {t.entries} entries changed)" for t in moved]
    return _gate(f"expect-frozen {pattern}", "moved", shown, unseen)


def _changed(pattern: str, report: DiffReport) -> GateResult:
    still = [t.name for t in report.tensors if fnmatchcase(t.name, pattern) and t.bitwise_changed == 0]
    return _gate(
        f"expect-changed {pattern}", "bit-identical to the base", still, _uncompared(pattern, report)
    )


def _uncompared(pattern: str, report: DiffReport) -> list[str]:
    """Matching tensors that no pair covers: they can neither be called frozen nor changed."""
    names = [left.name for left in report.leftovers] + [pair.name for pair in report.skipped]
    return [name for name in names if fnmatchcase(name, pattern)]


def _gate(gate: str, what: str, offenders: list[str], unseen: list[str]) -> GateResult:
    parts = []
    for label, names in ((what, offenders), ("not compared", unseen)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{len(names)} {label}: {', '.join(names[:_SHOWN])}{more}")
    return GateResult(gate=gate, passed=not parts, detail="; ".join(parts) or "as stated")
