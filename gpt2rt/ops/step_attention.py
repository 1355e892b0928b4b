"""Attention as ``cpu_step`` computes it in its fast arithmetic, by itself: for tests and measurements."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define


def _step_attention_fake(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


_step_attention = define(
    "step_attention",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor query_start_loc, float scale) -> Tensor",
    reference=None,
    fake=_step_attention_fake,
)


def step_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
) -> Tensor:
    """``paged_prefill_attention`` with products of bfloat16, where there is an instruction for them.

    On a bfloat16 cache, and a processor with bfloat16 dot products, queries and the weights of the softmax are rounded
    to bfloat16 and sums are float32. Everywhere else it is ``paged_prefill_attention`` to the bit.

    Args:
        query: [num_tokens, n_head, head_dim], float32, float16 or bfloat16 on CPU; last dimension contiguous.
        key_cache: [num_blocks, n_head, block_size, head_dim] in one of these dtypes.
        value_cache: likewise.
        block_table: [num_seqs, max_blocks_per_seq] int32.
        seq_lens: [num_seqs] int32, tokens in the cache after this step.
        query_start_loc: [num_seqs + 1] int32, prefix sums of the query lengths.
        scale: multiplies the scores.

    Returns:
        [num_tokens, n_head, head_dim], contiguous, dtype of ``query``.

    Raises:
        ValueError, TypeError: a shape, stride or dtype does not fit.
        IndexError: a block id that is used lies outside the cache.
        NotImplementedError: the extension is missing.
    """
    return _step_attention(query, key_cache, value_cache, block_table, seq_lens, query_start_loc, scale)
