"""Rows of keys and values as a paged cache holds them, and the device functions that load and store them.

Three formats, by the dtype of the cache:

- ``float``: float32, float16 or bfloat16, as they are.
- ``int8``: codes -127 to 127 and a float32 scale for each token and head: ``x`` is about ``code * scale``.
- ``float8``: float8_e4m3fn (4 bits of exponent, 3 of mantissa) and such a scale, so that the largest element of a head
  becomes 448, the largest number there is.

``refs.quantize_heads_ref`` defines the codes to the bit. Kernels see both 8-bit formats as bytes and decode them by
integer arithmetic: float8 conversions need sm_89, and the instruction that turns an integer into a float runs at a
fraction of the speed of an addition, which at a byte an element would be slower than the memory.

Source of float8_e4m3fn: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: largest code of each format: a head's largest element becomes this
LARGEST_INT8 = tl.constexpr(127.0)
LARGEST_FLOAT8 = tl.constexpr(448.0)
# below it a head counts as zero: a factor of 448 / it is still a number
SMALLEST_HEAD = tl.constexpr(1e-30)

_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "float8"}
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def cache_format(cache: Tensor) -> str:
    """``FORMAT`` of the device functions: "float", "int8" or "float8"."""
    return _FORMATS.get(cache.dtype, "float")


def stored(cache: Tensor) -> Tensor:
    """The cache as kernels take it: 8-bit formats as bytes."""
    return cache.view(torch.uint8) if cache.dtype in _FORMATS else cache


def dot_dtype(query: Tensor, cache: Tensor) -> tl.dtype:
    """In which dtype tensor cores multiply: the query's; float32 if the cache holds floats of another dtype.

    int8 codes and the values of float8 are exact in float16 and bfloat16.
    """
    mixed = cache.dtype not in _FORMATS and cache.dtype != query.dtype
    return tl.float32 if mixed else _TYPES[query.dtype]


@triton.jit
def decoded(x, FORMAT: tl.constexpr):
    """Loaded elements in float32, exact, without the scale: of float8 the 256th part of the code's value."""
    if FORMAT == "int8":
        # 2^23 + 128 + code, whose last bits hold the integer
        bits = (x.to(tl.int32) ^ 0x80) | 0x4B000000
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    elif FORMAT == "float8":
        # the fields of a float16 with the exponent 8 too low, subnormal numbers included. 0x7F and 0xFF, NaN in this
        # format, are never stored: what is not finite has the scale NaN
        wide = x.to(tl.int32)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def operand(x, DOT: tl.constexpr, FORMAT: tl.constexpr):
    """``decoded``, as the operand of a product in the dtype ``DOT``."""
    if FORMAT == "float":
        # not by way of float32: elements that need no conversion go to the tensor cores as they were loaded
        return x.to(DOT)
    return decoded(x, FORMAT).to(DOT)


@triton.jit
def decoded_scales(scales_ptr, rows, mask, FORMAT: tl.constexpr):
    """What makes ``decoded`` elements of these rows whole, float32; call it for 8-bit formats only."""
    scales = tl.load(scales_ptr + rows, mask=mask, other=0.0)
    if FORMAT == "float8":
        scales *= 256.0
    return scales


@triton.jit
def encoded(x, FORMAT: tl.constexpr):
    """Heads as 8-bit codes: ``refs.quantize_heads_ref`` to the bit.

    Args:
        x: [BLOCK_H, BLOCK_D] float32, a head a row, zero where it is padded.
        FORMAT: "int8" or "float8".

    Returns:
        (codes [BLOCK_H, BLOCK_D] uint8, scales [BLOCK_H] float32).
    """
    magnitude = tl.abs(x)
    # not "isinf": NaN compares false as well
    finite = tl.min((magnitude < float("inf")).to(tl.int32), 1) == 1  # [BLOCK_H]
    largest = tl.max(tl.where(finite[:, None], magnitude, 0.0), 1)
    some = largest >= SMALLEST_HEAD
    divisor = tl.where(some, largest, 1.0)
    if FORMAT == "int8":
        top = tl.full(largest.shape, LARGEST_INT8, tl.float32)
    else:
        top = tl.full(largest.shape, LARGEST_FLOAT8, tl.float32)
    # div_rn: the plain division is not rounded correctly on a device
    factor = tl.where(some, tl.div_rn(top, divisor), 0.0)
    scales = tl.where(some, tl.div_rn(divisor, top), 0.0)
    product = tl.where(some[:, None], x, 0.0) * factor[:, None]
    if FORMAT == "int8":
        # the clamp changes nothing, but keeps the product from being fused with the addition that rounds it
        clamped = tl.minimum(tl.maximum(product, -127.5), 127.5)
        # adding 1.5 * 2^23 rounds half to even and leaves the integer in the last bits
        codes = (clamped + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)
    else:
        clamped = tl.minimum(tl.abs(product), 448.0)
        bits = clamped.to(tl.int32, bitcast=True)
        # keep 3 bits of mantissa, half to even, and move the exponent from a bias of 127 to one of 7
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # below 2^-6 numbers lie 2^-9 apart: adding 2^14, whose last bit is worth that, rounds to them
        subnormal = (clamped + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        sign = (product.to(tl.int32, bitcast=True) >> 24) & 0x80
        codes = (tl.where(clamped < 0.015625, subnormal, normal) | sign).to(tl.uint8)
    return codes, tl.where(finite, scales, float("nan"))
