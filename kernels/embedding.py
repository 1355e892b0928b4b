"""Token and position embedding: two gathers and an add.

    y[t] = wte[input_ids[t]] + wpe[position_ids[t]]

Shapes: input_ids, position_ids [num_tokens] int64; wte [V, E], wpe [P, E]; y [num_tokens, E]. Added in float32, one
rounding at the store. An id outside its table cannot raise on a device without waiting for it: such a row becomes NaN,
and nothing is read outside the tables.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config_table import ALL, Chunk, ConfigTable
from .launch import OPTIONS, architecture_of, on_device
from .refs import embedding_ref

__all__ = ["embedding_ref", "embedding_triton"]

# 8 elements a thread, one 16-byte load in float16; starting points, not tuned on a device yet
CHUNKS: ConfigTable[Chunk] = ConfigTable(
    "embedding", ("row",), {ALL: ((256, Chunk(256, 1)), (512, Chunk(512, 2)), (None, Chunk(1024, 4)))}
)


@triton.jit
def _embedding_kernel(
    input_ids_ptr,
    position_ids_ptr,
    wte_ptr,
    wpe_ptr,
    y_ptr,
    stride_wte,
    stride_wpe,
    V: tl.constexpr,
    P: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < E
    # ids are int64, so id * stride is int64 as well
    token_id = tl.load(input_ids_ptr + token)
    position = tl.load(position_ids_ptr + token)
    known = (token_id >= 0) & (token_id < V) & (position >= 0) & (position < P)
    y = tl.full([BLOCK], float("nan"), tl.float32)
    if known:
        y = tl.load(wte_ptr + token_id * stride_wte + cols, mask=mask, other=0.0).to(tl.float32)
        y += tl.load(wpe_ptr + position * stride_wpe + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * E + cols, y, mask=mask)


def embedding_triton(input_ids: Tensor, position_ids: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """Launch ``embedding``. Shapes and dtypes were checked by ``gpt2rt.ops``; ids and table rows must be contiguous."""
    num_tokens, n_embd = input_ids.shape[0], wte.shape[1]
    y = torch.empty((num_tokens, n_embd), dtype=wte.dtype, device=wte.device)
    block, num_warps = CHUNKS.find(architecture_of(wte), ALL, n_embd)
    if y.numel():
        with on_device(wte):
            _embedding_kernel[(num_tokens, triton.cdiv(n_embd, block))](
                input_ids,
                position_ids,
                wte,
                wpe,
                y,
                wte.stride(0),
                wpe.stride(0),
                V=wte.shape[0],
                P=wpe.shape[0],
                E=n_embd,
                BLOCK=block,
                num_warps=num_warps,
                **OPTIONS,
            )
    return y
