"""The package's page templates, rendered with everything escaped and nothing undefined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["TEMPLATES", "render_page"]

TEMPLATES = Path(__file__).with_name("templates")


def render_page(name: str, **values: Any) -> str:
    """The text of a template; a name that `values` lacks is an error, not an empty place."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)
