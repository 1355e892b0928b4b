"""``ops.quantized_linear`` on a GPU: the storage layout of quantised weights, read as it is.

The definition is :func:`gpt2rt.kernels.quantized_linear.quantized_linear_ref`, the kernel that of ``linear_tiles.py``:
two 4-bit codes a byte and every group size of the op, products in the dtype of x, sums in float32. Nothing is packed or
dequantised in memory. The executor's weights are packed once (``weights.py``) and do not come this way.

With int8 activations the definition itself runs: it is the yardstick of the CPU's integer kernels, and no GPU path asks
for it.
"""

import torch
from torch import Tensor

from .linear_tiles import StoredWeight, launch
from .quantized_linear import quantized_linear_ref


def quantized_linear_triton(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    group_size: int,
    int8_activations: bool,
) -> Tensor:
    """Launch ``quantized_linear``. Shapes, strides and dtypes were checked by ``gpt2rt.ops``."""
    if int8_activations:
        return quantized_linear_ref(x, codes, scales, zeros, codebook, bias, in_features, group_size, True)
    codes = codes.contiguous()
    int8 = codes.dtype == torch.int8
    weight = StoredWeight(
        "int8" if int8 else "pairs",
        (codes.size(0), in_features),
        codes,
        codes.stride(0),
        1,
        x.dtype,
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        codebook,
        0 if int8 else group_size,
    )
    y = torch.empty((x.size(0), codes.size(0)), dtype=x.dtype, device=x.device)
    launch(x, weight, bias, y, None)
    return y
