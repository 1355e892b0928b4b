"""Layer norm over rows, alone and fused with the residual add before it.

    s = x + residual                       (add_layer_norm only; rounded to the storage dtype and returned as well)
    mean = sum(s) / n
    var  = sum((s - mean)^2) / n           (biased; two passes, over registers)
    y    = (s - mean) / sqrt(var + eps) * weight + bias

Source: Ba, Kiros & Hinton, arXiv:1607.06450.
Shapes: x, residual, s, y [num_tokens, n]; weight, bias [n]. Arithmetic in float32, one rounding at each store.
Memory-bound: a row is read once and stays in the registers of one program, so a row's result cannot depend on the
other rows of the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config_table import ALL, ConfigTable
from .launch import OPTIONS, architecture_of, on_device
from .refs import add_layer_norm_ref, layer_norm_ref

__all__ = ["add_layer_norm_ref", "add_layer_norm_triton", "layer_norm_ref", "layer_norm_triton"]

# a whole row is held by one program: 32768 floats are 32 of the 64 registers that each of 1024 threads may have, and
# twice as many would spill
MAX_ROW = 32768
# warps: one 16-byte load a thread in float16, as long as the row is not longer than 8192. No architecture has a reason
# to differ: a row's registers are the only limit. Starting points, not tuned on a device yet
WARPS: ConfigTable[int] = ConfigTable(
    "layer_norm", ("row",), {ALL: ((256, 1), (512, 2), (1024, 4), (2048, 8), (4096, 16), (MAX_ROW, 32))}
)


@triton.jit
def _normalise(s, weight_ptr, bias_ptr, cols, mask, eps, N: tl.constexpr):
    mean = tl.sum(s, 0) / N
    centred = tl.where(mask, s - mean, 0.0)  # [BLOCK]
    variance = tl.sum(centred * centred, 0) / N
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return centred * tl.rsqrt(variance + eps) * weight + bias


@triton.jit
def _layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, stride_x, eps, N: tl.constexpr, BLOCK: tl.constexpr):
    # int64: token * stride passes 2**31 in long prefills
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < N
    x = tl.load(x_ptr + token * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    y = _normalise(x, weight_ptr, bias_ptr, cols, mask, eps, N)
    tl.store(y_ptr + token * N + cols, y, mask=mask)


@triton.jit
def _add_layer_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    stride_x,
    stride_residual,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < N
    x = tl.load(x_ptr + token * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + token * stride_residual + cols, mask=mask, other=0.0).to(tl.float32)
    # the norm must see the rounded sum: it is the residual stream that later layers read
    s = x.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + token * N + cols, s, mask=mask)
    y = _normalise(s.to(tl.float32), weight_ptr, bias_ptr, cols, mask, eps, N)
    tl.store(y_ptr + token * N + cols, y, mask=mask)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Launch ``layer_norm``. Shapes and dtypes were checked by ``gpt2rt.ops``; ``x`` needs contiguous rows."""
    num_tokens, n = x.shape
    block, num_warps = _row_config("layer_norm", x)
    y = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)
    if num_tokens:
        with on_device(x):
            _layer_norm_kernel[(num_tokens,)](
                x, weight, bias, y, x.stride(0), eps, N=n, BLOCK=block, num_warps=num_warps, **OPTIONS
            )
    return y


def add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch ``add_layer_norm``. Shapes and dtypes were checked by ``gpt2rt.ops``; both inputs need contiguous rows."""
    num_tokens, n = x.shape
    block, num_warps = _row_config("add_layer_norm", x)
    y = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)
    total = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)
    if num_tokens:
        with on_device(x):
            _add_layer_norm_kernel[(num_tokens,)](
                x,
                residual,
                weight,
                bias,
                y,
                total,
                x.stride(0),
                residual.stride(0),
                eps,
                N=n,
                BLOCK=block,
                num_warps=num_warps,
                **OPTIONS,
            )
    return y, total


def _row_config(op: str, x: Tensor) -> tuple[int, int]:
    """(BLOCK, num_warps) for the rows of ``x``."""
    n = x.size(1)
    if n > MAX_ROW:
        raise ValueError(f"{op}: rows have {n} elements, expected at most {MAX_ROW}; use the torch reference")
    return triton.next_power_of_2(n), WARPS.find(architecture_of(x), ALL, n)
