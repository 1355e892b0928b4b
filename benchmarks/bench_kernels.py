"""Every kernel's forms under pytest-benchmark: the registry of the kernel lab, one group a size.

    pytest benchmarks/bench_kernels.py --benchmark-only                                # a CPU: C++ beside torch
    GPT2RT_BENCH_DEVICE=cuda pytest benchmarks/bench_kernels.py --benchmark-only -k layer_norm

A form is checked against its definition before it is timed. On a GPU a round waits for the device, so small kernels
show the cost of starting them from Python; ``gpt2rt bench kernels`` measures them in graphs.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch

from gpt2rt.lab.measure import is_ours, size_text
from gpt2rt.lab.problem import Place, Problem
from gpt2rt.lab.registry import OPERATIONS, Operation
from gpt2rt.lab.timing import measure_limits

DEVICE = torch.device(os.environ.get("GPT2RT_BENCH_DEVICE", "cpu"))
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.float16
#: calls of a round take turns through so much data
COLD_BYTES = 1 << 28
FORMS = ("C++",) if DEVICE.type == "cpu" else ("Triton",)


def _cases() -> list[Any]:
    found = []
    for operation in OPERATIONS.values():
        if DEVICE.type == "cpu" and not operation.cpp:
            continue
        for size in operation.sizes:
            # words that -k takes
            words = size_text(size).replace("=", "").replace(" ", "-")
            for form in (*FORMS, "peers"):
                found.append(pytest.param(operation, size, form, id=f"{operation.name}-{words}-{form}"))
    return found


@functools.lru_cache(maxsize=1)
def _problem(name: str, size: tuple[tuple[str, Any], ...]) -> Problem:
    return OPERATIONS[name].problem(Place(DEVICE, DTYPE, cold_bytes=COLD_BYTES), dict(size))


@functools.cache
def _limits() -> dict[str, float]:
    return measure_limits(DEVICE, DTYPE)


@pytest.mark.parametrize(("operation", "size", "form"), _cases())
def test_kernel(benchmark: Any, operation: Operation, size: dict[str, Any], form: str) -> None:
    problem = _problem(operation.name, tuple(size.items()))
    name = form if form != "peers" else next((n for n in problem.forms if not is_ours(n)), None)
    if name not in problem.forms:
        pytest.skip(f"{operation.name} has no {form} form for this size")
    error = problem.error(name)
    if is_ours(name):
        assert error is not None
        assert error <= operation.tolerance(DTYPE)
    benchmark.group = f"{operation.name} {size_text(size)}"
    turn = iter(range(1 << 62))

    def call() -> None:
        problem.forms[name](next(turn) % problem.copies)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark(call)
    benchmark.extra_info["error"] = error
    if operation.limit != "launch":
        limits = _limits()
        least = max(problem.moved / limits["bytes_per_s"], problem.operations / limits["operations_per_s"])
        benchmark.extra_info["percent_of_limit"] = 100 * least / benchmark.stats["median"]
