"""The fused linear layer for up to eight rows: each weight is read once, multiplied and added, no tensor cores.

    h = layer_norm(x), or x, or the merge of split attention
    y = residual + activation(h @ weight^T + bias)

The definition is ``fused_linear_ref``. Shapes: x [M, K], weight (N, K) in any format of ``weights.py``, y [M, N].

A program owns a few rows of the weight. It reads them whole (up to ``MAX_WHOLE_K`` elements each) into registers, and
only then waits for the kernel before it: under programmatic dependent launch the weights are on their way while that
kernel still runs. Then it takes the rows of x one by one: each program normalises (or merges) a row for itself, which
costs a few KB from L2 and saves a launch. Every row takes the same instructions in the same order, and tile sizes
depend on the weight alone, so the bits of a row do not depend on how many rows there are.

Arithmetic in float32, one rounding at each store. The device functions are in ``row_tiles.py``.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .config_table import ConfigTable
from .fused_linear import Append, Norm, Partials
from .fusion import activated, let_dependents_start, normalised, store_qkv, wait_for_inputs
from .launch import OPTIONS, architecture_of, on_device
from .merge_splits import SPLIT
from .row_tiles import load_input, load_norm, load_tile, product_by_tiles, tile_product
from .weights import CHUNK, DeviceWeight

__all__ = ["MAX_SPLITS", "MAX_WHOLE_K", "RowsConfig", "RowsTile", "fused_linear_rows_triton", "rows_config"]

# longest weight row that a program holds in registers; longer ones are read again for every row of x
MAX_WHOLE_K = 8192
# partial results that a program merges for itself; with more of them a kernel of its own is cheaper
MAX_SPLITS = 8


class RowsTile(NamedTuple):
    """Weight rows of a program, and its warps."""

    block_n: int
    num_warps: int


class RowsConfig(NamedTuple):
    """Weight rows of a program, elements of a row in a tile, warps, and elements of a row in a segment (row_tiles)."""

    block_n: int
    block_k: int
    num_warps: int
    segment: int


# by bits of a weight: 32 or 64 weights a thread. Narrow weights take more rows, for the work on x is done by every
# program. One table for all architectures: neither shared memory nor tensor cores are used, and registers are as many
# on all of them. Starting points, not tuned on a device yet
TILES: ConfigTable[RowsTile] = ConfigTable(
    "linear_rows",
    ("row of the weight",),
    {
        16: ((2048, RowsTile(4, 4)), (MAX_WHOLE_K, RowsTile(2, 8))),
        8: ((1024, RowsTile(8, 4)), (2048, RowsTile(4, 4)), (4096, RowsTile(4, 8)), (MAX_WHOLE_K, RowsTile(2, 8))),
        4: ((1024, RowsTile(8, 4)), (2048, RowsTile(8, 8)), (4096, RowsTile(4, 8)), (MAX_WHOLE_K, RowsTile(2, 8))),
    },
)
FORMAT_BITS = {"dense": 16, "int8": 8, "int4": 4, "code4": 4}
# rows that do not fit: tile by tile
LOOPED = RowsConfig(4, 2048, 8, 2048)


def rows_config(weight: DeviceWeight, table: ConfigTable[RowsTile] = TILES) -> RowsConfig:
    """The tile for a weight; it depends on the weight and the device alone, never on the rows of x."""
    k = weight.shape[1]
    if k > MAX_WHOLE_K:
        return LOOPED
    # a tile holds at least one group of 4-bit codes
    block_k = max(triton.next_power_of_2(k), 16, CHUNK if weight.group_size else 0, weight.group_size)
    block_n, num_warps = table.find(architecture_of(weight.data), FORMAT_BITS[weight.format], k)
    # what a warp reads by one 16-byte load a thread, if the program has a row for each warp; else all
    segment = min(block_k, 512 // weight.data.element_size()) if block_n >= num_warps else block_k
    return RowsConfig(block_n, block_k, num_warps, segment)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _fused_linear_rows_kernel(
    x_ptr,
    values_ptr,
    lse_ptr,
    seq_lens_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    codebook_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    out_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slots_ptr,
    num_rows,
    num_slots,
    stride_x,
    stride_w,
    stride_residual,
    stride_out,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    # of attention and its cache; 0 where there is none
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE_K: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    bias = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)

    wait_for_inputs(PDL)
    for m in range(num_rows):
        row = tl.cast(m, tl.int64)
        if WHOLE_K:
            x = load_input(x_ptr, values_ptr, lse_ptr, seq_lens_ptr, row, 0, stride_x, K, D, NUM_SPLITS, SPLIT, BLOCK_K)
            if norm_weight_ptr is not None:
                x = normalised(x, norm_weight, norm_bias, tl.arange(0, BLOCK_K) < K, eps, K)
            y = tile_product(values, scales, x, GROUP, BLOCK_N, BLOCK_K)
        else:
            y = product_by_tiles(
                x_ptr,
                values_ptr,
                lse_ptr,
                seq_lens_ptr,
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
                D,
                NUM_SPLITS,
                SPLIT,
                SEGMENT,
                BLOCK_N,
                BLOCK_K,
            )
        y = activated(y + bias, ACTIVATION)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + row * stride_residual + column, mask=mask, other=0.0).to(tl.float32)
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + row)
            store_qkv(
                y,
                out_ptr,
                key_cache_ptr,
                value_cache_ptr,
                row,
                slot,
                column,
                mask,
                num_slots,
                stride_out,
                N // 3,
                D,
                BLOCK_SIZE,
            )
        else:
            tl.store(out_ptr + row * stride_out + column, y, mask=mask)


def fused_linear_rows_triton(
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
        x: [M, K], contiguous rows, a storage dtype; None with ``partials``. Meant for M up to ``MAX_ROWS``: with more
            rows the results hold, but the time is that of M products.
        weight: (N, K).
        bias: [N] or None.
        out: [M, N] (with ``append`` [M, N / 3]), contiguous rows, a storage dtype; written.
        norm: of the rows of x, or None; not with ``partials``.
        activation: one of ``fusion.ACTIVATIONS``.
        residual: [M, N], contiguous rows, or None; may be ``out``.
        append: the product is queries, keys and values, and these two go to a cache of a float dtype.
        partials: x is the merge of split attention, of at most ``MAX_SPLITS`` splits.
        pdl: programmatic dependent launch; the kernel before this one in the stream must follow its rules (fusion.py).

    Raises:
        ValueError: both or neither of ``x`` and ``partials``, ``norm`` with ``partials``, ``residual`` with
            ``append``, too many splits, or sizes that contradict the weight.
    """
    n, k = weight.shape
    num_rows = out.size(0)
    _check(x, weight, out, norm, residual, append, partials)
    if not out.numel():
        return
    config = rows_config(weight)
    head_dim = block_size = num_slots = num_splits = 0
    if append is not None:
        num_blocks, _, block_size, head_dim = append.key_cache.shape
        num_slots = num_blocks * block_size
    if partials is not None:
        num_splits, head_dim = partials.values.shape[2:]
    # the option is given only where it is asked for: targets before sm_90 do not know it
    launch = {"launch_pdl": True} if pdl else {}
    with on_device(out):
        _fused_linear_rows_kernel[(triton.cdiv(n, config.block_n),)](
            x,
            *(partials or (None, None, None)),
            weight.data,
            weight.scales,
            weight.zeros,
            weight.codebook,
            bias,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            residual,
            out,
            *(append or (None, None, None)),
            num_rows,
            num_slots,
            0 if x is None else x.stride(0),
            weight.data.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            0.0 if norm is None else norm.eps,
            N=n,
            K=k,
            FORMAT=weight.format,
            GROUP=weight.group_size,
            ACTIVATION=activation,
            D=head_dim,
            BLOCK_SIZE=block_size,
            NUM_SPLITS=num_splits,
            SPLIT=SPLIT,
            WHOLE_K=config.block_k >= k,
            SEGMENT=config.segment,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            PDL=pdl,
            num_warps=config.num_warps,
            **launch,
            **OPTIONS,
        )


def _check(
    x: Tensor | None,
    weight: DeviceWeight,
    out: Tensor,
    norm: Norm | None,
    residual: Tensor | None,
    append: Append | None,
    partials: Partials | None,
) -> None:
    """Refuse what the kernel would read or write outside its tensors."""
    n, k = weight.shape
    rows = out.size(0)
    if (x is None) == (partials is None):
        raise ValueError(
            "fused_linear_rows: expected either x or partials, got " + ("neither" if x is None else "both")
        )
    if partials is not None:
        m, n_head, num_splits, head_dim = partials.values.shape
        if norm is not None:
            raise ValueError("fused_linear_rows: a norm of merged attention is not built; merge it first")
        if (m, n_head * head_dim) != (rows, k) or not 1 <= num_splits <= MAX_SPLITS:
            raise ValueError(
                f"fused_linear_rows: partials are {list(partials.values.shape)}, expected [{rows}, n_head, 1 to "
                f"{MAX_SPLITS}, head_dim] with n_head * head_dim = {k}; merge longer contexts with merge_splits first"
            )
    elif x.shape != (rows, k) or x.stride(1) != 1:
        raise ValueError(
            f"fused_linear_rows: x is {list(x.shape)} with strides {list(x.stride())}, expected [{rows}, {k}] with "
            f"contiguous rows for out {list(out.shape)} and weight [{n}, {k}]"
        )
    width = n
    if append is not None:
        if residual is not None:
            raise ValueError("fused_linear_rows: a residual cannot be added to what goes to the cache")
        _, n_head, _, head_dim = append.key_cache.shape
        if n != 3 * n_head * head_dim or not append.key_cache.is_floating_point():
            raise ValueError(
                f"fused_linear_rows: the caches are {append.key_cache.dtype} with {n_head} heads of {head_dim}, "
                f"expected a float dtype and heads of {n} / 3 columns together; write_kv serves other caches"
            )
        width = n // 3
    if out.size(1) != width or out.stride(1) != 1:
        raise ValueError(
            f"fused_linear_rows: out is {list(out.shape)} with strides {list(out.stride())}, "
            f"expected [{rows}, {width}] with contiguous rows"
        )
