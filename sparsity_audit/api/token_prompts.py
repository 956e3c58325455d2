"""The prompts of a token audit: from a JSONL file, or problems of the lab.

Contract: a file that is not what it should be is one error that names the line. A prompt that cannot be used
(empty, longer than the context, a character the tokenizer has not) is *failed*: listed with its reason, and
the run goes on with the others; only where none is left there is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_audit.errors import SparsityAuditError, UsageError
from sparsity_audit.report.tokens import FailedPrompt

if TYPE_CHECKING:
    from sparsity_audit.models.facts import ModelFacts
    from sparsity_audit.models.protocol import Tokenizer

__all__ = [
    "EncodedPrompt",
    "Judge",
    "PromptLine",
    "encode_prompts",
    "lab_prompts",
    "read_prompts",
]

Judge = Callable[[str], bool]
"""Whether a completion is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLine:
    """A prompt as it was given.

    Args:
        name: Its `id`, else its number.
        text: The prompt; None where there are messages.
        messages: A conversation up to where the assistant begins.
        completions: Completions that were given.
        judge: The task's verdict on a completion; None where nothing judges.
        fields: The line's whole JSON object, for a verifier; empty for a task's problems.
    """

    name: str
    text: str | None
    messages: tuple[dict[str, str], ...] | None
    completions: tuple[str, ...]
    judge: Judge | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt that can be used.

    Args:
        number: Its place among all prompts given, from 0.
        line: What was given.
        ids: Its tokens.
        completions: Tokens of the completions that were given.
    """

    number: int
    line: PromptLine
    ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]


def read_prompts(path: str | Path, *, num: int | None) -> list[PromptLine]:
    """The lines of a JSONL file, at most `num`; other keys than those below are passed over.

    A line has `prompt` (a text) or `messages` (a conversation), and may have `completion` (a text) or
    `completions` (several) and `id`.

    Raises:
        UsageError: The file cannot be read, holds no prompts, or a line is no such object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(str(path), f"cannot be read: {error}", expected="a JSONL file, UTF-8") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (num is None or len(found) < num):
            found.append(_parsed(line, f"{path}, line {number}", number=len(found)))
    if not found:
        raise UsageError(str(path), "holds no prompts", expected='lines such as {"prompt": "12+34="}')
    return found


def _parsed(line: str, subject: str, *, number: int) -> PromptLine:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(subject, f"is not JSON: {error}", expected='{"prompt": …} on a line') from error
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise UsageError(subject, "has not exactly one of `prompt` and `messages`")
    if "completion" in value and "completions" in value:
        raise UsageError(subject, "has both `completion` and `completions`", expected="one of them")
    completions = value.get("completions", [value["completion"]] if "completion" in value else [])
    messages = value.get("messages")
    text = value.get("prompt", "")
    if not isinstance(text, str):
        raise UsageError(subject, f"`prompt` is {type(text).__name__}", expected="a text")
    if not isinstance(completions, list) or not all(isinstance(one, str) for one in completions):
        raise UsageError(subject, "`completions` is not a list of texts")
    if messages is not None and not _are_messages(messages):
        raise UsageError(
            subject, "`messages` is no conversation", expected='[{"role": "user", "content": "…"}, …]'
        )
    return PromptLine(
        name=str(value.get("id", number)),
        text=None if messages is not None else text,
        messages=None if messages is None else tuple(messages),
        completions=tuple(completions),
        fields=value,
    )


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and {"role", "content"} <= set(one)
        and all(isinstance(v, str) for v in one.values())
        for one in value
    )


def lab_prompts(task: str, *, lengths: Sequence[int], num: int, seed: int) -> list[PromptLine]:
    """Problems of the lab with their judge, lengths in equal shares. Raises UsageError."""
    from sparsity_audit.lab.determinism import stream
    from sparsity_audit.lab.tasks import named_task

    asked = named_task(task)
    problems = asked.sample(
        num, lengths=dict.fromkeys(lengths, 1.0), generator=stream(seed, "token problems")
    )
    return [
        PromptLine(
            name=str(number),
            text=problem.prompt,
            messages=None,
            completions=(),
            judge=lambda text, problem=problem: asked.verify(problem, text),
        )
        for number, problem in enumerate(problems)
    ]


def encode_prompts(
    lines: Sequence[PromptLine], sides: Sequence[ModelFacts], *, tokenizer: Tokenizer, vocab_size: int
) -> tuple[list[EncodedPrompt], list[FailedPrompt]]:
    """Prompts as tokens, and those that cannot be used.

    Args:
        lines: What was given; where one has completions, all must.
        sides: Both models: the shorter context counts.
        tokenizer: Encodes.
        vocab_size: Ids from 0 that both models share.

    Raises:
        UsageError: No prompt can be used.
    """
    contexts = [side.context_tokens for side in sides if side.context_tokens is not None]
    context = min(contexts) if contexts else None
    is_given = any(line.completions for line in lines)
    found: list[EncodedPrompt] = []
    failed: list[FailedPrompt] = []
    for number, line in enumerate(lines):
        try:
            ids = _ids(line, tokenizer)
            completions = [tuple(tokenizer.encode_completion(text)) for text in line.completions]
        except SparsityAuditError as error:
            failed.append(_failed(number, line, f"{error.subject}: {error.found}"))
            continue
        reason = _unusable(ids, context=context, vocab_size=vocab_size)
        if reason is None and is_given and not completions:
            reason = "has no completion, though others have"
        if reason is not None:
            failed.append(_failed(number, line, reason))
            continue
        usable = []
        for place, completion in enumerate(completions):
            room = None if context is None else context + 1  # the last token predicts nothing
            why = _unusable((*ids, *completion), context=room, vocab_size=vocab_size)
            why = "is empty" if not completion else why
            if why is None:
                usable.append(completion)
            else:
                failed.append(_failed(number, line, why, completion=f"given completion {place}"))
        if usable or not is_given:
            found.append(EncodedPrompt(number=number, line=line, ids=tuple(ids), completions=tuple(usable)))
    if not found:
        raise UsageError("prompts", f"none of {len(lines)} can be used; the first: {failed[0].reason}")
    return found, failed


def _ids(line: PromptLine, tokenizer: Tokenizer) -> list[int]:
    if line.messages is not None:
        if not line.messages:
            raise UsageError("messages", "are empty")
        return tokenizer.encode_chat(line.messages)
    if not (line.text or "").strip():
        raise UsageError("prompt", "is empty")
    return tokenizer.encode_prompt(line.text or "")


def _unusable(ids: Sequence[int], *, context: int | None, vocab_size: int) -> str | None:
    if not ids:
        return "is empty"
    if context is not None and len(ids) >= context:
        return f"{len(ids):,} tokens leave no room in a context of {context:,}"
    if max(ids) >= vocab_size:
        return f"has token {max(ids)}, beyond the {vocab_size:,} ids that both models share"
    return None


def _failed(number: int, line: PromptLine, reason: str, *, completion: str = "") -> FailedPrompt:
    return FailedPrompt(prompt=number, name=line.name, completion=completion, reason=reason)
