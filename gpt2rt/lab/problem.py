"""What a kernel is measured on: where, in which dtype, and a problem of one size with its data in place."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

#: what a problem calls its definition among its forms
DEFINITION = "definition"
#: copies of the data that calls take in turn, at most
MAX_COPIES = 64


class Place:
    """Where the data lies and in which dtype.

    Args:
        device: cpu, where C++ forms run, or Triton's interpreter if ``TRITON_INTERPRET=1``; or a CUDA device.
        dtype: float32, float16 or bfloat16; of weights and activations.
        cold_bytes: how much data a problem is spread over, so that what a call reads has left the caches; 0: no copies.

    Attributes:
        generator: of all random data; the same in every run.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype = torch.float32, *, cold_bytes: int = 0) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.cold_bytes = cold_bytes
        self.generator = torch.Generator(self.device).manual_seed(0)

    @property
    def interpreted(self) -> bool:
        """Triton's kernels run in its interpreter: their results count, their times mean nothing."""
        return self.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def has_triton(self) -> bool:
        return self.interpreted or self.device.type == "cuda"

    def copies(self, num_bytes: int) -> int:
        """How many copies of so much data make it cold."""
        return max(1, min(MAX_COPIES, -(-self.cold_bytes // max(1, num_bytes))))

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers in the place's dtype or another."""
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(dtype or self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random numbers from ``low`` to below ``high``."""
        x = torch.rand(shape, generator=self.generator, device=self.device, dtype=torch.float64)
        return (low + x * (high - low)).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Random integers from ``low`` to below ``high``."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator, device=self.device)

    def forms(
        self, op: str, launcher: str, definition: Callable[..., Any], arguments: Callable[[int], tuple[Any, ...]]
    ) -> dict[str, Callable[[int], Any]]:
        """The forms of an op that run here: "C++", or "Triton" by its launcher, and its definition in plain torch.

        Args:
            op: name in ``torch.ops.gpt2rt``.
            launcher: ``module:function`` below ``gpt2rt.kernels``.
            definition: the reference, which computes in float32 and rounds to the dtype of the place.
            arguments: those of a call on a copy of the data; all forms take the op's.
        """
        from gpt2rt import ops

        found: dict[str, Callable[..., Any]] = {}
        if self.has_triton:
            found["Triton"] = load(launcher)
        elif self.device.type == "cpu" and ops.op_forms()[op]["cpu"] == "C++":
            found["C++"] = getattr(torch.ops.gpt2rt, op).default
        found[DEFINITION] = definition

        def on_copy(form: Callable[..., Any]) -> Callable[[int], Any]:
            return lambda i: form(*arguments(i))

        return {name: on_copy(form) for name, form in found.items()}


def load(target: str) -> Callable[..., Any]:
    """``module:function`` below ``gpt2rt.kernels``."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"gpt2rt.kernels.{module}"), name)


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _nothing() -> None:
    pass


@dataclasses.dataclass
class Problem:
    """One kernel at one size.

    Attributes:
        forms: name -> call on a copy of the data, 0 to ``copies`` - 1. "Triton", "C++" and "CUDA C++" are gpt2rt's,
            also with a variant behind a colon; the others are peers.
        expected: the definition's results on copy 0, in float64 or integers.
        moved: bytes that a call must read and write.
        operations: multiplications and additions that count.
        copies: of the data.
        prepare: brings outputs and states into the condition before a call.
        outputs: what to compare, from what a call returned.
        unchecked: forms whose results are others by their nature.
        definition: what ``expected`` gave, once it was asked.
    """

    forms: dict[str, Callable[[int], Any]]
    expected: Callable[[], Any]
    moved: int
    operations: int = 0
    copies: int = 1
    prepare: Callable[[], None] = _nothing
    outputs: Callable[[Any], Any] = _as_tuple
    unchecked: frozenset[str] = frozenset()
    definition: tuple[Tensor, ...] | None = None

    def error(self, form: str) -> float | None:
        """How far a form's results on copy 0 lie from the definition; None for an unchecked one.

        Floats: the largest difference over the largest expected magnitude, infinite where one is NaN or infinite and
        the other is not the same. Integers: how many differ.
        """
        if form in self.unchecked:
            return None
        results = self.results(form)
        if self.definition is None:
            # once for all forms: in float64 it takes longer than they do
            self.definition = _as_tuple(self.expected())
        return largest_error(results, self.definition)

    def results(self, form: str) -> tuple[Tensor, ...]:
        """What a form gives on copy 0, as it is compared; may share memory with what the next call gives."""
        self.prepare()
        return _as_tuple(self.outputs(self.forms[form](0)))


def largest_error(results: Any, expected: Any) -> float:
    """The largest :func:`error_of` of several results."""
    return max(error_of(r, e) for r, e in zip(_as_tuple(results), _as_tuple(expected), strict=True))


def error_of(result: Tensor, expected: Tensor) -> float:
    """See :meth:`Problem.error`."""
    if result.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return float((result.to(torch.int64) != expected.to(torch.int64)).sum())
    result, expected = result.double(), expected.double()
    usual = expected.isfinite()
    if not torch.equal(usual, result.isfinite()):
        return math.inf
    odd = ~usual
    if not torch.equal(result[odd].nan_to_num(nan=0.0), expected[odd].nan_to_num(nan=0.0)):
        return math.inf
    if not usual.any():
        return 0.0
    scale = float(expected[usual].abs().max())
    return float((result[usual] - expected[usual]).abs().max()) / (scale or 1.0)


def poison(*tensors: Tensor) -> None:
    """Fill outputs with what no kernel may leave: NaN, or -77."""
    for tensor in tensors:
        if tensor.dtype.is_floating_point and tensor.itemsize > 1:
            tensor.fill_(math.nan)
        elif tensor.itemsize == 1:
            tensor.view(torch.uint8).fill_(0xB3)
        else:
            tensor.fill_(-77)


@contextlib.contextmanager
def patched(module: str, name: str, value: Any) -> Iterator[None]:
    """A module of ``gpt2rt.kernels`` with another value for one of its names: how what is switched off is tried."""
    target = importlib.import_module(f"gpt2rt.kernels.{module}")
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


def variant(module: str, name: str, value: Any, run: Callable[[int], Any]) -> Callable[[int], Any]:
    """``run`` under :func:`patched`."""

    def call(copy: int) -> Any:
        with patched(module, name, value):
            return run(copy)

    return call


def tried(table: Any, config: Any, run: Callable[[int], Any]) -> Callable[[int], Any]:
    """``run`` with another configuration than those of a table (``gpt2rt.kernels.config_table``)."""

    def call(copy: int) -> Any:
        with table.trying(config):
            return run(copy)

    return call


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of the elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
