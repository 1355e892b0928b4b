"""The interpreter's bfloat16, as the fixture in conftest.py mends it, against torch."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

pytestmark = pytest.mark.kernel


@triton.jit
def _convert_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    offsets = i[:, None] * N + i[None, :]
    tl.store(y_ptr + offsets, tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)))


def test_float32_is_rounded_to_nearest_even():
    ties = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8, 3.4e38, torch.inf, -torch.inf, 0.0, -0.0])
    x = torch.cat([ties, torch.randn(4096 - len(ties))])
    y = torch.zeros(4096, dtype=torch.bfloat16)
    _convert_kernel[(1,)](x, y, N=4096)
    assert torch.equal(y.view(torch.int16), x.bfloat16().view(torch.int16))


def test_nan_stays_nan():
    # the smallest NaN pattern would become infinity if its low bits were cut off
    x = torch.full((16,), 0x7F800001, dtype=torch.int32).view(torch.float32)
    y = torch.zeros(16, dtype=torch.bfloat16)
    _convert_kernel[(1,)](x, y, N=16)
    assert y.isnan().all()


def test_dot_multiplies_values_not_bit_patterns():
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    y = torch.zeros(32, 32)
    _dot_kernel[(1,)](a, b, y, N=32)
    torch.testing.assert_close(y, a.float() @ b.float())
