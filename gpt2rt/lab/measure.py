"""One operation at one size: errors and times of all its forms, beside what the machine allows."""

from __future__ import annotations

import math
from typing import Any

import torch

from .problem import DEFINITION, Place, Problem
from .registry import OPERATIONS, Operation
from .timing import Timer, describe

OURS = ("C++", "Triton", "CUDA C++")


def is_ours(form: str) -> bool:
    """Whether a form is one of gpt2rt's, variants included."""
    return form.partition(":")[0] in OURS


def size_text(size: dict[str, Any]) -> str:
    """A size in one word, such as "rows=8 k=768 format=int4"."""
    return " ".join(f"{name}={value}" for name, value in size.items())


def runs_on(operation: Operation, place: Place) -> bool:
    """Whether gpt2rt has a form of it there: on a CPU without Triton's interpreter, kernels of the GPU have none."""
    return bool(operation.cpp) or place.has_triton


#: which forms a problem has does not depend on more than this of a size
_ENOUGH = {"rows": 65, "seqs": 2, "vocab": 1000, "n": 192}


def form_names(operation: Operation, size: dict[str, Any], place: Place) -> list[str]:
    """The forms of an operation at one size, told by a problem that is not larger than it must be."""
    small = {name: min(value, _ENOUGH[name]) if name in _ENOUGH else value for name, value in size.items()}
    return list(operation.problem(Place(place.device, place.dtype), small).forms)


def choose(names: list[str] | None) -> list[Operation]:
    """Operations by name; all without names.

    Raises:
        ValueError: there is no such operation.
    """
    for name in names or ():
        if name not in OPERATIONS:
            raise ValueError(f"there is no operation {name!r}; choose from {', '.join(OPERATIONS)}")
    return [operation for name, operation in OPERATIONS.items() if not names or name in names]


def measure(
    operation: Operation,
    size: dict[str, Any],
    place: Place,
    timer: Timer | None = None,
    limits: dict[str, float] | None = None,
    *,
    definition: bool = True,
) -> dict[str, Any]:
    """Check every form against the definition, and time those that did not fail.

    Args:
        operation: what.
        size: one of its sizes.
        place: device and dtype.
        timer: None measures no times.
        limits: ``bytes_per_s`` and ``operations_per_s`` of the machine; None: no shares.
        definition: False leaves the definition's own time out where there are other peers.

    Returns:
        op, size, dtype, tolerance, bytes, operations, limit_us (what the bytes or the operations take at the machine's
        best, None without limits), copies, ok (every form of gpt2rt is within the tolerance), and forms: name ->
        error (see ``Problem.error``), ok (None for peers), us, p10_us, share (limit_us / us), captured (in a graph),
        failed (why, or None).
    """
    result: dict[str, Any] = {
        "op": operation.name,
        "size": dict(size),
        "dtype": str(place.dtype).removeprefix("torch."),
        "tolerance": operation.tolerance(place.dtype),
        "forms": {},
    }
    with torch.no_grad():
        problem = operation.problem(place, size)
        best = _least_us(operation, problem, limits)
        if not definition and any(not is_ours(name) and name != DEFINITION for name in problem.forms):
            problem.forms.pop(DEFINITION, None)
        result |= {"bytes": problem.moved, "operations": problem.operations, "limit_us": best, "copies": problem.copies}
        for name in problem.forms:
            result["forms"][name] = _checked(operation, problem, name, place)
        if timer is not None:
            calls = {n: problem.forms[n] for n, form in result["forms"].items() if form["failed"] is None}
            times, failed = timer.compare(calls, problem.copies)
            for name, why in failed.items():
                result["forms"][name] |= {"failed": why, "ok": False if is_ours(name) else None}
            for name, time in times.items():
                share = None if best is None else best / time.median
                result["forms"][name] |= {
                    "us": time.median,
                    "p10_us": time.p10,
                    "share": share,
                    "captured": time.captured,
                }
    result["ok"] = all(form["ok"] is not False for form in result["forms"].values())
    return result


def _checked(operation: Operation, problem: Problem, name: str, place: Place) -> dict[str, Any]:
    form: dict[str, Any] = {"error": None, "ok": None, "failed": None}
    form |= {"us": None, "p10_us": None, "share": None, "captured": None}
    try:
        form["error"] = problem.error(name)
    except Exception as error:
        form["failed"] = describe(error)
    if is_ours(name):
        # "not >" would let NaN pass
        good = form["error"] is not None and form["error"] <= operation.tolerance(place.dtype)
        form["ok"] = good and form["failed"] is None
    if form["error"] == math.inf:
        # JSON has no infinity
        form |= {"error": None, "failed": form["failed"] or "results are NaN or infinite where they must not be"}
    return form


def _least_us(operation: Operation, problem: Problem, limits: dict[str, float] | None) -> float | None:
    if limits is None or operation.limit == "launch":
        return None
    moving = problem.moved / limits["bytes_per_s"]
    return 1e6 * max(moving, problem.operations / limits["operations_per_s"])
