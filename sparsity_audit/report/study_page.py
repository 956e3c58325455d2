"""`index.html` of a study, with its figures: one page that needs nothing but a browser.

Contract: the bytes are a function of the report. The page has no script and loads nothing; its policy forbids
every request. Figures are matplotlib's SVG, made fit to stand beside each other in one document: ids get the
figure's name in front, metadata and the style rule that would reach the whole page are dropped.
"""

from __future__ import annotations

import re

from sparsity_audit.report.page_template import TEMPLATES, render_page
from sparsity_audit.report.study import StudyReport
from sparsity_audit.report.study_figures import study_captions, study_figures
from sparsity_audit.report.style import FORMATS, house_style, to_bytes

__all__ = ["PAGE_POLICY", "inline_svg", "render_study"]

PAGE_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'"
_HISTORY = {
    "study": "goals come from a prototype with another base, or were set beside it, and did not change. "
    "The fp32 runs of GRPO were first made with 40 steps: the two seeds gained .257 and .227 (goal .25) with "
    "a share of S of .715 and .721 (goal .8), so claims 1 and 2 failed, and the overlap of the largest "
    "movements was 4.9 times chance (goal 10). They were lengthened to 60 steps after that. The bf16 runs "
    "were first made with 120 steps at 1e-4, which gained .01 and says nothing of runs that learn; since "
    "then they have 50 steps at 2e-4 with eight updates each. After their first step those hold .92 of the "
    "final mask, with true rewards and with shuffled ones; the claim that masks are found in training, which "
    "till then reproduced below .99, has a verdict in between since. Algorithms, pruning and masked training "
    "are one seed each.",
    "smoke": "lengths and goals were fitted to what short runs give (20 steps missed the gain of .08, 30 "
    "reach "
    "it; the lift goal was lowered to 4), so these verdicts test the machinery and are no evidence.",
}
"""What was changed after looking at results; a reader of the verdicts must know."""

_MARKS = {
    "reproduces": "yes",
    "does not reproduce": "no",
    "is explained by rounding": "rounding",
    "not measured": "none",
}


def render_study(report: StudyReport) -> dict[str, bytes]:
    """Name → content: the page, each figure in every format, and its caption."""
    captions = study_captions(report)
    files: dict[str, bytes] = {}
    svgs: dict[str, str] = {}
    with house_style():
        for key, figure in study_figures(report).items():
            made = {suffix: to_bytes(figure, suffix) for suffix in FORMATS}
            files |= {f"figures/{key}.{suffix}": data for suffix, data in made.items()}
            files[f"figures/{key}.txt"] = f"{captions[key]}\n".encode()
            svgs[key] = inline_svg(made["svg"].decode(), name=key)
    return files | {"index.html": _page(report, svgs, captions)}


def inline_svg(svg: str, *, name: str) -> str:
    """An SVG file of matplotlib's as an element of a page.

    Args:
        svg: The file.
        name: Put in front of every id, so that two figures' ids cannot meet.
    """
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"<style[^>]*>.*?</style>", "", element, flags=re.DOTALL)
    element = re.sub(r'\b(id="|href="#)', rf"\g<1>{name}-", element)
    element = element.replace("url(#", f"url(#{name}-")
    element = re.sub(r'^<svg ([^>]*?)width="[^"]*" ', r"<svg \1", element)
    element = re.sub(r' height="[^"]*pt"', "", element, count=1)
    return element.replace("<svg ", f'<svg class="plot" role="img" aria-labelledby="caption-{name}" ', 1)


def _page(report: StudyReport, svgs: dict[str, str], captions: dict[str, str]) -> bytes:
    from markupsafe import Markup

    page = render_page(
        "study.html.jinja",
        report=report,
        facts=report.facts,
        policy=PAGE_POLICY,
        style=Markup((TEMPLATES / "study.css").read_text("utf-8")),  # noqa: S704  (a file of this package)
        svgs={key: Markup(svg) for key, svg in svgs.items()},  # noqa: S704  (matplotlib escapes its texts)
        captions=captions,
        marks=_MARKS,
        history=_HISTORY[report.size],
    )
    return page.encode("utf-8", errors="xmlcharrefreplace")
