"""Linear layer for few rows (decode) and for many (prefill).

    y = x @ weight^T + bias

Shapes: x [M, K] with contiguous rows, weight [N, K] as ``torch.nn.Linear`` holds it with either dimension contiguous
(a Conv1D weight comes as ``w.t()``), bias [N] or None, y [M, N]. Sums in float32, one rounding at the store.

Two kernels:

- up to ``MAX_ROWS`` rows: each program owns a few output columns. It reads their weights once, keeps them in registers
  (when a row of them fits in one tile) and runs over the rows of x. Multiply and add, no tensor cores: the time is that
  of reading the weights. Every row takes the same instructions in the same order, so a row's result does not depend on
  how many rows there are.
- more rows: output tiles by ``tl.dot``: tensor cores for float16 and bfloat16 (products exact, sums float32), plain
  float32 ("ieee", never TF32) for float32. A row's result does not depend on its neighbours within one tile size; bits
  may differ between tile sizes, and between the two kernels.

No split over K and no atomics anywhere: each output element is summed by one program.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_gelu_new import bias_gelu_new_triton
from .launch import OPTIONS, on_device
from .refs import linear_gelu_new_ref, linear_ref, linear_residual_ref

__all__ = [
    "linear_gelu_new_ref",
    "linear_gelu_new_triton",
    "linear_ref",
    "linear_residual_ref",
    "linear_residual_triton",
    "linear_triton",
]

# more rows than this go to the tensor cores; starting point, not tuned on a device yet
MAX_ROWS = 8
# longest weight row that one tile holds (then rows of x share the weights in registers)
MAX_WHOLE_K = 8192


class Tile(NamedTuple):
    """Tile sizes and launch options of the tiled kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# by bytes per element: (largest M, tile), the first that fits; starting points, not tuned on a device yet.
# 16 bit: tiles of 16 rows use mma.sync, those of 64 and more use wgmma on sm_90. 32 bit: multiply and add; small tiles
# keep it in registers
TILES = {
    2: (
        (16, Tile(16, 32, 64, 4, 4)),
        (64, Tile(64, 32, 64, 4, 4)),
        (256, Tile(64, 64, 64, 4, 4)),
        (None, Tile(128, 128, 64, 8, 3)),
    ),
    4: ((16, Tile(16, 32, 32, 4, 2)), (None, Tile(64, 64, 16, 8, 2))),
}


@triton.jit(do_not_specialize=["num_rows"])
def _linear_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    stride_x,
    stride_w,
    N: tl.constexpr,
    K: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # int64: n * stride passes 2**31 for large vocabularies
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    n_mask = first + n < N
    if K_CONTIGUOUS:
        weight_ptrs = weight_ptr + first * stride_w + n[:, None] * stride_w + k[None, :]  # [BLOCK_N, BLOCK_K]
    else:
        weight_ptrs = weight_ptr + first + n[:, None] + k[None, :] * stride_w
    bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first + n, mask=n_mask, other=0.0).to(tl.float32)
    if WHOLE_K:
        weight = tl.load(weight_ptrs, mask=n_mask[:, None] & (k < K)[None, :], other=0.0)
        for m in range(num_rows):
            row = tl.cast(m, tl.int64)
            x = tl.load(x_ptr + row * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
            y = tl.sum(weight.to(tl.float32) * x[None, :], 1) + bias
            tl.store(y_ptr + row * N + first + n, y, mask=n_mask)
    else:
        # the weights do not fit in registers: the second row and those after it find them in the caches
        for m in range(num_rows):
            row = tl.cast(m, tl.int64)
            total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            tile_ptrs = weight_ptrs
            for k0 in range(0, K, BLOCK_K):
                k_mask = k0 + k < K
                weight = tl.load(tile_ptrs, mask=n_mask[:, None] & k_mask[None, :], other=0.0).to(tl.float32)
                x = tl.load(x_ptr + row * stride_x + k0 + k, mask=k_mask, other=0.0).to(tl.float32)
                total += weight * x[None, :]
                # moving the pointer keeps the offsets in 32 bits
                tile_ptrs += BLOCK_K if K_CONTIGUOUS else BLOCK_K * stride_w
            tl.store(y_ptr + row * N + first + n, tl.sum(total, 1) + bias, mask=n_mask)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_tiles_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    stride_x,
    stride_w,
    N: tl.constexpr,
    K: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # programs of one weight tile run next to each other, so that it is read from memory once
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    first_n = tl.program_id(1).to(tl.int64) * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_mask = first_m + m < num_rows
    n_mask = first_n + n < N
    x_ptrs = x_ptr + first_m * stride_x + m[:, None] * stride_x + k[None, :]  # [BLOCK_M, BLOCK_K]
    if K_CONTIGUOUS:
        weight_ptrs = weight_ptr + first_n * stride_w + n[None, :] * stride_w + k[:, None]  # [BLOCK_K, BLOCK_N]
    else:
        weight_ptrs = weight_ptr + first_n + n[None, :] + k[:, None] * stride_w
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k_mask = k0 + k < K
        x = tl.load(x_ptrs, mask=m_mask[:, None] & k_mask[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=k_mask[:, None] & n_mask[None, :], other=0.0)
        # operands stay in the storage dtype; "ieee" keeps float32 from being rounded to TF32
        total = tl.dot(x, weight, total, input_precision="ieee")
        # moving the pointers keeps the offsets in 32 bits
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K if K_CONTIGUOUS else BLOCK_K * stride_w
    if HAS_BIAS:
        total += tl.load(bias_ptr + first_n + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + (first_m + m)[:, None] * N + (first_n + n)[None, :], total, mask=m_mask[:, None] & n_mask[None, :])


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Launch ``linear``. Shapes, strides and dtypes were checked by ``gpt2rt.ops``."""
    num_rows, n_in = x.shape
    n_out = weight.shape[0]
    y = torch.empty((num_rows, n_out), dtype=x.dtype, device=x.device)
    # a [1, K] or [N, 1] weight is contiguous both ways; rows then need no special case
    k_contiguous = weight.stride(1) == 1
    stride_w = weight.stride(0) if k_contiguous else weight.stride(1)
    if not y.numel():
        return y
    # without a bias the pointer is never read
    args = (x, weight, weight if bias is None else bias, y, num_rows, x.stride(0), stride_w)
    shape = {"N": n_out, "K": n_in, "K_CONTIGUOUS": k_contiguous, "HAS_BIAS": bias is not None}
    with on_device(x):
        if num_rows <= MAX_ROWS:
            block_n, block_k, num_warps = _rows_config(n_in, k_contiguous, x.element_size())
            _linear_rows_kernel[(triton.cdiv(n_out, block_n),)](
                *args,
                **shape,
                WHOLE_K=block_k >= n_in,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                num_warps=num_warps,
                **OPTIONS,
            )
        else:
            tile = next(t for most, t in TILES[x.element_size()] if most is None or num_rows <= most)
            _linear_tiles_kernel[(triton.cdiv(num_rows, tile.block_m), triton.cdiv(n_out, tile.block_n))](
                *args,
                **shape,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                BLOCK_K=tile.block_k,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **OPTIONS,
            )
    return y


def linear_gelu_new_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu_new(x @ weight.T + bias)`` as two kernels, rounded between them; arguments as :func:`linear_triton`."""
    y = linear_triton(x, weight, None)
    return bias_gelu_new_triton(y, y.new_zeros(weight.size(0)) if bias is None else bias)


def linear_residual_triton(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``residual + x @ weight.T + bias`` as a kernel and an addition, rounded between them."""
    return linear_triton(x, weight, bias).add_(residual)


def _rows_config(n_in: int, k_contiguous: bool, itemsize: int) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_K, num_warps) of the few-rows kernel; depends on the weight alone, never on the rows.

    Starting points, not tuned on a device yet.
    """
    if not k_contiguous:
        # 64 bytes of neighbouring columns per weight row: whole memory sectors, and still enough programs
        return 64 // itemsize, 128, 8
    block_k = triton.next_power_of_2(n_in)
    if block_k > MAX_WHOLE_K:
        return 4, 2048, 8
    # 64 weights a thread or fewer: 4 output columns of a narrow layer, 2 of a wide one
    return (4, max(block_k, 16), 4) if block_k <= 2048 else (2, block_k, 8)
