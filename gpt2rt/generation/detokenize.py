"""Bytes and text of tokens as they come, from our tokenizers and from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

# what decode shows for bytes that are no complete character
_INCOMPLETE = "\ufffd"


class TextDecoder(Protocol):
    """Turns a growing sequence of ids into text, one complete character at a time."""

    def put(self, ids: Sequence[int]) -> str:
        """The text that these further ids complete."""

    def end(self) -> str:
        """The rest."""


def text_decoder(tokenizer: Any, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = False) -> TextDecoder:
    """A decoder for the ids that follow a prompt.

    Args:
        tokenizer: ours (exact, by bytes), or any object with ``decode(ids, skip_special_tokens=...)``.
        prompt_ids: the ids before the first new one; a character may begin in them.
        skip_special_tokens: leave special tokens out of the text.
    """
    if hasattr(tokenizer, "id_to_bytes"):
        from gpt2rt.tokenizers import StreamDecoder

        return StreamDecoder(tokenizer, prompt_ids, skip_special_tokens)
    return _DecodeDifferences(tokenizer, skip_special_tokens)


class _DecodeDifferences:
    """For tokenizers that only decode whole sequences: decode the line so far, return what is new."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._shown = 0

    def put(self, ids: Sequence[int]) -> str:
        self._ids += [int(token) for token in ids]
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        if text.endswith(_INCOMPLETE):
            return ""
        piece = text[self._shown :]
        self._shown = len(text)
        if text.endswith("\n"):
            # nothing after a line break changes what stands before it: start over, so that the cost stays bounded
            self._ids, self._shown = [], 0
        return piece

    def end(self) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip) if self._ids else ""
        piece = text[self._shown :]
        self._ids, self._shown = [], 0
        return piece
