"""Matrix multiplication with bias, in either weight orientation."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2rt.kernels import refs

from ._checks import check_device, check_like, check_rows
from ._library import define

#: output columns in one panel of a packed weight; csrc/cpu reads the same layout on every ISA
PANEL = 64


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty((x.size(0), weight.size(0)), dtype=x.dtype, device=x.device)


def _linear_residual_fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return _linear_fake(x, weight, bias)


def _pack_linear_fake(weight: Tensor, out: Tensor) -> None:
    return None


_linear = define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=refs.linear_ref,
    triton="linear:linear_triton",
    fake=_linear_fake,
)
_linear_gelu_new = define(
    "linear_gelu_new",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=refs.linear_gelu_new_ref,
    triton="linear:linear_gelu_new_triton",
    fake=_linear_fake,
)
_linear_residual = define(
    "linear_residual",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
    reference=refs.linear_residual_ref,
    triton="linear:linear_residual_triton",
    fake=_linear_residual_fake,
)
_pack_linear = define("pack_linear", "(Tensor weight, Tensor(a!) out) -> ()", reference=None, fake=_pack_linear_fake)


def _check_weight(op: str, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [out_features, in_features], got {list(weight.shape)}")
    if weight.numel() and weight.stride(0) != 1 and weight.stride(1) != 1:
        raise ValueError(
            f"{op}: one dimension of weight must be contiguous, got strides {list(weight.stride())}; "
            "call .contiguous() (a transposed view of a contiguous matrix is fine as it is)"
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: [num_tokens, in_features], float32, float16 or bfloat16; rows contiguous.
        weight: [out_features, in_features] as in ``nn.Linear``, dtype and device of ``x``; either dimension may be
            the contiguous one, so a GPT-2 ``Conv1D`` weight is passed as ``weight.t()`` without a copy.
        bias: [out_features], likewise, or None.

    Returns:
        [num_tokens, out_features], contiguous, dtype of ``x``; accumulated in float32 and rounded once. On CPU each
        element is summed in an order that ``in_features`` alone decides: a row's result does not depend on the other
        rows.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a dtype does not fit.
    """
    _check_linear("linear", x, weight, bias)
    return _linear(x, weight, bias)


def linear_gelu_new(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``gelu_new(x @ weight.T + bias)``: the first half of a GPT-2 MLP without a second pass over memory.

    The activation is the tanh approximation of Hendrycks & Gimpel, arXiv:1606.08415. Arguments, result and errors are
    those of :func:`linear`; the sum is rounded once, after the activation.
    """
    _check_linear("linear_gelu_new", x, weight, bias)
    return _linear_gelu_new(x, weight, bias)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``residual + x @ weight.T + bias``: the end of a branch and its addition to the residual stream in one pass.

    Args:
        x, weight, bias: as in :func:`linear`.
        residual: [num_tokens, out_features], dtype and device of ``x``; rows contiguous.

    Returns:
        [num_tokens, out_features], a new tensor; the sum is rounded once.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a dtype does not fit.
    """
    _check_linear("linear_residual", x, weight, bias)
    check_rows("linear_residual", "residual", residual)
    check_like("linear_residual", "residual", residual, (x.size(0), weight.size(0)), x)
    return _linear_residual(x, weight, bias, residual)


def _check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_rows(op, "x", x)
    _check_weight(op, weight)
    check_like(op, "weight", weight, (weight.size(0), x.size(1)), x, "a Conv1D weight is [in, out]: pass weight.t()")
    if bias is not None:
        check_like(op, "bias", bias, (weight.size(0),), x)


def packed_linear_bytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Size in bytes of a packed [out_features, in_features] weight: whole panels of 64 output columns."""
    # bfloat16 lies in pairs along the input
    padded = in_features + in_features % 2 if dtype == torch.bfloat16 else in_features
    return -(-out_features // PANEL) * PANEL * padded * dtype.itemsize


def pack_linear(weight: Tensor, out: Tensor) -> None:
    """Write ``weight`` into ``out`` in the order that the CPU kernels read: panels [in_features, 64].

    Args:
        weight: [out_features, in_features], float32, float16 or bfloat16 on CPU, either dimension contiguous.
        out: [packed_linear_bytes(...)] uint8 on CPU, contiguous, aligned to 64 bytes; overwritten, columns past
            ``out_features`` with zeros.

    Raises:
        ValueError: a shape or stride does not fit, or ``out`` is not aligned to 64 bytes.
        NotImplementedError: the extension is missing.
    """
    _check_weight("pack_linear", weight)
    check_device("pack_linear", "out", out, weight)
    expected = packed_linear_bytes(weight.size(0), weight.size(1), weight.dtype)
    if out.dim() != 1 or out.numel() != expected or out.dtype != torch.uint8:
        raise ValueError(f"pack_linear: out must be [{expected}] uint8, got {list(out.shape)} {out.dtype}")
    _pack_linear(weight, out)
