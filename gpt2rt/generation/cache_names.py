"""What ``cache_implementation`` means here.

There is one cache, the paged one, and it is reserved in full before the first token: what transformers calls dynamic,
static or paged differs in speed and in when memory runs out, never in numbers, so all three names mean it. "paged"
returns [num_rows, length] like the others; transformers adds a leading dimension of 1 there.

"quantized" is the paged cache in int8, like ``kv_cache_dtype="int8"``. transformers' settings of its quantized caches
describe other schemes, so of ``cache_config`` only ``{"nbits": 8}`` is taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gpt2rt.errors import RequestError
from gpt2rt.graph import Executor

from .config import GenerationConfig

#: names that are the paged cache; the last three are old names of transformers' static cache
_PAGED = ("dynamic", "static", "paged", "sliding_window", "hybrid", "hybrid_chunked")

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
}
_REASONS = {
    "offloaded": "keys and values are not moved between devices; the model must fit with its cache",
    "offloaded_static": "keys and values are not moved between devices; the model must fit with its cache",
    "offloaded_hybrid": "keys and values are not moved between devices; the model must fit with its cache",
    "offloaded_hybrid_chunked": "keys and values are not moved between devices; the model must fit with its cache",
}


def check_cache(config: GenerationConfig, past_key_values: Any) -> None:
    """Check the settings about the cache.

    Args:
        config: of the call.
        past_key_values: the caller's cache, or None.

    Raises:
        RequestError: a cache that is not here, or two of them.
    """
    name = config.cache_implementation
    if name in _REASONS:
        raise RequestError(
            f"generate does not support cache_implementation={name!r}: {_REASONS[name]}; use 'dynamic' or leave it out"
        )
    if name not in (None, "quantized", *_PAGED):
        raise RequestError(
            f"cache_implementation={name!r} is no cache; choose one of {', '.join(_PAGED[:3])}, quantized"
        )
    if name is not None and past_key_values is not None:
        raise RequestError("cache_implementation and past_key_values were both given; they both say which cache to use")
    if config.max_cache_len is not None and name != "static":
        warnings.warn("max_cache_len only matters with cache_implementation='static'", stacklevel=5)


def check_cache_length(config: GenerationConfig, lengths: Sequence[int]) -> None:
    """Hold ``max_cache_len`` against the rows of the call.

    Args:
        config: of the call.
        lengths: for each prompt, the most tokens of a row, the last one included, which is never in the cache.

    Raises:
        RequestError: a row may get longer than the static cache is.
    """
    most = config.max_cache_len
    if config.cache_implementation != "static" or most is None:
        return
    if max(lengths) - 1 > most:
        raise RequestError(
            f"max_cache_len={most}, but a row may need {max(lengths) - 1} places in the cache; raise it, or ask for "
            "fewer new tokens"
        )


def kv_cache_dtype(config: GenerationConfig, executor: Executor) -> torch.dtype | None:
    """What keys and values are stored in; None: what suits the executor, its ``cache_dtype``.

    Args:
        config: of the call.
        executor: what will run the model.

    Raises:
        RequestError: the settings contradict each other, ask for another scheme than int8, or for what the executor
            lacks.
    """
    name = config.get("kv_cache_dtype")
    if config.cache_implementation == "quantized":
        _check_quantized(config.cache_config)
        if name not in ("auto", "int8"):
            raise RequestError(
                f"cache_implementation='quantized' stores keys and values in int8, but kv_cache_dtype is {name!r}; "
                "leave one of them out"
            )
        name = "int8"
    if name == "auto":
        return None
    if name == "float8" and executor.name == "cpu":
        raise RequestError(
            "kv_cache_dtype='float8' has no kernels in the cpu executor; use 'int8', which is as small, or choose "
            "another executor: model.generation_executor('eager')"
        )
    return _DTYPES[name]


def _check_quantized(cache_config: Any) -> None:
    """Refuse settings of transformers' quantized caches that ask for something else than 8 bits."""
    settings = {} if cache_config is None else cache_config
    if not isinstance(settings, Mapping):
        settings = settings.to_dict()
    for name, value in settings.items():
        if name != "nbits":
            raise RequestError(
                f"generate does not support cache_config with {name}={value!r}: a quantized cache is int8 here, with "
                "one scale for each token and head; pass {'nbits': 8} or leave cache_config out"
            )
        if value != 8 or isinstance(value, bool):
            raise RequestError(
                f"generate does not support cache_config with nbits={value!r}: a quantized cache has 8 bits; pass "
                "{'nbits': 8} or leave cache_config out"
            )
