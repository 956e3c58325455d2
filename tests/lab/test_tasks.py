"""Verifiers cannot be talked to; formats are syntax; problems follow their mixtures."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.mixtures import draw
from sparsity_audit.lab.names import TASK_NAMES
from sparsity_audit.lab.tasks import OTHER_FORMAT, TASKS, Addition, Problem, Sorting, Task, named_task
from sparsity_audit.lab.vocabulary import TOKENS, encode, encode_prompt

PROBLEM = Problem(prompt="47+85=", answer="132", length=2)
tasks = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_solutions_of_addition_are_those_of_the_specification() -> None:
    task = Addition()
    assert task.write(PROBLEM, "S") == "S7512;4813;#132<eos>"
    assert task.write(PROBLEM, "C") == "C1213#132<eos>"
    assert task.write(PROBLEM, "R") == "R231#132<eos>"


def test_operands_of_different_length_are_filled_with_zeros() -> None:
    problem = Problem(prompt="5+123=", answer="128", length=3)
    assert Addition().write(problem, "S") == "S5308;0202;0101;#128<eos>"


def test_solutions_of_sorting_select_count_and_reverse() -> None:
    problem = Problem(prompt="3141=", answer="1134", length=4)
    assert Sorting().write(problem, "S") == "S1341;134;34;4;#1134<eos>"
    assert Sorting().write(problem, "C") == "C123141#1134<eos>"
    assert Sorting().write(problem, "R") == "R4311#1134<eos>"


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("#132<eos>", True),
        ("R231#132<eos>", True),
        ("R999#132<eos>", True),  # the reasoning is not judged
        ("#131#132<eos>", True),  # the last # counts
        ("#132#131<eos>", False),
        ("132<eos>", False),  # no #
        ("R231#132", False),  # no <eos>: truncated
        ("R231#132<eos><eos>", False),
        ("R231#132<eos><pad>", False),
        ("R231#0132<eos>", False),
        ("R231#1320<eos>", False),
        ("R231#13<eos>", False),
        ("R231#+132<eos>", False),
        ("R231#132;<eos>", False),
        ("R231# 132<eos>", False),
        ("R231#132#<eos>", False),
        ("R231#<eos>", False),
        ("R231#132<bos><eos>", False),
        ("R<eos>#132<eos>", False),  # it had ended before
        ("<pad>#132<eos>", False),
        ("47+85=#132<eos>", True),
        ("#٣١<eos>", False),
        ("", False),
        ("<eos>", False),
        ("#", False),
    ],
)
def test_the_verifier_is_strict(completion: str, *, right: bool) -> None:
    assert Addition().verify(PROBLEM, completion) is right


@given(st.text("0123456789#;SRC+=", max_size=12))
def test_only_the_answer_behind_the_last_sign_is_rewarded(reasoning: str) -> None:
    assert Addition().verify(PROBLEM, f"{reasoning}#132<eos>")
    wrong = f"{reasoning}<eos>"
    assert Addition().verify(PROBLEM, wrong) == wrong.endswith("#132<eos>")


@pytest.mark.parametrize(
    ("completion", "label"),
    [
        ("S7512;4813;#132<eos>", "S"),
        ("S#999<eos>", "S"),  # wrong and malformed: still S
        ("C", "C"),
        ("R<eos>", "R"),
        ("RSC#132<eos>", "R"),
        ("#132<eos>", OTHER_FORMAT),  # right, but in no known format
        ("7S", OTHER_FORMAT),
        ("<eos>", OTHER_FORMAT),
        ("", OTHER_FORMAT),
    ],
)
def test_a_format_is_the_first_character_and_nothing_else(completion: str, label: str) -> None:
    assert Addition().format_of(completion) == label


@tasks
@given(seed=st.integers(0, 2**31), length=st.integers(1, 9))
def test_written_solutions_are_right_of_their_format_and_below_the_limit(
    task: Task, seed: int, length: int
) -> None:
    (problem,) = task.sample(1, lengths={length: 1}, generator=generator(seed))
    assert problem.length == length
    assert encode_prompt(problem.prompt)
    for fmt in task.formats:
        text = task.write(problem, fmt)
        assert task.verify(problem, text)
        assert task.format_of(text) == fmt
        assert len(encode(text)) < task.max_new_tokens(length)


@given(seed=st.integers(0, 2**31), length=st.integers(1, 12))
def test_the_answer_of_an_addition_is_the_sum(seed: int, length: int) -> None:
    for task in (Addition(), Addition(operands="varying")):
        (problem,) = task.sample(1, lengths={length: 1}, generator=generator(seed))
        left, right = problem.prompt.removesuffix("=").split("+")
        assert int(problem.answer) == int(left) + int(right)
        assert problem.answer == str(int(problem.answer))
        assert (
            {len(left), len(right)} == {length}
            if task.operands == "equal"
            else max(len(left), len(right)) == length
        )
        assert all(text == "0" or not text.startswith("0") for text in (left, right))


def test_varying_operands_vary_on_both_sides() -> None:
    problems = Addition(operands="varying").sample(200, lengths={4: 1}, generator=generator())
    sizes = Counter(tuple(map(len, problem.prompt.removesuffix("=").split("+"))) for problem in problems)
    assert set(sizes) == {(4, n) for n in range(1, 5)} | {(n, 4) for n in range(1, 5)}


@given(seed=st.integers(0, 2**31), length=st.integers(1, 9))
def test_the_answer_of_a_sorting_is_the_same_digits_in_order(seed: int, length: int) -> None:
    (problem,) = Sorting().sample(1, lengths={length: 1}, generator=generator(seed))
    assert problem.answer == "".join(sorted(problem.prompt.removesuffix("=")))


@tasks
def test_the_same_generator_gives_the_same_problems(task: Task) -> None:
    first = task.sample(20, lengths={2: 1, 3: 1}, generator=generator(1))
    assert task.sample(20, lengths={2: 1, 3: 1}, generator=generator(1)) == first
    assert task.sample(20, lengths={2: 1, 3: 1}, generator=generator(2)) != first


def test_a_mixture_is_followed_in_its_proportions() -> None:
    # Binomial: 3000 draws at share .75 have a standard deviation of .008; six of them.
    drawn = Counter(draw({"S": 3, "R": 1}, 3000, generator=generator()))
    assert abs(drawn["S"] / 3000 - 0.75) < 0.048


@tasks
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({}, "the mixture is empty"),
        ({4: 0.0}, "4 has weight 0.0"),
        ({4: -1.0}, "4 has weight -1.0"),
        ({4: float("nan")}, "4 has weight nan"),
        ({4: float("inf")}, "4 has weight inf"),
        ({0: 1.0}, "0 digits"),
    ],
)
def test_lengths_that_cannot_be_drawn_are_refused(
    task: Task, lengths: dict[int, float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        task.sample(1, lengths=lengths, generator=generator())


@tasks
@pytest.mark.parametrize("fmt", ["", "X", "SC", OTHER_FORMAT])
def test_an_unknown_format_cannot_be_written(task: Task, fmt: str) -> None:
    (problem,) = task.sample(1, lengths={2: 1}, generator=generator())
    with pytest.raises(UsageError, match="expected: one of S, R, C"):
        task.write(problem, fmt)


def test_tasks_are_known_by_name_and_others_are_refused() -> None:
    assert tuple(TASKS) == TASK_NAMES
    assert named_task("sorting") == Sorting()
    with pytest.raises(UsageError, match="'multiplication' is not known"):
        named_task("multiplication")


def test_formats_are_letters_of_the_alphabet() -> None:
    assert all(fmt in TOKENS for task in TASKS.values() for fmt in task.formats)
