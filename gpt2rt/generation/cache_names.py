"""What ``cache_implementation`` means here.

There is one cache, the paged one, and it is reserved in full before the first token: what transformers calls dynamic,
static or paged differs in speed and in when memory runs out, never in numbers, so all three names mean it. "paged"
returns [num_rows, length] like the others; transformers adds a leading dimension of 1 there.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from gpt2rt.errors import RequestError

from .config import GenerationConfig

#: names that are the paged cache; the last three are old names of transformers' static cache
_PAGED = ("dynamic", "static", "paged", "sliding_window", "hybrid", "hybrid_chunked")

_REASONS = {
    "offloaded": "keys and values are not moved between devices; the model must fit with its cache",
    "offloaded_static": "keys and values are not moved between devices; the model must fit with its cache",
    "offloaded_hybrid": "keys and values are not moved between devices; the model must fit with its cache",
    "offloaded_hybrid_chunked": "keys and values are not moved between devices; the model must fit with its cache",
    "quantized": "keys and values are kept in the model's dtype",
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
    if name is not None and name not in _PAGED:
        raise RequestError(f"cache_implementation={name!r} is no cache; choose one of {', '.join(_PAGED[:3])}")
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
