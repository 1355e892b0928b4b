"""Bias addition fused with GPT-2's activation."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2rt.kernels import refs

from ._checks import check_like, check_rows
from ._library import define


def _bias_gelu_new_fake(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_bias_gelu_new = define(
    "bias_gelu_new",
    "(Tensor x, Tensor bias) -> Tensor",
    reference=refs.bias_gelu_new_ref,
    triton="bias_gelu_new:bias_gelu_new_triton",
    fake=_bias_gelu_new_fake,
)


def bias_gelu_new(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu_new(x + bias)`` in one pass over memory; Hendrycks & Gimpel, arXiv:1606.08415, the tanh form.

    Args:
        x: [num_tokens, n], float32, float16 or bfloat16; rows contiguous.
        bias: [n], dtype and device of ``x``.

    Returns:
        [num_tokens, n], a new tensor in the dtype of ``x``; computed in float32.

    Raises:
        ValueError: ``bias`` does not have the length of the last dimension of ``x``, or a stride does not fit.
        TypeError: a dtype does not fit.
    """
    check_rows("bias_gelu_new", "x", x)
    check_like("bias_gelu_new", "bias", bias, (x.size(1),), x, "was the bias of mlp.c_proj passed instead of mlp.c_fc?")
    return _bias_gelu_new(x, bias)
