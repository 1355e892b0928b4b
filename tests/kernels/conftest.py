"""What the Triton tests share: the interpreter's bfloat16, poisoned memory with guards, and comparisons.

The kernels run on CPU tensors in triton's interpreter, which is chosen when ``@triton.jit`` runs: the variable must be
set before the first import, so these tests are a pytest run of their own, ``TRITON_INTERPRET=1 python -m pytest -m
kernel tests/kernels``. In any other run each file skips itself when it is collected.

The interpreter does not notice reads and writes outside a tensor. Three things stand in for it here: every tensor that
a launcher allocates is filled with NaN and has NaN guards on both sides, which must be unchanged after the test; inputs
are cut out of larger NaN buffers; and results are compared as a whole, so that a NaN that was left or read shows.
"""

import math
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

# elements on each side of an allocation: more than a row or a tile of any test, and a multiple of 16 bytes
GUARD = 4096
# by bytes per element: a NaN that no arithmetic gives, so that even NaN written over it shows (for 2 bytes: a NaN of
# float16 and of bfloat16)
POISON = {2: (torch.int16, 0x7FDA), 4: (torch.int32, 0x7FC05A5A)}


@pytest.fixture(scope="session", autouse=True)
def interpreter_bfloat16() -> Iterator[None]:
    """Teach the interpreter bfloat16, which it stores as raw 16-bit integers.

    Two of its operations are wrong without a word (triton 3.6 to 3.9): ``tl.dot`` multiplies the bit patterns, and the
    conversion from float32 cuts the low bits off, where a GPU rounds to nearest even.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return convert(self, src, dst_type)
        bits = np.asarray(src.data, dtype=np.float32).view(np.uint32)
        # adding half of the last kept bit, less one unless that bit is odd, rounds to nearest even
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded), tl.bfloat16)

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *options):
        return dot(self, widen(a), widen(b), d, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what ``torch.empty`` gives with NaN, put guards around it, and check the guards after the test."""
    allocate = torch.empty
    buffers: list[tuple[Tensor, int]] = []

    def empty(*size, dtype=None, device=None, **options):
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        if dtype not in (torch.float32, torch.float16, torch.bfloat16) or options:
            return allocate(shape, dtype=dtype, device=device, **options)
        bits, poison = POISON[dtype.itemsize]
        numel = math.prod(shape)
        buffer = allocate(numel + 2 * GUARD, dtype=bits, device=device).fill_(poison)
        buffers.append((buffer, numel))
        return buffer.view(dtype)[GUARD : GUARD + numel].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    torch.manual_seed(0)
    yield
    for buffer, numel in buffers:
        _, poison = POISON[buffer.itemsize]
        assert (buffer[:GUARD] == poison).all(), "a kernel wrote before its output"
        assert (buffer[GUARD + numel :] == poison).all(), "a kernel wrote after its output"


@pytest.fixture
def cut_rows() -> Callable[[Tensor], Tensor]:
    """Gives a matrix as a view into a larger NaN matrix: rows before and after, columns to the right."""

    def cut(matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        buffer = torch.full((rows + 2, columns + 5), math.nan, dtype=matrix.dtype)
        view = buffer[1:-1, :columns]
        view.copy_(matrix)
        return view

    return cut


@pytest.fixture
def close() -> Callable[..., None]:
    """Asserts that a kernel's result has the dtype asked for and lies near the definition in float64."""

    def check(result: Tensor, definition: Tensor, tolerance: dict[torch.dtype, tuple[float, float]]) -> None:
        assert definition.dtype == torch.float64
        assert result.is_contiguous()
        rtol, atol = tolerance[result.dtype]
        torch.testing.assert_close(result.double(), definition, rtol=rtol, atol=atol)

    return check


@pytest.fixture
def as_exact_as_torch() -> Callable[..., None]:
    """Asserts that the largest error against float64 is at most twice plain torch's in the same dtype, plus 1e-5."""

    def check(result: Tensor, torch_result: Tensor, definition: Tensor) -> None:
        assert definition.dtype == torch.float64
        assert result.dtype == torch_result.dtype
        assert result.shape == definition.shape
        assert result.is_contiguous()
        if result.numel():
            error = (result.double() - definition).abs().max().item()
            allowed = 2 * (torch_result.double() - definition).abs().max().item() + 1e-5
            # "not >" would let NaN pass
            assert error <= allowed, f"largest error {error:.2e}, allowed {allowed:.2e}"

    return check
