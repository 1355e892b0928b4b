"""The product of activations with a quantised weight: on the kernels, with gradients, and in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2rt import ops
from gpt2rt.kernels.quantized_linear import quantize_activations_ref
from gpt2rt.quantization.weight import INT8_ACTIVATION_GROUP, QuantizedWeight

from .layers import KERNEL_DTYPES, as_rows, is_transformed

# rows of a narrow float weight that are widened at a time
_WIDENED_ROWS = 4096


def product(x: Tensor, weight: QuantizedWeight | Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``; if the weight says so, with x rounded to int8.

    Differentiable with respect to ``x`` and ``bias``. Under autocast, x and bias are cast first, as a linear layer's.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features]; a tensor may have another floating-point dtype than ``x``.
        bias: [out_features] in the dtype of ``x``, or None.
    Returns:
        [..., out_features] in the dtype of ``x``.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return product(x.to(dtype), weight, None if bias is None else bias.to(dtype))
    plain = x.dtype not in KERNEL_DTYPES or torch.jit.is_tracing() or is_transformed()
    rows = as_rows(x)
    if plain:
        y = plain_product(rows, weight, bias)
    elif torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _Product.apply(rows, bias, weight)
    else:
        y = _run(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _run(rows: Tensor, weight: QuantizedWeight | Tensor, bias: Tensor | None) -> Tensor:
    """On the kernels: [num_tokens, in_features] to [num_tokens, out_features]."""
    if isinstance(weight, Tensor):
        if weight.dtype == rows.dtype:
            return ops.linear(rows, weight, bias)
        biases = [None] * len(weight) if bias is None else bias.split(_WIDENED_ROWS)
        parts = [
            ops.linear(rows, part.to(rows.dtype), b)
            for part, b in zip(weight.split(_WIDENED_ROWS), biases, strict=False)
        ]
        return torch.cat(parts, dim=1)
    if not ops.has_kernel(weight.scheme == "int8", weight.codebook is not None, weight.shape[1], weight.group_size):
        # blocks of odd sizes are those of odd models
        return ops.linear(rows, weight.dequantize(rows.dtype), bias)
    return ops.quantized_linear(
        rows,
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.codebook,
        bias,
        in_features=weight.shape[1],
        group_size=weight.group_size,
        int8_activations=weight.activations == "int8",
    )


def _widened(weight: QuantizedWeight | Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


def plain_product(rows: Tensor, weight: QuantizedWeight | Tensor, bias: Tensor | None) -> Tensor:
    """:func:`product` of [num_tokens, in_features] by torch's functions, for torch.func, torch.jit and float64."""
    if isinstance(weight, QuantizedWeight) and weight.activations == "int8":
        group = INT8_ACTIVATION_GROUP if weight.scheme == "int8" else weight.group_size
        codes, scales = quantize_activations_ref(rows.detach(), group)
        rounded = (codes * scales.unsqueeze(-1)).flatten(1)[:, : rows.size(1)].to(rows.dtype)
        # the value of the rounded rows with the gradient of the others
        rows = rows + (rounded - rows).detach()
    return F.linear(rows, _widened(weight, rows.dtype), bias)


class _Product(torch.autograd.Function):
    """The kernel with a gradient; the float weight exists during the backward pass only, a layer at a time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor | None, weight: QuantizedWeight | Tensor) -> Tensor:
        ctx.quantized = weight
        return _run(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        for_rows = grad @ _widened(ctx.quantized, grad.dtype) if ctx.needs_input_grad[0] else None
        for_bias = grad.sum(0) if ctx.needs_input_grad[1] else None
        return for_rows, for_bias, None
