"""Reference-counted allocation of KV blocks.

The pool's whole state is one int32 tensor, so it is owned, copied and freed like any other memory:

    state[0]                number of blocks N
    state[1]                number of free blocks
    state[2 : 2 + N]        stack of free block ids, its top at index 2 + state[1] - 1
    state[2 + N : 2 + 2N]   reference counts

Every call either succeeds or raises and changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define


def new_block_pool(num_blocks: int) -> Tensor:
    """The state of a pool whose blocks are all free; block 0 is handed out first.

    Args:
        num_blocks: how many blocks, 1 to 2**30.

    Returns:
        [2 + 2 * num_blocks] int32 on CPU.

    Raises:
        ValueError: ``num_blocks`` is out of range.
    """
    if not 1 <= num_blocks <= 2**30:
        raise ValueError(f"num_blocks must be between 1 and 2**30, got {num_blocks}")
    state = torch.zeros(2 + 2 * num_blocks, dtype=torch.int32)
    state[0] = state[1] = num_blocks
    state[2 : 2 + num_blocks] = torch.arange(num_blocks - 1, -1, -1, dtype=torch.int32)
    return state


def _counts(state: Tensor) -> tuple[Tensor, Tensor]:
    num_blocks = int(state[0])
    return state[2 : 2 + num_blocks], state[2 + num_blocks :]


def _allocate_ref(state: Tensor, num_blocks: int) -> Tensor:
    stack, references = _counts(state)
    num_free = int(state[1])
    if num_blocks < 0 or num_blocks > num_free:
        raise RuntimeError(f"block_pool_allocate: {num_blocks} blocks wanted, {num_free} of {stack.numel()} are free")
    ids = stack[num_free - num_blocks : num_free].flip(0).clone()
    references[ids.long()] = 1
    state[1] = num_free - num_blocks
    return ids


def _used(op: str, state: Tensor, block_ids: Tensor) -> Tensor:
    _, references = _counts(state)
    ids = block_ids.long()
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= references.numel()):
        raise RuntimeError(f"{op}: block ids {block_ids.tolist()} must lie in [0, {references.numel()})")
    used = torch.bincount(ids, minlength=references.numel()).to(torch.int32)
    bad = (references == 0) & (used > 0) if op == "block_pool_incref" else used > references
    if bad.any():
        block = int(bad.nonzero()[0])
        raise RuntimeError(f"{op}: block {block} has {int(references[block])} references, {int(used[block])} named")
    return used


def _incref_ref(state: Tensor, block_ids: Tensor) -> None:
    used = _used("block_pool_incref", state, block_ids)
    _counts(state)[1].add_(used)


def _free_ref(state: Tensor, block_ids: Tensor) -> None:
    used = _used("block_pool_free", state, block_ids)
    stack, references = _counts(state)
    references.sub_(used)
    freed: list[int] = []
    for position, block in enumerate(block_ids.tolist()):
        # a block named twice is pushed where its last reference went
        if references[block] == 0 and block not in block_ids[position + 1 :].tolist():
            freed.append(block)
    num_free = int(state[1])
    stack[num_free : num_free + len(freed)] = torch.tensor(freed, dtype=torch.int32)
    state[1] = num_free + len(freed)


def _allocate_fake(state: Tensor, num_blocks: int) -> Tensor:
    return torch.empty(num_blocks, dtype=torch.int32, device=state.device)


def _change_fake(state: Tensor, block_ids: Tensor) -> None:
    return None


_allocate = define(
    "block_pool_allocate",
    "(Tensor(a!) state, int num_blocks) -> Tensor",
    reference=_allocate_ref,
    fake=_allocate_fake,
)
_incref = define(
    "block_pool_incref", "(Tensor(a!) state, Tensor block_ids) -> ()", reference=_incref_ref, fake=_change_fake
)
_free = define("block_pool_free", "(Tensor(a!) state, Tensor block_ids) -> ()", reference=_free_ref, fake=_change_fake)


def block_pool_allocate(state: Tensor, num_blocks: int) -> Tensor:
    """Take free blocks; each gets a reference count of 1.

    Args:
        state: a pool's state (:func:`new_block_pool`); changed in place.
        num_blocks: how many.

    Returns:
        [num_blocks] int32 block ids.

    Raises:
        RuntimeError: fewer are free; nothing is taken.
    """
    return _allocate(state, num_blocks)


def block_pool_incref(state: Tensor, block_ids: Tensor) -> None:
    """Add one reference to each block, as a fork does.

    Args:
        state: a pool's state; changed in place.
        block_ids: [n] int32, blocks in use.

    Raises:
        RuntimeError: an id is out of range or free; nothing is changed.
    """
    _incref(state, block_ids)


def block_pool_free(state: Tensor, block_ids: Tensor) -> int:
    """Drop one reference of each block; those without any go back to the pool.

    Args:
        state: a pool's state; changed in place.
        block_ids: [n] int32; an id may stand several times and loses as many references.

    Returns:
        How many blocks became free.

    Raises:
        RuntimeError: an id is out of range or has fewer references; nothing is changed.
    """
    # counted here: an op that changes its argument and returns a host integer could not be traced
    before = int(state[1])
    _free(state, block_ids)
    return int(state[1]) - before
