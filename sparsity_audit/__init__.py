"""sparsity-audit: what RL fine-tuning changed in the weights, and how much of it is rounding.

Contract: the names below are the public Python interface; they are resolved on first use, so that
`import sparsity_audit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsity_audit.api.card import mask_card as mask_card
    from sparsity_audit.api.diff import diff as diff
    from sparsity_audit.api.diff import plan_diff as plan_diff
    from sparsity_audit.api.export import mask_export as mask_export
    from sparsity_audit.api.gates import Expectations as Expectations
    from sparsity_audit.api.inspect import inspect as inspect
    from sparsity_audit.api.loggers import log_report as log_report
    from sparsity_audit.api.masks import mask_convert as mask_convert
    from sparsity_audit.api.masks import mask_info as mask_info
    from sparsity_audit.api.masks import mask_ops as mask_ops
    from sparsity_audit.api.masks import mask_random as mask_random
    from sparsity_audit.api.overlap import overlap as overlap
    from sparsity_audit.api.overlap import overlap_criteria as overlap_criteria
    from sparsity_audit.api.pairs import diff_pairs as diff_pairs
    from sparsity_audit.api.presets import apply_preset as apply_preset
    from sparsity_audit.api.prune import prune as prune
    from sparsity_audit.api.recovery import recovery as recovery
    from sparsity_audit.api.render import load_report as load_report
    from sparsity_audit.api.render import plot as plot
    from sparsity_audit.api.render import render as render
    from sparsity_audit.errors import SparsityAuditError as SparsityAuditError
    from sparsity_audit.report.schema import DiffReport as DiffReport
    from sparsity_audit.types import Criterion as Criterion
    from sparsity_audit.types import View as View

__version__ = "0.1.0"

_HOMES = {
    "Criterion": "types",
    "DiffReport": "report.schema",
    "Expectations": "api.gates",
    "SparsityAuditError": "errors",
    "View": "types",
    "apply_preset": "api.presets",
    "diff": "api.diff",
    "diff_pairs": "api.pairs",
    "inspect": "api.inspect",
    "load_report": "api.render",
    "log_report": "api.loggers",
    "mask_card": "api.card",
    "mask_convert": "api.masks",
    "mask_export": "api.export",
    "mask_info": "api.masks",
    "mask_ops": "api.masks",
    "mask_random": "api.masks",
    "overlap": "api.overlap",
    "overlap_criteria": "api.overlap",
    "plan_diff": "api.diff",
    "plot": "api.render",
    "prune": "api.prune",
    "recovery": "api.recovery",
    "render": "api.render",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
