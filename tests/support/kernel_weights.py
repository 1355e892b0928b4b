"""Random weights in every format of the fused GPU kernels."""

import torch

from gpt2rt.kernels.weights import DeviceWeight, pack_dense, pack_quantized

DENSE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def make_weight(kind: str, n: int, k: int) -> DeviceWeight:
    """A weight (n, k) scaled like a layer's: "f32", "f16", "bf16", "int8", or a 4-bit kind and its group size, such as
    "int4 g64", "int4z g32" (with zero points) or "table g128" (codes of a table, as NF4 and FP4 have them).
    """
    scale = k**-0.5
    if kind in DENSE:
        return pack_dense((torch.randn(n, k) * scale).to(DENSE[kind]))
    if kind == "int8":
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        scales = torch.rand(n) * scale / 64
        return pack_quantized(codes, scales, None, None, in_features=k, group_size=k, compute_dtype=torch.float16)
    name, _, group_size = kind.partition(" g")
    groups = -(-k // int(group_size))
    codes = torch.randint(0, 256, (n, -(-k // 2)), dtype=torch.uint8)
    scales = torch.rand(n, groups) * scale / 4
    zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8) if name == "int4z" else None
    codebook = torch.randn(16) if name == "table" else None
    return pack_quantized(
        codes,
        scales.half() if codebook is None else scales,
        zeros,
        codebook,
        in_features=k,
        group_size=int(group_size),
        compute_dtype=torch.float16,
    )
