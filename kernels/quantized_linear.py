"""Matrix multiplication with weights of 8 and 4 bits, in plain torch: what the numbers are.

Weights: ``gpt2rt.quantization`` defines them. Activations are float32, or quantised to int8 as they come, in groups of
a row: the groups of the weight, or of 64 elements for int8 weights, whose one scale a row is applied last. Dynamic
quantisation of activations: Dettmers et al., "LLM.int8()", arXiv:2208.07339, section 2, there with one scale a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: elements of a row that share an activation scale when the weights are int8
INT8_GROUP = 64
#: a group whose largest element is below this is zero: 127 / max |x| would overflow float32
SMALLEST_GROUP = 1e-30


def quantize_activations_ref(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Rows in int8: scale = max |x| / 127 for each group, codes = x * (127 / max |x|) rounded to even.

    Args:
        x: [num_tokens, K] of a float dtype; computed in float32.
        group: elements of a row that share a scale; the last group may be shorter.

    Returns:
        Codes [num_tokens, ceil(K / group), group] int8, zero past K, and scales [num_tokens, ceil(K / group)]
        float32; a group that holds NaN or an infinity has the scale NaN and zero codes.
    """
    rows, k = x.shape
    groups = -(-k // group)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group - k)).view(rows, groups, group)
    largest = padded.abs().amax(-1)
    finite = torch.isfinite(largest)
    some = finite & (largest >= SMALLEST_GROUP)
    # a number over a tensor would be the tensor's reciprocal times the number, which is rounded twice
    factor = torch.where(some, torch.full_like(largest, 127.0) / largest, 0.0)
    codes = torch.where(some[..., None], (padded * factor[..., None]).round(), 0.0).to(torch.int8)
    scales = torch.where(some, largest / 127.0, 0.0)
    return codes, torch.where(finite, scales, torch.nan)


def unpack_codes_ref(codes: Tensor, in_features: int) -> Tensor:
    """Codes as int32 [N, K]: int8 [N, K] as they are; uint8 [N, ceil(K / 2)] holds two, the first in the high half."""
    if codes.dtype == torch.int8:
        return codes.int()
    pairs = torch.stack((codes >> 4, codes & 15), dim=-1)
    return pairs.flatten(1)[:, :in_features].int()


def dequantize_ref(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, codebook: Tensor | None, in_features: int, group_size: int
) -> Tensor:
    """The weight [N, K] in float32; arguments as in :func:`quantized_linear_ref`."""
    numbers = unpack_codes_ref(codes, in_features)
    if codes.dtype == torch.int8:
        return numbers * scales[:, None]

    def each(per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(group_size, dim=1)[:, :in_features]

    if codebook is not None:
        return codebook[numbers] * each(scales)
    return (numbers - (8 if zeros is None else each(zeros).int())) * each(scales.float())


def quantized_linear_ref(
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
    """``x @ w.t() + bias`` with a quantised w.

    Args:
        x: [num_tokens, K], a storage dtype.
        codes: [N, K] int8, or [N, ceil(K / 2)] uint8 with two 4-bit codes a byte, the first in the high half.
        scales: int8: [N] float32; int4: [N, ceil(K / group_size)] float16; with a codebook float32.
        zeros: [N, ceil(K / group_size)] uint8, zero points of int4 codes; None: 8.
        codebook: [16] float32, the values of the codes; None: they are integers.
        bias: [N] in the dtype of ``x``, or None.
        in_features: K.
        group_size: elements of a row of w that share a scale; of no meaning for int8.
        int8_activations: quantise the rows of ``x`` to int8, in groups.

    Returns:
        [num_tokens, N], dtype of ``x``; sums in float32.
    """
    if not int8_activations:
        y = x.float() @ dequantize_ref(codes, scales, zeros, codebook, in_features, group_size).t()
    else:
        int8 = codes.dtype == torch.int8
        group = INT8_GROUP if int8 else group_size
        rows, row_scales = quantize_activations_ref(x, group)
        groups = rows.size(1)
        numbers = unpack_codes_ref(codes, in_features)
        numbers = torch.nn.functional.pad(numbers, (0, groups * group - in_features)).view(-1, groups, group)
        if not int8:
            numbers = numbers - (8 if zeros is None else zeros.int()[..., None])
        y = torch.zeros((x.size(0), codes.size(0)), dtype=torch.float32, device=x.device)
        for g in range(groups):
            # integers below 2^24: exact in float32
            sums = rows[:, g].float() @ numbers[:, g].float().t()
            scale = row_scales[:, g, None] if int8 else row_scales[:, g, None] * scales[:, g].float()
            y += sums * scale
        if int8:
            y *= scales
    return (y if bias is None else y + bias.float()).to(x.dtype)
