"""Split a plan into shares that processes without contact run, and join what they counted.

Contract: share i of N holds the units whose middle byte lies in the i-th N-th of all bytes: contiguous, of
equal bytes but for one unit, every unit in exactly one share, and a function of the plan alone. A share's
journal names its plan, so that shares of two plans are never joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from sparsity_audit.passes.plan import Plan, WorkUnit
from sparsity_audit.types import TensorSpec

__all__ = ["plan_of_share", "share_name", "shares_of", "touched_tensors"]


def share_name(index: int, count: int) -> str:
    """`share-00003-of-00032`; indices count from 0."""
    return f"share-{index:05d}-of-{count:05d}"


def shares_of(plan: Plan, count: int) -> tuple[tuple[WorkUnit, ...], ...]:
    """The units of each share, in plan order; some are empty when there are more shares than units."""
    assert count >= 1
    shares: list[list[WorkUnit]] = [[] for _ in range(count)]
    done, total = 0, sum(_weights(plan))
    for unit, weight in zip(plan.units, _weights(plan), strict=True):
        place = (2 * done + weight) * count // (2 * total) if total else 0
        shares[min(place, count - 1)].append(unit)
        done += weight
    return tuple(map(tuple, shares))


def _weights(plan: Plan) -> Iterator[int]:
    for unit in plan.units:
        spec = plan.specs[unit.pair]
        yield unit.num_entries * (spec.base.itemsize + spec.tuned.itemsize)


def plan_of_share(plan: Plan, index: int, count: int) -> Plan:
    """The plan with the units of one share alone; its key stays that of the whole."""
    return replace(plan, units=shares_of(plan, count)[index])


def touched_tensors(plan: Plan, units: Sequence[WorkUnit]) -> tuple[TensorSpec, ...]:
    """The base tensors that some units compare, in plan order."""
    specs = (plan.pairs[unit.pair].base.spec for unit in units)
    return tuple({spec.name: spec for spec in specs}.values())
