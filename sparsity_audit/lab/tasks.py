"""Verifiable tasks: problems, solutions in several formats, and a verifier that cannot be talked to.

Contract: a completion is a text that ends with `<eos>` where the model ended it. `verify` is strict: the text
after the last `#`, `<eos>` included, is the answer, character for character (no leading zeros), and no other
special token occurs. `format_of` is syntactic: it looks at the first character, which is where a policy
chooses its format, and never at whether the rest is right or even well formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.mixtures import check_mixture, draw
from sparsity_audit.lab.vocabulary import EOS, TOKENS

__all__ = ["OTHER_FORMAT", "TASKS", "Addition", "Problem", "Sorting", "Task", "named_task"]

OTHER_FORMAT = "other"
"""The label of a completion that begins with no format's letter."""

_END = TOKENS[EOS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question with its only answer.

    Args:
        prompt: The text a policy continues, without `<bos>`.
        answer: What must stand behind the last `#`.
        length: Digits of the (longer) operand: the difficulty.
    """

    prompt: str
    answer: str
    length: int


class Task(Protocol):
    """What training and evaluation need of a task; formats are single letters of the alphabet."""

    @property
    def name(self) -> str:
        """The name on the command line."""
        ...

    @property
    def formats(self) -> tuple[str, ...]:
        """Letters of the formats that solutions are written in."""
        ...

    def sample(
        self, num: int, *, lengths: Mapping[int, float], generator: torch.Generator
    ) -> tuple[Problem, ...]:
        """`num` problems whose lengths follow a mixture. Raises UsageError where it cannot be drawn from."""
        ...

    def write(self, problem: Problem, fmt: str) -> str:
        """The right completion in one format, `<eos>` included. Raises UsageError on an unknown format."""
        ...

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether a completion ends with the answer and `<eos>`."""
        ...

    def format_of(self, completion: str) -> str:
        """The completion's format letter, or `OTHER_FORMAT`."""
        ...

    def max_new_tokens(self, length: int) -> int:
        """A limit that no right solution in a known format reaches: the longest one and a quarter more."""
        ...


@dataclass(frozen=True, slots=True)
class _Written:
    """The parts that tasks share: strict verification, format letters, the limit of new tokens."""

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether exactly the answer and `<eos>` follow the last `#`, and nothing else is special."""
        reasoning, sign, answer = completion.rpartition("#")
        return sign == "#" and answer == problem.answer + _END and "<" not in reasoning

    @property
    def formats(self) -> tuple[str, ...]:
        """S, R and C."""
        return ("S", "R", "C")

    def format_of(self, completion: str) -> str:
        """The first character where it is a format's letter, else `OTHER_FORMAT`."""
        return completion[0] if completion[:1] in self.formats else OTHER_FORMAT

    def _check_format(self, fmt: str) -> None:
        if fmt not in self.formats:
            raise UsageError("format", f"{fmt!r} is not known", expected=f"one of {', '.join(self.formats)}")


def _check_lengths(lengths: Mapping[int, float]) -> None:
    check_mixture("lengths", lengths)
    if min(lengths) < 1:
        raise UsageError("lengths", f"{min(lengths)} digits", expected="at least 1")


@dataclass(frozen=True, slots=True)
class Addition(_Written):
    """Sums of two numbers; the formats lay the carries open to different degrees.

    For 47+85: `S7512;4813;#132` (both digits, carry, sum digit, least significant first), `C1213#132` (carry
    and sum digit only), `R231#132` (the sum reversed).

    Args:
        operands: `equal`: both have n digits. `varying`: one has n, the other 1 to n, in either order, which
            makes some places harder than others (2502.06533 studies those).
    """

    operands: Literal["equal", "varying"] = "equal"

    @property
    def name(self) -> str:
        """`addition` or `addition-varying`."""
        return "addition" if self.operands == "equal" else "addition-varying"

    def sample(
        self, num: int, *, lengths: Mapping[int, float], generator: torch.Generator
    ) -> tuple[Problem, ...]:
        """`num` sums; operands are uniform among the numbers of their length, 0 being one of length 1."""
        _check_lengths(lengths)
        drawn = draw(lengths, num, generator=generator)
        digits = torch.randint(10, (num, 2, max(lengths)), generator=generator)
        leading = torch.randint(1, 10, (num, 2), generator=generator)
        others = self._other_lengths(drawn, generator)
        return tuple(
            _sum(
                _number(digits[i, 0, : sizes[0]].tolist(), int(leading[i, 0])),
                _number(digits[i, 1, : sizes[1]].tolist(), int(leading[i, 1])),
            )
            for i, sizes in enumerate(others)
        )

    def _other_lengths(self, drawn: Sequence[int], generator: torch.Generator) -> list[tuple[int, int]]:
        """Lengths of both operands of each problem."""
        if self.operands == "equal":
            return [(n, n) for n in drawn]
        share = torch.rand(len(drawn), 2, generator=generator).tolist()
        pairs = [(n, 1 + int(n * u)) for n, (u, _) in zip(drawn, share, strict=True)]
        return [(a, b) if v < 0.5 else (b, a) for (a, b), (_, v) in zip(pairs, share, strict=True)]

    def write(self, problem: Problem, fmt: str) -> str:
        """The right completion in one format."""
        self._check_format(fmt)
        if fmt == "R":
            return f"R{problem.answer[::-1]}#{problem.answer}{_END}"
        left, right = problem.prompt.removesuffix("=").split("+")
        size, carry, steps = max(len(left), len(right)), 0, []
        for a, b in zip(reversed(left.zfill(size)), reversed(right.zfill(size)), strict=True):
            carry, digit = divmod(int(a) + int(b) + carry, 10)
            steps.append(f"{a}{b}{carry}{digit};" if fmt == "S" else f"{carry}{digit}")
        return f"{fmt}{''.join(steps)}#{problem.answer}{_END}"

    def max_new_tokens(self, length: int) -> int:
        """A quarter more than an S solution: letter, 5 a digit, `#`, n + 1 digits, `<eos>`."""
        return (6 * length + 4) * 5 // 4


def _number(digits: list[int], leading: int) -> str:
    """The digits as a number of as many places: the first is not 0, unless it is the only one."""
    return "".join(map(str, digits if len(digits) == 1 else [leading, *digits[1:]]))


def _sum(left: str, right: str) -> Problem:
    answer = str(int(left) + int(right))
    return Problem(prompt=f"{left}+{right}=", answer=answer, length=max(len(left), len(right)))


@dataclass(frozen=True, slots=True)
class Sorting(_Written):
    """Digits in ascending order: a task without arithmetic, so that "other data" exists.

    For 3141: `S1341;134;34;4;#1134` (the smallest digit and what is then left, again and again),
    `C123141#1134` (each digit with its number of occurrences), `R4311#1134` (descending order first).
    """

    @property
    def name(self) -> str:
        """`sorting`."""
        return "sorting"

    def sample(
        self, num: int, *, lengths: Mapping[int, float], generator: torch.Generator
    ) -> tuple[Problem, ...]:
        """`num` strings of digits, each digit uniform."""
        _check_lengths(lengths)
        drawn = draw(lengths, num, generator=generator)
        digits = torch.randint(10, (num, max(lengths)), generator=generator).tolist()
        texts = ["".join(map(str, row[:n])) for row, n in zip(digits, drawn, strict=True)]
        return tuple(Problem(prompt=f"{t}=", answer="".join(sorted(t)), length=len(t)) for t in texts)

    def write(self, problem: Problem, fmt: str) -> str:
        """The right completion in one format."""
        self._check_format(fmt)
        answer = problem.answer
        if fmt == "R":
            steps = answer[::-1]
        elif fmt == "C":
            steps = "".join(f"{digit}{answer.count(digit)}" for digit in sorted(set(answer)))
        else:
            steps, left = "", problem.prompt.removesuffix("=")
            for digit in answer:
                left = left.replace(digit, "", 1)
                steps += f"{digit}{left};"
        return f"{fmt}{steps}#{answer}{_END}"

    def max_new_tokens(self, length: int) -> int:
        """A quarter more than an S solution: letter, n + … + 1 digits, n `;`, `#`, n digits, `<eos>`."""
        return (length * (length + 1) // 2 + 2 * length + 3) * 5 // 4


TASKS: dict[str, Task] = {task.name: task for task in (Addition(), Addition(operands="varying"), Sorting())}
"""The tasks by name."""


def named_task(name: str) -> Task:
    """The task of that name. Raises UsageError."""
    if name not in TASKS:
        raise UsageError("task", f"{name!r} is not known", expected=f"one of {', '.join(TASKS)}")
    return TASKS[name]
