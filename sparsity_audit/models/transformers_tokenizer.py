"""A tokenizer of `transformers` behind the protocol `Tokenizer`; it is given one and imports nothing.

Contract: ids in, ids out; nothing is cut, cleaned or normalised beyond what the tokenizer itself does. Some
tokenizers put a space in front of a text: a completion given as text is encoded as a text of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsity_audit.errors import UsageError

__all__ = ["TransformersTokenizer"]


class TransformersTokenizer:
    """A tokenizer with the ids its model ends on.

    Args:
        tokenizer: Of `AutoTokenizer`.
        eos_ids: Ids that end a completion, from the generation config and the tokenizer.
        name: For errors.
    """

    def __init__(self, tokenizer: Any, *, eos_ids: tuple[int, ...], name: str) -> None:
        self._tokenizer, self.eos_ids, self._name = tokenizer, eos_ids, name

    @property
    def pad_id(self) -> int:
        """The tokenizer's own, or 0: it is masked anyhow."""
        pad = self._tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text with the special tokens the tokenizer puts around one."""
        return list(self._tokenizer(text, add_special_tokens=True)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids by the tokenizer's chat template, up to where the assistant begins.

        Raises:
            UsageError: There is no template, or it refuses the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise UsageError(
                f"{self._name}: tokenizer",
                "has no chat template",
                remedy="give `prompt` instead of `messages`, or the other side's template",
            )
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except Exception as error:  # a template is a program and raises what it likes
            raise UsageError(f"{self._name}: chat template", f"refuses the messages: {error}") from error
        return [int(number) for number in ids]

    def encode_completion(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens included, spaces as they are."""
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def vocabulary(self) -> dict[str, int]:
        """Token → id, added tokens included."""
        return dict(self._tokenizer.get_vocab())
