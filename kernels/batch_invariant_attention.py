"""Attention in which a token has the same bits whether it is decoded alone or prefilled in a chunk of any size.

    y_i = sum_j softmax_j(scale * q_i . k_j) v_j       over positions j <= position of query i

Decoding and prefill divide the work differently: one has a program for each split of the context, the other walks the
whole context for a tile of queries. Both do the same here: tiles of ``BLOCK_M`` queries (of which decoding fills one
row), for each split of ``SPLIT`` tokens the softmax average of its own tokens (``_split_of_tile``), merged in order by
``merge_split``. A row of a matrix product takes the same instructions wherever it stands in its tile, and a split in a
row's future changes no bit of it.

``BLOCK_M`` is 16 on every device: from 64 rows on, Hopper has other matrix instructions, whose sums may differ. That is
the price: longer prompts read each key more often than in the other prefill.

Sources and shapes: paged_prefill_attention.py and paged_decode_attention.py, which launch these kernels for
``batch_invariant=True``.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .config_table import ConfigTable
from .fusion import let_dependents_start, wait_for_inputs
from .kv_formats import cache_format, decoded, decoded_scales, dot_dtype, operand, stored
from .launch import OPTIONS, architecture_of, on_device
from .merge_splits import SPLIT, merge_split

# queries per tile: the fewest that tensor cores take
BLOCK_M = 16


class InvariantTile(NamedTuple):
    """Keys that are multiplied at a time, and launch options."""

    block_n: int
    num_warps: int
    num_stages: int


# by bytes of an operand of the products: what fits the registers, and the shared memory of every architecture. The
# order of the additions follows the tile and the number of warps: one choice for both kernels. Starting points, not
# tuned on a device yet
TILES: ConfigTable[InvariantTile] = ConfigTable(
    "batch_invariant_attention",
    ("head_dim",),
    {
        2: ((64, InvariantTile(64, 4, 2)), (256, InvariantTile(64, 8, 1))),
        4: ((64, InvariantTile(64, 4, 2)), (128, InvariantTile(32, 8, 1)), (256, InvariantTile(16, 8, 1))),
    },
)


@triton.jit
def _split_of_tile(
    query,
    positions,
    first_key,
    seq_len,
    table_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    head,
    num_blocks,
    max_blocks_per_seq,
    score_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FORMAT: tl.constexpr,
    DOT: tl.constexpr,
):
    """Softmax average of one split for a tile of queries [BLOCK_M, BLOCK_D], and its lse (base 2) [BLOCK_M, 1]."""
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    highest = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_M, 1], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(SPLIT // BLOCK_N):
        keys = first_key + i * BLOCK_N + tl.arange(0, BLOCK_N)
        in_table = (keys < seq_len) & (keys // BLOCK_SIZE < max_blocks_per_seq)
        block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=in_table, other=-1)
        present = (block >= 0) & (block < num_blocks)  # [BLOCK_N]
        tokens = (block.to(tl.int64) * H + head) * BLOCK_SIZE + keys % BLOCK_SIZE
        key = tl.load(
            key_cache_ptr + tokens[None, :] * D + dims[:, None], mask=present[None, :] & dim_mask[:, None], other=0
        )  # [BLOCK_D, BLOCK_N]
        value = tl.load(
            value_cache_ptr + tokens[:, None] * D + dims[None, :], mask=present[:, None] & dim_mask[None, :], other=0
        )  # [BLOCK_N, BLOCK_D]
        # "ieee" keeps float32 from being rounded to TF32
        scores = tl.dot(query, operand(key, DOT, FORMAT), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if FORMAT == "float":
            scores *= score_scale
        else:
            scores *= (decoded_scales(key_scales_ptr, tokens, present, FORMAT) * score_scale)[None, :]
        # a key that should be there and is not poisons the rows that see it
        scores = tl.where(present[None, :], scores, float("nan"))
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1)[:, None])
        # a row that sees nothing so far has weights of 0, not -inf minus -inf
        level = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - level)
        decay = tl.exp2(highest - level)
        weight_sum = tl.fma(weight_sum, decay, tl.sum(weights, 1)[:, None])
        if FORMAT == "float":
            value = value.to(DOT)
        else:
            scales = decoded_scales(value_scales_ptr, tokens, present, FORMAT)
            value = (decoded(value, FORMAT) * scales[:, None]).to(DOT)
        total = tl.dot(weights.to(DOT), value, total * decay, input_precision="ieee")
        highest = new_highest
    average = total / tl.where(weight_sum == 0.0, 1.0, weight_sum)
    return average, highest + tl.log2(weight_sum)


@triton.jit(do_not_specialize=["num_blocks", "max_blocks_per_seq", "num_splits"])
def _tile_partials_kernel(
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    block_table_ptr,
    seq_lens_ptr,
    values_ptr,
    lse_ptr,
    num_blocks,
    max_blocks_per_seq,
    num_splits,
    stride_qt,
    stride_qh,
    stride_table,
    score_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FORMAT: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    let_dependents_start(PDL)
    wait_for_inputs(PDL)
    # int64: sequence * stride passes 2**31
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    row = (sequence * H + head) * num_splits + split
    seq_len = tl.load(seq_lens_ptr + sequence)
    if split * SPLIT >= seq_len:
        tl.store(lse_ptr + row, float("-inf"))
        return
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    mask = (rows == 0)[:, None] & (dims < D)[None, :]
    query = tl.load(
        query_ptr + sequence * stride_qt + head * stride_qh + rows[:, None] * 0 + dims[None, :], mask=mask, other=0.0
    ).to(DOT)  # [BLOCK_M, BLOCK_D], one row of which is a query
    average, lse = _split_of_tile(
        query,
        rows * 0 + (seq_len - 1),
        split * SPLIT,
        seq_len,
        block_table_ptr + sequence * stride_table,
        key_cache_ptr,
        value_cache_ptr,
        key_scales_ptr,
        value_scales_ptr,
        head,
        num_blocks,
        max_blocks_per_seq,
        score_scale,
        H,
        D,
        BLOCK_SIZE,
        SPLIT,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        FORMAT,
        DOT,
    )
    tl.store(values_ptr + row * D + rows[:, None] * 0 + dims[None, :], average, mask=mask)
    tl.store(lse_ptr + row + rows[:, None] * 0, lse, mask=(rows == 0)[:, None])


@triton.jit(do_not_specialize=["num_blocks", "max_blocks_per_seq"])
def _tile_attention_kernel(
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
    score_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    mask = (rows < query_len)[:, None] & (dims < D)[None, :]
    # int64: token * stride passes 2**31
    tokens = (start + rows).to(tl.int64)
    query = tl.load(
        query_ptr + tokens[:, None] * stride_qt + head * stride_qh + dims[None, :], mask=mask, other=0.0
    ).to(DOT)  # [BLOCK_M, BLOCK_D]

    highest = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_M, 1], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    num_keys = tl.minimum(seq_len, seq_len - query_len + first_row + BLOCK_M)
    for first_key in range(0, num_keys, SPLIT):
        average, lse = _split_of_tile(
            query,
            positions,
            first_key,
            seq_len,
            block_table_ptr + sequence.to(tl.int64) * stride_table,
            key_cache_ptr,
            value_cache_ptr,
            key_scales_ptr,
            value_scales_ptr,
            head,
            num_blocks,
            max_blocks_per_seq,
            score_scale,
            H,
            D,
            BLOCK_SIZE,
            SPLIT,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            FORMAT,
            DOT,
        )
        # position 0 is visible to every row, so the maximum is a number from the first split on
        total, weight_sum, highest = merge_split(total, weight_sum, highest, average, lse)
    tl.store(out_ptr + tokens[:, None] * stride_out + head * D + dims[None, :], total / weight_sum, mask=mask)


def _options(query: Tensor, key_cache: Tensor, pdl: bool) -> dict[str, object]:
    """What both launches share."""
    _, n_head, head_dim = query.shape
    block_d = max(16, triton.next_power_of_2(head_dim))
    dot = dot_dtype(query, key_cache)
    tile = TILES.find(architecture_of(query), dot.primitive_bitwidth // 8, head_dim)
    return {
        "H": n_head,
        "D": head_dim,
        "BLOCK_SIZE": key_cache.shape[2],
        "SPLIT": SPLIT,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "FORMAT": cache_format(key_cache),
        "DOT": dot,
        "PDL": pdl,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "launch_pdl": pdl,
        **OPTIONS,
    }


def tile_partials_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    values: Tensor,
    lse: Tensor,
    scale: float,
    *,
    pdl: bool,
) -> None:
    """``paged_decode_partials_triton`` with ``batch_invariant=True``, which checked the arguments."""
    num_seqs, n_head, num_splits, _ = values.shape
    with on_device(query):
        _tile_partials_kernel[(num_seqs, n_head, num_splits)](
            query,
            stored(key_cache),
            stored(value_cache),
            key_scales,
            value_scales,
            block_table,
            seq_lens,
            values,
            lse,
            key_cache.shape[0],
            block_table.shape[1],
            num_splits,
            query.stride(0),
            query.stride(1),
            block_table.stride(0),
            scale * math.log2(math.e),
            **_options(query, key_cache, pdl),
        )


def tile_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    out: Tensor,
    scale: float,
    *,
    pdl: bool,
) -> None:
    """``paged_prefill_into_triton`` with ``batch_invariant=True``, which checked the arguments."""
    with on_device(query):
        _tile_attention_kernel[(triton.cdiv(max_query_len, BLOCK_M), query.shape[1], seq_lens.shape[0])](
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
            **_options(query, key_cache, pdl),
        )
