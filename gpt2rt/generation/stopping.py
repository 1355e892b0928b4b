"""When a row is finished."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2rt.errors import RequestError

from .config import GenerationConfig
from .processors import token_list

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

    @property
    def max_length(self) -> int | None:
        """That of the first MaxLengthCriteria; None without one."""
        return next((criterion.max_length for criterion in self if isinstance(criterion, MaxLengthCriteria)), None)


class MaxLengthCriteria(StoppingCriteria):
    """Every row ends when rows have ``max_length`` columns.

    Args:
        max_length: prompt, padding and new tokens.
        max_position_embeddings: positions of the model; if rows get longer, a warning says so once.
    """

    def __init__(self, max_length: int, max_position_embeddings: int | None = None) -> None:
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings
        self._warned = False

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        length, positions = input_ids.size(1), self.max_position_embeddings
        done = length >= self.max_length
        if positions is not None and not done and length > positions and not self._warned:
            self._warned = True
            warnings.warn(f"rows have {length} tokens now, but the model has {positions} positions", stacklevel=2)
        return _same_for_all(done, input_ids)


class MaxTimeCriteria(StoppingCriteria):
    """Every row ends when the time is over.

    Args:
        max_time: seconds.
        initial_timestamp: when they begin, as ``time.time()`` counts; None: now.
    """

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        return _same_for_all(time.time() - self.initial_timestamp > self.max_time, input_ids)


class EosTokenCriteria(StoppingCriteria):
    """A row ends with an end token.

    Args:
        eos_token_id: the end tokens.
    """

    def __init__(self, eos_token_id: int | Sequence[int] | Tensor) -> None:
        self.eos_token_id = torch.tensor(token_list("eos_token_id", eos_token_id))

    def __call__(
        self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, new_token_length: int = 1, **kwargs: Any
    ) -> Tensor:
        """As every criterion; ``new_token_length`` is how many columns at the end are new."""
        newest = input_ids[:, -new_token_length:]
        return torch.isin(newest, self.eos_token_id.to(newest.device)).any(dim=-1)


class ConfidenceCriteria(StoppingCriteria):
    """A draft ends when its last token was less likely than a threshold; it needs the scores and looks at row 0.

    Args:
        assistant_confidence_threshold: a probability.
    """

    def __init__(self, assistant_confidence_threshold: float) -> None:
        self.assistant_confidence_threshold = assistant_confidence_threshold

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> bool:
        if not scores:
            raise RequestError("ConfidenceCriteria looks at scores; set return_dict_in_generate and output_scores")
        probability = torch.softmax(scores[-1][0], dim=-1)[input_ids[0, -1]]
        return bool(probability < self.assistant_confidence_threshold)


class StopStringCriteria(StoppingCriteria):
    """A row ends with the token that completes one of several texts.

    Args:
        tokenizer: ours, or any object with ``decode(ids)``.
        stop_strings: one text or several, none empty.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]) -> None:
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not strings or not all(isinstance(text, str) and text for text in strings):
            raise RequestError(f"stop_strings must be a text or several, none of them empty, got {stop_strings!r}")
        self.stop_strings = tuple(strings)
        self._finder = StopStrings(strings, tokenizer)

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        # negative ids are padding
        rows = [[token for token in row if token >= 0] for row in input_ids.tolist()]
        found = [bool(row) and self._finder.put(self._finder.begin(row[:-1]), row[-1])[1] for row in rows]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


def without_replaced(config: GenerationConfig, criteria: Sequence[Any]) -> GenerationConfig:
    """The settings of a call without those that a caller's own criteria take the place of, as in transformers.

    Its classes and ours count, by their names: MaxLengthCriteria goes before max_length and max_new_tokens,
    MaxTimeCriteria before max_time, StopStringCriteria before stop_strings. (EosTokenCriteria goes before the end
    tokens, but only where rows end: see :func:`holds`.)
    """
    config = copy.copy(config)
    length = next((item.max_length for item in criteria if type(item).__name__ == "MaxLengthCriteria"), None)
    if length is not None:
        config.max_length, config.max_new_tokens = length, None
    if holds(criteria, "MaxTimeCriteria"):
        config.max_time = None
    if holds(criteria, "StopStringCriteria"):
        config.stop_strings = None
    return config


def holds(criteria: Sequence[Any], name: str) -> bool:
    """Whether a criterion of a class with this name is among them."""
    return any(type(item).__name__ == name for item in criteria)


def _same_for_all(done: bool, input_ids: Tensor) -> Tensor:
    return torch.full((input_ids.size(0),), done, dtype=torch.bool, device=input_ids.device)


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
