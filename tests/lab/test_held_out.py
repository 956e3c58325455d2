"""Held-out prompts are distinct, and what is chosen on is not what is tested on."""

from __future__ import annotations

import pytest
from lab_runs import ADDITION

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.held_out import count_correct, held_out_problems
from sparsity_audit.lab.tasks import named_task

TASK = named_task("addition")


def test_no_prompt_stands_twice_or_in_both_sets_even_where_they_are_scarce() -> None:
    """There are 100 sums of one-digit numbers; 95 of them are asked for."""
    held = held_out_problems(TASK, {1: 1.0}, num_test=60, num_validation=35)
    prompts = [problem.prompt for problem in (*held.test, *held.validation)]
    assert len(prompts) == len(set(prompts)) == 95


def test_the_test_set_does_not_depend_on_the_validation_set() -> None:
    sizes = [held_out_problems(TASK, {2: 1.0}, num_test=50, num_validation=n).test for n in (0, 20, 200)]
    assert sizes[0] == sizes[1] == sizes[2]


def test_more_problems_than_there_are_is_an_error_and_not_a_loop() -> None:
    with pytest.raises(UsageError, match=r"only 100 distinct problems of lengths 1"):
        held_out_problems(TASK, {1: 1.0}, num_test=80, num_validation=21)


def test_a_policy_is_counted_the_same_each_time() -> None:
    problems = held_out_problems(TASK, {1: 1.0}, num_test=40, num_validation=0).test
    counts = [count_correct(ADDITION / "base-bf16", problems, task=TASK) for _ in range(2)]
    assert counts[0] == counts[1]
    assert 20 < counts[0] <= 40
