"""The lab's alphabet: 20 tokens, one a character, and the tokenizer files that say so to everybody else.

Contract: `encode` and `decode` are inverse to each other on all texts of the alphabet; special tokens are
written `<pad>`, `<bos>`, `<eos>` in texts. The tokenizer files make `transformers.AutoTokenizer` encode
alike; it puts `<bos>` in front, as `encode_prompt` does. The order is that of the frozen checkpoints in
`tests/data/addition`, so that their rows mean the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from sparsity_audit.errors import UsageError

__all__ = ["BOS", "EOS", "PAD", "TOKENS", "decode", "encode", "encode_prompt", "tokenizer_files"]

TOKENS = ("<pad>", "<bos>", "<eos>", *"0123456789+=#;SRC")
"""Token texts by id: specials, digits, signs, and one letter for each solution format."""

PAD, BOS, EOS = 0, 1, 2

_IDS = {text: number for number, text in enumerate(TOKENS)}
_PIECE = re.compile(r"<pad>|<bos>|<eos>|.", re.DOTALL)


def encode(text: str) -> list[int]:
    """The ids of a text, one a character or special token.

    Raises:
        UsageError: The text has a character outside the alphabet.
    """
    pieces = _PIECE.findall(text)
    for piece in pieces:
        if piece not in _IDS:
            raise UsageError(
                f"text {text!r}", f"{piece!r} is not in the alphabet", expected="".join(TOKENS[3:])
            )
    return [_IDS[piece] for piece in pieces]


def encode_prompt(text: str) -> list[int]:
    """The ids of a prompt: `<bos>` and the text."""
    return [BOS, *encode(text)]


def decode(ids: Iterable[int]) -> str:
    """The text of ids, special tokens included."""
    return "".join(TOKENS[number] for number in ids)


def tokenizer_files() -> dict[str, str]:
    """Name → content of the files that `transformers.AutoTokenizer` loads."""
    specials = {"pad_token": TOKENS[PAD], "bos_token": TOKENS[BOS], "eos_token": TOKENS[EOS]}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **specials,
    }
    return {
        "tokenizer.json": _json(_tokenizer()),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(specials),
    }


def _tokenizer() -> dict[str, Any]:
    """The content of `tokenizer.json`: a word-level model on single characters."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, "content": TOKENS[n], **special} for n in (PAD, BOS, EOS)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Fuse"},
        # No row is free for an unknown token: a text outside the alphabet is an error, here as in `encode`.
        "model": {"type": "WordLevel", "vocab": _IDS, "unk_token": "<unk>"},
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
