"""`report.html`: the audit of one pair as one page that needs nothing but a browser. Jinja is imported here.

Contract: the bytes are a function of the record and the row and column counts. The page loads nothing: its
policy forbids every request, and runs only the one script and style sheet whose hashes it states. Names come
from checkpoints and are not trusted: the template escapes them, the script writes them as text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsity_audit.report import page_headline, page_heat, page_precision, page_sections, svg_charts
from sparsity_audit.report.page_data import MAX_MAPS, axis_criterion, axis_maps, page_data, script_json
from sparsity_audit.report.page_template import TEMPLATES, render_page
from sparsity_audit.report.schema import DiffReport, PrecisionRecord

__all__ = ["render_html"]


def render_html(report: DiffReport, *, axes: Mapping[str, np.ndarray]) -> bytes:
    """The page, UTF-8.

    Args:
        report: The record.
        axes: `NAME.rows` and `NAME.cols` → changed entries per row and column, as in
            `axis_counts.safetensors`; may be empty.
    """
    from markupsafe import Markup

    style, script = (TEMPLATES / name for name in ("report.css", "report.js"))
    texts = {"style": style.read_text("utf-8"), "script": script.read_text("utf-8")}
    maps = axis_maps(report, axes)
    page = render_page(
        "report.html.jinja",
        report=report,
        policy=_policy(texts),
        style=Markup(texts["style"]),  # noqa: S704  (files of this package)
        script=Markup(texts["script"]),  # noqa: S704
        data=Markup(script_json(page_data(report, maps))),  # noqa: S704  (no < > & left)
        charts=[_charts(record, number) for number, record in enumerate(report.precision)],
        rate_chart=Markup(svg_charts.rate_chart(report.precision)),  # noqa: S704  (escaped where it is made)
        has_axes=bool(axes),
        num_maps=len(maps),
        max_maps=MAX_MAPS,
        axis_criterion=axis_criterion(report),
        headline=page_headline,
        heat_maps=page_heat.heat_maps(report),
        visible=page_precision.visible_table(report),
        sections=page_sections,
        nbsp="\N{NO-BREAK SPACE}",
    )
    return page.encode("utf-8", errors="xmlcharrefreplace")


def _policy(texts: Mapping[str, str]) -> str:
    hashes = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in texts.items()
    }
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'"
    )


def _charts(record: PrecisionRecord, number: int) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "record": record,
        "name": f"{record.view.value} ({record.dtype.label})",
        "tables": page_precision.precision_tables(record),
        "ulps": Markup(svg_charts.ulp_chart(record, number=2 * number)),  # noqa: S704
        "delta": Markup(svg_charts.delta_chart(record, number=2 * number + 1)),  # noqa: S704
        "tolerance": Markup(svg_charts.tolerance_chart(record)),  # noqa: S704
    }
