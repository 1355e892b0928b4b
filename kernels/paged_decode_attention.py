"""Attention of one query a sequence over the paged cache, split over the context.

    y = sum_j softmax_j(scale * q . k_j) v_j       over positions j < seq_len

One query has too few heads to fill a GPU, so the context is cut into splits of ``SPLIT`` tokens by absolute position.
Each split gives a normalised partial result and the logarithm of its sum of weights; a second kernel merges them in the
order of their positions:

    lse_i = log sum_j exp(s_j)  over split i;    y = sum_i exp(lse_i - m) y_i / sum_i exp(lse_i - m),   m = max_i lse_i

Sources: online softmax: Milakov & Gimelshein, arXiv:1805.02867; splits of the context: Dao et al., "Flash-Decoding"
(2023); paging: Kwon et al., arXiv:2309.06180.

Shapes: query, y [num_seqs, n_head, head_dim]; caches [num_blocks, n_head, block_size, head_dim]; block_table
[num_seqs, max_blocks_per_seq] int32; seq_lens [num_seqs] int32, 0 for a padding row, which becomes zeros. Everything is
multiply and add in float32: with one query a head, tensor cores have nothing to save, the time is that of reading K and
V. Splits are never sized by the batch, and the merge walks groups of ``MERGE`` splits from the first on, so a row's
result depends on its own sequence alone.

A block id outside the cache, or a sequence longer than ``max_seq_len``, cannot raise on a device without waiting for
it: such a row becomes NaN, and nothing is read outside the cache.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, on_device
from .refs import paged_decode_attention_ref

__all__ = ["paged_decode_attention_ref", "paged_decode_attention_triton"]

# tokens per split, and splits merged at a time (1024 tokens); starting points, not tuned on a device yet
SPLIT = 64
MERGE = 16


@triton.jit(do_not_specialize=["num_blocks", "max_blocks_per_seq", "num_splits"])
def _paged_decode_attention_kernel(
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_table_ptr,
    seq_lens_ptr,
    partial_ptr,
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
):
    # int64: sequence * stride and block * block elements pass 2**31
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + sequence)
    if split * SPLIT >= seq_len:
        return
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    query = tl.load(query_ptr + sequence * stride_qt + head * stride_qh + dims, mask=dim_mask, other=0.0)
    query = query.to(tl.float32) * score_scale  # [BLOCK_D]
    table_ptr = block_table_ptr + sequence * stride_table

    highest = float("-inf")
    weight_sum = 0.0
    total = tl.zeros([BLOCK_D], tl.float32)
    for first_key in range(split * SPLIT, tl.minimum(seq_len, (split + 1) * SPLIT), BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        visible = keys < seq_len
        in_table = visible & (keys // BLOCK_SIZE < max_blocks_per_seq)
        block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=in_table, other=-1)
        present = (block >= 0) & (block < num_blocks)  # [BLOCK_N]
        offsets = ((block.to(tl.int64) * H + head) * BLOCK_SIZE + keys % BLOCK_SIZE) * D
        mask = present[:, None] & dim_mask[None, :]
        key = tl.load(key_cache_ptr + offsets[:, None] + dims[None, :], mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        value = tl.load(value_cache_ptr + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
        scores = tl.sum(key.to(tl.float32) * query[None, :], 1)  # [BLOCK_N]
        # a key that should be there and is not poisons the row
        scores = tl.where(present, scores, float("nan"))
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 0))
        weights = tl.exp2(scores - new_highest)
        decay = tl.exp2(highest - new_highest)
        weight_sum = weight_sum * decay + tl.sum(weights, 0)
        total = total * decay + tl.sum(weights[:, None] * value.to(tl.float32), 0)
        highest = new_highest

    row = (sequence * H + head) * num_splits + split
    tl.store(partial_ptr + row * D + dims, total / weight_sum, mask=dim_mask)
    tl.store(lse_ptr + row, highest + tl.log2(weight_sum))


@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits_kernel(
    partial_ptr,
    lse_ptr,
    seq_lens_ptr,
    y_ptr,
    num_splits,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + sequence)
    used = tl.cdiv(seq_len, SPLIT)
    first_row = (sequence * H + head) * num_splits
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D

    highest = float("-inf")
    weight_sum = 0.0
    total = tl.zeros([BLOCK_D], tl.float32)
    for first_split in range(0, tl.minimum(used, num_splits), MERGE):
        splits = first_split + tl.arange(0, MERGE)
        split_mask = splits < tl.minimum(used, num_splits)
        lse = tl.load(lse_ptr + first_row + splits, mask=split_mask, other=float("-inf"))  # [MERGE], base 2
        partial = tl.load(
            partial_ptr + (first_row + splits)[:, None] * D + dims[None, :],
            mask=split_mask[:, None] & dim_mask[None, :],
            other=0.0,
        )  # [MERGE, BLOCK_D]
        new_highest = tl.maximum(highest, tl.max(lse, 0))
        weights = tl.exp2(lse - new_highest)
        decay = tl.exp2(highest - new_highest)
        weight_sum = weight_sum * decay + tl.sum(weights, 0)
        total = total * decay + tl.sum(weights[:, None] * partial, 0)
        highest = new_highest

    y = tl.where(seq_len > 0, total / tl.where(seq_len > 0, weight_sum, 1.0), 0.0)
    y = tl.where(used > num_splits, float("nan"), y)
    tl.store(y_ptr + (sequence * H + head) * D + dims, y, mask=dim_mask)


def paged_decode_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    scale: float,
) -> Tensor:
    """Launch ``paged_decode_attention``. Shapes and dtypes were checked by ``gpt2rt.ops``.

    Raises:
        ValueError: ``head_dim`` is above 256.
    """
    num_seqs, n_head, head_dim = query.shape
    num_blocks, _, block_size, _ = key_cache.shape
    block_d = max(16, triton.next_power_of_2(head_dim))
    if block_d > 256:
        raise ValueError(f"paged_decode_attention: head_dim is {head_dim}, expected at most 256")
    y = torch.empty((num_seqs, n_head, head_dim), dtype=query.dtype, device=query.device)
    num_splits = triton.cdiv(max_seq_len, SPLIT)
    partial = torch.empty((num_seqs, n_head, num_splits, head_dim), dtype=torch.float32, device=query.device)
    lse = torch.empty((num_seqs, n_head, num_splits), dtype=torch.float32, device=query.device)
    if not y.numel():
        return y
    with on_device(query):
        if num_splits:
            _paged_decode_attention_kernel[(num_seqs, n_head, num_splits)](
                query,
                key_cache,
                value_cache,
                block_table,
                seq_lens,
                partial,
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
                BLOCK_N=min(SPLIT, 4096 // block_d),
                num_warps=4,
                **OPTIONS,
            )
        _merge_splits_kernel[(num_seqs, n_head)](
            partial,
            lse,
            seq_lens,
            y,
            num_splits,
            H=n_head,
            D=head_dim,
            SPLIT=SPLIT,
            MERGE=MERGE,
            BLOCK_D=block_d,
            # one warp sums without shared memory; starting point, not tuned on a device yet
            num_warps=max(1, block_d // 128),
            **OPTIONS,
        )
    return y
