"""A whole decode step of one sequence in one launch, in CUDA C++ (csrc/cuda/persistent.cuh).

    x = wte[id] + wpe[position]
    per layer:  q, k, v = norm(x) w_qkv^T + b;  k and v to the cache
                x = x + attention(q, cache) w_proj^T + b
                x = x + activation(norm(x) w_fc^T + b) w_down^T + b
    hidden = norm(x);  logits = hidden w_head^T;  chosen = the first of the largest

Why it exists: a step of 124M parameters is some sixty dependent phases, and between two launches the memory idles.
Here a block on each multiprocessor runs all phases, with a barrier of the grid between them, and one of its warps
streams the block's share of the weights through rings in shared memory all the while: weights do not depend on
activations, so the memory works through the barriers.

Weights, keys and values are float16 or bfloat16; activations and sums are float32 everywhere. A row of a weight is
summed by one warp in an order that its length alone decides, splits of attention go by absolute position and are merged
in order: the bits depend on the weights' shapes and on the position, not on the number of multiprocessors. They are not
those of the Triton chain, whose activations are rounded between its kernels.

The stream of a model: its layers one after another, each with qkv, proj, fc and down, then the head. A weight [n, k] is
a sequence of tiles of eight rows; a tile is its eight biases in float32, then chunks of C elements of each of the eight
rows, C = n_embd rounded up to 256, at most 1024. Rows are padded with zeros to a multiple of eight elements, the last
tile to eight rows. So every chunk is one contiguous copy of whole 16 bytes, whatever the number of multiprocessors.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "MAX_HEAD_DIM",
    "DecodeLayer",
    "DecodeWeights",
    "chunk_elements",
    "pack_decode_weights",
    "pack_tiles",
    "persistent_blocks",
    "persistent_decode_cuda",
    "persistent_decode_ref",
    "unpack_tiles",
    "workspace_floats",
]

#: tokens in a split of attention, as in merge_splits.py (which needs triton)
SPLIT = 64
#: largest head that the attention phase has room for; head_dim is a multiple of 8
MAX_HEAD_DIM = 128
TILE_ROWS = 8
_HEADER = 4 * TILE_ROWS
# of a grid; each leaves its largest logit
_MAX_BLOCKS = 1024
# the order of fusion.ACTIVATIONS, which needs triton
_ACTIVATIONS = {
    "linear": lambda y: y,
    "gelu_new": lambda y: F.gelu(y, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
}


class DecodeLayer(NamedTuple):
    """Weights of a layer, [out, in] with any strides; biases [out] or None; norms (weight, bias) [n_embd].

    ``scale`` multiplies the scores.
    """

    attention_norm: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor | None]
    proj: tuple[Tensor, Tensor | None]
    mlp_norm: tuple[Tensor, Tensor]
    fc: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    scale: float


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeWeights:
    """A model as the kernel reads it.

    Attributes:
        stream: uint8, see the module's text.
        norms: [2 * n_layer + 1, 2, n_embd] float32: weight and bias, in the order of their use.
        scales: [n_layer] float32, of the scores, times log2(e).
        eps: of all norms.
        activation: of the inner layer, one of ``fusion.ACTIVATIONS``.
        inner: its width.
    """

    stream: Tensor
    norms: Tensor
    scales: Tensor
    eps: float
    activation: str
    inner: int


def chunk_elements(n_embd: int) -> int:
    """Elements of a row in a chunk; the same for all weights of a model."""
    return min(1024, -(-n_embd // 256) * 256)


def tiles_bytes(n: int, k: int) -> int:
    """Bytes of a weight [n, k] in the stream."""
    return -(-n // TILE_ROWS) * (_HEADER + 2 * TILE_ROWS * (-(-k // 8) * 8))


def pack_tiles(weight: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
    """A weight [n, k], float16 or bfloat16, and its bias [n] as a part of the stream, uint8."""
    n, k = weight.shape
    tiles, padded = -(-n // TILE_ROWS), -(-k // 8) * 8
    rows = F.pad(weight, (0, padded - k, 0, tiles * TILE_ROWS - n)).view(tiles, TILE_ROWS, padded)
    biases = torch.zeros(tiles * TILE_ROWS, dtype=torch.float32, device=weight.device)
    if bias is not None:
        biases[:n] = bias
    parts = [biases.view(tiles, TILE_ROWS).view(torch.uint8)]
    parts += [part.contiguous().view(torch.uint8).flatten(1) for part in rows.split(chunk, dim=2)]
    return torch.cat(parts, dim=1).flatten()


def unpack_tiles(data: Tensor, n: int, k: int, chunk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack_tiles`: the weight [n, k] in ``dtype`` and its bias [n] float32."""
    tiles, padded = -(-n // TILE_ROWS), -(-k // 8) * 8
    table = data.view(tiles, -1)
    biases = table[:, :_HEADER].contiguous().view(torch.float32).flatten()[:n]
    rows, at = [], _HEADER
    for first in range(0, padded, chunk):
        width = min(chunk, padded - first)
        part = table[:, at : at + 2 * TILE_ROWS * width].contiguous().view(dtype)
        rows.append(part.view(tiles * TILE_ROWS, width))
        at += 2 * TILE_ROWS * width
    return torch.cat(rows, dim=1)[:n, :k], biases


def pack_decode_weights(
    layers: Sequence[DecodeLayer],
    final_norm: tuple[Tensor, Tensor],
    head: Tensor,
    *,
    eps: float,
    activation: str = "gelu_new",
) -> DecodeWeights:
    """A model's weights in the order in which the kernel reads them; all of them are copied.

    Args:
        layers: all of one shape, float16 or bfloat16.
        final_norm: weight and bias [n_embd].
        head: [vocab_size, n_embd], any strides.
        eps: of all norms.
        activation: one of ``fusion.ACTIVATIONS``.

    Raises:
        torch.cuda.OutOfMemoryError: there is no room for a second copy of the weights.
    """
    n_embd, inner = head.size(1), layers[0].fc[0].size(0)
    chunk = chunk_elements(n_embd)
    products = [part for layer in layers for part in (layer.qkv, layer.proj, layer.fc, layer.down)] + [(head, None)]
    sizes = [tiles_bytes(*weight.shape) for weight, _ in products]
    stream = torch.empty(sum(sizes), dtype=torch.uint8, device=head.device)
    for part, (weight, bias) in zip(stream.split(sizes), products, strict=True):
        part.copy_(pack_tiles(weight, bias, chunk))
    norms = [part for layer in layers for part in (layer.attention_norm, layer.mlp_norm)] + [final_norm]
    return DecodeWeights(
        stream,
        torch.stack([torch.stack(norm).float() for norm in norms]),
        torch.tensor([layer.scale * math.log2(math.e) for layer in layers], dtype=torch.float32, device=head.device),
        eps,
        activation,
        inner,
    )


def workspace_floats(n_embd: int, wide: int, inner: int, n_head: int, num_splits: int) -> int:
    """float32 elements of the workspace of a step; ``wide`` = n_head * head_dim."""
    return n_embd + wide + -(-inner // 4) * 4 + num_splits * (wide + n_head) + 2 * _MAX_BLOCKS


def persistent_decode_ref(
    layers: Sequence[DecodeLayer],
    final_norm: tuple[Tensor, Tensor],
    head: Tensor,
    wte: Tensor,
    wpe: Tensor,
    token: int,
    position: int,
    context: Tensor,
    *,
    eps: float,
    activation: str = "gelu_new",
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in float32 (float64 if ``context`` is).

    Args:
        layers, final_norm, head: as in :func:`pack_decode_weights`.
        wte, wpe: [vocab_size, n_embd] and [n_positions, n_embd].
        token, position: of the step.
        context: [n_layer, 2, n_head, seq_len, head_dim], keys and values as the cache holds them after the step.
        eps, activation: as in :func:`pack_decode_weights`.

    Returns:
        logits [vocab_size], hidden [n_embd], and the new token's keys and values [n_layer, 2, n_head, head_dim].
    """
    wide = torch.float64 if context.dtype == torch.float64 else torch.float32
    _, _, n_head, _, head_dim = context.shape

    def product(x: Tensor, part: tuple[Tensor, Tensor | None]) -> Tensor:
        weight, bias = part
        return F.linear(x, weight.to(wide), None if bias is None else bias.to(wide))

    def norm(x: Tensor, part: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, x.shape, part[0].to(wide), part[1].to(wide), eps)

    x = wte[token].to(wide) + wpe[position].to(wide)
    written = []
    for layer, (keys, values) in zip(layers, context.to(wide), strict=True):
        query, key, value = product(norm(x, layer.attention_norm), layer.qkv).view(3, n_head, head_dim)
        written.append(torch.stack((key, value)))
        weights = torch.softmax(torch.einsum("hd,htd->ht", query, keys) * layer.scale, dim=-1)
        x = x + product(torch.einsum("ht,htd->hd", weights, values).flatten(), layer.proj)
        x = x + product(_ACTIVATIONS[activation](product(norm(x, layer.mlp_norm), layer.fc)), layer.down)
    hidden = norm(x, final_norm)
    return product(hidden, (head, None)), hidden, torch.stack(written)


def persistent_blocks(like: Tensor, n_head: int, head_dim: int, n_embd: int, inner: int) -> int:
    """Blocks that a launch on the device of ``like`` and for its dtype has: one a multiprocessor.

    Raises:
        ValueError: the device cannot run it (no cooperative launches, too little shared memory).
        AttributeError: the library that holds the op is not loaded.
    """
    return torch.ops.gpt2rt.persistent_blocks_cuda.default(like, n_head, head_dim, n_embd, inner)


def persistent_decode_cuda(
    weights: DecodeWeights,
    wte: Tensor,
    wpe: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    slot_mapping: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    cache: Tensor,
    workspace: Tensor,
    barrier: Tensor,
    logits: Tensor,
    hidden: Tensor | None = None,
    chosen: Tensor | None = None,
    *,
    num_splits: int,
    blocks: int = 0,
) -> None:
    """Launch the kernel on the first row of the inputs; nothing is allocated and nothing waits for the device.

    Args:
        weights: packed, on the device.
        wte, wpe: [vocab_size, n_embd] and [n_positions, n_embd], contiguous rows, dtype of the cache.
        input_ids, position_ids, slot_mapping: [1] int64. A row whose id or position is not in its table becomes NaN;
            slot -1 writes nothing.
        seq_lens: [1] int32, the new token included; 0 for a padding row.
        block_table: [1, max_blocks] int32. A block outside the cache makes the row NaN.
        cache: [n_layer, 2, num_blocks, n_head, block_size, head_dim], float16 or bfloat16, contiguous; written.
        workspace: [``workspace_floats``] float32; written.
        barrier: [1] int32, zero before the first launch and left to the kernel afterwards. Launches that share it must
            follow one another.
        logits: [vocab_size] or [1, vocab_size] float32; written.
        hidden: [n_embd] or [1, n_embd] float32, the row after the final norm; written. None: not wanted.
        chosen: [1] int64, the first of the largest logits, -1 unless all are finite; written. None: not wanted.
        num_splits: splits of 64 tokens that the workspace has room for; a longer sequence becomes NaN.
        blocks: of the grid; 0: one a multiprocessor, and never more. Changes no bit.

    Raises:
        ValueError: dtypes or sizes that the kernel does not have, or that contradict each other.
        RuntimeError: CUDA refuses the launch: all blocks must run at the same time.
        AttributeError: the library that holds the op is not loaded.
    """
    torch.ops.gpt2rt.persistent_decode_cuda.default(
        weights.stream,
        weights.norms,
        weights.scales,
        weights.eps,
        list(_ACTIVATIONS).index(weights.activation),
        wte,
        wpe,
        input_ids,
        position_ids,
        slot_mapping,
        seq_lens,
        block_table,
        cache,
        workspace,
        barrier,
        logits,
        hidden,
        chosen,
        weights.inner,
        num_splits,
        blocks,
    )
