"""What requests need of a GPU, made before the first of them comes: compiled kernels and captured graphs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from typing import Any

from gpt2rt.errors import RequestError

from .core import EngineCore
from .frontend import Frontend
from .params import PoolingParams, SamplingParams
from .served import ServedModel

_LOG = logging.getLogger(__name__)

# requests at once: more than the 8 rows that have kernels of their own
_MANY = 12
_PROMPT, _NEW = 4, 3
#: settings of which each brings kernels of its own
_WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {},
    {"top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"top_k": 5, "top_p": 0.9},
    {"top_k": 5, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.1},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.0, "logprobs": 1},
    {"temperature": 0.0, "prompt_logprobs": 1},
)


def new_core(served: ServedModel) -> EngineCore:
    """An engine for a model; on a GPU no request of it will wait for a compiler.

    Raises:
        RequestError, ValueError: as :class:`EngineCore`.
    """
    core = EngineCore(served)
    if served.device.type == "cuda":
        began = time.perf_counter()
        warm_up(core)
        _LOG.info("kernels and graphs were ready after %.1f s", time.perf_counter() - began)
    return core


def warm_up(core: EngineCore) -> None:
    """Run one request of each kind, in an engine of its own, and one step of each size that has a graph.

    Args:
        core: whose executor and cache are meant; nothing of it changes, and it has no request yet.
    """
    _run_each_kind(core.served)
    # only one kind of executor has graphs
    executor: Any = core.served.executor
    config = core.served.config
    if executor.name != "cuda":
        return
    from gpt2rt.graph.cuda import BATCH_SIZES, PROMPT_LENGTHS

    most = min(config.max_num_seqs, core.cache.pool.num_free, BATCH_SIZES[-1])
    rows = [*(size for size in BATCH_SIZES if size < most), most]
    lengths = [length for length in PROMPT_LENGTHS if length <= config.step_tokens]
    # the engine has no decode loops: their graphs would push those of its steps out
    executor.warm_up(core.cache, batch_sizes=rows, prompt_lengths=lengths, loops=False)


def _run_each_kind(served: ServedModel) -> None:
    """Requests of every kind, alone and together, with a cache for them."""
    trial = copy.copy(served)
    trial.config = dataclasses.replace(
        served.config,
        max_num_seqs=_MANY,
        max_num_batched_tokens=None,
        num_blocks=4 * _MANY,
        kv_cache_memory_bytes=None,
        enable_prefix_caching=False,
        max_num_queued_reqs=None,
        max_num_queued_tokens=None,
    )
    core, frontend = EngineCore(trial), Frontend(trial)
    length = max(1, min(_PROMPT, trial.max_model_len - _NEW))
    kinds: list[Any] = [PoolingParams(task=task) for task in sorted(trial.tasks - {"generate", "score"})]
    if "generate" in trial.tasks:
        kinds += [SamplingParams(max_tokens=_NEW, ignore_eos=True, seed=0, detokenize=False, **way) for way in _WAYS]
    groups = [*([kind] for kind in kinds), (kinds * _MANY)[:_MANY]]
    for number, group in enumerate(groups):
        for place, kind in enumerate(group):
            # the limits of a server may exclude a kind: then no request will be of it
            with contextlib.suppress(RequestError):
                core.add(frontend.make([0] * length, kind, _nobody, request_id=f"warm-up {number} {place}"))
        while core.has_unfinished:
            core.step()


def _nobody(output: Any) -> None:
    """Outputs that are not wanted."""
