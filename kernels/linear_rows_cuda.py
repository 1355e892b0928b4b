"""The fused linear layer for up to eight rows and 4-bit weights, in CUDA C++ (csrc/cuda/rows.cuh).

The definition is ``fused_linear_ref``; the arguments are those of ``linear_rows.fused_linear_rows_triton``. Rows of x
(after norm or merge) are rounded to the weight's compute dtype, and so is a codebook; products and sums are float32, on
tensor cores. A row's bits do not depend on how many rows there are.

Why it exists: a product of few rows is bound by reading the weights only if unpacking a code takes at most about 3.5
instructions. Here unpacking and multiplying take 2.1 to 3 (counted in the machine code for sm_90), for one tensor core
instruction multiplies eight weights of a thread; what a block does once, above all the norm, comes on top.

Off until :func:`enable` is called; ``gpt2rt.ops.cuda_extension`` does that, on request, after it has loaded the op.
"""

import torch
from torch import Tensor

from .fused_linear import Append, Norm, Partials
from .fusion import ACTIVATIONS
from .launch import on_device
from .weights import GROUP_SIZES, DeviceWeight

__all__ = ["MAX_K", "enable", "fused_linear_rows_cuda", "serves"]

#: longest weight row that a block holds in its registers: 13 warps with 4 steps of 128 elements each
MAX_K = 6656

_enabled = False


def enable(on: bool = True) -> None:
    """Let :func:`serves` say yes, or no longer. The op must be loaded."""
    global _enabled
    _enabled = on


def serves(weight: DeviceWeight, out: Tensor, partials: Partials | None = None) -> bool:
    """Whether this kernel takes the launch; if not, it is Triton's."""
    return (
        _enabled
        and out.is_cuda
        and weight.group_size in GROUP_SIZES
        and weight.compute_dtype in (torch.float16, torch.bfloat16)
        and weight.shape[1] <= MAX_K
        and (partials is None or partials.values.size(3) % 4 == 0)
    )


def fused_linear_rows_cuda(
    x: Tensor | None,
    weight: DeviceWeight,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: Norm | None = None,
    activation: str = "linear",
    residual: Tensor | None = None,
    append: Append | None = None,
    partials: Partials | None = None,
    pdl: bool = False,
) -> None:
    """Launch the kernel; nothing is allocated and nothing waits for the device.

    Args:
        x: [M, K], contiguous rows, float32, float16 or bfloat16; None with ``partials``. Meant for M up to 8.
        weight: (N, K), "int4" or "code4", K up to ``MAX_K``, compute dtype float16 or bfloat16.
        bias: [N] or None.
        out: [M, N] (with ``append`` [M, N / 3]), contiguous rows, a storage dtype; written.
        norm: of the rows of x, or None; not with ``partials``.
        activation: one of ``fusion.ACTIVATIONS``.
        residual: [M, N], contiguous rows, or None; may be ``out``.
        append: the product is queries, keys and values, and these two go to a cache of a float dtype.
        partials: x is the merge of split attention; head_dim a multiple of 4.
        pdl: programmatic dependent launch; the kernel before this one in the stream must follow its rules (fusion.py).

    Raises:
        ValueError: dtypes or sizes that the kernel does not have, or that contradict each other.
        AttributeError: the library that holds the op is not loaded.
    """
    if weight.compute_dtype not in (torch.float16, torch.bfloat16) or weight.group_size not in GROUP_SIZES:
        raise ValueError(
            f"fused_linear_rows_cuda: the weight is {weight.format} in groups of {weight.group_size} with compute "
            f"dtype {weight.compute_dtype}, expected 4-bit codes in groups of 32, 64 or 128 and float16 or bfloat16; "
            "fused_linear_rows_triton has the others"
        )
    with on_device(out):
        torch.ops.gpt2rt.fused_linear_rows_cuda.default(
            x,
            *(partials or (None, None, None)),
            weight.data,
            weight.scales,
            weight.zeros,
            weight.codebook,
            weight.shape[1],
            weight.group_size,
            weight.compute_dtype == torch.bfloat16,
            bias,
            *(norm or (None, None, 0.0)),
            ACTIVATIONS.index(activation),
            residual,
            out,
            *(append or (None, None, None)),
            pdl,
        )
