"""Final norm, lm_head and argmax in one pass over the weight: the logits of greedy decoding are never stored.

    logits = layer_norm(x) @ weight^T;   id = first n with the largest logit

Shapes: x [T, K], of which rows ``logits_indices`` [M] (or the first M) are taken; weight (N, K) in any format of
``weights.py``; ids [M] int64, the largest logits [M] float32; logits [M, N] float32 only when asked for. A row with NaN
or +infinity among its logits has the id -1 and the largest logit NaN, as ``argmax_ref`` has it; so has a row whose
index lies outside x, and with ``finite`` one with -infinity.

Two kernels. The first is ``linear_rows`` with another end: a program owns a few rows of the weight and leaves one
integer a row of x, a key whose high half orders floats and whose low half orders ids backwards. The second takes the
largest key of a row; in a decode loop it is part of ``advance.py``, which needs the token anyway. Being integers, keys
have one maximum, in whatever order they are compared. A counter that lets the last program of the first do this would
need memory ordered between programs, which no test without a GPU could prove.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config_table import ConfigTable, Line
from .fused_linear import Norm, fused_linear_ref
from .fusion import let_dependents_start, normalised, wait_for_inputs
from .launch import OPTIONS, on_device
from .linear_rows import MAX_WHOLE_K, RowsConfig, RowsTile, rows_config
from .row_tiles import load_input, load_norm, load_tile, product_by_tiles, tile_product
from .sampling_refs import argmax_ref
from .weights import DeviceWeight

__all__ = ["KEYS", "head_argmax_ref", "head_argmax_triton", "head_keys_triton", "head_workspace_bytes", "largest_of"]

# 64 weights a thread, for a vocabulary has programs enough. Starting points, not tuned on a device yet
LINES: tuple[Line, ...] = (
    (1024, RowsTile(16, 8)),
    (2048, RowsTile(8, 8)),
    (4096, RowsTile(4, 8)),
    (MAX_WHOLE_K, RowsTile(2, 8)),
)
# by bits of a weight; of all architectures, for the reasons of linear_rows
TILES: ConfigTable[RowsTile] = ConfigTable("head", ("row of the weight",), {16: LINES, 8: LINES, 4: LINES})
# keys of a row that the second kernel reads at a time
KEYS = 2048


def head_argmax_ref(
    x: Tensor, weight: DeviceWeight, norm: Norm | None, logits_indices: Tensor | None, finite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in float32 (float64 for float64 ``x``): ids [M] int64, largest logits [M], logits [M, N]."""
    rows = x if logits_indices is None else x[logits_indices]
    logits = fused_linear_ref(rows, weight, None, norm=norm)
    ids = argmax_ref(logits, finite)
    return ids, torch.where(ids < 0, torch.nan, logits.amax(dim=-1)), logits


def head_config(weight: DeviceWeight) -> RowsConfig:
    """The tile of the first kernel; it depends on the weight and the device alone."""
    return rows_config(weight, TILES)


def head_workspace_bytes(weight: DeviceWeight, num_rows: int) -> int:
    """Bytes of workspace for ``num_rows`` rows: a key for each row and program."""
    return 8 * num_rows * triton.cdiv(weight.shape[0], head_config(weight).block_n)


@triton.jit
def sortable_keys(values, ids):
    """int64 keys: larger for larger float32 values, and of equal values for the lower id; NaN and +inf above all."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0, which it equals
    # negative floats: their magnitude counts down
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    # NaN may have either sign
    ordered = tl.where(values < float("inf"), ordered, 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - ids.to(tl.int64))


@triton.jit(do_not_specialize=["num_rows", "num_x_rows"])
def _head_kernel(
    x_ptr,
    logits_indices_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    codebook_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    keys_ptr,
    logits_ptr,
    num_rows,
    num_x_rows,
    stride_x,
    stride_w,
    stride_logits,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FINITE: tl.constexpr,
    PDL: tl.constexpr,
):
    let_dependents_start(PDL)
    # int64: n * stride passes 2**31 for large vocabularies
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    mask = column < N
    if WHOLE_K:
        values, scales = load_tile(
            weight_ptr,
            scales_ptr,
            zeros_ptr,
            codebook_ptr,
            first,
            0,
            stride_w,
            N,
            K,
            FORMAT,
            GROUP,
            SEGMENT,
            BLOCK_N,
            BLOCK_K,
        )
        if norm_weight_ptr is not None:
            norm_weight, norm_bias = load_norm(norm_weight_ptr, norm_bias_ptr, 0, K, BLOCK_K)

    wait_for_inputs(PDL)
    for m in range(num_rows):
        target = tl.cast(m, tl.int64)
        row = target
        if logits_indices_ptr is not None:
            row = tl.load(logits_indices_ptr + m).to(tl.int64)
        inside = (row >= 0) & (row < num_x_rows)
        row = tl.where(inside, row, 0)
        if WHOLE_K:
            x = load_input(x_ptr, None, None, None, row, 0, stride_x, K, 0, 0, 0, BLOCK_K)
            if norm_weight_ptr is not None:
                x = normalised(x, norm_weight, norm_bias, tl.arange(0, BLOCK_K) < K, eps, K)
            y = tile_product(values, scales, x, GROUP, BLOCK_N, BLOCK_K)
        else:
            y = product_by_tiles(
                x_ptr,
                None,
                None,
                None,
                row,
                weight_ptr,
                scales_ptr,
                zeros_ptr,
                codebook_ptr,
                norm_weight_ptr,
                norm_bias_ptr,
                first,
                stride_x,
                stride_w,
                eps,
                N,
                K,
                FORMAT,
                GROUP,
                0,
                0,
                0,
                SEGMENT,
                BLOCK_N,
                BLOCK_K,
            )
        y = tl.where(inside, y, float("nan"))
        if logits_ptr is not None:
            tl.store(logits_ptr + target * stride_logits + column, y, mask=mask)
        if FINITE:
            y = tl.where(y > float("-inf"), y, float("nan"))
        # a row past the vocabulary has the lowest key of all
        keys = sortable_keys(tl.where(mask, y, float("-inf")), column)
        tl.store(keys_ptr + target * tl.num_programs(0) + tl.program_id(0), tl.max(keys, 0))


@triton.jit
def largest_of(keys_ptr, row, num_keys, BLOCK: tl.constexpr):
    """(token, logit) of the largest key of a row: the first of the largest logits, or -1 and NaN."""
    best = tl.full([BLOCK], -(2**63), tl.int64)
    for start in range(0, num_keys, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + row * num_keys + i, mask=i < num_keys, other=-(2**63))
        best = tl.maximum(best, key)
    key = tl.max(best, 0)
    ordered = (key >> 32).to(tl.int32)
    fine = ordered != 0x7FFFFFFF
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    value = tl.where(fine, bits.to(tl.float32, bitcast=True), float("nan"))
    # all logits -inf: nothing to choose
    fine = fine & (value > float("-inf"))
    return tl.where(fine, 0x7FFFFFFF - (key & 0xFFFFFFFF), -1), tl.where(fine, value, float("nan"))


@triton.jit(do_not_specialize=["num_keys"])
def _largest_key_kernel(keys_ptr, ids_ptr, best_ptr, num_keys, BLOCK: tl.constexpr, PDL: tl.constexpr):
    let_dependents_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    token, value = largest_of(keys_ptr, row, num_keys, BLOCK)
    tl.store(ids_ptr + row, token)
    tl.store(best_ptr + row, value)


def head_keys_triton(
    x: Tensor,
    weight: DeviceWeight,
    norm: Norm | None,
    logits_indices: Tensor | None,
    num_rows: int,
    workspace: Tensor,
    *,
    logits_out: Tensor | None = None,
    finite: bool = False,
    pdl: bool = False,
) -> Tensor:
    """Launch the first kernel; nothing is allocated and nothing waits for the device.

    Args:
        x: [T, K], contiguous rows, a storage dtype.
        weight: (N, K); N below 2^31.
        norm: of the rows of ``x``, or None.
        logits_indices: [M] int64 or int32, the rows of ``x`` that are asked for; None: the first M.
        num_rows: M.
        workspace: uint8, at least :func:`head_workspace_bytes`, starting at a multiple of 8 bytes.
        logits_out: [M, N] float32 with contiguous rows, or None; written.
        finite: -inf is as bad as NaN.
        pdl: programmatic dependent launch; the kernel before this one in the stream must follow its rules (fusion.py).

    Returns:
        [M, number of programs] int64, the keys, at the start of ``workspace``.

    Raises:
        ValueError: sizes that contradict each other.
    """
    n, k = weight.shape
    asked = x.size(0) if logits_indices is None else logits_indices.size(0)
    if x.size(1) != k or x.stride(1) != 1:
        raise ValueError(
            f"head_argmax: x is {list(x.shape)} with strides {list(x.stride())}, expected [T, {k}] with contiguous rows"
        )
    if asked < num_rows:
        raise ValueError(f"head_argmax: {num_rows} rows are wanted of the {asked} that are given")
    needed = head_workspace_bytes(weight, num_rows)
    if workspace.numel() * workspace.element_size() < needed:
        raise ValueError(
            f"head_argmax: the workspace has {workspace.numel() * workspace.element_size()} bytes, expected {needed} "
            f"for {num_rows} rows; head_workspace_bytes says how many"
        )
    if logits_out is not None and (logits_out.shape != (num_rows, n) or logits_out.stride(1) != 1):
        raise ValueError(
            f"head_argmax: logits_out is {list(logits_out.shape)}, expected [{num_rows}, {n}] with contiguous rows"
        )
    config = head_config(weight)
    num_keys = triton.cdiv(n, config.block_n)
    keys = workspace[:needed].view(torch.int64).view(num_rows, num_keys)
    if not num_rows:
        return keys
    with on_device(x):
        _head_kernel[(num_keys,)](
            x,
            logits_indices,
            weight.data,
            weight.scales,
            weight.zeros,
            weight.codebook,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            keys,
            logits_out,
            num_rows,
            x.size(0),
            x.stride(0),
            weight.data.stride(0),
            0 if logits_out is None else logits_out.stride(0),
            0.0 if norm is None else norm.eps,
            N=n,
            K=k,
            FORMAT=weight.format,
            GROUP=weight.group_size,
            WHOLE_K=config.block_k >= k,
            SEGMENT=config.segment,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            FINITE=finite,
            PDL=pdl,
            num_warps=config.num_warps,
            # the option is given only where it is asked for: targets before sm_90 do not know it
            **({"launch_pdl": True} if pdl else {}),
            **OPTIONS,
        )
    return keys


def head_argmax_triton(
    x: Tensor,
    weight: DeviceWeight,
    norm: Norm | None,
    logits_indices: Tensor | None,
    ids_out: Tensor,
    best_out: Tensor,
    workspace: Tensor,
    *,
    logits_out: Tensor | None = None,
    finite: bool = False,
    pdl: bool = False,
) -> None:
    """Launch both kernels; nothing is allocated and nothing waits for the device.

    Args:
        ids_out: [M] int64; written.
        best_out: [M] float32; written.
        x, weight, norm, logits_indices, workspace, logits_out, finite, pdl: as for :func:`head_keys_triton`.

    Raises:
        ValueError: sizes that contradict each other.
    """
    num_rows = ids_out.size(0)
    if best_out.size(0) != num_rows:
        raise ValueError(f"head_argmax: ids_out has {num_rows} rows, best_out {best_out.size(0)}; expected as many")
    options = {"logits_out": logits_out, "finite": finite, "pdl": pdl}
    keys = head_keys_triton(x, weight, norm, logits_indices, num_rows, workspace, **options)
    if not num_rows:
        return
    launch = {"launch_pdl": True} if pdl else {}
    with on_device(x):
        _largest_key_kernel[(num_rows,)](
            keys, ids_out, best_out, keys.size(1), BLOCK=KEYS, PDL=pdl, num_warps=8, **launch, **OPTIONS
        )
