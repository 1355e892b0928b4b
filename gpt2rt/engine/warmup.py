"""What requests need of a GPU, made before the first of them comes: compiled kernels, buffers, captured graphs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from gpt2rt.cache import PagedKVCache
from gpt2rt.errors import RequestError
from gpt2rt.generation.starts import BLOCK_SIZE

from .core import EngineCore
from .frontend import Frontend
from .params import PoolingParams, SamplingParams
from .request import Output
from .served import ServedModel

# of the requests: short ones, so that many fit into few blocks
_PROMPT, _NEW = 4, 3
_FILTERS: dict[str, Any] = {"top_k": 5, "top_p": 0.9, "min_p": 0.1}
_PENALTIES: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}


def _subsets(settings: dict[str, Any], least: int) -> list[dict[str, Any]]:
    """The settings in all combinations of at least so many."""
    counts = range(least, len(settings) + 1)
    return [dict(chosen) for count in counts for chosen in itertools.combinations(settings.items(), count)]


#: settings of which each brings kernels of its own: filters are compiled in combination, and so are penalties; scores
#: that rules have changed may be -inf, which others may not
_WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    *_subsets(_FILTERS, 0),
    *_subsets(_PENALTIES, 1),
    {"logit_bias": {0: 1.0}},
    {"logit_bias": {0: 1.0}, "temperature": 0.0},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 0.0, "logprobs": 1},
    {"temperature": 0.0, "prompt_logprobs": 1},
    # the last one is what fills a step: a row of logits for each token
    {"temperature": 0.0, "prompt_logprobs": 0},
)


def try_out(served: ServedModel) -> EngineCore:
    """Run a request of each kind and a step of each size, in an engine with a small cache.

    Every kernel is compiled then, and whatever the executor keeps between steps is there; only the graphs belong to
    this small cache.

    Args:
        served: the model; nothing of it changes.

    Returns:
        The engine, without requests.

    Raises:
        torch.cuda.OutOfMemoryError: there is no memory for the buffers of a step.
    """
    config = served.config
    trial = copy.copy(served)
    full = _filling(served)
    blocks = max(
        config.max_num_seqs,
        sum(-(-(length + _NEW) // BLOCK_SIZE) for length in full),
        -(-served.max_model_len // BLOCK_SIZE),
    )
    trial.config = dataclasses.replace(
        config,
        num_blocks=blocks,
        kv_cache_memory_bytes=None,
        enable_prefix_caching=False,
        max_num_queued_reqs=None,
        max_num_queued_tokens=None,
        prefill_slowdown=None,
    )
    core = EngineCore(trial, trial.new_cache(blocks))
    capture(core.served, core.cache)
    kinds: list[Any] = [PoolingParams(task=task) for task in sorted(trial.tasks - {"generate", "score"})]
    for kind in kinds:
        if kind.task.endswith("classify"):
            # its head may look at all tokens of a request, and has kernels for each number of rows
            for power in range(trial.max_model_len.bit_length()):
                _run(core, [1 << power], [kind])
            _run(core, [trial.max_model_len], [kind])
    if "generate" in trial.tasks:
        kinds += [SamplingParams(max_tokens=_NEW, ignore_eos=True, seed=0, detokenize=False, **way) for way in _WAYS]
    short = max(1, min(_PROMPT, trial.max_model_len - _NEW))
    # alone and together: a row's logits lie otherwise in memory than several rows', which triton compiles by
    for kind in kinds:
        for count in (1, 2):
            _run(core, [short] * count, [kind] * count)
    # as many as there may be at once, and a mixture of all
    many = max(config.max_num_seqs, len(kinds))
    _run(core, [short] * many, list(itertools.islice(itertools.cycle(kinds), many)))
    _run(core, full, [kinds[-1]] * len(full))
    return core


def _filling(served: ServedModel) -> list[int]:
    """Lengths of prompts that fill a step."""
    longest = max(1, served.max_model_len - _NEW)
    return [min(longest, served.config.step_tokens)] * math.ceil(served.config.step_tokens / longest)


def _run(core: EngineCore, lengths: Sequence[int], kinds: Sequence[Any]) -> list[Output]:
    """The last outputs of requests, in the order in which they end."""
    frontend, ends = Frontend(core.served), []

    def sink(output: Output) -> None:
        if output.finished:
            ends.append(output)

    for place, (length, kind) in enumerate(zip(lengths, kinds, strict=True)):
        # the limits of a server may exclude a kind, and a short context too: then no request will be of it
        with contextlib.suppress(RequestError):
            core.add(frontend.make([0] * length, kind, sink, request_id=f"warm-up {place}"))
    while core.has_unfinished:
        core.step()
    for output in ends:
        # damaged weights show with the requests that need them; one that found no memory has tried nothing out
        cause = None if output.error is None else output.error.__cause__
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause
    return ends


def capture(served: ServedModel, cache: PagedKVCache) -> None:
    """One step of each size that has a graph, with a cache, to whose address its graphs belong.

    Args:
        served: whose executor is meant.
        cache: only free blocks of it are written, and they are free again afterwards.

    Raises:
        torch.cuda.OutOfMemoryError: there is no memory for the buffers of a step or for its graph.
    """
    # only one kind of executor has graphs
    executor: Any = served.executor
    if executor.name != "cuda":
        return
    from gpt2rt.graph.cuda import BATCH_SIZES, PROMPT_LENGTHS

    config = served.config
    most = min(config.max_num_seqs, cache.pool.num_free, BATCH_SIZES[-1])
    rows = [*(size for size in BATCH_SIZES if size < most), most]
    lengths = [*(length for length in PROMPT_LENGTHS if length < config.step_tokens), config.step_tokens]
    executor.warm_up(cache, batch_sizes=rows, prompt_lengths=lengths)
