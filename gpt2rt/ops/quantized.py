"""Matrix multiplication with weights of 8 and 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2rt.kernels.quantized_linear import quantized_linear_ref

from ._checks import check_device, check_like, check_rows
from ._library import define
from .linear import PANEL

#: what the group size of a packed 4-bit weight is a multiple of
MIN_GROUP = 32


def _fake(
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
    return torch.empty((x.size(0), codes.size(0)), dtype=x.dtype, device=x.device)


def _pack_fake(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    in_features: int,
    group_size: int,
    out: Tensor,
) -> None:
    return None


_quantized_linear = define(
    "quantized_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? codebook, Tensor? bias, int in_features, "
    "int group_size, bool int8_activations) -> Tensor",
    reference=quantized_linear_ref,
    triton="quantized_linear_triton:quantized_linear_triton",
    fake=_fake,
)
_pack_quantized = define(
    "pack_quantized",
    "(Tensor codes, Tensor scales, Tensor? zeros, Tensor? codebook, int in_features, int group_size, Tensor(a!) out) "
    "-> ()",
    reference=None,
    fake=_pack_fake,
)


def has_kernel(scheme_is_int8: bool, has_codebook: bool, in_features: int, group_size: int) -> bool:
    """Whether the kernels hold this weight in its 8 or 4 bits; else it must be dequantised.

    4-bit groups must be multiples of 32 up to 4096, and with a codebook they must divide the row.
    """
    if scheme_is_int8:
        return True
    fits = group_size % MIN_GROUP == 0 and group_size <= 4096
    return fits and not (has_codebook and in_features % group_size)


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    *,
    in_features: int,
    group_size: int,
    int8_activations: bool,
) -> Tensor:
    """``x @ w.t() + bias`` with a weight of 8 or 4 bits; the definition is in ``kernels/quantized_linear.py``.

    Args:
        x: [num_tokens, K], float32, float16 or bfloat16, contiguous rows.
        codes: [N, K] int8, or [N, ceil(K / 2)] uint8 with two 4-bit codes a byte, the first in the high half.
        scales: int8: [N] float32; int4: [N, ceil(K / group_size)] float16; with a codebook [N, K / group_size] float32.
        zeros: [N, ceil(K / group_size)] uint8, zero points of int4 codes; None: 8.
        codebook: [16] float32, the values of the codes (NF4, FP4); None: they are integers.
        bias: [N] in the dtype of ``x``, or None.
        in_features: K.
        group_size: elements of a row of w that share a scale; of no meaning for int8.
        int8_activations: quantise the rows of ``x`` to int8 in groups; integers only. On a GPU this is the definition
            in plain torch, for comparison: no kernel there multiplies int8 activations.

    Returns:
        [num_tokens, N], dtype of ``x``. A GPU multiplies in that dtype, with weights rounded to it (int8 weights are
        exact); a CPU in float32.

    Raises:
        ValueError: a shape does not fit, the weight has no kernel (see :func:`has_kernel`), or there are both
            ``int8_activations`` and a codebook.
        TypeError: a dtype does not fit.
    """
    op = "quantized_linear"
    check_rows(op, "x", x)
    if x.size(1) != in_features:
        raise ValueError(f"{op}: x has rows of {x.size(1)}, expected in_features={in_features}")
    if codebook is not None and int8_activations:
        raise ValueError(f"{op}: int8_activations with a codebook: its values are no integers; pass False")
    if codes.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"{op}: codes have dtype {codes.dtype}, expected int8, or uint8 with two 4-bit codes a byte")
    if not has_kernel(codes.dtype == torch.int8, codebook is not None, in_features, group_size):
        raise ValueError(
            f"{op}: group_size {group_size} with in_features {in_features} has no kernel: it must be a multiple of "
            f"{MIN_GROUP} up to 4096, and divide in_features where there is a codebook; use the dequantised weight"
        )
    check_device(op, "codes", codes, x)
    check_device(op, "scales", scales, x)
    if bias is not None:
        check_like(op, "bias", bias, (codes.size(0),), x)
    return _quantized_linear(x, codes, scales, zeros, codebook, bias, in_features, group_size, int8_activations)


def packed_quantized_bytes(
    out_features: int, in_features: int, *, bits: int, group_size: int, has_zeros: bool, has_codebook: bool
) -> int:
    """Size in bytes of a packed weight of 8 or 4 bits (csrc/cpu/packed.h): panels of 64 output columns."""
    panels = -(-out_features // PANEL)
    if bits == 8:
        return panels * PANEL * (-(-in_features // 64) * 64 + 4)
    header = 4 if has_codebook else 3 if has_zeros else 2
    return panels * PANEL * -(-in_features // group_size) * (header + group_size // 2)


def pack_quantized(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    out: Tensor,
    *,
    in_features: int,
    group_size: int,
) -> None:
    """Write a weight of 8 or 4 bits into ``out`` in the order that the CPU kernels read.

    Args:
        codes, scales, zeros, codebook, in_features, group_size: as in :func:`quantized_linear`, contiguous, on CPU.
        out: [packed_quantized_bytes(...)] uint8 on CPU, contiguous, aligned to 64 bytes; overwritten.

    Raises:
        ValueError: a shape does not fit, or ``out`` is not aligned to 64 bytes.
        NotImplementedError: the extension is missing.
    """
    _pack_quantized(codes, scales, zeros, codebook, in_features, group_size, out)
