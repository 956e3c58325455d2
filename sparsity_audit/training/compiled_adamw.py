"""AdamW on the selected entries of an fp32 CPU tensor in few passes over memory, or the news that it cannot.

Contract: bit for bit the steps of `SubnetworkAdamW`'s torch operations. Where torch's build fuses a
multiplication with an addition is not documented, so the first use in a process compares both on the spot;
where they differ the compiled step is never taken. Each torch thread takes one run of entries, so threads
meet once a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import torch

__all__ = ["Constants", "agrees", "applies", "step_selected", "torch_step"]

_FROM_ENTRIES: Final = 1 << 13
"""Below this torch's operations are fast enough, and nothing waits for a compiler."""
_PIECE_ENTRIES: Final = 1 << 14
"""Scratch of a piece stays in cache, and torch does not split the root of so few among threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """The numbers of one step, as Python computes them for torch.

    Args:
        decay: 1 − lr · weight decay.
        beta1: In (.5, 1): torch interpolates otherwise from ½ down.
        beta2: In [0, 1).
        correction: √(1 − beta2^step).
        eps: Added to the denominator.
        step_size: lr ÷ (1 − beta1^step).
    """

    decay: float
    beta1: float
    beta2: float
    correction: float
    eps: float
    step_size: float


def applies(weights: torch.Tensor, gradient: torch.Tensor, positions: torch.Tensor, beta1: float) -> bool:
    """Whether the compiled step is for these tensors, and equals torch's operations on this machine."""
    return (
        weights.device.type == "cpu"
        and weights.dtype is gradient.dtype is torch.float32
        and positions.dtype is torch.int32
        and len(positions) >= _FROM_ENTRIES
        and beta1 > 0.5
        and _is_exact_here()
    )


def step_selected(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    positions: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    constants: Constants,
) -> None:
    """One step, in place, on the entries of flat `weights` at `positions` (≥ 1); moments are compact."""
    threads = torch.get_num_threads()
    size = -(-len(positions) // (threads * _PIECE_ENTRIES)) * _PIECE_ENTRIES
    runs = [slice(first, first + size) for first in range(0, len(positions), size)]

    def take(run: slice) -> None:
        with torch.no_grad():
            _step_run(weights, gradient, positions[run], mean[run], square[run], constants)

    if len(runs) <= 1:
        for run in runs:
            take(run)
    else:
        list(_pool(threads).map(take, runs))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="subnetwork-adamw")


def _step_run(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    positions: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    constants: Constants,
) -> None:
    from sparsity_audit.training.numba_adamw import BLOCK, after_root, before_root

    size = min(_PIECE_ENTRIES, len(positions))
    root = torch.empty(size)
    held, block, roots = np.empty(size, np.float32), np.empty(BLOCK, np.float32), root.numpy()
    w, g, p, m, v = (t.numpy() for t in (weights, gradient, positions, mean, square))
    narrow = np.float32
    first_rates = (
        narrow(constants.decay),
        narrow(1 - constants.beta1),
        narrow(constants.beta2),
        narrow(1 - constants.beta2),
    )
    last_rates = narrow(constants.correction), narrow(constants.eps), narrow(-constants.step_size)
    for first in range(0, len(positions), size):
        piece = slice(first, first + size)
        before_root(w, g, p[piece], m[piece], v[piece], held, block, *first_rates)
        part = square[piece]
        torch.sqrt(part, out=root[: len(part)])
        after_root(w, p[piece], m[piece], held, roots, *last_rates)


def torch_step(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    constants: Constants,
) -> None:
    """The same in torch's operations, on dense pieces: the definition, in the order of torch's own AdamW."""
    if constants.decay != 1:
        weights.mul_(constants.decay)
    mean.lerp_(gradient, 1 - constants.beta1)
    square.mul_(constants.beta2).addcmul_(gradient, gradient, value=1 - constants.beta2)
    denominator = square.sqrt().div_(constants.correction).add_(constants.eps)
    weights.addcdiv_(mean, denominator, value=-constants.step_size)


@cache
def _is_exact_here() -> bool:
    return agrees(_step_run)


def agrees(step: Callable[..., None]) -> bool:
    """Whether a compiled step and `torch_step` give the same bits for two steps at several scales."""
    generator = torch.Generator().manual_seed(0)
    size = _PIECE_ENTRIES
    positions = torch.arange(size, dtype=torch.int32)
    with torch.no_grad():
        for scale in (1.0, 1e-4, 1e-19, 1e9):
            state = [torch.randn(size, generator=generator) * 0.02, torch.zeros(size), torch.zeros(size)]
            twin = [tensor.clone() for tensor in state]
            for number in (1, 2):
                gradient = torch.randn(size, generator=generator) * scale
                constants = Constants(
                    decay=1 - 1e-4,
                    beta1=0.9,
                    beta2=0.95,
                    correction=(1 - 0.95**number) ** 0.5,
                    eps=1e-8,
                    step_size=1e-3 / (1 - 0.9**number),
                )
                step(state[0], gradient, positions, state[1], state[2], constants)
                torch_step(twin[0], gradient, twin[1], twin[2], constants)
            for mine, theirs in zip(state, twin, strict=True):
                if not torch.equal(mine.view(torch.int32), theirs.view(torch.int32)):
                    return False
    return True
