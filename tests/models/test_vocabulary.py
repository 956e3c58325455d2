"""Two vocabularies are one, or the difference is shown, or their common prefix was asked for."""

from __future__ import annotations

import pytest

from sparsity_audit.errors import UsageError
from sparsity_audit.models.vocabulary import shared_vocabulary

WORDS = {"<s>": 0, "a": 1, "b": 2, "c": 3}


def shared(tuned, *, sizes=(4, 4), eos_ids=(3,), common_prefix=False):
    return shared_vocabulary(WORDS, tuned, sizes=sizes, eos_ids=eos_ids, common_prefix=common_prefix)


def test_equal_vocabularies_are_shared_whole() -> None:
    assert shared(dict(WORDS)).size == 4
    assert shared(dict(WORDS), sizes=(8, 8)).size == 8


def test_a_difference_is_refused_and_shown() -> None:
    with pytest.raises(UsageError) as error:
        shared({"<s>": 0, "a": 1, "B": 2, "c": 3})
    for part in ("1 of 4 ids differ", "first id 2", "'b' in base", "'B' in tuned", "common-prefix", " 2 ids"):
        assert part in str(error.value)
    with pytest.raises(UsageError, match="no token in base"):
        shared({**WORDS, "<chat>": 4}, sizes=(4, 5))
    with pytest.raises(UsageError, match="base has 4 logits, tuned 6, of the same tokens"):
        shared(dict(WORDS), sizes=(4, 6))


def test_the_common_prefix_ends_before_the_first_difference() -> None:
    found = shared({**WORDS, "<chat>": 4}, sizes=(4, 5), eos_ids=(3, 4), common_prefix=True)
    assert (found.size, found.base_size, found.tuned_size) == (4, 4, 5)
    assert found.eos_ids == (3,)
    assert shared({"<s>": 0, "a": 1, "B": 2, "c": 3}, common_prefix=True).size == 2


def test_nothing_in_common_is_refused_even_then() -> None:
    with pytest.raises(UsageError, match="no common prefix"):
        shared({"x": 0}, common_prefix=True)
