"""The kernels of ``linear_tiles.py``: product of tiles, and the sum of the splits of K.

``linear_tiles.py`` has the maths and the reasons; this file the device code alone.
"""

import triton
import triton.language as tl

from .fusion import activated, let_dependents_start, store_qkv, wait_for_inputs
from .weight_tiles import group_tile, weight_tile

# programs of so many row tiles run next to each other on one column tile, so that the weights stay in the L2 cache
GROUP_M = tl.constexpr(8)


@triton.jit
def _merge_chunk(x, mask, mean, squares, before, share, COUNT: tl.constexpr):
    """Mean and sum of squared deviations of ``before`` elements and COUNT more; ``share`` = COUNT of both together."""
    chunk_mean = tl.sum(x, 1) / COUNT
    centred = tl.where(mask, x - chunk_mean[:, None], 0.0)
    step = chunk_mean - mean
    return mean + step * share, squares + tl.sum(centred * centred, 1) + step * step * (before * share)


@triton.jit
def _row_statistics(row_ptrs, m_mask, eps, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of rows, float32 [BLOCK_M]; ``row_ptrs`` [BLOCK_M, 1]."""
    k = tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for i in range(K // BLOCK):
        x = tl.load(row_ptrs + i * BLOCK + k[None, :], mask=m_mask[:, None], other=0.0).to(tl.float32)
        mean, squares = _merge_chunk(x, m_mask[:, None], mean, squares, i * (BLOCK * 1.0), 1.0 / (i + 1.0), BLOCK)
    WHOLE: tl.constexpr = K // BLOCK * BLOCK
    if WHOLE < K:
        mask = m_mask[:, None] & (WHOLE + k < K)[None, :]
        x = tl.load(row_ptrs + WHOLE + k[None, :], mask=mask, other=0.0).to(tl.float32)
        mean, squares = _merge_chunk(x, mask, mean, squares, WHOLE * 1.0, (K - WHOLE) / K, K - WHOLE)
    return mean, tl.rsqrt(squares / K + eps)


@triton.jit
def _norm_tile(weight_ptr, bias_ptr, k, K: tl.constexpr):
    weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return weight, tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _prefetch(
    data_ptr,
    first_row,
    num_rows: tl.constexpr,
    row_bytes,
    first_byte,
    ROW_BYTES: tl.constexpr,
    BYTES: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Ask for BYTES of each of BLOCK_N weight rows without waiting: they come to the L2 cache.

    Loads into registers or shared memory before the wait would have to be those of the pipelined loop after it. What
    lies past the matrix is not asked for: its last row and bytes are asked for again.
    """
    row = tl.minimum(first_row + tl.arange(0, BLOCK_N), num_rows - 1)
    byte = tl.minimum(first_byte + tl.minimum(tl.arange(0, LINES) * LINE, BYTES - 1), ROW_BYTES - 1)
    address = data_ptr.to(tl.int64) + row[:, None] * row_bytes + byte[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _finish(
    total,
    row,
    column,
    mask,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slots_ptr,
    num_slots,
    stride_residual,
    stride_out,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    APPEND: tl.constexpr,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Scale, bias, activation, residual and store of the sums ``total`` [M, N] of a tile; row int64, mask [M, 1]."""
    n_mask = column < N
    if FORMAT == "int8":
        total *= tl.load(scales_ptr + column, mask=n_mask, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    y = activated(total, ACTIVATION)
    both = mask & n_mask[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + row * stride_residual + column[None, :], mask=both, other=0.0).to(tl.float32)
    if APPEND:
        slot = tl.load(slots_ptr + row, mask=mask, other=-1)
        store_qkv(
            y,
            out_ptr,
            key_cache_ptr,
            value_cache_ptr,
            row,
            slot,
            column[None, :],
            both,
            num_slots,
            stride_out,
            N // 3,
            HEAD_DIM,
            BLOCK_SIZE,
        )
    else:
        tl.store(out_ptr + row * stride_out + column[None, :], y, mask=both)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def linear_tiles_kernel(
    x_ptr,
    data_ptr,
    scales_ptr,
    zeros_ptr,
    codebook_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slots_ptr,
    partials_ptr,
    num_rows,
    num_slots,
    stride_x,
    stride_n,
    stride_k,
    stride_residual,
    stride_out,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    COMPUTE: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    APPEND: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    LINE: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    let_dependents_start(PDL)
    # stored elements for one of w: 8 codes a word, 2 a pair
    PACKED: tl.constexpr = 8 if FORMAT == "words" else 2 if FORMAT == "pairs" else 1
    FOUR_BITS: tl.constexpr = PACKED > 1
    num_m = tl.cdiv(num_rows, BLOCK_M)
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    # row tiles of a group run first, then the next column tile
    program = tl.program_id(0)
    group = program // (GROUP_M * num_n)
    group_rows = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * num_n)
    # int64: row * stride passes 2**31 for large vocabularies and long prefills
    first_m = (group * GROUP_M + within % group_rows).to(tl.int64) * BLOCK_M
    first_n = (within // group_rows).to(tl.int64) * BLOCK_N
    split = tl.program_id(1)
    first_k = split * (TILES * BLOCK_K)

    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_mask = m < num_rows
    n_mask = n < N
    if PREFETCH_LINES > 0:
        SIZE: tl.constexpr = data_ptr.dtype.element_ty.primitive_bitwidth // 8
        _prefetch(
            data_ptr,
            first_n,
            N,
            stride_n * SIZE,
            first_k // PACKED * SIZE,
            K * SIZE // PACKED,
            TILES * BLOCK_K * SIZE // PACKED,
            PREFETCH_LINES,
            LINE,
            BLOCK_N,
        )
    wait_for_inputs(PDL)

    row_ptrs = x_ptr + m[:, None] * stride_x  # [BLOCK_M, 1]
    if HAS_NORM:
        mean, factor = _row_statistics(row_ptrs, m_mask, eps, K, BLOCK_M, STATISTICS)
        norm_weight, norm_bias = _norm_tile(norm_weight_ptr, norm_bias_ptr, first_k + k, K)
    scale = 0.0
    zero = 0.0
    codebook = 0.0
    if HAS_CODEBOOK:
        codebook = tl.load(codebook_ptr + tl.arange(0, 16))
    group_ptrs = n[:, None] * ((K + GROUP - 1) // GROUP)  # [BLOCK_N, 1]
    if FOUR_BITS:
        scale = group_tile(scales_ptr + group_ptrs, first_k, n_mask, K, GROUP, SPAN, BLOCK_K)
        zero = tl.full([BLOCK_N, BLOCK_K // SPAN], 8.0, tl.float32)
        if HAS_ZEROS:
            zero = group_tile(zeros_ptr + group_ptrs, first_k, n_mask, K, GROUP, SPAN, BLOCK_K)
    weight_ptrs = data_ptr + n[:, None] * stride_n  # [BLOCK_N, 1]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(TILES):
        k0 = first_k + i * BLOCK_K
        x = tl.load(row_ptrs + (k0 + k)[None, :], mask=m_mask[:, None] & (k0 + k < K)[None, :], other=0.0)
        weight = weight_tile(
            weight_ptrs,
            stride_k,
            k0,
            n_mask,
            scale,
            zero,
            codebook,
            FORMAT,
            COMPUTE,
            K,
            SPAN,
            HAS_CODEBOOK,
            BLOCK_N,
            BLOCK_K,
        )
        if HAS_NORM:
            x = (x.to(tl.float32) - mean[:, None]) * factor[:, None] * norm_weight[None, :] + norm_bias[None, :]
            # parameters are too narrow for the pipeline: those of the next tile are asked for a tile ahead
            norm_weight, norm_bias = _norm_tile(norm_weight_ptr, norm_bias_ptr, k0 + BLOCK_K + k, K)
        if FOUR_BITS:
            scale = group_tile(scales_ptr + group_ptrs, k0 + BLOCK_K, n_mask, K, GROUP, SPAN, BLOCK_K)
            if HAS_ZEROS:
                zero = group_tile(zeros_ptr + group_ptrs, k0 + BLOCK_K, n_mask, K, GROUP, SPAN, BLOCK_K)
        if x.dtype != COMPUTE:
            x = x.to(tl.float32).to(COMPUTE)
        # "ieee" keeps float32 from being rounded to TF32
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    if SPLITS == 1:
        _finish(
            total,
            m[:, None],
            n,
            m_mask[:, None],
            scales_ptr,
            bias_ptr,
            residual_ptr,
            out_ptr,
            key_cache_ptr,
            value_cache_ptr,
            slots_ptr,
            num_slots,
            stride_residual,
            stride_out,
            FORMAT,
            ACTIVATION,
            HAS_BIAS,
            HAS_RESIDUAL,
            APPEND,
            N,
            HEAD_DIM,
            BLOCK_SIZE,
        )
    else:
        row = split.to(tl.int64) * num_rows + m
        tl.store(partials_ptr + row[:, None] * N + n[None, :], total, mask=m_mask[:, None] & n_mask[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def reduce_splits_kernel(
    partials_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slots_ptr,
    num_rows,
    num_slots,
    stride_residual,
    stride_out,
    N: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    APPEND: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    let_dependents_start(PDL)
    wait_for_inputs(PDL)
    row = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row < num_rows
    both = mask & (column < N)[None, :]
    total = tl.load(partials_ptr + row * N + column[None, :], mask=both, other=0.0)
    for split in tl.static_range(1, SPLITS):
        # int64: a long prefill in many splits passes 2**31 elements
        ptrs = partials_ptr + (split * num_rows + row) * N + column[None, :]
        total += tl.load(ptrs, mask=both, other=0.0)
    _finish(
        total,
        row,
        column,
        mask,
        scales_ptr,
        bias_ptr,
        residual_ptr,
        out_ptr,
        key_cache_ptr,
        value_cache_ptr,
        slots_ptr,
        num_slots,
        stride_residual,
        stride_out,
        FORMAT,
        ACTIVATION,
        HAS_BIAS,
        HAS_RESIDUAL,
        APPEND,
        N,
        HEAD_DIM,
        BLOCK_SIZE,
    )
