"""The fused linear layer: norm, product, bias, activation and residual (or the store to the KV cache) in one launch.

    h = layer_norm(x) if norm else x
    y = residual + activation(h @ weight^T + bias)

One definition, two kernels: ``linear_rows`` multiplies and adds for up to ``MAX_ROWS`` rows, where the time is that of
reading the weights; ``linear_tiles`` feeds tensor cores for any number. Shapes: x [M, K], weight (N, K) in any format
of ``weights.py``, bias [N] or None, residual and out [M, N].

Sources: layer norm: Ba, Kiros & Hinton, arXiv:1607.06450; merging split attention: see ``paged_decode_attention.py``.
Imports torch alone: the launchers are imported where they are called.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .refs import bias_gelu_new_ref, compute_dtype, layer_norm_ref
from .weights import DeviceWeight

__all__ = ["MAX_ROWS", "Append", "Norm", "Partials", "fused_linear_ref", "fused_linear_rows", "fused_linear_triton"]

#: up to so many rows the kernel without tensor cores is taken; its results for a row do not depend on their number
MAX_ROWS = 8


class Norm(NamedTuple):
    """Layer norm before the product: weight and bias [K], eps added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float


class Append(NamedTuple):
    """Where the keys and values of a QKV product go: its columns are [queries, keys, values], E of each.

    Queries go to ``out`` [M, E]; keys and values to the caches [num_blocks, n_head, block_size, head_dim] of a float
    dtype at ``slots`` [M] int64, ``block_id * block_size + offset``; a slot outside the caches, such as -1, is skipped.
    """

    key_cache: Tensor
    value_cache: Tensor
    slots: Tensor


class Partials(NamedTuple):
    """Attention split over the context, not merged yet: ``x = sum_i 2^(lse_i - m) values_i / sum_i 2^(lse_i - m)``.

    values [M, n_head, num_splits, head_dim] float32, lse [M, n_head, num_splits] float32 (base 2), seq_lens [M] int32.
    Splits from ``ceil(seq_len / 64)`` on are not read; a row of length 0 is zeros.
    """

    values: Tensor
    lse: Tensor
    seq_lens: Tensor


def _activated(y: Tensor, name: str) -> Tensor:
    match name:
        case "linear":
            return y
        case "gelu_new":
            return bias_gelu_new_ref(y, torch.zeros(y.size(1), dtype=y.dtype, device=y.device))
        case "gelu":
            return 0.5 * y * (1.0 + torch.erf(y * math.sqrt(0.5)))
        case "relu":
            return torch.relu(y)
        case "silu":
            return y * torch.sigmoid(y)
        case "tanh":
            return torch.tanh(y)
        case "quick_gelu":
            return y * torch.sigmoid(1.702 * y)
    raise ValueError(f"there is no activation {name!r}")


def merge_partials_ref(partials: Partials, split: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Split attention, merged: [M, n_head * head_dim] in ``dtype``; splits of ``split`` tokens."""
    values, lse, seq_lens = partials
    num_splits = values.size(2)
    used = torch.arange(num_splits, device=lse.device) * split < seq_lens[:, None]  # [M, num_splits]
    logs = lse.to(dtype).masked_fill(~used[:, None], -math.inf)
    weights = torch.exp2(logs - logs.amax(dim=-1, keepdim=True)).nan_to_num(0.0)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    # tokens that no split holds
    weights = weights.masked_fill((seq_lens > num_splits * split)[:, None, None], math.nan)
    return (weights[..., None] * values.to(dtype).masked_fill(~used[:, None, :, None], 0.0)).sum(dim=2).flatten(1)


def fused_linear_ref(
    x: Tensor,
    weight: DeviceWeight,
    bias: Tensor | None,
    *,
    norm: Norm | None = None,
    activation: str = "linear",
    residual: Tensor | None = None,
) -> Tensor:
    """The definition, in float32 (float64 for float64 ``x``), not rounded at the end.

    Args:
        x: [M, K].
        weight: (N, K).
        bias: [N] or None.
        norm: of the rows of ``x``, or None.
        activation: "linear", "gelu_new", "gelu", "relu", "silu", "tanh" or "quick_gelu".
        residual: [M, N] or None.

    Returns:
        [M, N] float32 or float64.
    """
    dtype = compute_dtype(x)
    h = x.to(dtype)
    if norm is not None:
        h = layer_norm_ref(h, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
    y = h @ weight.dequantize(dtype).t()
    if bias is not None:
        y = y + bias.to(dtype)
    y = _activated(y, activation)
    return y if residual is None else residual.to(dtype) + y


def fused_linear_triton(
    x: Tensor,
    weight: DeviceWeight,
    bias: Tensor | None,
    out: Tensor,
    *,
    workspace: Tensor,
    norm: Norm | None = None,
    activation: str = "linear",
    residual: Tensor | None = None,
    append: Append | None = None,
    batch_invariant: bool = False,
    pdl: bool = False,
) -> None:
    """Launch the kernel for the number of rows; nothing is allocated and nothing waits for the device.

    Args:
        x: [M, K], contiguous rows, a storage dtype.
        weight: (N, K).
        bias: [N] or None.
        out: [M, N] (with ``append`` [M, N / 3]), contiguous rows, a storage dtype; written.
        workspace: uint8, at least ``linear_tiles.workspace_bytes`` of the call, on the device; it may hold anything.
        norm: of the rows of ``x``, as a prologue; for more than 64 rows only with ``batch_invariant``.
        activation: one of ``fusion.ACTIVATIONS``.
        residual: [M, N] or None; may be ``out``.
        append: the product is queries, keys and values; these two go to a cache.
        batch_invariant: take the kernel whose results for a row are the same for every M.
        pdl: programmatic dependent launch; the kernel before this one in the stream must follow its rules (fusion.py).
    """
    options = {"norm": norm, "activation": activation, "residual": residual, "append": append, "pdl": pdl}
    if x.size(0) <= MAX_ROWS and not batch_invariant:
        fused_linear_rows(x, weight, bias, out, **options)
    else:
        from .linear_tiles import fused_linear_tiles_triton

        fused_linear_tiles_triton(x, weight, bias, out, workspace=workspace, batch_invariant=batch_invariant, **options)


def fused_linear_rows(
    x: Tensor | None,
    weight: DeviceWeight,
    bias: Tensor | None,
    out: Tensor,
    *,
    partials: Partials | None = None,
    **options,
) -> None:
    """Launch the kernel for up to ``MAX_ROWS`` rows: that of CUDA C++ where it is enabled and has the weight's format.

    The arguments are those of ``linear_rows.fused_linear_rows_triton``.
    """
    from .linear_rows_cuda import fused_linear_rows_cuda, serves

    if serves(weight, out, partials):
        fused_linear_rows_cuda(x, weight, bias, out, partials=partials, **options)
    else:
        from .linear_rows import fused_linear_rows_triton

        fused_linear_rows_triton(x, weight, bias, out, partials=partials, **options)
