"""Bias add fused with GPT-2's tanh GELU (``gelu_new``).

    u = x + bias
    z = sqrt(2/pi) * (u + 0.044715 * u^3)
    y = 0.5 * u * (1 + tanh(z))  =  u * sigmoid(2z)

Source: Hendrycks & Gimpel, arXiv:1606.08415, the tanh approximation.
Shapes: x [num_tokens, n], bias [n], y like x. Arithmetic in float32, one rounding at the store. Memory-bound: x and
bias are read once, y is written once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config_table import ALL, Chunk, ConfigTable
from .launch import OPTIONS, architecture_of, on_device
from .refs import bias_gelu_new_ref

__all__ = ["bias_gelu_new_ref", "bias_gelu_new_triton"]

SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2.0 / math.pi))
# 8 elements a thread, one 16-byte load in float16; starting points, not tuned on a device yet
CHUNKS: ConfigTable[Chunk] = ConfigTable(
    "bias_gelu_new", ("row",), {ALL: ((256, Chunk(256, 1)), (512, Chunk(512, 2)), (None, Chunk(1024, 4)))}
)


@triton.jit
def _bias_gelu_new_kernel(x_ptr, bias_ptr, y_ptr, stride_x, N: tl.constexpr, BLOCK: tl.constexpr):
    # int64: token * stride passes 2**31 in long prefills
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    u = tl.load(x_ptr + token * stride_x + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    u += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    z = SQRT_2_OVER_PI * (u + 0.044715 * u * u * u)
    # sigmoid instead of tanh: runs on every target and in the interpreter, and keeps the digits of small results
    # that 1 + tanh(z) cancels for negative z
    tl.store(y_ptr + token * N + cols, u * tl.sigmoid(2.0 * z), mask=mask)


def bias_gelu_new_triton(x: Tensor, bias: Tensor) -> Tensor:
    """Launch ``bias_gelu_new``. Shapes and dtypes were checked by ``gpt2rt.ops``; ``x`` needs contiguous rows."""
    num_tokens, n = x.shape
    y = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)
    block, num_warps = CHUNKS.find(architecture_of(x), ALL, n)
    if y.numel():
        with on_device(x):
            _bias_gelu_new_kernel[(num_tokens, triton.cdiv(n, block))](
                x, bias, y, x.stride(0), N=n, BLOCK=block, num_warps=num_warps, **OPTIONS
            )
    return y
