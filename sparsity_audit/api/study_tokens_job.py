"""The study's job `tokens`: how far a run's distributions are from its base's, on samples of both."""

from __future__ import annotations

from pathlib import Path

from sparsity_audit.api.tokens_diverge import tokens_diverge
from sparsity_audit.lab.saved_run import read_run
from sparsity_audit.report.study_tokens import TokenFacts, TokenSetFacts
from sparsity_audit.report.tokens import SetRecord

__all__ = ["measure_tokens"]

_SEED = 7
"""Of prompts and noise, as of the study's other judges."""


def measure_tokens(folder: Path, *, run: str, role: str, num_prompts: int, num_samples: int) -> TokenFacts:
    """Token divergence of one finished run."""
    saved = read_run(folder / "runs" / run)
    report = tokens_diverge(
        saved.reference,
        saved.path / "final",
        task=saved.task,
        lengths=tuple(saved.lengths),
        num_prompts=num_prompts,
        num_samples=num_samples,
        seed=_SEED,
    )
    return TokenFacts(
        run=run,
        role=role,
        num_prompts=num_prompts,
        num_samples=num_samples,
        sets=tuple(_facts(one) for one in report.sets),
    )


def _facts(one: SetRecord) -> TokenSetFacts:
    found = one.summary
    exact = [
        point
        for point in found.by_position
        if point.end == point.start + 1 and point.is_common(found.sequences)
    ]
    return TokenSetFacts(
        name=one.name,
        positions=found.positions,
        above=found.above,
        concentration=found.concentration,
        in_top_3=found.choices_above.in_top_3,
        new=found.choices_above.new,
        curve=found.curve,
        profile=tuple(point.mean_js for point in exact if point.mean_js is not None),
    )
