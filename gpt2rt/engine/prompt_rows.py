"""What is wanted of every token of a prompt: hidden states for pooling, or log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpt2rt.errors import NumericsError
from gpt2rt.graph import StepOutput

from .batch import Item
from .logprobs import TokenTexts, as_logprobs, prompt_logprobs
from .params import PoolingParams
from .request import Request
from .runner import Group
from .served import ServedModel


class PromptRows:
    """Keeps the rows of a step that are wanted of prompt tokens.

    Args:
        served: pools hidden states.
        texts: of the tokens.
        fail: is told of a request whose rows cannot be taken, and why.
    """

    def __init__(self, served: ServedModel, texts: TokenTexts, fail: Callable[[Request, Exception], None]) -> None:
        self._served = served
        self._texts = texts
        self._fail = fail

    def take(self, group: Group) -> None:
        """Keep what is wanted of a group's prompt tokens: their log-probabilities, or hidden states."""
        first = 0
        for item in group.items:
            stop = first + item.num_logits
            request = item.branch.request
            if item.num_logits and (request.sampling is None or request.needs_prompt_rows):
                try:
                    self._take(item, group.output, first, stop)
                except Exception as error:
                    self._fail(item.branch.request, error)
            first = stop

    def _take(self, item: Item, output: StepOutput, first: int, stop: int) -> None:
        request = item.branch.request
        if isinstance(request.params, PoolingParams):
            assert output.hidden is not None
            hidden = output.hidden[first:stop]
            if not bool(torch.isfinite(hidden).all()):
                raise NumericsError("hidden states of the prompt hold NaN or infinity; the weights are damaged")
            request.rows.append(hidden)
            if item.complete:
                request.pooled = self._served.pool(torch.cat(request.rows), request.params)
                item.branch.finish_reason = "stop"
            return
        assert output.logits is not None
        assert request.sampling is not None
        assert request.sampling.prompt_logprobs is not None
        known = request.prompt_logprobs = request.prompt_logprobs or [None]
        next_ids = request.prompt_ids[item.start + 1 : item.start + item.count + 1]
        # after a preemption the first tokens come again, in chunks of other sizes
        again = len(known) - item.start - 1
        assert again >= 0
        if again < len(next_ids):
            logits = output.logits[first + again : first + len(next_ids)]
            found = prompt_logprobs(logits, next_ids[again:], request.sampling.prompt_logprobs)
            known += [as_logprobs(entry, self._texts) for entry in found]
