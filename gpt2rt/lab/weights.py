"""Random weights in the formats of the fused kernels."""

from __future__ import annotations

import dataclasses

import torch

from gpt2rt.kernels.weights import DeviceWeight, pack_dense, pack_quantized
from gpt2rt.quantization.codebooks import codebook

from .problem import Place

#: format of a weight -> (bits, elements that share a scale, whether there are zero points)
FORMATS = {
    "dense": (0, 0, False),
    "int8": (8, 0, False),
    "int4": (4, 64, False),
    "int4-g32": (4, 32, False),
    "int4-g128": (4, 128, False),
    "int4-zeros": (4, 64, True),
    "nf4": (4, 64, False),
}


def random_codes(place: Place, format: str, n: int, k: int):
    """The stored tensors of a quantised weight [n, k]: (codes, scales, zeros, codebook, group_size), scaled like a
    layer's; as ``gpt2rt.quantization.QuantizedWeight`` holds them.
    """
    bits, group, has_zeros = FORMATS[format]
    scale = k**-0.5
    if bits == 8:
        codes = place.integers(-127, 128, n, k, dtype=torch.int8)
        return codes, place.uniform(n, low=scale / 128, high=scale / 64), None, None, k
    groups = -(-k // group)
    codes = place.integers(0, 256, n, -(-k // 2), dtype=torch.uint8)
    zeros = place.integers(5, 11, n, groups, dtype=torch.uint8) if has_zeros else None
    table = codebook(format, place.device) if format == "nf4" else None
    dtype = torch.float16 if table is None else torch.float32
    span = 8.0 if table is None else 1.0
    return codes, place.uniform(n, groups, low=scale / span, high=2 * scale / span, dtype=dtype), zeros, table, group


def make_weight(place: Place, format: str, n: int, k: int) -> DeviceWeight:
    """A weight (n, k) of a format of :data:`FORMATS`, its products in the dtype of the place."""
    if format == "dense":
        return pack_dense(place.normal(n, k, scale=k**-0.5))
    codes, scales, zeros, table, group = random_codes(place, format, n, k)
    return pack_quantized(codes, scales, zeros, table, in_features=k, group_size=group, compute_dtype=place.dtype)


def copies_of(weight: DeviceWeight, count: int) -> list[DeviceWeight]:
    """The weight, and as many equal ones elsewhere in memory."""
    return [weight] + [dataclasses.replace(weight, data=weight.data.clone()) for _ in range(count - 1)]
