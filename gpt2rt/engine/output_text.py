"""The text of one continuation as it grows, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpt2rt.generation.detokenize import TextDecoder, text_decoder

from .fields import as_texts
from .params import SamplingParams


class OutputText:
    """The text of one continuation that may be shown: never half a character, never a part of a stop string.

    Text that could be the beginning of a stop string is held back until it is decided. The stop string that ends the
    text is the one that is complete first, character by character (of several that end with the same character the
    longest), so the cut does not depend on how the text came in tokens. Only the output is searched, not the prompt.

    Args:
        tokenizer: ours, or any object with ``decode(ids, skip_special_tokens=...)``; None: there is no text.
        prompt_ids: the tokens before the first new one; a character may begin in them.
        params: the request's.

    Attributes:
        text: all that may be shown so far. It only grows.
        stop_reason: the stop string that was found, or None.
    """

    __slots__ = ("_decoder", "_finder", "_held", "_include", "stop_reason", "text")

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self.text = ""
        self.stop_reason: str | None = None
        self._held = ""
        self._include = params.include_stop_str_in_output
        wanted = params.detokenize and tokenizer is not None
        self._decoder: TextDecoder | None = (
            text_decoder(tokenizer, prompt_ids, params.skip_special_tokens) if wanted else None
        )
        stop = as_texts(params.stop)
        self._finder = _StopFinder(stop) if stop else None

    def put(self, token_id: int, *, counts: bool = True) -> bool:
        """Go on with a token. One that ends the continuation is left out, unless its text is to be shown.

        Args:
            token_id: the token.
            counts: a stop string that it completes counts: there are ``min_tokens``. Its beginning may lie in text that
                did not count yet.

        Returns:
            Whether a stop string is complete; ``text`` is final then, and ``stop_reason`` says which.
        """
        if self._decoder is None or self.stop_reason is not None:
            return self.stop_reason is not None
        piece = self._decoder.put((token_id,))
        if self._finder is None:
            self.text += piece
            return False
        return bool(piece) and self._show(piece, self._finder, counts)

    def _show(self, piece: str, finder: _StopFinder, counts: bool) -> bool:
        text = self._held + piece
        found = finder.find(piece, counts)
        if found is None:
            shown = len(text) - finder.held
            self.text += text[:shown]
            self._held = text[shown:]
            return False
        stop, end = found
        # it may have begun in what was held back
        end += len(self._held)
        self.text += text[: end if self._include else end - len(stop)]
        self._held, self.stop_reason = "", stop
        return True

    def end(self) -> None:
        """Nothing more comes: show what was held back, and what is left of an unfinished character."""
        if self._decoder is None or self.stop_reason is not None:
            return
        self.text += self._held + self._decoder.end()
        self._held = ""


class _StopFinder:
    """Finds the first of several texts that a stream of characters completes.

    Source: Knuth, Morris, Pratt, "Fast pattern matching in strings", SIAM J. Comput. 6 (1977): for each text the
    longest beginning of it that the stream ends with is known, so a character costs the same however long the texts
    are and however much was read before.

    Args:
        stops: texts, none empty.

    Attributes:
        held: so many of the last characters are, or may become, a part of a text that is not complete yet.
    """

    __slots__ = ("_failures", "_matched", "_stops", "held")

    def __init__(self, stops: Sequence[str]) -> None:
        # of those that end together the longest comes first
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failures(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self.held = 0

    def find(self, piece: str, counts: bool) -> tuple[str, int] | None:
        """Read more characters.

        Args:
            piece: the characters.
            counts: a text that is completed counts; otherwise it is passed over.

        Returns:
            The text, and the place in ``piece`` after its last character; None if none is complete.
        """
        matched = self._matched
        for place, character in enumerate(piece):
            for index, stop in enumerate(self._stops):
                length = matched[index]
                if length or stop[0] == character:
                    matched[index] = length = self._advance(index, length, character)
                    if length < len(stop):
                        continue
                    if counts:
                        return stop, place + 1
                    matched[index] = self._failures[index][-1]
        self.held = max(matched)
        return None

    def _advance(self, index: int, length: int, character: str) -> int:
        """How much of a text the stream ends with, after one more character."""
        stop, failures = self._stops[index], self._failures[index]
        while length and stop[length] != character:
            length = failures[length - 1]
        return length + 1 if stop[length] == character else 0


def _failures(text: str) -> list[int]:
    """For each beginning of a text the length of the longest shorter beginning that it ends with."""
    result = [0] * len(text)
    length = 0
    for place in range(1, len(text)):
        while length and text[place] != text[length]:
            length = result[length - 1]
        if text[place] == text[length]:
            length += 1
        result[place] = length
    return result
