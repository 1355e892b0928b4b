"""From what a caller gives to a request that the engine can run, checked before any work is done."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from gpt2rt.errors import RequestError
from gpt2rt.generation.random import request_key

from .inputs import check_text, check_token_ids
from .params import PoolingParams, SamplingParams
from .request import Output, Request
from .served import ServedModel

_SEED_MASK = 2**63 - 1


class Frontend:
    """Makes requests for one engine.

    Args:
        served: the model.
    """

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self._arrivals = 0
        seed = served.config.seed
        # requests without a seed draw different numbers, the same ones in every run if the engine has a seed
        self._base_seed = secrets.randbits(63) if seed is None else seed & _SEED_MASK

    def encode(
        self,
        text: str,
        params: Any = None,
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool | None = None,
    ) -> list[int]:
        """The ids of a text.

        Args:
            text: of the prompt.
            params: of the request, whose ``truncate_prompt_tokens`` allows any length; or None.
            add_special_tokens: as the tokenizer adds them by itself.
            split_special_tokens: read names of special tokens as ordinary text; None: as the tokenizer is set.

        Raises:
            RequestError: there is no tokenizer, or the text cannot be encoded or is far too long.
        """
        tokenizer = self.served.tokenizer
        if tokenizer is None:
            raise RequestError("the prompt is a text, but this engine has no tokenizer; send token ids")
        cut = params is not None and params.truncate_prompt_tokens is not None
        check_text(text, None if cut else self.served.max_model_len, self.served.longest_token)
        options: dict[str, Any] = {"add_special_tokens": add_special_tokens, "verbose": False}
        if split_special_tokens is not None:
            options["split_special_tokens"] = split_special_tokens
        try:
            return list(tokenizer.encode(text, **options))
        except BaseException as error:
            # the tokenizers library reports its own faults by an exception that is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            raise RequestError(f"the prompt cannot be tokenised: {error}") from error

    def make(
        self,
        prompt_ids: Any,
        params: SamplingParams | PoolingParams,
        sink: Callable[[Output], None],
        *,
        request_id: str,
        prompt: str | None = None,
        priority: int = 0,
        salt: str | None = None,
    ) -> Request:
        """A request.

        Args:
            prompt_ids: token ids.
            params: what is wanted; copied.
            sink: is given its outputs.
            request_id: its name.
            prompt: its text, if it came as one.
            priority: the smaller goes first.
            salt: its prefix is shared only with requests of the same salt.

        Raises:
            RequestError: something is out of its range.
        """
        served = self.served
        if type(priority) is not int or not -(2**31) <= priority < 2**31:
            raise RequestError(f"priority must be an integer of 32 bits, got {priority!r}")
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise RequestError(f"cache_salt must be a text that is not empty, got {salt!r}")
        if not isinstance(request_id, str) or not request_id:
            raise RequestError(f"request_id must be a text that is not empty, got {request_id!r}")
        params = params.clone()
        if isinstance(params, SamplingParams):
            if "generate" not in served.tasks:
                raise RequestError(
                    f"{type(served.model).__name__} generates no text; its tasks are {', '.join(sorted(served.tasks))}"
                )
            params.check(vocab_size=served.vocab_size, limits=served.config.limits, tokenizer=served.tokenizer)
        else:
            params.check()
        ids = check_token_ids(prompt_ids, served.vocab_size)
        ids = self._truncated(ids, params)
        max_tokens = self._max_tokens(len(ids), params)
        request = Request(
            request_id=request_id,
            prompt=prompt,
            prompt_ids=ids,
            params=params,
            sink=sink,
            priority=priority,
            arrival=self._arrivals,
            salt=salt,
            max_tokens=max_tokens,
        )
        if isinstance(params, SamplingParams):
            own = params.seed
            request.seed = (self._base_seed if own is None else own) & (2**64 - 1)
            # with a seed of its own: the numbers of model.generate; without one, those of nobody else
            request.key = request_key(ids) if own is not None else self._arrivals
        else:
            request.pooled_place = served.pooled_place(ids, params)
        self._arrivals += 1
        return request

    def _truncated(self, ids: list[int], params: SamplingParams | PoolingParams) -> list[int]:
        """The last tokens, as many as ``truncate_prompt_tokens`` says."""
        count = params.truncate_prompt_tokens
        if count is None:
            return ids
        if count == -1:
            room = 0
            if isinstance(params, SamplingParams):
                room = 1 if params.max_tokens is None else params.max_tokens
            count = max(1, self.served.max_model_len - room)
        return ids[-count:]

    def _max_tokens(self, length: int, params: SamplingParams | PoolingParams) -> int:
        """The most new tokens of a choice."""
        limit = self.served.max_model_len
        if isinstance(params, PoolingParams):
            if length > limit:
                raise RequestError(
                    f"the prompt has {length} tokens, but the model takes {limit}; shorten it or set "
                    "truncate_prompt_tokens"
                )
            return 0
        if length == limit and params.prompt_logprobs is not None and params.max_tokens == 1:
            # a text that fills the context can be scored: its one new token is chosen and never computed
            return 1
        if length >= limit:
            raise RequestError(
                f"the prompt has {length} tokens, but prompt and output together have at most {limit}; shorten it or "
                "set truncate_prompt_tokens"
            )
        wanted = params.max_tokens
        if wanted is None:
            return limit - length
        if length + wanted > limit:
            raise RequestError(
                f"the prompt has {length} tokens and max_tokens is {wanted}, together {length + wanted}, but the model "
                f"takes {limit}; lower max_tokens to {limit - length} or shorten the prompt"
            )
        return wanted
