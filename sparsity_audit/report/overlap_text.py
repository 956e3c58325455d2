"""How numbers of an overlap are printed, and the Markdown and LaTeX around them.

Contract: pure. Shares have three decimals and are never 0 or 1 when they are neither; what is undefined is a
dash.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsity_audit.report.latex import escape

__all__ = ["digits", "expected_entries", "latex_table", "markdown_table", "share"]


def share(value: float | None) -> str:
    """Three decimals; never 0 or 1 for what is neither."""
    if value is None:
        return "–"
    text = f"{value:.3f}"
    if value != 0 and abs(value) < 0.0005:
        text = f"{value:.0e}"
    elif value < 1 and text == "1.000":
        text = ">0.999"
    return text.replace("-", "−")


def expected_entries(value: float) -> str:
    """An expected number of entries to one decimal; never 0 for what is not."""
    return f"{value:.0e}".replace("-", "−") if 0 < value < 0.05 else f"{value:,.1f}"


def digits(value: float | None) -> str:
    """Three significant digits."""
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is text and whose others are numbers."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|---" + "|---:" * (len(head) - 1) + "|", *[line(row) for row in rows]]


def latex_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> bytes:
    """A booktabs table, its first column text and the others numbers; the caption comes without full stop."""
    lines = [
        *(
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_tex(caption)}.}}",
        ),
        rf"  \begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        *(r"    \toprule", rf"    {' & '.join(_tex(cell) for cell in head)} \\", r"    \midrule"),
        *[rf"    {' & '.join(_tex(cell) for cell in row)} \\" for row in rows],
        *(r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""),
    ]
    return "\n".join(lines).encode()


def _tex(text: str) -> str:
    return escape(text).replace("×", r"$\times$").replace("−", "$-$").replace("|", "$|$")
