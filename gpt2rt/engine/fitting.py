"""An engine on a GPU: warmed up, and with a KV cache as large as its steps leave memory for.

What steps need is measured, not guessed: an engine with a small cache runs a request of each kind and a step of each
size first, which compiles kernels, makes buffers and captures graphs. What is free then is free for the real cache.
"""

from __future__ import annotations

import gc
import logging
import time
from typing import Any

import torch

from gpt2rt.errors import RequestError

from .core import EngineCore
from .served import ServedModel
from .warmup import capture, try_out

_LOG = logging.getLogger("gpt2rt.engine")
# how often a cache is made smaller, and by how much: 0.8 ** 4 is 0.41
_MOST_TRIES = 5
_SHRINK = 0.8


def new_core(served: ServedModel) -> EngineCore:
    """An engine for a model; on a GPU no request of it will wait for a compiler.

    Raises:
        RequestError: its steps, or its cache, do not fit into memory.
        ValueError: as :meth:`ServedModel.new_cache`.
    """
    if served.device.type != "cuda":
        return EngineCore(served, served.new_cache())
    began = time.perf_counter()
    asked = _asked(served)
    spare = _spare_bytes(served)
    # its graphs are those of a cache that is gone
    _clear(served)
    if asked is None:
        core = _largest(served, spare)
    else:
        found, reason = _try(served, asked)
        if found is None:
            _clear(served)
            raise _too_large(served, asked, reason)
        core = found
    _LOG.info("kernels and graphs were ready after %.1f s", time.perf_counter() - began)
    return core


def _asked(served: ServedModel) -> int | None:
    """The blocks that the config asks for; None: it leaves that to the engine.

    Raises:
        RequestError: they do not even fit before anything else is there.
        ValueError: there is none.
    """
    config = served.config
    if config.num_blocks is None and config.kv_cache_memory_bytes is None:
        return None
    num_blocks = served.num_blocks(0)
    free, _ = torch.cuda.mem_get_info(served.device)
    unused = torch.cuda.memory_reserved(served.device) - torch.cuda.memory_allocated(served.device)
    if num_blocks * served.block_bytes > free + unused:
        raise _too_large(served, num_blocks, "not even before anything else is there")
    return num_blocks


def _too_large(served: ServedModel, num_blocks: int, reason: str) -> RequestError:
    name = "kv_cache_memory_bytes" if served.config.num_blocks is None else "num_blocks"
    return RequestError(
        f"{name}={getattr(served.config, name)} asks for a KV cache of {num_blocks * served.block_bytes / 1e9:.2f} GB, "
        f"which does not fit beside the engine's weights, steps and graphs: {_memory(served.device)}; lower it, or "
        f"leave it out and the engine takes what there is ({reason})"
    )


def _spare_bytes(served: ServedModel) -> int:
    """What of a GPU's memory is left beside weights, buffers and graphs, when a step needs the most of it."""
    device, config = served.device, served.config
    # what loading has left would count as needed by steps
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        core = try_out(served)
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error)
    else:
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
        # the small cache is counted too: what it takes is a reserve
        del core
        return int(free - peak - (1.0 - config.gpu_memory_utilization) * total)
    # outside of the handler: its traceback holds what was allocated
    _clear(served)
    raise RequestError(
        f"the steps of an engine of max_num_seqs={config.max_num_seqs} and {config.step_tokens} tokens a step do not "
        f"fit into what of {device}'s memory its weights leave: {_memory(device)}; lower max_num_seqs or "
        f"max_num_batched_tokens, take a smaller dtype, or quantise the weights ({reason})"
    )


def _largest(served: ServedModel, spare: int) -> EngineCore:
    """An engine with the largest cache for its requests that fits into so many bytes, or into less."""
    config, device, each = served.config, served.device, served.block_bytes / 1e9
    # the least that is of use: a request of full length
    least = -(-served.max_model_len // served.block_size)
    count, reason = served.num_blocks(spare), f"{max(0, spare) / 1e9:.2f} GB are left"
    for _ in range(_MOST_TRIES):
        if count < least:
            break
        core, reason = _try(served, count)
        if core is not None:
            return core
        # outside of the handler in there, whose traceback held what was allocated
        _clear(served)
        if count == least:
            break
        before, count = count, max(least, int(count * _SHRINK))
        _LOG.warning(
            "a KV cache of %d blocks (%.2f GB) does not fit beside the engine's steps and graphs into the memory of "
            "%s; trying %d blocks (%.2f GB): %s",
            before,
            before * each,
            device,
            count,
            count * each,
            reason,
        )
    raise RequestError(
        f"there is no memory for a KV cache of {least} blocks ({least * each:.2f} GB), which one request of "
        f"max_model_len={served.max_model_len} needs, within gpu_memory_utilization={config.gpu_memory_utilization}: "
        f"{_memory(device)}; lower max_model_len, max_num_seqs or max_num_batched_tokens, raise "
        f"gpu_memory_utilization, or choose a smaller kv_cache_dtype ({reason})"
    )


def _try(served: ServedModel, num_blocks: int) -> tuple[EngineCore | None, str]:
    """An engine with a cache of so many blocks and its graphs; None and the reason if memory does not suffice."""
    try:
        cache = served.new_cache(num_blocks)
        # before there is an engine, so that nothing else refers to a cache that has to go again
        capture(served, cache)
        return EngineCore(served, cache), ""
    except (torch.cuda.OutOfMemoryError, RequestError) as error:
        return None, str(error)


def _clear(served: ServedModel) -> None:
    """Give back what is not in use any more."""
    # a graph may still be under way
    torch.cuda.synchronize(served.device)
    # only one kind of executor has graphs
    executor: Any = served.executor
    if executor.name == "cuda":
        # they hold addresses of a cache that is gone
        executor.graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()


def _memory(device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    return f"{free / 1e9:.2f} of {total / 1e9:.2f} GB are free"
