"""The KV cache of a call, made before its first step: all of it or an error."""

from __future__ import annotations

import os

import torch

from gpt2rt.cache import SCALED_DTYPES, PagedKVCache
from gpt2rt.errors import RequestError
from gpt2rt.graph import Executor, Plan

from .starts import BLOCK_SIZE

# of the free memory that a cache may take and still be rounded up
_LARGEST_SHARE = 0.8


def block_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Bytes of a block of 16 tokens, keys and values of all layers of a model."""
    # an 8-bit head has a scale of 4 bytes
    head_bytes = plan.head_dim * dtype.itemsize + (4 if dtype in SCALED_DTYPES else 0)
    return BLOCK_SIZE * plan.n_layer * 2 * plan.n_head * head_bytes


def new_cache(
    executor: Executor,
    num_blocks: int,
    who: str,
    remedy: str,
    dtype: torch.dtype | None = None,
    *,
    exact: bool = False,
) -> PagedKVCache:
    """A cache of at least so many blocks for a model.

    On a CUDA device their number is rounded up, by at most a quarter: calls of about the same size then get caches of
    the same shape, often at the same place, and the graphs captured for one serve the next. Where the rounded number
    does not fit, the exact one is taken.

    Args:
        executor: whose keys and values go there.
        num_blocks: blocks of 16 tokens.
        who: what needs it, for the message.
        remedy: what to do if it is too large, for the message.
        dtype: what they are stored in; None: the executor's ``cache_dtype``.
        exact: their number is not rounded up.

    Raises:
        RequestError: it would not fit into this machine's memory, or does not fit into what of the device's is free.
    """
    model, dtype = executor.plan, dtype or executor.cache_dtype
    each = block_bytes(model, dtype)
    memory = _memory_bytes(model.device)
    if num_blocks * each > memory:
        raise RequestError(
            f"{who} need up to {num_blocks * each / 1e9:.1f} GB of KV cache, but {model.device} has "
            f"{memory / 1e9:.1f} GB of memory; {remedy}"
        )
    counts = [num_blocks]
    # a step needs memory too: the rounded number must leave some
    if model.device.type == "cuda" and not exact:
        up = rounded(num_blocks)
        if up * each < _LARGEST_SHARE * _free_bytes(model.device):
            counts = sorted({up, num_blocks}, reverse=True)
    for count in counts:
        try:
            return PagedKVCache(
                model.n_layer,
                model.n_head,
                model.head_dim,
                count,
                block_size=BLOCK_SIZE,
                dtype=dtype,
                device=model.device,
            )
        except torch.cuda.OutOfMemoryError:
            # outside of the handler, so that its traceback does not hold memory
            continue
    free = _free_bytes(model.device)
    raise RequestError(
        f"{who} need up to {num_blocks * each / 1e9:.1f} GB of KV cache, but of {model.device}'s memory only "
        f"{free / 1e9:.1f} GB are free; {remedy}"
    )


def rounded(num_blocks: int) -> int:
    """The next number of at least 64 that has at most three significant bits."""
    unit = max(16, 1 << max(0, num_blocks.bit_length() - 3))
    return max(64, -(-num_blocks // unit) * unit)


def _free_bytes(device: torch.device) -> int:
    """What of a CUDA device's memory may be had: free, or kept by torch without being used."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
