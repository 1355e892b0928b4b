"""Large blocks of memory: packed weights, scratch memory, KV caches."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_HUGE_PAGE = 2 * 1024 * 1024


def allocate_arena(num_bytes: int) -> Tensor:
    """Uninitialised memory on 2 MiB pages where the system gives them.

    Weights, keys and values are read once a step; over 4 KiB pages the address translation costs up to half of that
    speed.

    Args:
        num_bytes: size, at least 1.

    Returns:
        [num_bytes] uint8 on CPU, aligned to 64 bytes (to 2 MiB from one page up).

    Raises:
        OSError: the system has not that much memory.
    """
    if num_bytes < _HUGE_PAGE:
        padded = torch.empty(num_bytes + 64, dtype=torch.uint8)
        offset = -padded.data_ptr() % 64
        return padded[offset : offset + num_bytes]
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    # the tensor keeps the mapping alive
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    offset = -tensor.data_ptr() % _HUGE_PAGE
    return tensor[offset : offset + num_bytes]
