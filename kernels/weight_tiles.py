"""Device function that reads one tile of a weight, in any format, as the operand of ``tl.dot``.

Formats are those of ``weights.py`` (dense, int8, words of 4-bit codes) and ``pairs``, the storage layout of
``gpt2rt.ops.quantized_linear``: two 4-bit codes a byte, the first in the high half.

int8 codes are exact in float16 and bfloat16: the tile holds the codes, and the scale of a row is applied to the sum.
4-bit codes become ``(code - zero) * scale`` or ``codebook[code] * scale`` in float32, rounded once to the dtype of the
products.
"""

import triton
import triton.language as tl

# adding a code below 2^23 to the bits of 2^23 gives the float 2^23 + code: no conversion instruction, which runs at a
# quarter of the rate of the others
FLOAT_2_23 = tl.constexpr(8388608.0)
BITS_2_23 = tl.constexpr(0x4B000000)


@triton.jit
def group_tile(
    ptrs,
    k0,
    n_mask,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scales or zero points of the elements from ``k0`` on, float32 [BLOCK_N, BLOCK_K / SPAN]: one for each SPAN.

    ``ptrs`` [BLOCK_N, 1] point to the first of each row; SPAN divides GROUP and BLOCK_K. 0 past K.
    """
    first = k0 + tl.arange(0, BLOCK_K // SPAN) * SPAN
    mask = n_mask[:, None] & (first < K)[None, :]
    return tl.load(ptrs + (first // GROUP)[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def weight_tile(
    row_ptrs,
    stride_k,
    k0,
    n_mask,
    scale,
    zero,
    codebook,
    FORMAT: tl.constexpr,
    COMPUTE: tl.constexpr,
    K: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_N, BLOCK_K] of dtype COMPUTE: elements ``k0`` to ``k0 + BLOCK_K`` of BLOCK_N rows.

    Args:
        row_ptrs: [BLOCK_N, 1], to the first stored element of each row.
        stride_k: stored elements from one to the next of a row; 1 for 4-bit formats.
        k0: first element of the row, a multiple of BLOCK_K.
        n_mask: [BLOCK_N], rows that exist.
        scale, zero: [BLOCK_N, BLOCK_K / SPAN] float32, as :func:`group_tile` gives them; 4-bit formats only.
        codebook: [16] float32, of a weight that has one.

    What lies past K is finite: x is zero there.
    """
    if FORMAT == "dense" or FORMAT == "int8":
        k = k0 + tl.arange(0, BLOCK_K)
        # int64: k * stride passes 2**31 for large matrices with contiguous columns
        ptrs = row_ptrs + (k.to(tl.int64) * stride_k)[None, :]
        tile = tl.load(ptrs, mask=n_mask[:, None] & (k < K)[None, :], other=0)
        if FORMAT == "int8":
            # with the sign bit turned over, a code is itself plus 128
            raised = (tile.to(tl.uint8, bitcast=True) ^ 128).to(tl.int32)
            tile = ((raised | BITS_2_23).to(tl.float32, bitcast=True) - (FLOAT_2_23 + 128.0)).to(COMPUTE)
    else:
        if FORMAT == "words":
            # a tile is whole chunks of 64 elements, or some of the eight planes of one
            CHUNKS: tl.constexpr = (BLOCK_K + 63) // 64
            PLANES: tl.constexpr = BLOCK_K // CHUNKS // 8
            word = k0 // 64 * 8 + tl.arange(0, CHUNKS * 8)
            mask = n_mask[:, None] & (word < (K + 63) // 64 * 8)[None, :]
            words = tl.load(row_ptrs + word[None, :], mask=mask, other=0)
            shift = 4 * (k0 % 64 // 8 + tl.arange(0, PLANES))
            codes = (tl.reshape(words, [BLOCK_N, CHUNKS, 1, 8]) >> shift[None, None, :, None]) & 15
        else:
            pair = k0 // 2 + tl.arange(0, BLOCK_K // 2)
            mask = n_mask[:, None] & (pair < (K + 1) // 2)[None, :]
            pairs = tl.load(row_ptrs + pair[None, :], mask=mask, other=0).to(tl.int32)
            codes = tl.join(pairs >> 4, pairs & 15)
        codes = tl.reshape(codes, [BLOCK_N, BLOCK_K // SPAN, SPAN])
        if HAS_CODEBOOK:
            # from registers: a load for each code would be four times as many, once for each warp that multiplies
            values = tl.gather(codebook, tl.reshape(codes, [BLOCK_N * BLOCK_K]), 0)
            values = tl.reshape(values, [BLOCK_N, BLOCK_K // SPAN, SPAN])
        else:
            values = (codes | BITS_2_23).to(tl.float32, bitcast=True) - (zero + FLOAT_2_23)[:, :, None]
        tile = tl.reshape(values * scale[:, :, None], [BLOCK_N, BLOCK_K]).to(COMPUTE)
    return tile
