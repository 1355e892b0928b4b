"""Argument checks shared by the ops: they run before any work, on shapes and dtypes only (no device sync)."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2rt.kernels.refs import LARGEST_CODE

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_rows(op: str, name: str, x: Tensor) -> None:
    """``x`` is [num_tokens, n] in a storage dtype with contiguous rows."""
    if x.dim() != 2:
        raise ValueError(f"{op}: {name} must be [num_tokens, n], got {list(x.shape)}; flatten the leading dimensions")
    check_storage_dtype(op, name, x)
    if x.size(1) > 1 and x.stride(1) != 1:
        raise ValueError(f"{op}: rows of {name} must be contiguous, got stride {x.stride(1)}; call .contiguous()")


def check_storage_dtype(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in STORAGE_DTYPES:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected float32, float16 or bfloat16")


def check_like(op: str, name: str, x: Tensor, shape: tuple[int, ...], like: Tensor, hint: str = "") -> None:
    """``x`` has this shape and the dtype and device of ``like``."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected {list(shape)}{hint and '; ' + hint}")
    if x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {like.dtype}; cast one of them with .to()")
    check_device(op, name, x, like)


def check_device(op: str, name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, expected {like.device}; move it with .to()")


def check_index(op: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """``x`` is a contiguous tensor of this shape and dtype on the device of ``like``."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected {list(shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {dtype}")
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {list(x.stride())}; call .contiguous()")
    check_device(op, name, x, like)


def check_caches(
    op: str,
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    n_head: int,
    head_dim: int,
    like: Tensor,
) -> None:
    """Keys and values are contiguous [num_blocks, n_head, block_size, head_dim] on the device of ``like``.

    Their dtype is any that keys can be stored in; int8 and float8_e4m3fn have ``scales`` [num_blocks, n_head,
    block_size].
    """
    key_cache, value_cache = caches
    if key_cache.dim() != 4 or key_cache.size(1) != n_head or key_cache.size(3) != head_dim:
        raise ValueError(
            f"{op}: key_cache has shape {list(key_cache.shape)}, "
            f"expected [num_blocks, {n_head}, block_size, {head_dim}]"
        )
    if key_cache.dtype not in (*STORAGE_DTYPES, *LARGEST_CODE):
        raise TypeError(
            f"{op}: key_cache has dtype {key_cache.dtype}, expected float32, float16, bfloat16, int8 or float8_e4m3fn"
        )
    check_device(op, "key_cache", key_cache, like)
    check_like(op, "value_cache", value_cache, tuple(key_cache.shape), key_cache)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if not cache.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(cache.stride())}")
    for name, scale in zip(("key_scales", "value_scales"), scales, strict=True):
        if (scale is not None) != (key_cache.dtype in LARGEST_CODE):
            raise ValueError(
                f"{op}: {name} {'is missing' if scale is None else 'was given'}, but the cache is {key_cache.dtype}; "
                "int8 and float8_e4m3fn caches have scales, no other does"
            )
        if scale is not None:
            check_index(op, name, scale, tuple(key_cache.shape[:3]), torch.float32, like)
