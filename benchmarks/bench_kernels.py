"""Every kernel's forms under pytest-benchmark: the registry of the kernel lab, one group a size, one test a form.

    pytest benchmarks/bench_kernels.py --benchmark-only                                # a CPU: C++, definition, torch
    GPT2RT_BENCH_DEVICE=cuda pytest benchmarks/bench_kernels.py --benchmark-only -k layer_norm

The forms are those of ``gpt2rt bench kernels --list``: what gpt2rt has on the device (C++; Triton with its variants,
CUDA C++ where it was built), the definition in plain torch, and peers. A form of gpt2rt is checked against the
definition before it is timed. On a GPU a round waits for the device, so small kernels show the cost of starting them
from Python; ``gpt2rt bench kernels`` measures them in graphs.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import pytest
import torch

from gpt2rt.lab.measure import form_names, is_ours, runs_on, size_text
from gpt2rt.lab.problem import Place, Problem
from gpt2rt.lab.registry import OPERATIONS, Operation
from gpt2rt.lab.timing import measure_limits

DEVICE = torch.device(os.environ.get("GPT2RT_BENCH_DEVICE", "cpu"))
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.float16
#: calls of a round take turns through so much data
COLD_BYTES = 1 << 28
#: seconds that the rounds of one form may take, and the shortest round that a clock tells anything about
FORM_S, ROUND_S = 0.5, 200e-6
LEAST_ROUNDS, MOST_ROUNDS = 3, 200


def _cases() -> list[Any]:
    found = []
    place = Place(DEVICE, DTYPE)
    for operation in OPERATIONS.values():
        if not runs_on(operation, place):
            continue
        for size in operation.sizes:
            for form in form_names(operation, size, place):
                # words that -k takes
                words = f"{size_text(size)} {form}".replace("=", "").replace(":", "").replace(",", "").replace(" ", "-")
                found.append(pytest.param(operation, size, form, id=f"{operation.name}-{words}"))
    return found


@functools.lru_cache(maxsize=1)
def _problem(name: str, size: tuple[tuple[str, Any], ...]) -> Problem:
    return OPERATIONS[name].problem(Place(DEVICE, DTYPE, cold_bytes=COLD_BYTES), dict(size))


@functools.cache
def _limits() -> dict[str, float]:
    return measure_limits(DEVICE, DTYPE)


@pytest.mark.parametrize(("operation", "size", "form"), _cases())
@torch.no_grad()
def test_kernel(benchmark: Any, operation: Operation, size: dict[str, Any], form: str) -> None:
    problem = _problem(operation.name, tuple(size.items()))
    error = problem.error(form)
    if is_ours(form):
        assert error is not None
        assert error <= operation.tolerance(DTYPE)
    benchmark.group = f"{operation.name} {size_text(size)}"
    turn = iter(range(1 << 62))

    def call() -> None:
        problem.forms[form](next(turn) % problem.copies)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    # the first call beyond the check's is of another copy, as all of them are
    start = time.perf_counter()
    call()
    one = time.perf_counter() - start
    calls = max(1, round(ROUND_S / one))
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(FORM_S / (one * calls))))
    benchmark.pedantic(call, rounds=rounds, iterations=calls)
    benchmark.extra_info["error"] = error
    if operation.limit != "launch" and benchmark.stats is not None:
        limits = _limits()
        least = max(problem.moved / limits["bytes_per_s"], problem.operations / limits["operations_per_s"])
        benchmark.extra_info["percent_of_limit"] = 100 * least / benchmark.stats["median"]
