"""Retrainings on a terminal: verdict, warnings, one row a run."""

from __future__ import annotations

from pathlib import Path

from sparsity_audit.report.overlap_terminal import new_console, print_table, say
from sparsity_audit.report.overlap_text import share
from sparsity_audit.report.retrain import RetrainedRun, RetrainReport
from sparsity_audit.stats.scores import Accuracy, wilson_interval

__all__ = ["print_retrain", "retrain_head", "retrain_rows"]


def retrain_head() -> list[str]:
    """Head of `retrain_rows`."""
    return [
        "run",
        "density",
        "seed",
        "learning rate",
        "rates tried",
        "score",
        "95 %",
        "share of the gain",
        "95 %",
    ]


def retrain_rows(report: RetrainReport) -> list[list[str]]:
    """Base and full run, then the subnetwork and the controls."""
    rows = [
        [label, "–", "–", "–", "–", *_score(score), "–", "–"]
        for label, score in (("base", report.base_score), ("full", report.full_score))
        if score is not None
    ]
    return rows + [_row(run) for run in report.runs]


def print_retrain(report: RetrainReport, *, output: Path) -> None:
    """Print the record to stdout."""
    console = new_console()
    say(console, f"{report.verdict}.\n", style="bold")
    for line in report.warnings:
        say(console, f"! {line}")
    console.print()
    print_table(console, retrain_head(), retrain_rows(report))
    console.print()
    for line in report.notes:
        say(console, f"• {line}")
    where = "" if report.full is None else "; agreement with the full run in recovery/"
    say(console, f"runs, masks and retrain.json written to {output}{where}")


def _row(run: RetrainedRun) -> list[str]:
    interval = None if run.share is None else run.share.interval
    tried = ", ".join(f"{rate.lr:.3g}" for rate in run.rates) if len(run.rates) > 1 else "–"
    return [
        run.label,
        share(run.density),
        str(run.seed),
        "collapsed" if run.lr is None else f"{run.lr:.3g}",
        tried,
        *_score(run.score),
        "–" if run.share is None or run.share.value is None else f"{run.share.value:.2f}",
        "–" if interval is None else f"{interval.low:.2f}–{interval.high:.2f}",
    ]


def _score(score: Accuracy | None) -> tuple[str, str]:
    if score is None:
        return "–", "–"
    interval = wilson_interval(score)
    return f"{score.value:.3f}", f"{interval.low:.3f}–{interval.high:.3f}"
