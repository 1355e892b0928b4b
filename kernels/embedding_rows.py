"""Token and position embedding into the residual stream, the token table in any format of ``weights.py``.

    x[t] = wte[input_ids[t]] + wpe[position_ids[t]]

Shapes: input_ids, position_ids [M] int64; wte (V, E), wpe [P, E]; x [M, E], float32 or another storage dtype. Added in
float32, one rounding at the store. An id outside its table cannot raise on a device without waiting for it: such a row
becomes NaN, and nothing is read outside the tables. The first kernel of a step: everything it reads but the tables was
written before, so it waits first (fusion.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config_table import ALL, Chunk, ConfigTable
from .fusion import let_dependents_start, wait_for_inputs
from .launch import OPTIONS, architecture_of, on_device
from .refs import compute_dtype
from .weights import DeviceWeight

__all__ = ["embedding_rows_ref", "embedding_rows_triton"]

# 8 elements a thread, one 16-byte load in float16; at batch 1 a row is spread over a few programs. Starting points, not
# tuned on a device yet
CHUNKS: ConfigTable[Chunk] = ConfigTable(
    "embedding_rows", ("row",), {ALL: ((256, Chunk(256, 1)), (None, Chunk(512, 2)))}
)


def embedding_rows_ref(input_ids: Tensor, position_ids: Tensor, wte: DeviceWeight, wpe: Tensor) -> Tensor:
    """The definition: [M, E] float32 (float64 for float64 tables), not rounded; NaN in rows whose ids are no rows."""
    dtype = compute_dtype(wpe)
    known = (input_ids >= 0) & (input_ids < wte.shape[0]) & (position_ids >= 0) & (position_ids < wpe.size(0))
    tokens = wte.dequantize(dtype)[input_ids.where(known, 0)]
    x = tokens + wpe.to(dtype)[position_ids.where(known, 0)]
    return x.masked_fill(~known[:, None], torch.nan)


@triton.jit
def embedded(
    token_id,
    position,
    table_ptr,
    scales_ptr,
    zeros_ptr,
    codebook_ptr,
    wpe_ptr,
    stride_table,
    stride_wpe,
    cols,
    V: tl.constexpr,
    P: tl.constexpr,
    E: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns [BLOCK] of a token's row, float32: NaN where an id, int64 both, is no row of its table."""
    mask = cols < E
    known = (token_id >= 0) & (token_id < V) & (position >= 0) & (position < P)
    x = tl.full([BLOCK], float("nan"), tl.float32)
    if known:
        row_ptr = table_ptr + token_id * stride_table
        if FORMAT == "dense":
            x = tl.load(row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        elif FORMAT == "int8":
            x = tl.load(row_ptr + cols, mask=mask, other=0).to(tl.float32) * tl.load(scales_ptr + token_id)
        else:
            words = tl.load(row_ptr + cols // 64 * 8 + cols % 8, mask=mask, other=0)
            codes = (words >> (cols % 64 // 8 * 4)) & 15
            groups = token_id * ((E + GROUP - 1) // GROUP) + cols // GROUP
            if FORMAT == "code4":
                x = tl.load(codebook_ptr + codes, mask=mask, other=0.0)
            elif HAS_ZEROS:
                x = (codes - tl.load(zeros_ptr + groups, mask=mask, other=0).to(tl.int32)).to(tl.float32)
            else:
                x = (codes - 8).to(tl.float32)
            x *= tl.load(scales_ptr + groups, mask=mask, other=0.0).to(tl.float32)
        x += tl.load(wpe_ptr + position * stride_wpe + cols, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _embedding_rows_kernel(
    input_ids_ptr,
    position_ids_ptr,
    table_ptr,
    scales_ptr,
    zeros_ptr,
    codebook_ptr,
    wpe_ptr,
    x_ptr,
    stride_table,
    stride_wpe,
    stride_x,
    V: tl.constexpr,
    P: tl.constexpr,
    E: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_dependents_start(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = embedded(
        # ids are int64, so id * stride is int64 as well
        tl.load(input_ids_ptr + token),
        tl.load(position_ids_ptr + token),
        table_ptr,
        scales_ptr,
        zeros_ptr,
        codebook_ptr,
        wpe_ptr,
        stride_table,
        stride_wpe,
        cols,
        V,
        P,
        E,
        FORMAT,
        GROUP,
        HAS_ZEROS,
        BLOCK,
    )
    tl.store(x_ptr + token * stride_x + cols, x, mask=cols < E)


def embedding_rows_triton(
    input_ids: Tensor, position_ids: Tensor, wte: DeviceWeight, wpe: Tensor, out: Tensor, *, pdl: bool = False
) -> None:
    """Launch; nothing is allocated.

    Args:
        input_ids, position_ids: [M] int64, contiguous.
        wte: (V, E).
        wpe: [P, E], contiguous rows.
        out: [M, E], contiguous rows; written.
        pdl: programmatic dependent launch.
    """
    num_rows, n_embd = out.shape
    if not num_rows:
        return
    block, num_warps = CHUNKS.find(architecture_of(out), ALL, n_embd)
    unused = wte.data
    with on_device(out):
        _embedding_rows_kernel[(num_rows, triton.cdiv(n_embd, block))](
            input_ids,
            position_ids,
            wte.data,
            unused if wte.scales is None else wte.scales,
            unused if wte.zeros is None else wte.zeros,
            unused if wte.codebook is None else wte.codebook,
            wpe,
            out,
            wte.data.stride(0),
            wpe.stride(0),
            out.stride(0),
            V=wte.shape[0],
            P=wpe.size(0),
            E=n_embd,
            FORMAT=wte.format,
            GROUP=wte.group_size,
            HAS_ZEROS=wte.zeros is not None,
            BLOCK=block,
            PDL=pdl,
            num_warps=num_warps,
            **({"launch_pdl": True} if pdl else {}),
            **OPTIONS,
        )
