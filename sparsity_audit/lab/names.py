"""The names that the command line offers, importable without torch.

Contract: plain tuples; that they are those of the registries in `tasks`, `model` and `recipes` is tested.
"""

from __future__ import annotations

__all__ = ["BASES", "RECIPE_NAMES", "SIZE_NAMES", "TASK_NAMES"]

BASES = ("mix", "single")
"""Bases that are shipped with the package."""

RECIPE_NAMES = (*BASES, "both")
"""Bases that can be pretrained."""

SIZE_NAMES = ("tiny", "small", "medium")

TASK_NAMES = ("addition", "addition-varying", "sorting")
