"""What an engine is told: sizes, limits, policies."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from typing import Any

from .params import RequestLimits

_CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "float8")


@dataclasses.dataclass
class EngineConfig:
    """Settings of an engine; names are vLLM's where it has the same.

    Attributes:
        max_model_len: the most tokens of a request, prompt and output; None: the model's ``n_positions``.
        max_num_seqs: sequences that are computed side by side.
        max_num_batched_tokens: the most tokens of a step; None: 512, but at least ``max_num_seqs``.
        num_blocks: blocks in the KV cache; None: as many as ``kv_cache_memory_bytes`` holds.
        kv_cache_memory_bytes: memory of the KV cache; None: room for ``max_num_seqs`` requests of full length, but on
            a CPU at most a quarter of the machine's memory, on a GPU what steps and ``gpu_memory_utilization`` leave.
        gpu_memory_utilization: share of a GPU's memory that weights, what steps need, and KV cache may take together.
        kv_cache_dtype: "auto" (what suits the executor), float32, bfloat16, float16, int8 or float8.
        enable_prefix_caching: keep the blocks of computed prompts for later ones that begin alike.
        max_num_queued_reqs: requests that may wait; more are refused with :class:`QueueFullError`. 0: one that cannot
            run at once is refused. None: any number.
        max_num_queued_tokens: prompt tokens that may wait; None: ``64 * max_model_len``, or any number where
            ``max_num_queued_reqs`` is None.
        limits: what one request may ask for.
        prefill_slowdown: while sequences are being decoded, prompts are computed in chunks so small that a step takes
            about this many times the time of one without prompt tokens (measured as it goes); None: in chunks of
            ``max_num_batched_tokens``. Chunks change no bit of a result.
        seed: of requests without a seed of their own; None: they are different each time.
        executor: "cpu", "cuda" or "eager"; None: the fastest.
        num_threads: of the cpu executor; 0: ``GPT2RT_NUM_THREADS``, else torch's.

    Raises:
        ValueError: a setting is out of its range.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    max_num_queued_reqs: int | None = 256
    max_num_queued_tokens: int | None = None
    limits: RequestLimits = dataclasses.field(default_factory=RequestLimits)
    prefill_slowdown: float | None = None
    seed: int | None = None
    executor: str | None = None
    num_threads: int = 0

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_blocks",
            "kv_cache_memory_bytes",
            "max_num_queued_reqs",
            "max_num_queued_tokens",
        ):
            value = getattr(self, name)
            if value is None and name != "max_num_seqs":
                continue
            least = 0 if name == "max_num_queued_reqs" else 1
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if type(self.num_threads) is not int or self.num_threads < 0:
            raise ValueError(f"num_threads must be an integer of at least 0, got {self.num_threads!r}; 0 chooses")
        if self.seed is not None and (type(self.seed) is not int or not -(2**63) <= self.seed < 2**64):
            raise ValueError(f"seed must be an integer of 64 bits, got {self.seed!r}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization!r}")
        if self.kv_cache_dtype not in _CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype must be one of {', '.join(_CACHE_DTYPES)}, got {self.kv_cache_dtype!r}")
        slowdown = self.prefill_slowdown
        if slowdown is not None and not (math.isfinite(slowdown) and slowdown > 1.0):
            raise ValueError(f"prefill_slowdown must be a number above 1, got {slowdown!r}; None for whole chunks")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "a step computes a token of every sequence"
            )

    @property
    def step_tokens(self) -> int:
        """The most tokens of a step."""
        return self.max_num_batched_tokens or max(512, self.max_num_seqs)

    def queued_tokens(self, max_model_len: int) -> int | None:
        """The most prompt tokens that may wait; None: any number."""
        if self.max_num_queued_tokens is not None or self.max_num_queued_reqs is None:
            return self.max_num_queued_tokens
        return 64 * max_model_len


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords that are fields of :class:`EngineConfig`, and the others.

    Raises:
        TypeError: a keyword is spelt nearly like a field.
    """
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    for name in options.keys() - names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.85)
        if near:
            raise TypeError(f"{name!r} is no setting of the engine; did you mean {near[0]!r}?")
    return (
        {name: value for name, value in options.items() if name in names},
        {name: value for name, value in options.items() if name not in names},
    )


def machine_bytes() -> int:
    """The machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
