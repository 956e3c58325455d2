"""Problems that policies are judged on after training: a test set, and another one to choose by.

Contract: all prompts are distinct, and none of the validation set is in the test set, so that what is chosen
on the one is not chosen on the other. The problems depend on task, lengths and numbers alone: all policies,
of all retrainings, answer the same. One sample at temperature 1 a prompt, from one stream of noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.determinism import one_thread, stream
from sparsity_audit.lab.evaluate import sampled_rewards
from sparsity_audit.lab.folder import load_model
from sparsity_audit.lab.tasks import Problem, Task

__all__ = ["HeldOut", "count_correct", "held_out_problems"]

_SEED = 0
_DRAWS = 64
"""Draws of a set's size after which too few distinct problems mean that there are no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Two sets of problems without a common prompt."""

    test: tuple[Problem, ...]
    validation: tuple[Problem, ...]


def held_out_problems(
    task: Task, lengths: Mapping[int, float], *, num_test: int, num_validation: int
) -> HeldOut:
    """Distinct problems; the test set does not depend on the size of the validation set.

    Args:
        task: The task.
        lengths: Weight by length.
        num_test: Problems of the test set, ≥ 1.
        num_validation: Of the other one; may be 0.

    Raises:
        UsageError: The task has fewer distinct problems of these lengths.
    """
    taken: set[str] = set()
    sets = []
    for purpose, wanted in (("test", num_test), ("validation", num_validation)):
        generator = stream(_SEED, "retraining", purpose, "problems")
        found: list[Problem] = []
        for _ in range(_DRAWS):
            if len(found) >= wanted:
                break
            for problem in task.sample(wanted, lengths=lengths, generator=generator):
                if problem.prompt not in taken:
                    taken.add(problem.prompt)
                    found.append(problem)
        if len(found) < wanted:
            raise UsageError(
                "held-out prompts",
                f"{task.name} has only {len(taken)} distinct problems of lengths "
                f"{', '.join(map(str, lengths))} to draw from",
                expected=f"{num_test} of the test set and {num_validation} others for validation",
                remedy="ask for fewer prompts",
            )
        # What was drawn beyond the number wanted is free for the other set.
        taken -= {problem.prompt for problem in found[wanted:]}
        sets.append(tuple(found[:wanted]))
    return HeldOut(test=sets[0], validation=sets[1])


def count_correct(checkpoint: Path, problems: Sequence[Problem], *, task: Task) -> int:
    """Problems that a policy solves in one sample each.

    Raises:
        SparsityAuditError: As `load_model`.
    """
    with one_thread():
        generator = stream(_SEED, "retraining", "samples")
        rewards = sampled_rewards(load_model(checkpoint), problems, task=task, generator=generator)
    return round(sum(rewards))
