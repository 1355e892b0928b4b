"""When a row is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2rt.errors import RequestError

Criterion = Callable[..., Any]


class StoppingCriteria:
    """Base class of a caller's own criteria.

    A criterion sees all rows of the call, finished ones too, and says for each whether it ends here.
    """

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor | bool:
        """[num_rows] bool, or one bool for all rows.

        Args:
            input_ids: [num_rows, length] int64, prompt and new tokens; finished rows are padded.
            scores: the processed scores of each step if ``output_scores`` was asked for, else None.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(input_ids, scores)")


class StoppingCriteriaList(list):
    """Criteria of which one is enough."""

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        """[num_rows] bool: which rows end here."""
        done = torch.zeros(input_ids.size(0), dtype=torch.bool, device=input_ids.device)
        for criterion in self:
            done |= _as_rows(criterion(input_ids, scores, **kwargs), criterion, done)
        return done


def _as_rows(result: Any, criterion: Criterion, like: Tensor) -> Tensor:
    """A criterion's answer as [num_rows] bool."""
    answer = result if isinstance(result, Tensor) else torch.tensor(bool(result))
    if answer.numel() == 1:
        return answer.to(like.device, torch.bool).reshape(1).expand_as(like)
    if answer.shape != like.shape:
        raise RequestError(
            f"the stopping criterion {type(criterion).__name__} returned a tensor of shape {list(answer.shape)}, "
            f"expected one bool or {list(like.shape)}, one for each row"
        )
    return answer.to(like.device, torch.bool)


class StopStrings:
    """Finds the token that completes one of several texts.

    Matching is on the UTF-8 bytes of the row, prompt included, and a match must reach into the new token: a text may
    begin or end inside a token and span tokens that each hold half a character.

    Args:
        strings: one text or several, none empty.
        tokenizer: ours (with ``id_to_bytes``), or any object with ``decode(ids)``.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: Any) -> None:
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        self._tokenizer = tokenizer
        self._needles = [text.encode("utf-8", "surrogatepass") for text in self.strings]
        self._longest = max(len(needle) for needle in self._needles)
        self._by_bytes = hasattr(tokenizer, "id_to_bytes")

    def begin(self, prompt_ids: Sequence[int]) -> Any:
        """The state of a row that starts with this prompt."""
        # a token has at least one byte, so as many tokens as the longest text has bytes are enough
        recent = [int(token) for token in prompt_ids[-self._longest :]]
        if not self._by_bytes:
            return recent
        return b"".join(self._tokenizer.id_to_bytes(token) for token in recent)[-self._longest :]

    def put(self, state: Any, token: int) -> tuple[Any, bool]:
        """The row's state after one more token, and whether that token completes a text."""
        if not self._by_bytes:
            return self._put_decoded(state, token)
        piece = self._tokenizer.id_to_bytes(token)
        data = state + piece
        found = bool(piece) and any(
            data.find(needle, max(0, len(state) - len(needle) + 1)) >= 0 for needle in self._needles
        )
        return data[-self._longest :], found

    def _put_decoded(self, recent: list[int], token: int) -> tuple[list[int], bool]:
        window = [*recent, token]
        before = self._tokenizer.decode(recent).rstrip("\ufffd") if recent else ""
        after = self._tokenizer.decode(window)
        found = any(after.find(text, max(0, len(before) - len(text) + 1)) >= 0 for text in self.strings)
        return window[-self._longest :], found


class StopTextFilter:
    """Cuts streamed text before the first of several stop texts, and never shows a part of one.

    Text that could be the beginning of a stop text is held back until it is decided.

    Args:
        strings: the stop texts; empty for none.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings = list(strings)
        self._held = ""
        self.stopped = False

    def put(self, text: str) -> str:
        """What may be shown now."""
        if self.stopped:
            return ""
        text = self._held + text
        places = [place for stop in self._strings if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = 0
        for stop in self._strings:
            for length in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:length]):
                    held = length
                    break
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, now that no more text comes."""
        rest, self._held = self._held, ""
        return rest
