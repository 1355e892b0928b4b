"""Device functions of the kernels that multiply and add for few rows: a tile of a weight, a row of x, their product.

Shared by ``linear_rows`` and ``head``. A tile holds BLOCK_N rows of the weight and BLOCK_K elements of each. Floats and
int8 are read in segments: with segments that one warp reads in one instruction, a warp has rows for itself and sums
them over its own 32 threads; with BLOCK_K as the segment all warps share a row, for rows so long that the registers of
one warp would not hold them.

4-bit codes become floats without a conversion instruction, which is slow: a code at bits 4i of the mantissa of 2^23 is
the float 2^23 + code * 16^i, and one multiply-add by 16^-i, less 2^23 * 16^-i and the zero point, is exact. The five
lowest codes of a word are used where they stand, the others after one shift. Codes of a table are looked up in shared
memory. A group's scale multiplies its sum.
"""

import triton
import triton.language as tl

from .merge_splits import merge_split


@triton.jit
def each_chunk(groups, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr):
    """A number for each group, [BLOCK_N, CHUNKS * 64 / GROUP], spread over [BLOCK_N, CHUNKS, 8 planes, 1]."""
    if GROUP == 32:
        halves = tl.reshape(groups, [BLOCK_N, CHUNKS, 2, 1])
        planes = tl.reshape(tl.broadcast_to(halves, [BLOCK_N, CHUNKS, 2, 4]), [BLOCK_N, CHUNKS, 8, 1])
    else:
        SHARED: tl.constexpr = GROUP // 64
        chunks = tl.broadcast_to(groups[:, :, None], [BLOCK_N, CHUNKS // SHARED, SHARED])
        planes = tl.reshape(chunks, [BLOCK_N, CHUNKS, 1, 1])
    return planes


@triton.jit
def integers(words, zeros):
    """Codes less their zero points, [n, c, 8 planes, 8] float32; words the same in each plane, zeros broadcast.

    Exact: all intermediate values are integers, over powers of 16, with less than 24 bits.
    """
    plane = tl.arange(0, 8)[None, None, :, None]
    # the mantissa has room for five codes and a half
    moved = tl.where(plane < 5, words, words >> 20)
    shift = 4 * tl.where(plane < 5, plane, plane - 5)
    # 0x4B000000 is 2^23, whose last bit is worth 1
    value = ((moved & (15 << shift)) | 0x4B000000).to(tl.float32, bitcast=True)
    unit = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    return value * unit - (unit * 8388608.0 + zeros)


@triton.jit
def load_tile(
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    codebook_ptr,
    first,
    k0,
    stride_w,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows ``first`` to ``first + BLOCK_N`` of a weight, from element ``k0`` on.

    Returns:
        Values [BLOCK_N, BLOCK_K], float32 from 4-bit codes, else in the storage dtype, zero outside the weight; and
        their scales: [BLOCK_N, BLOCK_K / GROUP] of 4-bit codes, [BLOCK_N] of int8, else the number 1.
    """
    n = tl.arange(0, BLOCK_N)
    n_mask = first + n < N
    scales = 1.0
    if GROUP > 0:
        CHUNKS: tl.constexpr = BLOCK_K // 64
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        ALL_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        ALL_CHUNKS: tl.constexpr = (K + 63) // 64
        w = tl.arange(0, CHUNKS * 8)
        words = tl.load(
            weight_ptr + first * stride_w + n[:, None] * stride_w + k0 // 8 + w[None, :],
            mask=n_mask[:, None] & (k0 // 8 + w < ALL_CHUNKS * 8)[None, :],
            other=0,
        )
        # reshapes, for they keep all planes of a word in its thread, where a new axis would move it to another
        words = tl.broadcast_to(tl.reshape(words, [BLOCK_N, CHUNKS, 1, 8]), [BLOCK_N, CHUNKS, 8, 8])
        group = k0 // GROUP + tl.arange(0, GROUPS)
        group_mask = n_mask[:, None] & (group < ALL_GROUPS)[None, :]
        group_offsets = first * ALL_GROUPS + n[:, None] * ALL_GROUPS + group[None, :]
        scales = tl.load(scales_ptr + group_offsets, mask=group_mask, other=0.0).to(tl.float32)
        if FORMAT == "code4":
            shift = 4 * tl.arange(0, 8)[None, None, :, None]
            codes = tl.reshape((words >> shift) & 15, [BLOCK_N * BLOCK_K])
            # a gather keeps the codes in their threads, where loads by pointer would deal them out anew
            values = tl.gather(tl.load(codebook_ptr + tl.arange(0, 16)), codes, 0)
        elif zeros_ptr is not None:
            zeros = tl.load(zeros_ptr + group_offsets, mask=group_mask, other=0).to(tl.float32)
            values = integers(words, each_chunk(zeros, BLOCK_N, CHUNKS, GROUP))
        else:
            values = integers(words, 8.0)
        # planes of eight words are the elements in their natural order
        values = tl.reshape(values, [BLOCK_N, BLOCK_K])
    else:
        STEPS: tl.constexpr = BLOCK_K // SEGMENT
        # a tile of two dimensions: triton versions differ in which of three they give to the warps
        line = tl.arange(0, STEPS * BLOCK_N)
        k = k0 + (line // BLOCK_N)[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
        values = tl.load(
            weight_ptr + first * stride_w + (line % BLOCK_N)[:, None] * stride_w + k,
            mask=(first + line % BLOCK_N < N)[:, None] & (k < K),
            other=0.0,
        )  # [STEPS * BLOCK_N, SEGMENT]
        values = tl.permute(tl.reshape(values, [STEPS, BLOCK_N, SEGMENT]), [1, 0, 2])
        values = tl.reshape(values, [BLOCK_N, BLOCK_K])
        if FORMAT == "int8":
            scales = tl.load(scales_ptr + first + n, mask=n_mask, other=0.0)
    return values, scales


@triton.jit
def tile_product(values, scales, x, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """``sum_k weight[n, k] x[k]``, [BLOCK_N] float32, of a tile of :func:`load_tile` and x [BLOCK_K] float32."""
    products = values.to(tl.float32) * x[None, :]
    if GROUP > 0:
        sums = tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // GROUP, GROUP]), 2)
        y = tl.sum(sums * scales, 1)
    else:
        y = tl.sum(products, 1) * scales
    return y


@triton.jit
def merged(
    values_ptr,
    lse_ptr,
    row,
    seq_len,
    head,
    dim,
    H: tl.constexpr,
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Split attention of a row, merged in the order of the splits; ``head`` and ``dim`` broadcast; zero past H."""
    used = tl.where(head < H, tl.cdiv(seq_len, SPLIT), 0)
    first = (row * H + head) * NUM_SPLITS
    # shapes: [heads] of what a head has one of, that of ``head`` and ``dim`` together of the result
    highest = tl.where(head < 0, 0.0, float("-inf"))
    weight_sum = tl.where(head < 0, 1.0, 0.0)
    total = tl.where(head + dim < 0, 1.0, 0.0)
    for split in tl.static_range(NUM_SPLITS):
        # the first split of a row without tokens is read as one of weight 1 and value 0: no difference of infinities
        lse = tl.load(lse_ptr + first + split, mask=split < used, other=0.0 if split == 0 else float("-inf"))
        value = tl.load(values_ptr + (first + split) * D + dim, mask=(split < used) & (dim < D), other=0.0)
        total, weight_sum, highest = merge_split(total, weight_sum, highest, value, lse)
    x = total / weight_sum
    # more splits than there are: the length of the sequence is broken
    return tl.where(used > NUM_SPLITS, float("nan"), x)


@triton.jit
def load_input(
    x_ptr,
    values_ptr,
    lse_ptr,
    seq_lens_ptr,
    row,
    k0,
    stride_x,
    K: tl.constexpr,
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Elements ``k0`` to ``k0 + BLOCK_K`` of a row of x, or of the merge that stands for it: float32, zero past K."""
    k = k0 + tl.arange(0, BLOCK_K)
    if NUM_SPLITS == 0:
        x = tl.load(x_ptr + row * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
    else:
        seq_len = tl.load(seq_lens_ptr + row)
        H: tl.constexpr = K // D
        if (D & (D - 1)) == 0 and D <= BLOCK_K:
            # one weight a head and split instead of one an element
            head = k0 // D + tl.arange(0, BLOCK_K // D)[:, None]
            dim = tl.arange(0, D)[None, :]
            x = merged(values_ptr, lse_ptr, row, seq_len, head, dim, H, D, NUM_SPLITS, SPLIT)
            x = tl.reshape(x, [BLOCK_K])
        else:
            x = merged(values_ptr, lse_ptr, row, seq_len, k // D, k % D, H, D, NUM_SPLITS, SPLIT)
    return x


@triton.jit
def load_norm(norm_weight_ptr, norm_bias_ptr, k0, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weight and bias of the norm for a tile, float32 and zero past K."""
    k = k0 + tl.arange(0, BLOCK_K)
    weight = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def product_by_tiles(
    x_ptr,
    values_ptr,
    lse_ptr,
    seq_lens_ptr,
    row,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    codebook_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    first,
    stride_x,
    stride_w,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row's sums for weights that registers do not hold: the rows after the first find them in the caches."""
    k = tl.arange(0, BLOCK_K)
    mean = 0.0
    rstd = 1.0
    if norm_weight_ptr is not None:
        total = tl.zeros([BLOCK_K], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            total += tl.load(x_ptr + row * stride_x + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / K
        squares = tl.zeros([BLOCK_K], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x = tl.load(x_ptr + row * stride_x + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
            centred = tl.where(k0 + k < K, x - mean, 0.0)
            squares += centred * centred
        rstd = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    y = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x = load_input(x_ptr, values_ptr, lse_ptr, seq_lens_ptr, row, k0, stride_x, K, D, NUM_SPLITS, SPLIT, BLOCK_K)
        if norm_weight_ptr is not None:
            norm_weight, norm_bias = load_norm(norm_weight_ptr, norm_bias_ptr, k0, K, BLOCK_K)
            x = tl.where(k0 + k < K, (x - mean) * rstd * norm_weight + norm_bias, 0.0)
        values, scales = load_tile(
            weight_ptr,
            scales_ptr,
            zeros_ptr,
            codebook_ptr,
            first,
            k0,
            stride_w,
            N,
            K,
            FORMAT,
            GROUP,
            SEGMENT,
            BLOCK_N,
            BLOCK_K,
        )
        y += tile_product(values, scales, x, GROUP, BLOCK_N, BLOCK_K)
    return y
