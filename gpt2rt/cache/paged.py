"""Paged KV tensors and the block tables of the sequences that live in them.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
arXiv:2309.06180, section 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpt2rt.ops import write_kv
from gpt2rt.ops.arena import allocate_arena

from .block_pool import BlockPool

#: dtypes of keys and values that need a scale for each token and head
SCALED_DTYPES = (torch.int8, torch.float8_e4m3fn)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, *SCALED_DTYPES)


class PagedKVCache:
    """Keys and values of all layers, in blocks of ``block_size`` tokens.

    Args:
        n_layer: layers of the model.
        n_head: attention heads.
        head_dim: width of one head.
        num_blocks: blocks in the pool.
        block_size: tokens in a block.
        dtype: storage dtype: float32, float16, bfloat16, or int8 or float8_e4m3fn: a quarter of float32 and one float32
            scale for each token and head (``gpt2rt.kernels.refs.quantize_heads_ref``). The cpu executor has no float8.
        device: where the tensors live.

    Attributes:
        data: [n_layer, 2, num_blocks, n_head, block_size, head_dim]; index 0 of the second dimension holds keys,
            1 values. On a CPU it lies on 2 MiB pages where the system gives them.
        scales: [n_layer, 2, num_blocks, n_head, block_size] float32 for int8 and float8, else None.
        pool: which blocks are in use.

    Raises:
        ValueError: a size is not positive.
        TypeError: another dtype.
        OSError: the system has not that much memory (CPU).
    """

    def __init__(
        self,
        n_layer: int,
        n_head: int,
        head_dim: int,
        num_blocks: int,
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("n_layer", n_layer), ("n_head", n_head), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if block_size < 8 or block_size & (block_size - 1):
            raise ValueError(f"block_size must be a power of two >= 8, got {block_size}; use 16, the default")
        if dtype not in _DTYPES:
            raise TypeError(f"a KV cache cannot be {dtype}; choose float32, float16, bfloat16, int8 or float8_e4m3fn")
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        # unwritten slots are never read: attention stops at each sequence's length
        self.data = _uninitialized((n_layer, 2, num_blocks, n_head, block_size, head_dim), dtype, device)
        self.scales: Tensor | None = None
        if dtype in SCALED_DTYPES:
            self.scales = _uninitialized((n_layer, 2, num_blocks, n_head, block_size), torch.float32, device)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a sequence of ``num_tokens`` tokens occupies."""
        return -(-num_tokens // self.block_size)

    def key_cache(self, layer: int) -> Tensor:
        """[num_blocks, n_head, block_size, head_dim], a view."""
        return self.data[layer, 0]

    def value_cache(self, layer: int) -> Tensor:
        """[num_blocks, n_head, block_size, head_dim], a view."""
        return self.data[layer, 1]

    def key_scales(self, layer: int) -> Tensor | None:
        """[num_blocks, n_head, block_size] float32, a view; None unless the cache is int8 or float8."""
        return None if self.scales is None else self.scales[layer, 0]

    def value_scales(self, layer: int) -> Tensor | None:
        """[num_blocks, n_head, block_size] float32, a view; None unless the cache is int8 or float8."""
        return None if self.scales is None else self.scales[layer, 1]

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Put tokens of one layer into their slots; arguments and errors as those of ``gpt2rt.ops.write_kv``."""
        scales = self.key_scales(layer), self.value_scales(layer)
        write_kv(key, value, self.key_cache(layer), self.value_cache(layer), slots, *scales)

    def read(self, blocks: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        """Keys and values of sequences of one length, out of their blocks.

        Args:
            blocks: [num_seqs, blocks_for(length)] integers on the cache's device: their block tables.
            length: tokens of each.
            dtype: of the result.

        Returns:
            [n_layer, 2, num_seqs, n_head, length, head_dim], a new tensor.
        """
        tokens = self.data[:, :, blocks]  # [n_layer, 2, num_seqs, blocks, n_head, block_size, head_dim]
        if self.scales is not None:
            tokens = tokens.float() * self.scales[:, :, blocks][..., None]
        return tokens.transpose(3, 4).flatten(4, 5)[..., :length, :].to(dtype)

    def copy_block(self, source: int, target: int) -> None:
        """Copy all layers of one block over another."""
        for part in (self.data, self.scales):
            if part is not None:
                part[:, :, target].copy_(part[:, :, source])

    def __repr__(self) -> str:
        parts = [part for part in (self.data, self.scales) if part is not None]
        megabytes = sum(part.numel() * part.element_size() for part in parts) / 1e6
        return f"PagedKVCache({self.pool!r}, block_size={self.block_size}, {self.data.dtype}, {megabytes:.1f} MB)"


def _uninitialized(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return allocate_arena(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


class Sequence:
    """The block table of one sequence: which blocks hold its tokens, in order.

    A sequence holds one reference to each of its blocks until :meth:`free`, which may be called again.

    Args:
        cache: where its keys and values live.

    Attributes:
        blocks: physical block ids in logical order.
        length: tokens in the cache (or reserved by :meth:`append`).
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.blocks: list[int] = []
        self.length = 0
        # the last block may be shared with a fork or a prefix index: look before writing to it
        self._tail_may_be_shared = False

    def adopt(self, blocks: list[int], num_tokens: int) -> None:
        """Start with tokens that are in the cache already, as ``PrefixIndex.lookup`` finds them.

        Args:
            blocks: their blocks in order, with a reference to each, which becomes the sequence's.
            num_tokens: how many; a last block that they do not fill is copied before it is written to.

        Raises:
            ValueError: the sequence has tokens, or these tokens do not take that many blocks; the references stay with
                the caller.
        """
        if self.length or self.blocks:
            raise ValueError(
                f"only an empty sequence can adopt blocks, this one has {self.length} tokens; free it first"
            )
        if num_tokens < 0 or self.cache.blocks_for(num_tokens) != len(blocks):
            raise ValueError(
                f"{num_tokens} tokens in blocks of {self.cache.block_size} do not take the {len(blocks)} blocks given"
            )
        self.blocks = list(blocks)
        self.length = num_tokens
        self._tail_may_be_shared = True

    def append(self, num_tokens: int) -> list[int]:
        """Reserve room for the next tokens and return their slots.

        A last block that is shared with a fork or a prefix index is copied first (copy on write).

        Args:
            num_tokens: how many, at least 0.

        Returns:
            ``num_tokens`` slots, ``block_id * block_size + offset``.

        Raises:
            ValueError: ``num_tokens`` is negative.
            OutOfBlocksError: the pool cannot give the blocks; nothing is changed.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens must be at least 0, got {num_tokens}")
        pool, size = self.cache.pool, self.cache.block_size
        start, stop = self.length, self.length + num_tokens
        copy_tail = False
        if self._tail_may_be_shared and num_tokens:
            copy_tail = start % size != 0 and pool.reference_count(self.blocks[-1]) > 1
        missing = self.cache.blocks_for(stop) - len(self.blocks)
        new = pool.allocate(missing + copy_tail) if missing + copy_tail > 0 else []
        if copy_tail:
            try:
                self.cache.copy_block(self.blocks[-1], new[0])
                pool.free([self.blocks[-1]])
            except BaseException:
                pool.free(new)
                raise
            self.blocks[-1] = new.pop(0)
        if num_tokens:
            self._tail_may_be_shared = False
        self.blocks.extend(new)
        self.length = stop
        if num_tokens == 1:
            return [self.blocks[-1] * size + start % size]
        return [self.blocks[i // size] * size + i % size for i in range(start, stop)]

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on and free the blocks that held only those.

        Raises:
            ValueError: ``length`` is negative or more than the sequence has.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie in [0, {self.length}], got {length}")
        keep = self.cache.blocks_for(length)
        if self.blocks[keep:]:
            self.cache.pool.free(self.blocks[keep:])
            del self.blocks[keep:]
        if length < self.length:
            # the block that is last now may have been full before: a fork or a prefix index may hold it too
            self._tail_may_be_shared = True
        self.length = length

    def fork(self) -> Sequence:
        """A second sequence with the same tokens, sharing all blocks; each copies what it writes to."""
        self.cache.pool.incref(self.blocks)
        child = Sequence(self.cache)
        child.blocks = list(self.blocks)
        child.length = self.length
        self._tail_may_be_shared = child._tail_may_be_shared = True
        return child

    def free(self) -> None:
        """Give all blocks back."""
        blocks, self.blocks, self.length = self.blocks, [], 0
        if blocks:
            self.cache.pool.free(blocks)

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"Sequence({self.length} tokens in blocks {self.blocks})"
