"""Layer norm of chosen rows into a given tensor: what the chain of a step uses where no product takes the norm in.

    y[i] = layer_norm(x[rows[i]])        rows: which rows of x; all of them in order without it

Source: Ba, Kiros & Hinton, arXiv:1607.06450. Shapes: x [T, n], rows [M] int64, weight, bias [n], y [M, n]; any two
storage dtypes; arithmetic in float32, one rounding at the store. A row is read once and stays in the registers of one
program, so y may be x itself when there are no ``rows``. A row index outside x gives NaN.
"""

import triton
import triton.language as tl
from torch import Tensor

from .config_table import ALL, ConfigTable
from .fused_linear import Norm
from .fusion import let_dependents_start, normalised, wait_for_inputs
from .launch import OPTIONS, architecture_of, on_device
from .refs import compute_dtype, layer_norm_ref

__all__ = ["norm_rows_ref", "norm_rows_triton"]

# longer rows would spill, see layer_norm.py
MAX_ROW = 32768
# warps: 4 float32 elements a thread, one 16-byte load, as long as the row is not longer than 4096; see layer_norm.py.
# Starting points, not tuned on a device yet
WARPS: ConfigTable[int] = ConfigTable(
    "norm_rows", ("row",), {ALL: ((128, 1), (256, 2), (512, 4), (1024, 8), (2048, 16), (MAX_ROW, 32))}
)


def norm_rows_ref(x: Tensor, norm: Norm | None, rows: Tensor | None = None) -> Tensor:
    """The definition, not rounded: [M, n] float32 (float64 for float64 ``x``)."""
    dtype = compute_dtype(x)
    chosen = x.to(dtype) if rows is None else x.to(dtype)[rows]
    return chosen if norm is None else layer_norm_ref(chosen, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)


@triton.jit(do_not_specialize=["num_source"])
def _norm_rows_kernel(
    x_ptr,
    rows_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_source,
    stride_x,
    stride_y,
    eps,
    N: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < N
    if HAS_NORM:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    let_dependents_start(PDL)
    wait_for_inputs(PDL)
    source = target
    if HAS_ROWS:
        source = tl.load(rows_ptr + target)
    x = tl.full([BLOCK], float("nan"), tl.float32)
    if (source >= 0) & (source < num_source):
        x = tl.load(x_ptr + source * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            x = normalised(x, weight, bias, mask, eps, N)
    tl.store(y_ptr + target * stride_y + cols, x, mask=mask)


def norm_rows_triton(
    x: Tensor, norm: Norm | None, out: Tensor, *, rows: Tensor | None = None, pdl: bool = False
) -> None:
    """Launch; nothing is allocated.

    Args:
        x: [T, n], contiguous rows.
        norm: weight and bias [n]; None only copies the rows.
        out: [M, n], contiguous rows; written. Without ``rows`` M is T, and it may be ``x``.
        rows: [M] int64, contiguous, or None.
        pdl: programmatic dependent launch.

    Raises:
        ValueError: rows are too long for one program.
    """
    num_rows, n = out.shape
    if n > MAX_ROW:
        raise ValueError(f"norm_rows: rows have {n} elements, expected at most {MAX_ROW}; use the eager executor")
    if not num_rows:
        return
    block = triton.next_power_of_2(n)
    with on_device(x):
        _norm_rows_kernel[(num_rows,)](
            x,
            x if rows is None else rows,
            x if norm is None else norm.weight,
            x if norm is None else norm.bias,
            out,
            x.size(0),
            x.stride(0),
            out.stride(0),
            0.0 if norm is None else norm.eps,
            N=n,
            HAS_ROWS=rows is not None,
            HAS_NORM=norm is not None,
            BLOCK=block,
            PDL=pdl,
            num_warps=WARPS.find(architecture_of(x), ALL, n),
            **({"launch_pdl": True} if pdl else {}),
            **OPTIONS,
        )
