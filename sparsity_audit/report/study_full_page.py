"""`index.html` of a full study, with its figures; made like that of the small one.

Contract: the bytes are a function of the report. One page without a script or a request.
"""

from __future__ import annotations

from sparsity_audit.report.page_template import TEMPLATES, render_page
from sparsity_audit.report.study_full import FullReport
from sparsity_audit.report.study_full_claims import DRAWERS
from sparsity_audit.report.study_full_judging import RULE
from sparsity_audit.report.study_page import PAGE_POLICY, inline_svg
from sparsity_audit.report.style import FORMATS, house_style, to_bytes

__all__ = ["render_full_study"]

_HISTORY = (
    "SGD's rate and the ranges of the KL coefficients come from pilots with seed 0. The standard coefficient "
    ".5 was added after a first frontier had a hole where penalties are compared; the verdict on the largest "
    "probability was undecided before it (+.019, 0.000 to +.038, on seed 0) and is another one with it. "
    "Goals and margins were written before the runs."
)
"""What was changed after looking at results; a reader of the verdicts must know."""

_MARKS = {
    "reproduces": "yes",
    "does not reproduce": "no",
    "is explained": "rounding",
    "undecided": "none",
    "not measured": "none",
}


def render_full_study(report: FullReport, *, questions: dict[str, str]) -> dict[str, bytes]:
    """Name → content: the page, each figure in every format, and its caption.

    Args:
        report: The study.
        questions: Part → its question.
    """
    files: dict[str, bytes] = {}
    svgs: dict[str, str] = {}
    with house_style():
        for claim in report.claims:
            if not claim.caption:
                continue
            figure = DRAWERS[claim.key](report.facts)
            made = {suffix: to_bytes(figure, suffix) for suffix in FORMATS}
            files |= {f"figures/{claim.key}.{suffix}": data for suffix, data in made.items()}
            files[f"figures/{claim.key}.txt"] = f"{claim.caption}\n".encode()
            svgs[claim.key] = inline_svg(made["svg"].decode(), name=claim.key)
    return files | {"index.html": _page(report, svgs, questions)}


def _page(report: FullReport, svgs: dict[str, str], questions: dict[str, str]) -> bytes:
    from markupsafe import Markup

    page = render_page(
        "study_full.html.jinja",
        report=report,
        facts=report.facts,
        questions=questions,
        rule=RULE,
        history=_HISTORY,
        policy=PAGE_POLICY,
        style=Markup((TEMPLATES / "study.css").read_text("utf-8")),  # noqa: S704  (a file of this package)
        svgs={key: Markup(svg) for key, svg in svgs.items()},  # noqa: S704  (matplotlib escapes its texts)
        marks=_MARKS,
    )
    return page.encode("utf-8", errors="xmlcharrefreplace")
