"""What an engine tells of itself; times are seconds of ``time.monotonic``."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class FinishedRequest:
    """A request that has ended.

    Attributes:
        finish_reason: of its first choice: "stop", "length", "abort" or "error".
        num_prompt_tokens, num_generation_tokens: tokens, those of all choices together.
        e2e_latency: from arrival to the end.
        queue_time: from arrival to its first step.
        prefill_time: from there to its first token.
        decode_time: from there to its last.
        time_per_output_token: of the tokens after the first, their mean; None with fewer than two.
        max_tokens: what it asked for, None if it did not.
        n: its choices.
        has_error: it ended by a fault.
    """

    finish_reason: str
    num_prompt_tokens: int
    num_generation_tokens: int
    e2e_latency: float
    queue_time: float
    prefill_time: float
    decode_time: float
    time_per_output_token: float | None
    max_tokens: int | None
    n: int
    has_error: bool = False


@dataclasses.dataclass(slots=True)
class IterationStats:
    """What one step did, for those who watch.

    Attributes:
        num_prompt_tokens: prompt tokens of requests whose prompts are now computed, those from the prefix cache
            included.
        num_generation_tokens: new tokens.
        num_tokens: all tokens that the step computed.
        num_preemptions: sequences that gave their blocks to others.
        prefix_cache_queries, prefix_cache_hits: prompt tokens that were looked up, and found.
        time_to_first_token: of requests that got their first.
        inter_token_latency: between tokens, one for each new token but a choice's first.
        finished: requests that ended.
        running, waiting: sequences, after the step.
        kv_cache_usage: share of the blocks that sequences hold, 0 to 1.
        corrupted: requests whose logits were not finite.
    """

    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    time_to_first_token: list[float] = dataclasses.field(default_factory=list)
    inter_token_latency: list[float] = dataclasses.field(default_factory=list)
    finished: list[FinishedRequest] = dataclasses.field(default_factory=list)
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    corrupted: int = 0


@dataclasses.dataclass(slots=True)
class EngineStats:
    """An engine's state, and its sums since it began; see :class:`IterationStats`.

    Attributes:
        num_requests_running, num_requests_waiting: sequences.
        num_blocks, num_free_blocks: of the KV cache; those that only the prefix cache holds count as free.
        num_steps: so far.
    """

    num_requests_running: int
    num_requests_waiting: int
    num_blocks: int
    num_free_blocks: int
    kv_cache_usage: float
    num_steps: int
    prompt_tokens: int
    generation_tokens: int
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    corrupted_requests: int
    finished: dict[str, int]
