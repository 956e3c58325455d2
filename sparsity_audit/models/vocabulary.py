"""Whether two models speak of the same tokens.

Contract: pure. Two distributions are compared entry by entry, so every id must have one meaning. Other
tokenizers, or heads of another width, are refused with the first difference shown, unless the common prefix
of both vocabularies was asked for; what that leaves out is in the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsity_audit.errors import UsageError
from sparsity_audit.models.facts import ModelFacts
from sparsity_audit.models.protocol import LanguageModel

__all__ = ["SharedVocabulary", "check_same_vocabulary", "shared_vocabulary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedVocabulary:
    """The ids both models have in common.

    Args:
        size: Ids from 0 that are compared.
        base_size: Width of the base's logits.
        tuned_size: Width of the tuned model's.
        eos_ids: Ids that end a completion: those of either model.
    """

    size: int
    base_size: int
    tuned_size: int
    eos_ids: tuple[int, ...]


def check_same_vocabulary(
    base: LanguageModel | ModelFacts, tuned: LanguageModel | ModelFacts, *, common_prefix: bool = False
) -> SharedVocabulary:
    """What two models share; see `shared_vocabulary`."""
    return shared_vocabulary(
        base.tokenizer.vocabulary(),
        tuned.tokenizer.vocabulary(),
        sizes=(base.vocab_size, tuned.vocab_size),
        eos_ids=(*base.tokenizer.eos_ids, *tuned.tokenizer.eos_ids),
        common_prefix=common_prefix,
    )


def shared_vocabulary(
    base: Mapping[str, int],
    tuned: Mapping[str, int],
    *,
    sizes: tuple[int, int],
    eos_ids: tuple[int, ...],
    common_prefix: bool,
) -> SharedVocabulary:
    """What two vocabularies share.

    Args:
        base: Token → id.
        tuned: Token → id.
        sizes: Widths of the logits of both, which may exceed the vocabularies.
        eos_ids: Ids that end a completion, of either.
        common_prefix: Accept a difference, and compare the ids before it.

    Raises:
        UsageError: They differ and the common prefix was not asked for, or it is empty.
    """
    ours, theirs = (_by_id(vocabulary) for vocabulary in (base, tuned))
    end = max([*ours, *theirs], default=-1) + 1
    first = next((n for n in range(end) if ours.get(n) != theirs.get(n)), None)
    size = min(sizes) if first is None else min(first, *sizes)
    if (first is not None or sizes[0] != sizes[1]) and not common_prefix:
        raise UsageError(
            "vocabulary",
            _difference(ours, theirs, first, sizes),
            expected="the same tokens, and logits of the same width",
            remedy=f"--vocabulary common-prefix compares the {size:,} ids before the difference",
        )
    if size == 0:
        raise UsageError("vocabulary", "the two have no common prefix", expected="the same tokens")
    return SharedVocabulary(
        size=size,
        base_size=sizes[0],
        tuned_size=sizes[1],
        eos_ids=tuple(n for n in dict.fromkeys(eos_ids) if n < size),
    )


def _by_id(vocabulary: Mapping[str, int]) -> dict[int, str]:
    return {number: text for text, number in vocabulary.items()}


def _difference(
    ours: Mapping[int, str], theirs: Mapping[int, str], first: int | None, sizes: tuple[int, int]
) -> str:
    if first is None:
        return f"base has {sizes[0]:,} logits, tuned {sizes[1]:,}, of the same tokens"
    end = max([*ours, *theirs]) + 1
    number = sum(ours.get(n) != theirs.get(n) for n in range(end))
    of_base, of_tuned = (
        "no token" if first not in vocabulary else repr(vocabulary[first]) for vocabulary in (ours, theirs)
    )
    return (
        f"{number:,} of {end:,} ids differ; first id {first}: {of_base} in base, {of_tuned} in tuned "
        f"(base has {sizes[0]:,} logits, tuned {sizes[1]:,})"
    )
