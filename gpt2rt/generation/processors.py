"""What a logits processor is, and a list of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2rt.errors import RequestError

EXCLUDED = float("-inf")


class LogitsProcessor:
    """Base class of all processors.

    One that treats the rows of a call differently defines ``for_rows(input_ids, scores, rows)`` besides ``__call__``;
    :class:`LogitsProcessorList` prefers it when it is told which rows it has. One that holds something that must be
    given back defines ``close()``.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The changed scores, [num_rows, vocab_size] float32."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(input_ids, scores)")


class LogitsProcessorList(list):
    """Processors applied one after another."""

    def __call__(
        self, input_ids: Tensor, scores: Tensor, *, rows: Sequence[int] | None = None, **kwargs: Any
    ) -> Tensor:
        """The scores after all processors.

        Args:
            input_ids: [num_rows, length] int64.
            scores: [num_rows, vocab_size] float32.
            rows: for each row of ``scores`` its number among the rows of the call, of which some may be finished and
                left out; None: all rows of the call are here, in order.
            **kwargs: passed to processors that have more arguments than the first two.

        Raises:
            RequestError: a processor needs an argument that is not among ``kwargs``.
        """
        for processor in self:
            if rows is not None and hasattr(processor, "for_rows"):
                scores = processor.for_rows(input_ids, scores, rows)
            elif kwargs and len(parameters := inspect.signature(processor).parameters) > 2:
                missing = [name for name in list(parameters)[2:] if name not in kwargs]
                if missing:
                    raise RequestError(f"{type(processor).__name__} needs the arguments {', '.join(missing)} too")
                scores = processor(input_ids, scores, **kwargs)
            else:
                scores = processor(input_ids, scores)
        return scores

    def close(self) -> None:
        """Give back what the processors hold: cache blocks, for example. They can be used again."""
        for processor in self:
            if hasattr(processor, "close"):
                processor.close()


def as_list(ids: Any) -> list[int]:
    """One id, several, a tensor of them or None as a list."""
    if ids is None:
        return []
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    return [ids] if isinstance(ids, int) else list(ids)


def token_list(name: str, ids: Any) -> list[int]:
    """As :func:`as_list`, checked.

    Raises:
        RequestError: there is none, or one is no token id.
    """
    found = as_list(ids)
    if not found or not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in found):
        raise RequestError(f"{name} must be a token id or a list of token ids, integers from 0 on, got {ids!r}")
    return found


def without(scores: Tensor, ids: list[int]) -> Tensor:
    """A copy of [num_rows, vocab_size] in which some tokens are excluded; ids past the vocabulary are none of it."""
    scores = scores.clone()
    scores[:, [token for token in ids if token < scores.size(-1)]] = EXCLUDED
    return scores


def only(scores: Tensor, ids: list[int]) -> Tensor:
    """Scores of the same shape that allow some tokens and nothing else: those have 0, all others -inf."""
    result = torch.full_like(scores, EXCLUDED)
    result[:, ids] = 0.0
    return result
