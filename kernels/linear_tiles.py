"""The fused linear layer on tensor cores, for any number of rows: ``y = residual + activation(norm(x) @ w^T + bias)``.

The definition is :func:`gpt2rt.kernels.fused_linear.fused_linear_ref`. Shapes: x [M, K], weight (N, K) in any format of
``weights.py``, bias [N], residual and out [M, N].

A program owns a tile of the output and runs over tiles of K: ``tl.dot`` in the weight's ``compute_dtype`` (float16 and
bfloat16: products exact, sums float32; float32: "ieee", never TF32). Weights of 8 and 4 bits are read as they are
stored and become operands in registers (``weight_tiles.py``). ``tile_config.py`` has the tiles: up to 64 rows mma.sync
tiles of 16 or 32 rows, where the time is that of reading the weights; above that tiles of 64 and 128 rows, which are
wgmma on sm_90.

Few rows and few columns give too few programs to draw the memory's bandwidth, so K is split. Each split writes its
sums to the caller's workspace, and a second kernel adds them in the order of the splits and finishes (bias, activation,
residual, KV cache). A second kernel rather than the last program of a tile and a counter: both add in a fixed order,
but the counter must be zero before each launch and stays wrong after one that was cut short, needs a release and an
acquire over the whole device, and leaves the sums of a tile to one program. Two kernels keep no state, so a graph
replays them as they are, and under programmatic dependent launch the second waits in place.

A row's bits depend on the tile alone: never on the other rows, their number within one tile, or the number of SMs.
Tiles are chosen by M in buckets; with ``batch_invariant`` one tile serves every M. The split depends on N and K only.

Layer norm as a prologue: each program takes mean and variance of its rows in one pass, chunk by chunk (merged as in
Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1),
then normalises each tile of x as it comes.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_linear import Append, Norm
from .fusion import ACTIVATIONS
from .launch import OPTIONS, architecture_of, on_device
from .tile_config import FEW_ROWS, Tile, splits_for, tile_for
from .tile_kernels import linear_tiles_kernel, reduce_splits_kernel
from .weights import DeviceWeight

COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# elements of x that the statistics take at once: 32 a thread; starting point, not tuned on a device yet
STATISTICS_TILE = 4096
# the tile of the second kernel; starting points, not tuned on a device yet
REDUCE_ROWS, REDUCE_COLUMNS, REDUCE_WARPS = 4, 128, 4
# elements of w that one stored element holds, in formats of 4 bits
_PACKED = {"words": 8, "pairs": 2}
# bytes that a prefetch brings to the L2 cache
CACHE_LINE = 128


class StoredWeight(NamedTuple):
    """A weight as the kernel takes it.

    Attributes:
        format: "dense", "int8", "words" (4-bit codes as in ``weights.py``) or "pairs" (two a byte, the first high).
        shape: (N, K).
        data: the elements, codes, words or bytes.
        stride_n, stride_k: elements of ``data`` from a row to the next, and from an element of a row to the next; one
            of them is 1.
        compute_dtype: of the products.
        scales, zeros, codebook, group_size: as in :class:`DeviceWeight`; any group size that is a multiple of 32.
    """

    format: str
    shape: tuple[int, int]
    data: Tensor
    stride_n: int
    stride_k: int
    compute_dtype: torch.dtype
    scales: Tensor | None = None
    zeros: Tensor | None = None
    codebook: Tensor | None = None
    group_size: int = 0

    @property
    def four_bits(self) -> bool:
        return self.format in ("words", "pairs")


def stored(weight: DeviceWeight) -> StoredWeight:
    """A device weight as the kernel takes it."""
    return StoredWeight(
        "words" if weight.format in ("int4", "code4") else weight.format,
        weight.shape,
        weight.data,
        weight.data.stride(0),
        1,
        weight.compute_dtype,
        weight.scales,
        weight.zeros,
        weight.codebook,
        weight.group_size,
    )


def workspace_bytes(weight: DeviceWeight | StoredWeight, num_rows: int, *, batch_invariant: bool = False) -> int:
    """Bytes of workspace that a product of ``num_rows`` rows needs: a float32 for each output and split of K, or 0.

    What fewer rows need is not more. The workspace of a chain of kernels is that of the largest: a kernel is done with
    it when the next one starts.
    """
    weight = stored(weight) if isinstance(weight, DeviceWeight) else weight
    if not batch_invariant:
        num_rows = min(num_rows, FEW_ROWS)
    splits, _ = _splits(weight, _tile(weight, num_rows, batch_invariant, weight.compute_dtype.itemsize, 0))
    return 0 if splits == 1 else splits * num_rows * weight.shape[0] * 4


def fused_linear_tiles_triton(
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
    """Launch the layer: one kernel, or two where K is split. Allocates nothing and does not wait for the device.

    Args:
        x: [M, K], contiguous rows, a storage dtype.
        weight: (N, K).
        bias: [N] or None.
        out: [M, N] (with ``append`` [M, N / 3]), contiguous rows, a storage dtype; written.
        workspace: uint8, aligned to 16 bytes, at least ``workspace_bytes(weight, M)``; it may hold anything.
        norm: of the rows of ``x``, as a prologue; up to ``FEW_ROWS`` rows, or any number with ``batch_invariant``.
        activation: one of ``fusion.ACTIVATIONS``.
        residual: [M, N], contiguous rows, or None; may be ``out``.
        append: the product is queries, keys and values; these two go to a cache.
        batch_invariant: one tile for every M, so that a row's bits are the same whatever else is in the batch.
        pdl: programmatic dependent launch; the kernel before this one in the stream must follow its rules (fusion.py).

    Raises:
        ValueError: a shape does not fit, ``norm`` is given for too many rows, or the workspace is too small.
    """
    if norm is not None and x.size(0) > FEW_ROWS and not batch_invariant:
        raise ValueError(
            f"linear_tiles: norm with {x.size(0)} rows, expected at most {FEW_ROWS} outside of batch_invariant: each "
            "column tile would normalise every row again; launch layer_norm first and pass its result with norm=None"
        )
    launch(x, stored(weight), bias, out, workspace, norm, activation, residual, append, batch_invariant, pdl)


def launch(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
    norm: Norm | None = None,
    activation: str = "linear",
    residual: Tensor | None = None,
    append: Append | None = None,
    batch_invariant: bool = False,
    pdl: bool = False,
) -> None:
    """:func:`fused_linear_tiles_triton` for any stored weight; without a workspace one is allocated if need be."""
    num_rows = x.size(0)
    n_out, n_in = weight.shape
    _check(x, weight, out, activation, residual, append)
    if not num_rows or not n_out:
        return
    tile = _tile(weight, num_rows, batch_invariant, x.element_size(), architecture_of(x))
    few = batch_invariant or num_rows <= FEW_ROWS
    splits, tiles = _splits(weight, tile) if few else (1, -(-n_in // tile.block_k))
    partials = out
    if splits > 1:
        size = splits * num_rows * n_out * 4
        if workspace is None:
            workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        elif workspace.numel() < size or workspace.dtype != torch.uint8:
            raise ValueError(
                f"linear_tiles: workspace has {workspace.numel()} elements of {workspace.dtype}, expected at least "
                f"{size} of torch.uint8 for {num_rows} rows, {n_out} columns and {splits} splits: see workspace_bytes"
            )
        partials = workspace[:size].view(torch.float32)
    # what is absent is never read
    key_cache, value_cache, slots = (out, out, out) if append is None else append
    _, block_size, head_dim = (1, 1, 1) if append is None else key_cache.shape[1:]
    scales = x if weight.scales is None else weight.scales
    finish = {
        "N": n_out,
        "FORMAT": weight.format,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "APPEND": append is not None,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "ACTIVATION": activation,
        "PDL": pdl,
        "SPLITS": splits,
    }
    options: dict[str, object] = {**OPTIONS, "launch_pdl": True} if pdl else dict(OPTIONS)
    # ptxas of triton 3.6 spills 8 bytes on sm_120 to stay at 80 registers where nothing is gained by it
    limit = {"maxnreg": 128} if few and weight.format == "pairs" else {}
    ends = (
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        key_cache,
        value_cache,
        slots,
    )
    num_slots = key_cache.size(0) * block_size
    stride_residual = 1 if residual is None else residual.stride(0)
    row_bytes = tiles * tile.block_k * weight.data.element_size() // _PACKED.get(weight.format, 1)
    with on_device(x):
        linear_tiles_kernel[(triton.cdiv(num_rows, tile.block_m) * triton.cdiv(n_out, tile.block_n), splits)](
            x,
            weight.data,
            scales,
            x if weight.zeros is None else weight.zeros,
            x if weight.codebook is None else weight.codebook,
            x if norm is None else norm.weight,
            x if norm is None else norm.bias,
            *ends,
            partials,
            num_rows,
            num_slots,
            x.stride(0),
            weight.stride_n,
            weight.stride_k,
            stride_residual,
            out.stride(0),
            0.0 if norm is None else norm.eps,
            **finish,
            K=n_in,
            COMPUTE=COMPUTE[weight.compute_dtype],
            GROUP=max(1, weight.group_size),
            SPAN=math.gcd(weight.group_size, tile.block_k) if weight.four_bits else 1,
            HAS_ZEROS=weight.zeros is not None,
            HAS_CODEBOOK=weight.codebook is not None,
            HAS_NORM=norm is not None,
            PREFETCH_LINES=triton.next_power_of_2(triton.cdiv(row_bytes, CACHE_LINE)) if pdl and few else 0,
            LINE=CACHE_LINE,
            TILES=tiles,
            STATISTICS=STATISTICS_TILE // tile.block_m,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **limit,
            **options,
        )
        if splits > 1:
            reduce_splits_kernel[(triton.cdiv(num_rows, REDUCE_ROWS), triton.cdiv(n_out, REDUCE_COLUMNS))](
                partials,
                scales,
                *ends,
                num_rows,
                num_slots,
                stride_residual,
                out.stride(0),
                **finish,
                BLOCK_M=REDUCE_ROWS,
                BLOCK_N=REDUCE_COLUMNS,
                num_warps=REDUCE_WARPS,
                **options,
            )


def _tile(weight: StoredWeight, num_rows: int, batch_invariant: bool, x_bytes: int, architecture: int) -> Tile:
    return tile_for(
        num_rows,
        weight.shape[0],
        architecture=architecture,
        product_bytes=weight.compute_dtype.itemsize,
        x_bytes=x_bytes,
        four_bits=weight.four_bits,
        batch_invariant=batch_invariant,
    )


def _splits(weight: StoredWeight, tile: Tile) -> tuple[int, int]:
    return splits_for(*weight.shape, tile)


def _check(
    x: Tensor, weight: StoredWeight, out: Tensor, activation: str, residual: Tensor | None, append: Append | None
) -> None:
    """Raise ValueError unless the shapes fit each other: a kernel that trusts wrong ones writes to other tensors."""
    n_out, n_in = weight.shape
    columns = n_out if append is None else n_out // 3
    expected = [("x", x, n_in), ("out", out, columns)]
    if residual is not None:
        expected.append(("residual", residual, columns))
    for name, tensor, width in expected:
        if tensor.shape != (x.size(0), width) or (tensor.numel() and tensor.stride(1) != 1):
            raise ValueError(
                f"linear_tiles: {name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}, expected "
                f"[{x.size(0)}, {width}] with contiguous rows for a weight of {n_out} x {n_in}"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"linear_tiles: there is no activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    if append is not None:
        dtype = append.key_cache.dtype
        if dtype not in COMPUTE:
            raise ValueError(
                f"linear_tiles: append to caches of {dtype}, expected {', '.join(map(str, COMPUTE))}; for other caches "
                "take out [M, 3E] and launch write_kv"
            )
        _, n_head, _, head_dim = append.key_cache.shape
        if n_out != 3 * n_head * head_dim or residual is not None or activation != "linear":
            raise ValueError(
                f"linear_tiles: append to caches of {n_head} heads of {head_dim} wants a weight of "
                f"{3 * n_head * head_dim} rows, no activation and no residual; got {n_out} rows, {activation!r} and "
                f"{'a' if residual is not None else 'no'} residual"
            )
