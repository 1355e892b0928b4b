"""A request on its way through the engine, and its branches: one continuation each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .outputs import CompletionOutput, Logprob, PoolingRequestOutput, RequestMetrics, RequestOutput
from .params import PoolingParams, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from gpt2rt.cache import Sequence
    from gpt2rt.cache.prefix import Chain

    from .output_text import OutputText
    from .sampler import SamplingRow

Output = RequestOutput | PoolingRequestOutput


class Branch:
    """One sequence of tokens: a prompt, and one continuation of it.

    Attributes:
        request: whose it is.
        index: which of the request's choices.
        key: orders branches; the smaller goes first, the largest gives way.
        tokens: prompt and output ids.
        output_ids: the output alone, the same integers.
        sequence: its blocks in the KV cache; None while it waits.
        chain: names its full blocks for the prefix cache.
        num_computed: tokens whose keys and values are in the cache.
        num_cached: those of them that came from the prefix cache.
        row: how its tokens are chosen; None for pooling.
        text: its text; None where none is wanted.
        finish_reason, stop_reason: see :class:`CompletionOutput`; None while it goes on.
        shown_text, shown_ids: how much of it has been handed out.
    """

    __slots__ = (
        "chain",
        "cumulative_logprob",
        "finish_reason",
        "index",
        "key",
        "last_token_time",
        "logprobs",
        "num_cached",
        "num_computed",
        "output_ids",
        "request",
        "row",
        "sequence",
        "shown_ids",
        "shown_text",
        "stop_reason",
        "strikes",
        "text",
        "tokens",
    )

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.key = (request.priority, request.arrival, index)
        # what follows a single wanted row is not computed: the row does not see it
        self.tokens = request.prompt_ids[: request.pooled_place + 1 or None]
        self.output_ids: list[int] = []
        self.sequence: Sequence | None = None
        self.chain: Chain | None = None
        self.num_computed = 0
        self.num_cached = 0
        self.row: SamplingRow | None = None
        self.text: OutputText | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[dict[int, Logprob]] | None = None
        self.cumulative_logprob = 0.0
        self.last_token_time = 0.0
        self.shown_text = 0
        self.shown_ids = 0
        # steps in a row in which it found no block although it was alone
        self.strikes = 0

    def __repr__(self) -> str:
        return f"Branch({self.request.request_id!r}, {self.index}, {self.num_computed}/{len(self.tokens)} tokens)"


@dataclasses.dataclass(eq=False)
class Request:
    """What a caller asked for.

    Attributes:
        request_id: its name, which no other unfinished request has.
        prompt: its text, if it came as one.
        prompt_ids: at least one.
        params: checked.
        sink: is given its outputs, in the engine's thread.
        priority: the smaller goes first.
        arrival: the number of requests before it.
        arrival_time: seconds of ``time.monotonic``.
        salt: prefixes are shared among requests with the same one only.
        max_tokens: the most output tokens of a choice; 0 for pooling.
        seed, key: where its random numbers come from, see ``generation.random.uniform``.
        branches: those that exist; choices beyond the first begin when the prompt has been computed.
        prompt_logprobs: of each prompt token, as far as they are known; None if not asked for.
        rows: hidden states [tokens, n_embd] of pooling requests, chunk by chunk.
        pooled_place: the token whose state a pooling request wants; -1: all.
        pooled: what was made of them.
        error: what ended it, if it failed.
    """

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams | PoolingParams
    sink: Callable[[Output], None]
    priority: int = 0
    arrival: int = 0
    arrival_time: float = dataclasses.field(default_factory=time.monotonic)
    salt: str | None = None
    max_tokens: int = 0
    seed: int = 0
    key: int = 0
    branches: list[Branch] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    shown_prompt_logprobs: bool = False
    rows: list[Tensor] = dataclasses.field(default_factory=list)
    metrics: RequestMetrics = dataclasses.field(init=False)
    error: Exception | None = None
    finished: bool = False
    pooled_place: int = -1
    pooled: Any = None

    def __post_init__(self) -> None:
        self.metrics = RequestMetrics(arrival_time=self.arrival_time)

    @property
    def sampling(self) -> SamplingParams | None:
        """How its tokens are chosen; None for pooling."""
        return self.params if isinstance(self.params, SamplingParams) else None

    @property
    def num_choices(self) -> int:
        """How many continuations it has in the end."""
        return self.params.n if isinstance(self.params, SamplingParams) else 1

    @property
    def num_output_tokens(self) -> int:
        """Of all choices together."""
        return sum(len(branch.output_ids) for branch in self.branches)

    @property
    def needs_prompt_rows(self) -> bool:
        """Whether something is wanted of every prompt token, so that none may come from the prefix cache."""
        params = self.params
        if isinstance(params, PoolingParams):
            return self.pooled_place < 0
        if params.prompt_logprobs is None:
            return False
        return self.prompt_logprobs is None or len(self.prompt_logprobs) < len(self.prompt_ids)

    def output(self) -> Output | None:
        """What the caller is to be shown now; None: nothing new."""
        if isinstance(self.params, PoolingParams):
            if not self.finished:
                return None
            return PoolingRequestOutput(
                request_id=self.request_id,
                prompt_token_ids=self.prompt_ids,
                outputs=self.pooled,
                finished=True,
                num_cached_tokens=self.metrics.num_cached_tokens,
                error=self.error,
                metrics=self.metrics,
            )
        kind = self.params.output_kind
        if kind is RequestOutputKind.FINAL_ONLY and not self.finished:
            return None
        delta = kind is RequestOutputKind.DELTA
        found = [_completion(branch, delta) for branch in self.branches]
        outputs = [output for output in found if output is not None]
        if not outputs and not self.finished:
            return None
        prompt_logprobs = self.prompt_logprobs
        if delta:
            # once, with the first tokens
            prompt_logprobs = None if self.shown_prompt_logprobs else prompt_logprobs
            self.shown_prompt_logprobs = True
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=outputs,
            finished=self.finished,
            metrics=self.metrics,
            num_cached_tokens=self.metrics.num_cached_tokens,
            error=self.error,
        )

    def failed_output(self) -> Output:
        """Its last output where :meth:`output` fails: the tokens, without anything that has to be made of them."""
        if isinstance(self.params, PoolingParams):
            return PoolingRequestOutput(self.request_id, None, self.prompt_ids, True, error=self.error)
        outputs = [
            CompletionOutput(branch.index, token_ids=list(branch.output_ids), finish_reason="error")
            for branch in self.branches
        ]
        return RequestOutput(self.request_id, self.prompt, self.prompt_ids, None, outputs, True, error=self.error)


# a finished branch whose end has been handed out
_DONE = -1


def _completion(branch: Branch, delta: bool) -> CompletionOutput | None:
    text = branch.text.text if branch.text is not None else ""
    if not delta:
        return CompletionOutput(
            index=branch.index,
            text=text,
            token_ids=branch.output_ids if branch.finish_reason is not None else list(branch.output_ids),
            cumulative_logprob=None if branch.logprobs is None else branch.cumulative_logprob,
            logprobs=None if branch.logprobs is None else list(branch.logprobs),
            finish_reason=branch.finish_reason,
            stop_reason=branch.stop_reason,
        )
    if branch.shown_text == _DONE or (branch.shown_ids == len(branch.output_ids) and branch.finish_reason is None):
        return None
    output = CompletionOutput(
        index=branch.index,
        text=text[branch.shown_text :],
        token_ids=branch.output_ids[branch.shown_ids :],
        cumulative_logprob=None if branch.logprobs is None else branch.cumulative_logprob,
        logprobs=None if branch.logprobs is None else branch.logprobs[branch.shown_ids :],
        finish_reason=branch.finish_reason,
        stop_reason=branch.stop_reason,
    )
    branch.shown_text = len(text) if branch.finish_reason is None else _DONE
    branch.shown_ids = len(branch.output_ids)
    return output
