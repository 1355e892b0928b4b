"""Attention over the paged KV cache, and the write that fills it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpt2rt.kernels import refs

from ._checks import check_caches, check_index, check_like, check_storage_dtype
from ._library import define


def _write_kv_fake(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    return None


def _prefill_fake(
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
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _decode_fake(
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
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


_write_kv = define(
    "write_kv",
    "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
    "Tensor(c!)? key_scales=None, Tensor(d!)? value_scales=None) -> ()",
    reference=refs.write_kv_ref,
    triton="write_kv:write_kv_triton",
    fake=_write_kv_fake,
)
_paged_prefill_attention = define(
    "paged_prefill_attention",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor query_start_loc, int max_query_len, float scale, "
    "Tensor? key_scales=None, Tensor? value_scales=None) -> Tensor",
    reference=refs.paged_prefill_attention_ref,
    triton="paged_prefill_attention:paged_prefill_attention_triton",
    fake=_prefill_fake,
)
_paged_decode_attention = define(
    "paged_decode_attention",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "int max_seq_len, float scale, Tensor? key_scales=None, Tensor? value_scales=None) -> Tensor",
    reference=refs.paged_decode_attention_ref,
    triton="paged_decode_attention:paged_decode_attention_triton",
    fake=_decode_fake,
)


def _form(op: Callable, reference: Callable, cache: Tensor) -> Callable:
    """The op, but plain torch for float8 on a CPU: C++ has no form for it."""
    return reference if cache.dtype == torch.float8_e4m3fn and cache.device.type == "cpu" else op


def _check_heads(op: str, name: str, x: Tensor) -> None:
    check_storage_dtype(op, name, x)
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} must be [num_tokens, n_head, head_dim], got {list(x.shape)}")
    if x.size(2) > 1 and x.stride(2) != 1:
        raise ValueError(f"{op}: the last dimension of {name} must be contiguous, got stride {x.stride(2)}")


def write_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Copy each token's key and value to its slot of the paged cache.

    Args:
        key: [num_tokens, n_head, head_dim], float32, float16 or bfloat16; last dimension contiguous, so views into
            the QKV matrix are fine.
        value: likewise.
        key_cache: [num_blocks, n_head, block_size, head_dim], device of ``key``; changed in place. Any of ``key``'s
            dtypes, or int8 or float8_e4m3fn, where each token and head has a scale of its own
            (``quantize_heads_ref``). On a CPU float8 runs in plain torch.
        value_cache: likewise.
        slot_mapping: [num_tokens] int64, ``block_id * block_size + offset``; -1 skips the token (padding).
        key_scales: [num_blocks, n_head, block_size] float32 of an 8-bit cache, changed in place; else None.
        value_scales: likewise.

    Raises:
        ValueError, TypeError: a shape, stride, dtype or device does not fit.
        IndexError: a slot lies outside the cache (CPU; nothing is written. On CUDA such a token is skipped).
    """
    _check_heads("write_kv", "key", key)
    _check_heads("write_kv", "value", value)
    check_like("write_kv", "value", value, tuple(key.shape), key)
    check_caches("write_kv", (key_cache, value_cache), (key_scales, value_scales), key.size(1), key.size(2), key)
    check_index("write_kv", "slot_mapping", slot_mapping, (key.size(0),), torch.int64, key)
    write = _form(_write_kv, refs.write_kv_ref, key_cache)
    write(key, value, key_cache, value_cache, slot_mapping, key_scales, value_scales)


def _check_paged(
    op: str,
    query: Tensor,
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    block_table: Tensor,
    seq_lens: Tensor,
) -> None:
    _check_heads(op, "query", query)
    check_caches(op, caches, scales, query.size(1), query.size(2), query)
    if block_table.dim() != 2:
        raise ValueError(f"{op}: block_table must be [num_seqs, max_blocks_per_seq], got {list(block_table.shape)}")
    check_index(op, "block_table", block_table, tuple(block_table.shape), torch.int32, query)
    check_index(op, "seq_lens", seq_lens, (block_table.size(0),), torch.int32, query)


def paged_prefill_attention(
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
    """Causal attention of ragged rows of queries over the paged cache; prefix hits and chunks included.

    Query ``i`` of sequence ``s`` stands at position ``seq_lens[s] - query_len[s] + i`` and attends to positions 0
    to that one, its own key and value having been written before. Online softmax: Milakov & Gimelshein,
    arXiv:1805.02867; tiling: Dao, arXiv:2307.08691; paging: Kwon et al., arXiv:2309.06180.

    Args:
        query: [num_tokens, n_head, head_dim], float32, float16 or bfloat16; last dimension contiguous.
        key_cache: [num_blocks, n_head, block_size, head_dim], dtypes as for :func:`write_kv`.
        value_cache: likewise.
        block_table: [num_seqs, max_blocks_per_seq] int32, logical to physical; entries past a sequence's end are
            never read.
        seq_lens: [num_seqs] int32, tokens in the cache after this step.
        query_start_loc: [num_seqs + 1] int32, prefix sums of the query lengths; a length of 0 is fine.
        max_query_len: the largest query length.
        scale: multiplies the query before the dot product, 1/sqrt(head_dim) in GPT-2.
        key_scales: [num_blocks, n_head, block_size] float32 of an 8-bit cache; else None.
        value_scales: likewise.

    Returns:
        [num_tokens, n_head, head_dim], contiguous, dtype of ``query``; scores and softmax in float32.

    Raises:
        ValueError, TypeError: a shape, stride, dtype or device does not fit.
        IndexError: a block id that is used lies outside the cache (CPU).
    """
    _check_paged(
        "paged_prefill_attention", query, (key_cache, value_cache), (key_scales, value_scales), block_table, seq_lens
    )
    check_index(
        "paged_prefill_attention", "query_start_loc", query_start_loc, (block_table.size(0) + 1,), torch.int32, query
    )
    attend = _form(_paged_prefill_attention, refs.paged_prefill_attention_ref, key_cache)
    return attend(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        query_start_loc,
        max_query_len,
        scale,
        key_scales,
        value_scales,
    )


def paged_decode_attention(
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
    """Attention of one new token a sequence over the paged cache, split over positions (split-KV).

    The context is cut into splits of fixed length by absolute position, whose partial results are merged by their
    log-sum-exp in order, so a row's result depends on nothing but its own sequence. Source: Dao et al.,
    "Flash-Decoding for long-context inference", 2023.

    Args:
        query: [num_seqs, n_head, head_dim], float32, float16 or bfloat16, the token at ``seq_lens[s] - 1``.
        key_cache: [num_blocks, n_head, block_size, head_dim], dtypes as for :func:`write_kv`.
        value_cache: likewise.
        block_table: [num_seqs, max_blocks_per_seq] int32.
        seq_lens: [num_seqs] int32; 0 marks a padding row, whose result is zero.
        max_seq_len: the largest of ``seq_lens``.
        scale: multiplies the query before the dot product.
        key_scales: [num_blocks, n_head, block_size] float32 of an 8-bit cache; else None.
        value_scales: likewise.

    Returns:
        [num_seqs, n_head, head_dim], contiguous, dtype of ``query``.

    Raises:
        ValueError, TypeError: a shape, stride, dtype or device does not fit.
        IndexError: a block id that is used lies outside the cache (CPU).
    """
    _check_paged(
        "paged_decode_attention", query, (key_cache, value_cache), (key_scales, value_scales), block_table, seq_lens
    )
    if query.size(0) != block_table.size(0):
        raise ValueError(
            f"paged_decode_attention: query has {query.size(0)} rows for {block_table.size(0)} sequences; expected one "
            "each, use paged_prefill_attention for more"
        )
    attend = _form(_paged_decode_attention, refs.paged_decode_attention_ref, key_cache)
    return attend(query, key_cache, value_cache, block_table, seq_lens, max_seq_len, scale, key_scales, value_scales)
