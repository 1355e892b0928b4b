"""The definition of every op, in plain torch.

One function per op, with the op's signature. Arithmetic is float32 with one rounding at the end, in the dtype of the
first argument; float64 arguments are computed in float64, so that the same function is the yardstick that the C++ and
Triton forms are measured against. Any device, any strides.

The definitions stand together, in a file that imports torch alone, because machines without triton (and installs
without the C++ extension) run them as the fallback. Each kernel file imports its own from here, so that the maths, the
definition and the kernel are still read side by side.

Tensor names and shapes: T = num_tokens, S = num_seqs, H = n_head, D = head_dim; caches are
[num_blocks, H, block_size, D]; a slot is ``block_id * block_size + offset``, and -1 means "nowhere".
"""

import math

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a reference computes: float64 for float64 input, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, biased variance.

    Source: Ba, Kiros & Hinton, arXiv:1607.06450. Two passes: the variance is the mean of ``(x - mean)**2``, which keeps
    its digits where ``mean(x**2) - mean**2`` cancels.

    Args:
        x: [T, n].
        weight, bias: [n].
        eps: added to the variance.

    Returns:
        [T, n], contiguous, dtype of ``x``.
    """
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(variance + eps) * weight.to(dtype) + bias.to(dtype)
    return y.to(x.dtype).contiguous()


def add_layer_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``s = x + residual``, rounded to the dtype of ``x``, and ``layer_norm(s)``.

    The norm reads the rounded sum: what is normalised is exactly the residual stream that the next layer sees.

    Args:
        x, residual: [T, n], same dtype.
        weight, bias: [n].
        eps: added to the variance.

    Returns:
        (layer_norm(s), s), both [T, n], contiguous, dtype of ``x``.
    """
    dtype = compute_dtype(x)
    total = (x.to(dtype) + residual.to(dtype)).to(x.dtype).contiguous()
    return layer_norm_ref(total, weight, bias, eps), total


def bias_gelu_new_ref(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu_new(u) = 0.5 u (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3)))`` with ``u = x + bias``.

    Source: Hendrycks & Gimpel, arXiv:1606.08415, the tanh approximation.

    Args:
        x: [T, n].
        bias: [n].

    Returns:
        [T, n], contiguous, dtype of ``x``.
    """
    dtype = compute_dtype(x)
    u = x.to(dtype) + bias.to(dtype)
    z = math.sqrt(2.0 / math.pi) * (u + 0.044715 * u * u * u)
    return (0.5 * u * (1.0 + torch.tanh(z))).to(x.dtype).contiguous()


def embedding_ref(input_ids: Tensor, position_ids: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """``wte[input_ids] + wpe[position_ids]``, added in float32 and rounded once.

    Args:
        input_ids, position_ids: [T], int64.
        wte: [V, E] token table.
        wpe: [P, E] position table, dtype of ``wte``.

    Returns:
        [T, E], contiguous, dtype of ``wte``.

    Raises:
        IndexError: an id is negative or not below the number of rows of its table.
    """
    _check_ids("input_ids", input_ids, "wte", wte.shape[0])
    _check_ids("position_ids", position_ids, "wpe", wpe.shape[0])
    dtype = compute_dtype(wte)
    return (wte[input_ids].to(dtype) + wpe[position_ids].to(dtype)).to(wte.dtype)


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: [T, K].
        weight: [N, K] as ``torch.nn.Linear`` holds it, any strides (a Conv1D weight is passed as ``w.t()``).
        bias: [N] or None.

    Returns:
        [T, N], contiguous, dtype of ``x``.
    """
    dtype = compute_dtype(x)
    y = x.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        y += bias.to(dtype)
    return y.to(x.dtype)


def linear_gelu_new_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu_new(x @ weight.T + bias)``, rounded once; arguments as :func:`linear_ref`, the activation as
    :func:`bias_gelu_new_ref`.
    """
    dtype = compute_dtype(x)
    u = linear_ref(x.to(dtype), weight.to(dtype), None)
    zero = torch.zeros(weight.size(0), dtype=dtype, device=x.device)
    return bias_gelu_new_ref(u, zero if bias is None else bias.to(dtype)).to(x.dtype)


def linear_residual_ref(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``residual + x @ weight.T + bias``, rounded once; residual is [T, N], the rest as :func:`linear_ref`."""
    dtype = compute_dtype(x)
    y = linear_ref(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return (residual.to(dtype) + y).to(x.dtype)


#: dtypes of caches that hold codes with a scale for each token and head -> the largest code
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_heads_ref(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Keys or values as an 8-bit cache holds them: one symmetric scale for each token and head.

    ``scale = max|x| / top``, ``code = round(x * (top / max|x|))`` with the largest code ``top``, 127 of int8 and 448 of
    float8_e4m3fn, and ties to even (among the numbers of float8); a head whose largest element is below 1e-30 is zero.
    A head with NaN or infinity has the scale NaN, so that it spoils what attends to it.

    Source of float8_e4m3fn: Micikevicius et al., arXiv:2209.05433.

    Args:
        x: [..., D].
        dtype: int8 or float8_e4m3fn.

    Returns:
        (codes [..., D] in ``dtype``, scales [...] float32); ``x`` is about ``codes * scales``.
    """
    top = LARGEST_CODE[dtype]
    wide = x.float()
    finite = wide.isfinite().all(dim=-1)
    amax = wide.abs().amax(dim=-1)
    some = finite & (amax >= 1e-30)
    # top / amax would be amax.reciprocal() * top, which rounds twice
    factor = torch.where(some, torch.full_like(amax, top) / amax, 0.0)
    codes = torch.where(some[..., None], wide, 0.0) * factor[..., None]
    if dtype == torch.int8:
        codes = torch.round(codes)
    scales = torch.where(some, amax / top, 0.0)
    return codes.to(dtype), torch.where(finite, scales, math.nan)


def write_kv_ref(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Write each token's key and value to its slot of the paged cache, in place; slot -1 is skipped.

    Args:
        key, value: [T, H, D].
        key_cache, value_cache: [num_blocks, H, block_size, D], written in place; int8 and float8_e4m3fn by
            :func:`quantize_heads_ref`.
        slot_mapping: [T], int64; no slot but -1 may occur twice.
        key_scales, value_scales: [num_blocks, H, block_size] float32, written in place: of an 8-bit cache, else None.

    Raises:
        IndexError: a slot is below -1 or not below ``num_blocks * block_size``; nothing is written then.
    """
    num_blocks, _, block_size, _ = key_cache.shape
    if slot_mapping.numel():
        low, high = (int(v) for v in torch.aminmax(slot_mapping))
        if low < -1 or high >= num_blocks * block_size:
            raise IndexError(
                f"write_kv: slot_mapping holds {low if low < -1 else high}, expected -1 (skip) or 0 to "
                f"{num_blocks * block_size - 1} for {num_blocks} blocks of {block_size} tokens"
            )
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    blocks, offsets = slots // block_size, slots % block_size
    for x, cache, scales in ((key, key_cache, key_scales), (value, value_cache, value_scales)):
        if scales is None:
            cache[blocks, :, offsets] = x[kept].to(cache.dtype)
        else:
            cache[blocks, :, offsets], scales[blocks, :, offsets] = quantize_heads_ref(x[kept], cache.dtype)


def paged_prefill_attention_ref(
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
    """Causal attention of ragged queries over the paged cache.

    Query i of sequence s stands at position ``seq_lens[s] - query_len[s] + i`` and attends to positions 0 to that one:
    ``softmax((scale * q) . k) v``. Source: Vaswani et al., arXiv:1706.03762; paging: Kwon et al., arXiv:2309.06180.

    Args:
        query: [T, H, D], the sequences' queries one after another.
        key_cache, value_cache: [num_blocks, H, block_size, D]; the step's own keys and values are already in them.
        block_table: [S, max_blocks_per_seq], int32; entries past a sequence's last block may hold anything.
        seq_lens: [S], int32, tokens in the cache after this step.
        query_start_loc: [S + 1], int32, prefix sums of the query lengths; a query length may be 0.
        max_query_len: the largest query length (a bound is enough).
        scale: factor of the scores.
        key_scales, value_scales: [num_blocks, H, block_size] float32 of an 8-bit cache, whose keys and values are codes
            times scale; else None.

    Returns:
        [T, H, D], contiguous, dtype of ``query``.

    Raises:
        IndexError: a block id in use is outside the cache.
        ValueError: lengths that contradict each other.
    """
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    if starts[0] != 0 or starts[-1] != query.shape[0]:
        raise ValueError(
            f"paged_prefill_attention: query_start_loc runs from {starts[0]} to {starts[-1]}, expected 0 to "
            f"{query.shape[0]}, the number of query rows"
        )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for s, length in enumerate(lengths):
        first, last = starts[s], starts[s + 1]
        if not 0 <= last - first <= min(length, max_query_len):
            raise ValueError(
                f"paged_prefill_attention: sequence {s} has {last - first} queries, expected 0 to "
                f"{min(length, max_query_len)} (seq_len {length}, max_query_len {max_query_len})"
            )
        if last > first:
            k = _gather("paged_prefill_attention", key_cache, key_scales, block_table, s, length)
            v = _gather("paged_prefill_attention", value_cache, value_scales, block_table, s, length)
            out[first:last] = _attend(query[first:last], k, v, scale)
    return out


def paged_decode_attention_ref(
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
    """Attention of one query a sequence, at position ``seq_lens[s] - 1``, over the paged cache.

    Args:
        query: [S, H, D].
        key_cache, value_cache: [num_blocks, H, block_size, D]; the step's own keys and values are already in them.
        block_table: [S, max_blocks_per_seq], int32; entries past a sequence's last block may hold anything.
        seq_lens: [S], int32, tokens in the cache after this step; 0 marks a padding row.
        max_seq_len: the largest of ``seq_lens`` (a bound is enough).
        scale: factor of the scores.
        key_scales, value_scales: [num_blocks, H, block_size] float32 of an 8-bit cache, whose keys and values are codes
            times scale; else None.

    Returns:
        [S, H, D], contiguous, dtype of ``query``; zeros where ``seq_lens`` is 0.

    Raises:
        IndexError: a block id in use is outside the cache.
        ValueError: a sequence is longer than ``max_seq_len`` or negative.
    """
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    for s, length in enumerate(seq_lens.tolist()):
        if not 0 <= length <= max_seq_len:
            raise ValueError(
                f"paged_decode_attention: seq_lens[{s}] is {length}, expected 0 to max_seq_len {max_seq_len}"
            )
        if length:
            k = _gather("paged_decode_attention", key_cache, key_scales, block_table, s, length)
            v = _gather("paged_decode_attention", value_cache, value_scales, block_table, s, length)
            out[s] = _attend(query[s : s + 1], k, v, scale)[0]
    return out


def _check_ids(name: str, ids: Tensor, table: str, num_rows: int) -> None:
    """Raise IndexError unless every id is a row of its table."""
    if ids.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= num_rows:
        raise IndexError(
            f"embedding: {name} holds {low if low < 0 else high}, expected 0 to {num_rows - 1}: "
            f"{table} has {num_rows} rows"
        )


def _gather(op: str, cache: Tensor, scales: Tensor | None, block_table: Tensor, sequence: int, length: int) -> Tensor:
    """The first ``length`` tokens of a sequence, out of its blocks: [H, length, D]."""
    num_blocks, n_head, block_size, head_dim = cache.shape
    used = -(-length // block_size)
    if used > block_table.shape[1]:
        raise ValueError(
            f"{op}: sequence {sequence} has {length} tokens = {used} blocks of {block_size}, but block_table has "
            f"{block_table.shape[1]} columns"
        )
    blocks = block_table[sequence, :used].long()
    low, high = (int(v) for v in torch.aminmax(blocks))
    if low < 0 or high >= num_blocks:
        raise IndexError(
            f"{op}: block_table of sequence {sequence} holds {low if low < 0 else high}, expected 0 to {num_blocks - 1}"
        )
    tokens = cache[blocks]
    if scales is not None:
        tokens = tokens.float() * scales[blocks][..., None]
    return tokens.transpose(0, 1).reshape(n_head, used * block_size, head_dim)[:, :length]


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of the last ``query.shape[0]`` positions: query [Q, H, D], key, value [H, L, D] -> [Q, H, D]."""
    dtype = compute_dtype(query)
    num_queries, length = query.shape[0], key.shape[1]
    q = query.to(dtype).transpose(0, 1) * scale  # [H, Q, D]
    scores = q @ key.to(dtype).transpose(1, 2)  # [H, Q, L]
    positions = torch.arange(length, device=query.device)
    future = positions > positions[length - num_queries :, None]  # [Q, L]
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    return (weights @ value.to(dtype)).transpose(0, 1).to(query.dtype)
