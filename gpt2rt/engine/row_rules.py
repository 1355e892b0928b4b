"""Rules of one row of scores: biases, allowed tokens, bad words, no end before ``min_tokens``, the caller's processors.

Every rule writes into the row it is given and looks at nothing else, so that neighbours make no difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2rt.errors import RequestError

from .fields import bad_words_ids
from .params import LogitsProcessor, SamplingParams

_EXCLUDED = float("-inf")


class RowRules:
    """What one continuation changes in its scores.

    Args:
        params: the request's, checked.
        eos_token_ids: the model's end tokens.
        tokenizer: for ``bad_words`` whose tokens are not known yet.
    """

    __slots__ = ("_allowed", "_banned", "_bias", "_ends", "_longer", "_min_tokens", "_on_host", "_processors")

    def __init__(self, params: SamplingParams, eos_token_ids: Iterable[int], tokenizer: Any = None) -> None:
        words = params.bad_words_token_ids
        if words is None and params.bad_words:
            words = bad_words_ids(params.bad_words, tokenizer)
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            self._bias = _ids(params.logit_bias), torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._allowed = None if params.allowed_token_ids is None else _ids(set(params.allowed_token_ids))
        banned = {sequence[0] for sequence in words or () if len(sequence) == 1}
        self._banned = _ids(banned) if banned else None
        # of longer bad words, by the last token before the one that completes them: all before it, and that one
        self._longer: dict[int, list[tuple[list[int], int]]] = {}
        for sequence in words or ():
            if len(sequence) > 1:
                self._longer.setdefault(sequence[-2], []).append((sequence[:-1], sequence[-1]))
        ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_token_ids)}
        self._min_tokens = params.min_tokens if ends else 0
        self._ends = _ids(ends) if self._min_tokens else None
        self._processors = [_as_called(processor) for processor in params.logits_processors or ()]
        self._on_host = True

    def idle(self, num_output: int) -> bool:
        """Whether the rows of a continuation with so many tokens, and of longer ones, stay as they are."""
        others = self._bias is not None or self._allowed is not None or self._banned is not None
        return not (others or self._longer or self._processors) and num_output >= self._min_tokens

    def to(self, device: torch.device) -> None:
        """Have what is written at hand where the scores are."""
        if device.type == "cpu" or not self._on_host:
            return
        if self._bias is not None:
            self._bias = _sent(self._bias[0], device), _sent(self._bias[1], device)
        for name in ("_allowed", "_banned", "_ends"):
            ids = getattr(self, name)
            if ids is not None:
                setattr(self, name, _sent(ids, device))
        self._on_host = False

    @property
    def has_processors(self) -> bool:
        """Whether code of the caller looks at the scores."""
        return bool(self._processors)

    def add_bias(self, scores: Tensor) -> None:
        """Add the biases to one row of scores, [vocab_size] float32: before penalties, as in vLLM and ``generate``."""
        if self._bias is not None:
            scores.index_add_(0, *self._bias)

    def exclude(self, scores: Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Apply all other rules to one row of scores, after penalties.

        Args:
            scores: [vocab_size] float32, is changed.
            prompt_ids: the tokens of the prompt.
            output_ids: those that follow it.

        Raises:
            RequestError: one of the caller's processors raised, or returned something that is no row of scores.
        """
        if self._allowed is not None:
            kept = scores[self._allowed]
            scores.fill_(_EXCLUDED)
            scores[self._allowed] = kept
        if self._banned is not None:
            scores.index_fill_(0, self._banned, _EXCLUDED)
        if self._longer and output_ids:
            for start, last in self._longer.get(output_ids[-1], ()):
                if output_ids[-len(start) :] == start:
                    scores[last] = _EXCLUDED
        if self._ends is not None and len(output_ids) < self._min_tokens:
            scores.index_fill_(0, self._ends, _EXCLUDED)
        for processor in self._processors:
            processor(scores, prompt_ids, output_ids)


def make_rules(params: SamplingParams, eos_token_ids: Iterable[int], tokenizer: Any = None) -> RowRules | None:
    """The rules of a continuation, or None if there are none. Arguments as for :class:`RowRules`."""
    asked = (params.logit_bias, params.allowed_token_ids, params.bad_words, params.min_tokens, params.logits_processors)
    if not any(asked):
        return None
    rules = RowRules(params, eos_token_ids, tokenizer)
    return None if rules.idle(0) else rules


def _ids(ids: Iterable[int]) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """On a device, without a wait for it."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def _as_called(processor: LogitsProcessor) -> Callable[[Tensor, Sequence[int], Sequence[int]], None]:
    """A function (scores, prompt ids, output ids) that lets a caller's processor change the scores."""
    name = getattr(processor, "__name__", type(processor).__name__)
    try:
        parameters = inspect.signature(processor).parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = [p for p in positional if p.default is p.empty]
    except (TypeError, ValueError):
        # some functions in C have no signature; most take the output alone
        required = []
    with_prompt = len(required) == 3

    def call(scores: Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        # copies: the lists are the engine's
        ids = (list(prompt_ids), list(output_ids)) if with_prompt else (list(output_ids),)
        try:
            result = processor(*ids, scores)
        except Exception as error:
            raise RequestError(f"the logits processor {name} raised {type(error).__name__}: {error}") from error
        if result is scores:
            return
        if not isinstance(result, Tensor) or result.shape != scores.shape:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise RequestError(
                f"the logits processor {name} returned {got}, expected a tensor of shape {list(scores.shape)}, the row "
                "of scores that it was given"
            )
        scores.copy_(result.detach())

    return call
