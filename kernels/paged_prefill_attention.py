"""Causal attention of a step's queries over the paged cache, for ragged batches (prompts, and chunks of prompts).

    y_i = sum_j softmax_j(scale * q_i . k_j) v_j       over positions j <= position of query i

Query i of sequence s stands at position ``seq_lens[s] - query_len[s] + i``; keys and values of the step are already in
the cache. One program owns a tile of queries of one head and runs over tiles of keys with a running maximum m and
running sum l:

    m' = max(m, max_j s_j);  p_j = exp(s_j - m')
    l' = l exp(m - m') + sum_j p_j;  acc' = acc exp(m - m') + sum_j p_j v_j;  y = acc / l  at the end

Sources: Vaswani et al., arXiv:1706.03762; online softmax: Milakov & Gimelshein, arXiv:1805.02867, and Dao et al.,
arXiv:2205.14135; paging: Kwon et al., arXiv:2309.06180.

Shapes: query, y [num_tokens, n_head, head_dim]; caches [num_blocks, n_head, block_size, head_dim] in a format of
kv_formats.py; block_table [num_seqs, max_blocks_per_seq] int32; seq_lens [num_seqs], query_start_loc [num_seqs + 1]
int32. Products of float16 and bfloat16 run on tensor cores with float32 sums; softmax is float32; ``scale`` multiplies
the float32 score rather than the query, which would have to be rounded to the storage dtype once more. 8-bit keys are
multiplied as codes, exactly, and their scales join ``scale``; 8-bit values become the query's dtype with their scale,
one rounding, as weights times scale would leave the range of float16.

Key tiles start at absolute positions 0, BLOCK_N, 2 BLOCK_N, ..., and a tile that lies in a query's future leaves its m,
l and acc untouched bit for bit. So with one tile a row depends neither on the other rows nor on how the prompt was cut
into chunks; batch_invariant has one.

A block id outside the cache cannot raise on a device without waiting for it: rows that see such a block become NaN, and
nothing is read outside the cache. Rows of ``query`` after ``query_start_loc[-1]`` are not computed.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_invariant_attention import tile_attention_triton
from .config_table import ConfigTable
from .fusion import let_dependents_start, wait_for_inputs
from .kv_formats import cache_format, decoded, decoded_scales, dot_dtype, operand, stored
from .launch import OPTIONS, architecture_of, on_device
from .refs import paged_prefill_attention_ref

__all__ = [
    "PrefillTile",
    "paged_prefill_attention_ref",
    "paged_prefill_attention_triton",
    "paged_prefill_into_triton",
]


class PrefillTile(NamedTuple):
    """Tile sizes and launch options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# queries of all heads of the longest sequence: with more of them, tiles of 128 are still as many as the programs that
# fill a device of 132 multiprocessors; a constant, so that a tile does not depend on the device
FEW_QUERIES = 144 * 128
# by bytes of a stored element (float32 products: 4); starting points, not tuned on a device yet. 128 rows read each key
# half as often as 64. Both go through tiles of 64 keys with a warp for 16 rows and the same instructions (seen in the
# compiled layouts of sm_80, sm_90 and sm_120; sm_100 has others), so the bits of a row should be the same, which is for
# a device to show. Neither spills on any architecture, and both take less shared memory than the least (24 to 50 KiB).
# 8-bit codes are decoded in registers, where tiles of 64 keys would spill on sm_80, and 128 rows of them on sm_86
TILES: ConfigTable[PrefillTile] = ConfigTable(
    "paged_prefill_attention",
    ("queries of all heads", "head_dim"),
    {
        1: (
            (None, 64, PrefillTile(64, 32, 4, 2)),
            (None, 128, PrefillTile(64, 32, 8, 2)),
            (None, 256, PrefillTile(64, 32, 8, 2)),
        ),
        2: (
            (FEW_QUERIES, 64, PrefillTile(64, 64, 4, 2)),
            (None, 64, PrefillTile(128, 64, 8, 2)),
            (None, 128, PrefillTile(64, 32, 4, 2)),
            (None, 256, PrefillTile(64, 32, 8, 2)),
        ),
        4: (
            (None, 64, PrefillTile(32, 32, 4, 1)),
            (None, 128, PrefillTile(16, 32, 4, 1)),
            (None, 256, PrefillTile(16, 16, 4, 1)),
        ),
    },
)


@triton.jit(do_not_specialize=["num_blocks", "max_blocks_per_seq"])
def _paged_prefill_attention_kernel(
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
    out_ptr,
    num_blocks,
    max_blocks_per_seq,
    stride_qt,
    stride_qh,
    stride_table,
    stride_out,
    score_scale,  # scale * log2(e): the softmax runs on exp2
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    let_dependents_start(PDL)
    wait_for_inputs(PDL)
    sequence = tl.program_id(2)
    head = tl.program_id(1)
    # the last tile of a prompt has the most keys: first things first
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    start = tl.load(query_start_loc_ptr + sequence)
    query_len = tl.load(query_start_loc_ptr + sequence + 1) - start
    if first_row >= query_len:
        return
    seq_len = tl.load(seq_lens_ptr + sequence)
    rows = first_row + tl.arange(0, BLOCK_M)
    positions = seq_len - query_len + rows  # [BLOCK_M], of the queries
    dims = tl.arange(0, BLOCK_D)
    row_mask = rows < query_len
    dim_mask = dims < D
    # int64: token * stride and block * block elements pass 2**31
    tokens = (start + rows).to(tl.int64)
    query = tl.load(
        query_ptr + tokens[:, None] * stride_qt + head * stride_qh + dims[None, :],
        mask=row_mask[:, None] & dim_mask[None, :],
        other=0.0,
    ).to(DOT)  # [BLOCK_M, BLOCK_D]
    table_ptr = block_table_ptr + sequence.to(tl.int64) * stride_table

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    num_keys = tl.minimum(seq_len, seq_len - query_len + first_row + BLOCK_M)
    for first_key in range(0, num_keys, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        in_table = (keys < seq_len) & (keys // BLOCK_SIZE < max_blocks_per_seq)
        block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=in_table, other=-1)
        present = (block >= 0) & (block < num_blocks)  # [BLOCK_N]
        slots = (block.to(tl.int64) * H + head) * BLOCK_SIZE + keys % BLOCK_SIZE
        key = tl.load(
            key_cache_ptr + slots[None, :] * D + dims[:, None], mask=present[None, :] & dim_mask[:, None], other=0
        )  # [BLOCK_D, BLOCK_N]
        # "ieee" keeps float32 from being rounded to TF32
        scores = tl.dot(query, operand(key, DOT, FORMAT), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if FORMAT == "float":
            scores *= score_scale
        else:
            scores *= (decoded_scales(key_scales_ptr, slots, present, FORMAT) * score_scale)[None, :]
        # a key that should be there and is not poisons the rows that see it
        scores = tl.where(present[None, :], scores, float("nan"))
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
        # position 0 is visible to every row, so the maximum is a number from the first tile on
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        weight_sum = weight_sum * decay + tl.sum(weights, 1)
        value = tl.load(
            value_cache_ptr + slots[:, None] * D + dims[None, :], mask=present[:, None] & dim_mask[None, :], other=0
        )  # [BLOCK_N, BLOCK_D]
        if FORMAT == "float":
            value = value.to(DOT)
        else:
            value_scales = decoded_scales(value_scales_ptr, slots, present, FORMAT)
            value = (decoded(value, FORMAT) * value_scales[:, None]).to(DOT)
        total = tl.dot(weights.to(DOT), value, total * decay[:, None], input_precision="ieee")
        highest = new_highest

    tl.store(
        out_ptr + tokens[:, None] * stride_out + head * D + dims[None, :],
        total / weight_sum[:, None],
        mask=row_mask[:, None] & dim_mask[None, :],
    )


def paged_prefill_into_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    out: Tensor,
    scale: float,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    *,
    batch_invariant: bool = False,
    pdl: bool = False,
) -> None:
    """Attend to the cache; launches one kernel and allocates nothing.

    Args:
        query: [T, H, D], a storage dtype, last dimension contiguous.
        key_cache, value_cache: [num_blocks, H, block_size, D], any format of kv_formats.py.
        block_table: [S, max_blocks_per_seq] int32.
        seq_lens: [S] int32.
        query_start_loc: [S + 1] int32; a query length may be 0.
        max_query_len: the largest query length (a bound is enough); the tile follows it.
        out: [T, H, D] or [T, H * D] in a storage dtype, all but the first dimension contiguous; written up to row
            ``query_start_loc[-1]``.
        scale: of the scores.
        key_scales, value_scales: [num_blocks, H, block_size] float32 of an 8-bit cache, else None.
        batch_invariant: a token gets the bits that decoding with ``batch_invariant=True`` gives it.
        pdl: programmatic dependent launch (fusion.py).

    Raises:
        ValueError: ``head_dim`` is above 256.
    """
    num_tokens, n_head, head_dim = query.shape
    # tl.dot needs tiles of 16 and more
    block_d = max(16, triton.next_power_of_2(head_dim))
    if block_d > 256:
        raise ValueError(f"paged_prefill_attention: head_dim is {head_dim}, expected at most 256")
    if not num_tokens or not max_query_len:
        return
    if batch_invariant:
        caches = (key_cache, value_cache, key_scales, value_scales)
        batch = (block_table, seq_lens, query_start_loc, max_query_len)
        tile_attention_triton(query, *caches, *batch, out, scale, pdl=pdl)
        return
    dot = dot_dtype(query, key_cache)
    stored_bytes = 4 if dot == tl.float32 else key_cache.element_size()
    tile = TILES.find(architecture_of(query), stored_bytes, n_head * max_query_len, head_dim)
    with on_device(query):
        _paged_prefill_attention_kernel[(triton.cdiv(max_query_len, tile.block_m), n_head, seq_lens.shape[0])](
            query,
            stored(key_cache),
            stored(value_cache),
            key_scales,
            value_scales,
            block_table,
            seq_lens,
            query_start_loc,
            out,
            key_cache.shape[0],
            block_table.shape[1],
            query.stride(0),
            query.stride(1),
            block_table.stride(0),
            out.stride(0),
            scale * math.log2(math.e),
            H=n_head,
            D=head_dim,
            BLOCK_SIZE=key_cache.shape[2],
            BLOCK_D=block_d,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            FORMAT=cache_format(key_cache),
            DOT=dot,
            PDL=pdl,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            launch_pdl=pdl,
            **OPTIONS,
        )


def paged_prefill_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    scale: float,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Launch ``paged_prefill_attention``. Shapes and dtypes were checked by ``gpt2rt.ops``.

    Raises:
        ValueError: ``head_dim`` is above 256.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    batch = (block_table, seq_lens, query_start_loc, max_query_len)
    paged_prefill_into_triton(query, key_cache, value_cache, *batch, out, scale, key_scales, value_scales)
    return out
