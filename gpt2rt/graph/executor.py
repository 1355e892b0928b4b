"""What an executor is, and the choice of one."""

from __future__ import annotations

import importlib.util
import os
from typing import Protocol

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache
from gpt2rt.ops import extension_status

from .batch import StepBatch, StepOutput
from .plan import Plan

# bfloat16 on tensor cores, and asynchronous copies to shared memory
_OLDEST_CAPABILITY = (8, 0)


class Executor(Protocol):
    """Runs steps of one plan.

    Attributes:
        name: "eager", "cpu" or "cuda".
        plan: what it runs.
        cache_dtype: what keys and values are best stored in; it takes caches of other dtypes, too.
    """

    name: str
    plan: Plan
    cache_dtype: torch.dtype

    def step(self, batch: StepBatch, cache: PagedKVCache, *, return_hidden: bool = False) -> StepOutput:
        """Run one step: write the new tokens' keys and values to ``cache``, return the rows asked for.

        The batch may lie on the CPU, whatever the plan's device is: the step sends it there itself.
        """
        ...

    def with_positions(self, wpe: Tensor) -> Executor:
        """The same with another position table [n_positions, n_embd]; all other weights are shared."""
        ...


def executor_names() -> tuple[str, ...]:
    """The executors there are."""
    return ("eager", "cpu", "cuda")


def _why_not_cpu(plan: Plan) -> str:
    """Why the cpu executor cannot run this plan; empty if it can."""
    from .cpu import unsupported

    status = extension_status()
    if not status.loaded:
        return status.reason
    if plan.device.type != "cpu":
        return f"the weights are on {plan.device}"
    return unsupported(plan)


def _why_not_cuda(plan: Plan) -> str:
    """Why the cuda executor cannot run this plan; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if plan.device.type == "cuda":
        capability = torch.cuda.get_device_capability(plan.device)
        if capability < _OLDEST_CAPABILITY:
            return f"{plan.device} is of capability {capability[0]}.{capability[1]}, and the kernels need 8.0 or later"
    elif not (plan.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the weights are on {plan.device}"
    from .cuda import unsupported

    return unsupported(plan)


def make_executor(plan: Plan, name: str | None = None, *, num_threads: int = 0) -> Executor:
    """The fastest executor for a plan, or the one named.

    Args:
        plan: what to run.
        name: "eager" (ops one by one, any device), "cpu" (a step in one C++ call), "cuda" (Triton kernels in CUDA
            graphs; on the CPU only in Triton's interpreter, for tests) or None to choose.
        num_threads: threads of the cpu executor; 0 = ``GPT2RT_NUM_THREADS``, else ``torch.get_num_threads()``.

    Raises:
        ValueError: no such executor, or it cannot run this plan (the message says why).
    """
    if name not in (None, *executor_names()):
        raise ValueError(f"there is no executor {name!r}; choose one of {', '.join(executor_names())}")
    chosen = name or ("cuda" if plan.device.type == "cuda" else "cpu")
    if chosen != "eager":
        reason = _why_not_cuda(plan) if chosen == "cuda" else _why_not_cpu(plan)
        if reason and name is not None:
            raise ValueError(f"the {name} executor cannot run this model: {reason}; use the eager executor")
        if reason:
            chosen = "eager"
    if chosen == "eager":
        from .eager import EagerExecutor

        return EagerExecutor(plan)
    if chosen == "cuda":
        from .cuda import CudaExecutor

        return CudaExecutor(plan)
    from .cpu import CpuExecutor

    return CpuExecutor(plan, num_threads=num_threads)


def check_step(plan: Plan, batch: StepBatch, cache: PagedKVCache) -> None:
    """The cache and the batch belong to this plan.

    Raises:
        ValueError: a size, dtype or device does not fit.
    """
    n_layer, _, _, n_head, _, head_dim = cache.data.shape
    if (n_layer, n_head, head_dim) != (plan.n_layer, plan.n_head, plan.head_dim):
        raise ValueError(
            f"the cache is for {n_layer} layers of {n_head} heads of {head_dim}, the plan has {plan.n_layer} layers of "
            f"{plan.n_head} heads of {plan.head_dim}"
        )
    if batch.max_seq_len > plan.n_positions:
        raise ValueError(
            f"a sequence of {batch.max_seq_len} tokens exceeds the model's n_positions={plan.n_positions}; shorten it"
        )
    place = batch.input_ids.device
    if cache.data.device != plan.device or (place != plan.device and place.type != "cpu"):
        raise ValueError(
            f"the batch is on {place}, the cache on {cache.data.device} and the weights on {plan.device}; cache and "
            "weights must be on one device, and the batch there or on the CPU"
        )
