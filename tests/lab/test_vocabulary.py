"""The alphabet: round trips, and what is not in it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.folder import resolve_base
from sparsity_audit.lab.names import BASES
from sparsity_audit.lab.vocabulary import (
    BOS,
    EOS,
    PAD,
    TOKENS,
    decode,
    encode,
    encode_prompt,
    tokenizer_files,
)


def test_the_alphabet_has_20_tokens_and_specials_come_first() -> None:
    assert len(set(TOKENS)) == 20
    assert (TOKENS[PAD], TOKENS[BOS], TOKENS[EOS]) == ("<pad>", "<bos>", "<eos>")


@given(st.lists(st.integers(0, 19)))
def test_every_sequence_of_ids_survives_decoding_and_encoding(ids: list[int]) -> None:
    assert encode(decode(ids)) == ids


@given(st.text("".join(TOKENS[3:])))
def test_every_text_of_the_alphabet_survives_encoding_and_decoding(text: str) -> None:
    assert decode(encode(text)) == text
    assert encode_prompt(text) == [BOS, *encode(text)]


@pytest.mark.parametrize("text", ["1 2", "s", "<", "<unk>", "1\n", "é", "12<eo>", "-1"])
def test_a_character_outside_the_alphabet_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(UsageError, match="is not in the alphabet"):
        encode(text)


def test_the_tokenizer_files_hold_the_same_ids() -> None:
    files = {name: json.loads(text) for name, text in tokenizer_files().items()}
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    vocabulary = files["tokenizer.json"]["model"]["vocab"]
    assert sorted(vocabulary, key=vocabulary.__getitem__) == list(TOKENS)
    added = {token["content"]: token["id"] for token in files["tokenizer.json"]["added_tokens"]}
    assert added == {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}


@pytest.mark.parametrize("name", BASES)
def test_the_shipped_bases_carry_these_tokenizer_files(name: str) -> None:
    folder = resolve_base(name)
    assert {file: (folder / file).read_text() for file in tokenizer_files()} == tokenizer_files()
