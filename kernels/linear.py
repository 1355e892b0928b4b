"""Linear layer for few rows (decode) and for many (prefill).

    y = residual + activation(x @ weight^T + bias)       the activation gelu_new or none

Shapes: x [M, K] with contiguous rows, weight [N, K] as ``torch.nn.Linear`` holds it with either dimension contiguous
(a Conv1D weight comes as ``w.t()``), bias [N] or None, residual [M, N] or None, y [M, N]. Sums in float32, one rounding
at the store.

Three kernels:

- up to ``MAX_ROWS`` rows and a weight with contiguous rows: ``linear_rows.py``.
- up to ``MAX_ROWS`` rows and a weight with contiguous columns: the kernel below. Each program owns some columns of y
  and walks down their weights; multiply and add, no tensor cores: the time is that of reading the weights. Every row
  takes the same instructions in the same order, so a row's result does not depend on how many rows there are.
- more rows: the tiles of ``linear_tiles.py``, which reads a weight in either orientation. A row's result does not
  depend on its neighbours within one tile size; bits may differ between tile sizes, and between the kernels.

No atomics anywhere: sums are taken in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config_table import ConfigTable
from .fused_linear import MAX_ROWS
from .fusion import activated
from .launch import OPTIONS, architecture_of, on_device
from .linear_rows import fused_linear_rows_triton
from .linear_tiles import StoredWeight, launch
from .refs import linear_gelu_new_ref, linear_ref, linear_residual_ref
from .weights import DeviceWeight

__all__ = [
    "linear_gelu_new_ref",
    "linear_gelu_new_triton",
    "linear_ref",
    "linear_residual_ref",
    "linear_residual_triton",
    "linear_triton",
]


class ColumnsTile(NamedTuple):
    """Columns of y that a program of the kernel below owns, elements of K that it reads at a time, and its warps."""

    block_n: int
    block_k: int
    num_warps: int


# by bytes of an element: 64 bytes of neighbouring columns for each k, whole memory sectors, and still enough programs;
# starting points, not tuned on a device yet
TILES: ConfigTable[ColumnsTile] = ConfigTable(
    "linear, columns", (), {2: ((ColumnsTile(32, 128, 8),),), 4: ((ColumnsTile(16, 128, 8),),)}
)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_columns_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    num_rows,
    stride_x,
    stride_w,
    stride_residual,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # int64: k * stride passes 2**31 for large vocabularies
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    n_mask = first + n < N
    weight_ptrs = weight_ptr + first + n[:, None] + k[None, :] * stride_w  # [BLOCK_N, BLOCK_K]
    bias = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first + n, mask=n_mask, other=0.0).to(tl.float32)
    # the second row of x and those after it find the weights in the caches
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
            tile_ptrs += BLOCK_K * stride_w
        y = activated(tl.sum(total, 1) + bias, ACTIVATION)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + row * stride_residual + first + n, mask=n_mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * N + first + n, y, mask=n_mask)


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Launch ``linear``. Shapes, strides and dtypes were checked by ``gpt2rt.ops``."""
    return _linear(x, weight, bias, "linear", None)


def linear_gelu_new_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu_new(x @ weight.T + bias)``, rounded once; arguments as :func:`linear_triton`."""
    return _linear(x, weight, bias, "gelu_new", None)


def linear_residual_triton(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``residual + x @ weight.T + bias``, rounded once; arguments as :func:`linear_triton`."""
    return _linear(x, weight, bias, "linear", residual)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    num_rows, n_in = x.shape
    n_out = weight.shape[0]
    y = torch.empty((num_rows, n_out), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if num_rows > MAX_ROWS:
        stored = StoredWeight("dense", (n_out, n_in), weight, weight.stride(0), weight.stride(1), weight.dtype)
        launch(x, stored, bias, y, None, activation=activation, residual=residual)
    # a [1, K] or [N, 1] weight is contiguous both ways; rows then need no special case
    elif weight.stride(1) == 1:
        stored_rows = DeviceWeight("dense", (n_out, n_in), weight, weight.dtype)
        fused_linear_rows_triton(x, stored_rows, bias, y, activation=activation, residual=residual)
    else:
        tile = TILES.find(architecture_of(x), x.element_size())
        with on_device(x):
            _linear_columns_kernel[(triton.cdiv(n_out, tile.block_n),)](
                x,
                weight,
                bias,
                residual,
                y,
                num_rows,
                x.stride(0),
                weight.stride(1),
                0 if residual is None else residual.stride(0),
                N=n_out,
                K=n_in,
                ACTIVATION=activation,
                BLOCK_N=tile.block_n,
                BLOCK_K=tile.block_k,
                num_warps=tile.num_warps,
                **OPTIONS,
            )
    return y
