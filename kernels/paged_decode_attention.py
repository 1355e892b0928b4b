"""Attention of one query a sequence over the paged cache, split over the context.

    y = sum_j softmax_j(scale * q . k_j) v_j       over positions j < seq_len

One query has too few heads to fill a GPU, so the context is cut into splits of ``SPLIT`` tokens by absolute position.
Each split gives the softmax average of its own tokens and the logarithm to base 2 of its sum of weights; a second
kernel, or the prologue of the next product, merges them in the order of their positions (merge_splits.py).

Sources: online softmax: Milakov & Gimelshein, arXiv:1805.02867; splits of the context: Dao et al., "Flash-Decoding"
(2023); paging: Kwon et al., arXiv:2309.06180.

Shapes: query, y [num_seqs, n_head, head_dim]; caches [num_blocks, n_head, block_size, head_dim] in a format of
kv_formats.py; block_table [num_seqs, max_blocks_per_seq] int32; seq_lens [num_seqs] int32, 0 for a padding row, which
becomes zeros. Everything is multiply and add in float32: with one query a head, tensor cores have nothing to save, the
time is that of reading K and V. Splits are never sized by the batch, and the merge is sequential, so a row's result
depends on its own sequence alone.

A block id outside the cache, or a sequence longer than the splits hold, cannot raise on a device without waiting for
it: such a row becomes NaN, and nothing is read outside the cache.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_invariant_attention import tile_partials_triton
from .config_table import ConfigTable
from .fusion import let_dependents_start, wait_for_inputs
from .kv_formats import cache_format, decoded, decoded_scales, stored
from .launch import OPTIONS, architecture_of, on_device
from .merge_splits import SPLIT, merge_splits_triton
from .refs import paged_decode_attention_ref

__all__ = [
    "SPLIT",
    "DecodeTile",
    "merge_splits_triton",
    "paged_decode_attention_ref",
    "paged_decode_attention_triton",
    "paged_decode_partials_triton",
]


class DecodeTile(NamedTuple):
    """How a split of ``SPLIT`` tokens is read: ``block_n`` tokens at a time, ``num_stages`` such tiles under way."""

    block_n: int
    num_warps: int
    num_stages: int


# by bytes of a stored element. Two stages of 32 tokens have all loads of a split under way before the first is waited
# for; with one stage of 64 the assembler moves the loads of values behind the wait for keys (seen in sm_90 code). Two
# warps need two thirds of the instructions of four, and 8-bit caches are near the limit of instructions. Starting
# points beyond that, not tuned on a device yet. The order of the additions follows the tile, so it is never chosen by
# the batch. No architecture differs: the stages fit the shared memory of all
TILES: ConfigTable[DecodeTile] = ConfigTable(
    "paged_decode_attention",
    ("head_dim",),
    {
        1: ((64, DecodeTile(32, 2, 2)), (128, DecodeTile(32, 4, 2)), (256, DecodeTile(32, 8, 2))),
        2: ((64, DecodeTile(32, 2, 2)), (128, DecodeTile(32, 4, 2)), (256, DecodeTile(16, 4, 2))),
        4: ((64, DecodeTile(32, 4, 2)), (128, DecodeTile(16, 4, 2)), (256, DecodeTile(16, 8, 2))),
    },
)


@triton.jit(do_not_specialize=["num_blocks", "max_blocks_per_seq", "num_splits"])
def _paged_decode_partials_kernel(
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
    score_scale,  # scale * log2(e): the softmax runs on exp2
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    let_dependents_start(PDL)
    wait_for_inputs(PDL)
    # int64: sequence * stride and block * block elements pass 2**31
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    row = (sequence * H + head) * num_splits + split
    seq_len = tl.load(seq_lens_ptr + sequence)
    if split * SPLIT >= seq_len:
        tl.store(lse_ptr + row, float("-inf"))
        return
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    query = tl.load(query_ptr + sequence * stride_qt + head * stride_qh + dims, mask=dim_mask, other=0.0)
    query = query.to(tl.float32) * score_scale  # [BLOCK_D]
    table_ptr = block_table_ptr + sequence * stride_table

    highest = float("-inf")
    weight_sum = 0.0
    total = tl.zeros([BLOCK_D], tl.float32)
    last_key = tl.minimum(seq_len, (split + 1) * SPLIT)
    for first_key in tl.range(split * SPLIT, last_key, BLOCK_N, num_stages=NUM_STAGES):
        keys = first_key + tl.arange(0, BLOCK_N)
        visible = keys < seq_len
        in_table = visible & (keys // BLOCK_SIZE < max_blocks_per_seq)
        block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=in_table, other=-1)
        present = (block >= 0) & (block < num_blocks)  # [BLOCK_N]
        tokens = (block.to(tl.int64) * H + head) * BLOCK_SIZE + keys % BLOCK_SIZE
        offsets = tokens[:, None] * D + dims[None, :]
        mask = present[:, None] & dim_mask[None, :]
        key = tl.load(key_cache_ptr + offsets, mask=mask, other=0)  # [BLOCK_N, BLOCK_D]
        value = tl.load(value_cache_ptr + offsets, mask=mask, other=0)
        if FORMAT != "float":
            key_scales = decoded_scales(key_scales_ptr, tokens, present, FORMAT)
            value_scales = decoded_scales(value_scales_ptr, tokens, present, FORMAT)
        scores = tl.sum(decoded(key, FORMAT) * query[None, :], 1)  # [BLOCK_N]
        if FORMAT != "float":
            scores *= key_scales
        # a key that should be there and is not poisons the row
        scores = tl.where(present, scores, float("nan"))
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 0))
        weights = tl.exp2(scores - new_highest)
        decay = tl.exp2(highest - new_highest)
        weight_sum = weight_sum * decay + tl.sum(weights, 0)
        if FORMAT != "float":
            weights *= value_scales
        total = total * decay + tl.sum(weights[:, None] * decoded(value, FORMAT), 0)
        highest = new_highest

    tl.store(values_ptr + row * D + dims, total / weight_sum, mask=dim_mask)
    tl.store(lse_ptr + row, highest + tl.log2(weight_sum))


def paged_decode_partials_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    values: Tensor,
    lse: Tensor,
    scale: float,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    *,
    batch_invariant: bool = False,
    pdl: bool = False,
) -> None:
    """Attend to each split of the context; launches one kernel and allocates nothing.

    Args:
        query: [S, H, D], a storage dtype, last dimension contiguous.
        key_cache, value_cache: [num_blocks, H, block_size, D], any format of kv_formats.py.
        block_table: [S, max_blocks_per_seq] int32.
        seq_lens: [S] int32; 0 marks a padding row.
        values: [S, H, num_splits, D] float32, written for the splits that have tokens.
        lse: [S, H, num_splits] float32, base 2, written; -inf for splits without tokens.
        scale: of the scores.
        key_scales, value_scales: [num_blocks, H, block_size] float32 of an 8-bit cache, else None.
        batch_invariant: the arithmetic of the batch-invariant prefill, so that a token has the same bits in either.
        pdl: programmatic dependent launch (fusion.py).

    Raises:
        ValueError: ``head_dim`` is above 256.
    """
    num_seqs, n_head, head_dim = query.shape
    num_blocks, _, block_size, _ = key_cache.shape
    num_splits = values.shape[2]
    block_d = max(16, triton.next_power_of_2(head_dim))
    if block_d > 256:
        raise ValueError(f"paged_decode_attention: head_dim is {head_dim}, expected at most 256")
    if not lse.numel():
        return
    if batch_invariant:
        caches = (key_cache, value_cache, key_scales, value_scales)
        tile_partials_triton(query, *caches, block_table, seq_lens, values, lse, scale, pdl=pdl)
        return
    tile = TILES.find(architecture_of(query), key_cache.element_size(), head_dim)
    with on_device(query):
        _paged_decode_partials_kernel[(num_seqs, n_head, num_splits)](
            query,
            stored(key_cache),
            stored(value_cache),
            key_scales,
            value_scales,
            block_table,
            seq_lens,
            values,
            lse,
            num_blocks,
            block_table.shape[1],
            num_splits,
            query.stride(0),
            query.stride(1),
            block_table.stride(0),
            scale * math.log2(math.e),
            H=n_head,
            D=head_dim,
            BLOCK_SIZE=block_size,
            SPLIT=SPLIT,
            BLOCK_D=block_d,
            BLOCK_N=tile.block_n,
            NUM_STAGES=tile.num_stages,
            FORMAT=cache_format(key_cache),
            PDL=pdl,
            num_warps=tile.num_warps,
            launch_pdl=pdl,
            **OPTIONS,
        )


def paged_decode_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    scale: float,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """``paged_decode_attention``: splits, then merge. Shapes and dtypes were checked by ``gpt2rt.ops``.

    Raises:
        ValueError: ``head_dim`` is above 256.
    """
    num_seqs, n_head, head_dim = query.shape
    num_splits = triton.cdiv(max_seq_len, SPLIT)
    values = torch.empty((num_seqs, n_head, num_splits, head_dim), dtype=torch.float32, device=query.device)
    lse = torch.empty((num_seqs, n_head, num_splits), dtype=torch.float32, device=query.device)
    out = torch.empty((num_seqs, n_head, head_dim), dtype=query.dtype, device=query.device)
    caches, scales = (key_cache, value_cache), (key_scales, value_scales)
    paged_decode_partials_triton(query, *caches, block_table, seq_lens, values, lse, scale, *scales)
    merge_splits_triton(values, lse, seq_lens, out)
    return out
