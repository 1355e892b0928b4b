"""The memory that packed weights live in."""

import gc

import pytest
import torch

from gpt2rt.ops.arena import allocate_arena


@pytest.mark.parametrize("num_bytes", [1, 63, 4096, 2 * 1024 * 1024 - 1, 2 * 1024 * 1024, 5_000_001])
def test_size_and_alignment(num_bytes):
    arena = allocate_arena(num_bytes)
    assert arena.shape == (num_bytes,)
    assert arena.dtype == torch.uint8
    assert arena.data_ptr() % (64 if num_bytes < 2 * 1024 * 1024 else 2 * 1024 * 1024) == 0
    arena.fill_(7)
    assert arena.min() == arena.max() == 7


def test_a_view_keeps_the_memory_alive():
    view = allocate_arena(8 * 1024 * 1024)[-64:]
    gc.collect()
    view.fill_(3)
    assert view.sum() == 3 * 64


def test_more_than_the_machine_has_is_an_error_not_a_crash():
    with pytest.raises(OSError, match="Cannot allocate memory"):
        allocate_arena(2**52)
