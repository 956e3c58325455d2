"""How runs stay the same to the last bit: streams of randomness by name, and one thread.

Contract: nothing here or above it touches torch's global random state. A run has one seed; each purpose has a
stream of its own, so that evaluating more often, or resuming, does not move what training draws. On one
thread a run repeats bit for bit; a second thread changes the order of sums, and fp32 weights by about 2e-6 in
5 steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread", "stream"]


def stream(seed: int, *purpose: str | int) -> torch.Generator:
    """The generator of one purpose of a run: the same seed and purpose give the same numbers.

    Args:
        seed: The run's seed.
        purpose: What it is for, and which time: ("evaluation", 40).
    """
    text = "/".join(map(str, (seed, *purpose)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
