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
    from sparsity_audit.api.diff_question import DiffQuestion as DiffQuestion
    from sparsity_audit.api.export import mask_export as mask_export
    from sparsity_audit.api.gates import Expectations as Expectations
    from sparsity_audit.api.inspect import inspect as inspect
    from sparsity_audit.api.lab import lab_evaluate as lab_evaluate
    from sparsity_audit.api.lab import lab_pretrain as lab_pretrain
    from sparsity_audit.api.lab_critical import lab_critical as lab_critical
    from sparsity_audit.api.lab_study import lab_study as lab_study
    from sparsity_audit.api.lab_study_full import lab_study_full as lab_study_full
    from sparsity_audit.api.lab_track import lab_track as lab_track
    from sparsity_audit.api.lab_train import lab_train as lab_train
    from sparsity_audit.api.loggers import log_report as log_report
    from sparsity_audit.api.masks import mask_convert as mask_convert
    from sparsity_audit.api.masks import mask_info as mask_info
    from sparsity_audit.api.masks import mask_ops as mask_ops
    from sparsity_audit.api.masks import mask_random as mask_random
    from sparsity_audit.api.overlap import overlap as overlap
    from sparsity_audit.api.overlap import overlap_criteria as overlap_criteria
    from sparsity_audit.api.pairs import diff_pairs as diff_pairs
    from sparsity_audit.api.patch import patch_apply as patch_apply
    from sparsity_audit.api.patch import patch_info as patch_info
    from sparsity_audit.api.patch import patch_make as patch_make
    from sparsity_audit.api.presets import apply_preset as apply_preset
    from sparsity_audit.api.prune import prune as prune
    from sparsity_audit.api.recovery import recovery as recovery
    from sparsity_audit.api.render import load_report as load_report
    from sparsity_audit.api.render import plot as plot
    from sparsity_audit.api.render import render as render
    from sparsity_audit.api.retrain import retrain as retrain
    from sparsity_audit.api.series import series as series
    from sparsity_audit.api.shares import diff_share as diff_share
    from sparsity_audit.api.shares import merge as merge
    from sparsity_audit.api.tokens_critical import tokens_critical as tokens_critical
    from sparsity_audit.api.tokens_cross import tokens_cross_sample as tokens_cross_sample
    from sparsity_audit.api.tokens_diverge import tokens_diverge as tokens_diverge
    from sparsity_audit.api.tokens_patch import tokens_patch as tokens_patch
    from sparsity_audit.api.tokens_series import tokens_series as tokens_series
    from sparsity_audit.checkpoint.access import hub_access as hub_access
    from sparsity_audit.checkpoint.object_output import finish_upload as finish_upload
    from sparsity_audit.checkpoint.object_output import object_output as object_output
    from sparsity_audit.errors import SparsityAuditError as SparsityAuditError
    from sparsity_audit.report.schema import DiffReport as DiffReport
    from sparsity_audit.training.freeze import freeze_outside as freeze_outside
    from sparsity_audit.training.hooks import LiveAudit as LiveAudit
    from sparsity_audit.training.hooks import SubnetworkCallback as SubnetworkCallback
    from sparsity_audit.training.optim import SubnetworkAdamW as SubnetworkAdamW
    from sparsity_audit.training.optim import SubnetworkSGD as SubnetworkSGD
    from sparsity_audit.training.verify import verify_frozen as verify_frozen
    from sparsity_audit.types import Criterion as Criterion
    from sparsity_audit.types import View as View

__version__ = "0.1.0"

_HOMES = {
    "Criterion": "types",
    "DiffQuestion": "api.diff_question",
    "DiffReport": "report.schema",
    "Expectations": "api.gates",
    "LiveAudit": "training.hooks",
    "SparsityAuditError": "errors",
    "SubnetworkAdamW": "training.optim",
    "SubnetworkCallback": "training.hooks",
    "SubnetworkSGD": "training.optim",
    "View": "types",
    "apply_preset": "api.presets",
    "diff": "api.diff",
    "diff_pairs": "api.pairs",
    "diff_share": "api.shares",
    "finish_upload": "checkpoint.object_output",
    "freeze_outside": "training.freeze",
    "hub_access": "checkpoint.access",
    "inspect": "api.inspect",
    "lab_critical": "api.lab_critical",
    "lab_evaluate": "api.lab",
    "lab_pretrain": "api.lab",
    "lab_study": "api.lab_study",
    "lab_study_full": "api.lab_study_full",
    "lab_track": "api.lab_track",
    "lab_train": "api.lab_train",
    "load_report": "api.render",
    "log_report": "api.loggers",
    "mask_card": "api.card",
    "mask_convert": "api.masks",
    "mask_export": "api.export",
    "mask_info": "api.masks",
    "mask_ops": "api.masks",
    "mask_random": "api.masks",
    "merge": "api.shares",
    "object_output": "checkpoint.object_output",
    "overlap": "api.overlap",
    "overlap_criteria": "api.overlap",
    "patch_apply": "api.patch",
    "patch_info": "api.patch",
    "patch_make": "api.patch",
    "plan_diff": "api.diff",
    "plot": "api.render",
    "prune": "api.prune",
    "recovery": "api.recovery",
    "render": "api.render",
    "retrain": "api.retrain",
    "series": "api.series",
    "tokens_critical": "api.tokens_critical",
    "tokens_cross_sample": "api.tokens_cross",
    "tokens_diverge": "api.tokens_diverge",
    "tokens_patch": "api.tokens_patch",
    "tokens_series": "api.tokens_series",
    "verify_frozen": "training.verify",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
