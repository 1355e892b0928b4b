"""Layer normalisation, alone and fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2rt.kernels import refs

from ._checks import check_like, check_rows
from ._library import define


def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _add_layer_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)


_layer_norm = define(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    reference=refs.layer_norm_ref,
    triton="layer_norm:layer_norm_triton",
    fake=_layer_norm_fake,
)
_add_layer_norm = define(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    reference=refs.add_layer_norm_ref,
    triton="layer_norm:add_layer_norm_triton",
    fake=_add_layer_norm_fake,
)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_rows(op, "x", x)
    check_like(op, "weight", weight, (x.size(1),), x)
    check_like(op, "bias", bias, (x.size(1),), x)
    if not eps > 0.0:
        raise ValueError(f"{op}: eps must be greater than 0, got {eps}; GPT-2 uses 1e-5")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over each row; Ba, Kiros & Hinton, arXiv:1607.06450, eq. 4.

    Args:
        x: [num_tokens, n], float32, float16 or bfloat16; rows contiguous, any stride between them.
        weight: [n], dtype and device of ``x``.
        bias: [n], likewise.
        eps: added to the (biased) variance, > 0.

    Returns:
        [num_tokens, n], contiguous, dtype of ``x``; statistics and arithmetic in float32.

    Raises:
        ValueError: a shape, device or stride does not fit, or ``eps`` is not positive.
        TypeError: a dtype does not fit.
    """
    _check("layer_norm", x, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual addition and the layer norm that follows it, in one pass over memory.

    Args:
        x: [num_tokens, n], float32, float16 or bfloat16; rows contiguous.
        residual: [num_tokens, n], dtype and device of ``x``.
        weight: [n], likewise.
        bias: [n], likewise.
        eps: added to the variance, > 0.

    Returns:
        ``(layer_norm(s), s)`` with ``s = x + residual`` rounded to the dtype of ``x``; both [num_tokens, n].

    Raises:
        ValueError: a shape, device or stride does not fit, or ``eps`` is not positive.
        TypeError: a dtype does not fit.
    """
    _check("add_layer_norm", x, weight, bias, eps)
    check_rows("add_layer_norm", "residual", residual)
    check_like("add_layer_norm", "residual", residual, tuple(x.shape), x)
    return _add_layer_norm(x, residual, weight, bias, eps)
