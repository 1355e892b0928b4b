"""Reference-counted KV blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from gpt2rt.errors import OutOfBlocksError
from gpt2rt.ops import block_pool_allocate, block_pool_free, block_pool_incref, new_block_pool


class BlockPool:
    """Hands out block ids and takes them back; every call succeeds whole or changes nothing.

    Args:
        num_blocks: blocks in the pool, 1 to 2**30.

    Attributes:
        state: [2 + 2 * num_blocks] int32, see ``gpt2rt.ops.new_block_pool``.
        references: [num_blocks] integers, how often each block is held; a view that cannot be written to.
        reclaim: called by :meth:`allocate` with how many blocks are missing, to free that many and return how many it
            freed, or to free none and return 0; None: nobody is asked. It is called without the pool's lock.

    Raises:
        ValueError: ``num_blocks`` is out of range.
    """

    def __init__(self, num_blocks: int) -> None:
        self.state = new_block_pool(num_blocks)
        # the same memory: reading one number of a tensor costs a microsecond
        self._numbers = self.state.numpy().data.toreadonly()
        self.references = self._numbers[2 + num_blocks :]
        self.reclaim: Callable[[int], int] | None = None
        self._lock = threading.Lock()

    @property
    def num_blocks(self) -> int:
        return self._numbers[0]

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self._numbers[1]

    def reference_count(self, block_id: int) -> int:
        """How many sequences hold this block; 0 when it is free.

        Raises:
            IndexError: there is no such block.
        """
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} does not exist; the pool has {self.num_blocks}")
        return self.references[block_id]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks, each with one reference; where too few are free, :attr:`reclaim` is asked for the rest.

        Raises:
            ValueError: ``num_blocks`` is negative.
            OutOfBlocksError: fewer can be had; nothing is taken.
        """
        if num_blocks < 0:
            raise ValueError(f"num_blocks must be at least 0, got {num_blocks}")
        while True:
            with self._lock:
                missing = num_blocks - self.num_free
                if missing <= 0:
                    return block_pool_allocate(self.state, num_blocks).tolist()
            # without the lock, as `free` takes it; asked again if another thread was quicker with what became free
            if self.reclaim is None or self.reclaim(missing) <= 0:
                raise OutOfBlocksError(
                    f"{num_blocks} KV blocks are needed, but only {num_blocks - missing} of {self.num_blocks} are "
                    "free; free a sequence first or make the cache larger"
                )

    def incref(self, block_ids: Iterable[int]) -> None:
        """Add a reference to each block.

        Raises:
            RuntimeError: a block is not in use; nothing is changed.
        """
        with self._lock:
            block_pool_incref(self.state, _ids(block_ids))

    def free(self, block_ids: Iterable[int]) -> int:
        """Drop a reference of each block and return how many became free.

        Raises:
            RuntimeError: a block has fewer references than were dropped; nothing is changed.
        """
        with self._lock:
            return block_pool_free(self.state, _ids(block_ids))

    def reset(self) -> None:
        """Take all blocks back, whoever holds them."""
        with self._lock:
            self.state.copy_(new_block_pool(self.num_blocks))

    def __repr__(self) -> str:
        return f"BlockPool({self.num_blocks} blocks, {self.num_free} free)"


def _ids(block_ids: Iterable[int]) -> Tensor:
    # a third of the time of torch.tensor
    return torch.from_numpy(np.array(list(block_ids), np.int32))
