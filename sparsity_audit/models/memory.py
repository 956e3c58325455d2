"""Giving back the memory of a model nobody refers to any more."""

from __future__ import annotations

import gc

import torch

__all__ = ["release_memory"]


def release_memory() -> None:
    """Collect garbage, and return what torch keeps of an accelerator's memory to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
