"""Reference-counted KV blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from gpt2rt.errors import OutOfBlocksError
from gpt2rt.ops import block_pool_allocate, block_pool_free, block_pool_incref, new_block_pool


class BlockPool:
    """Hands out block ids and takes them back; every call succeeds whole or changes nothing.

    Args:
        num_blocks: blocks in the pool, 1 to 2**30.

    Raises:
        ValueError: ``num_blocks`` is out of range.
    """

    def __init__(self, num_blocks: int) -> None:
        self.state = new_block_pool(num_blocks)
        self._lock = threading.Lock()

    @property
    def num_blocks(self) -> int:
        return int(self.state[0])

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return int(self.state[1])

    def reference_count(self, block_id: int) -> int:
        """How many sequences hold this block; 0 when it is free.

        Raises:
            IndexError: there is no such block.
        """
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} does not exist; the pool has {self.num_blocks}")
        return int(self.state[2 + self.num_blocks + block_id])

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks, each with one reference.

        Raises:
            ValueError: ``num_blocks`` is negative.
            OutOfBlocksError: fewer are free; nothing is taken.
        """
        if num_blocks < 0:
            raise ValueError(f"num_blocks must be at least 0, got {num_blocks}")
        with self._lock:
            if num_blocks > self.num_free:
                raise OutOfBlocksError(
                    f"{num_blocks} KV blocks are needed, but only {self.num_free} of {self.num_blocks} are free; "
                    "free a sequence first or make the cache larger"
                )
            return block_pool_allocate(self.state, num_blocks).tolist()

    def incref(self, block_ids: Iterable[int]) -> None:
        """Add a reference to each block.

        Raises:
            RuntimeError: a block is not in use; nothing is changed.
        """
        with self._lock:
            block_pool_incref(self.state, torch.tensor(list(block_ids), dtype=torch.int32))

    def free(self, block_ids: Iterable[int]) -> int:
        """Drop a reference of each block and return how many became free.

        Raises:
            RuntimeError: a block has fewer references than were dropped; nothing is changed.
        """
        with self._lock:
            return block_pool_free(self.state, torch.tensor(list(block_ids), dtype=torch.int32))

    def __repr__(self) -> str:
        return f"BlockPool({self.num_blocks} blocks, {self.num_free} free)"
