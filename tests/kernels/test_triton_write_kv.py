"""write_kv in triton's interpreter: copies must be exact, and nothing else may change."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.write_kv import write_kv_ref, write_kv_triton

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNTOUCHED = 7.0


def caches(num_blocks, n_head, block_size, head_dim, dtype):
    """Two pairs (buffer, cache); the cache lies between guard blocks of its buffer."""
    buffers = [torch.full((num_blocks + 2, n_head, block_size, head_dim), UNTOUCHED, dtype=dtype) for _ in range(2)]
    return buffers, [b[1:-1] for b in buffers]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "n_head", "head_dim", "block_size"),
    [(1, 1, 1, 16), (9, 3, 5, 8), (5, 12, 64, 16), (4, 25, 64, 16), (3, 2, 80, 32), (2, 17, 129, 1)],
)
def test_copies_rows_to_their_slots(num_tokens, n_head, head_dim, block_size, dtype):
    num_blocks = 20 if block_size == 1 else 4
    qkv = torch.randn(num_tokens, 3, n_head, head_dim, dtype=dtype)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    buffers, (key_cache, value_cache) = caches(num_blocks, n_head, block_size, head_dim, dtype)
    expected, (key_expected, value_expected) = caches(num_blocks, n_head, block_size, head_dim, dtype)
    write_kv_triton(qkv[:, 1], qkv[:, 2], key_cache, value_cache, slots)
    write_kv_ref(qkv[:, 1], qkv[:, 2], key_expected, value_expected, slots)
    assert all(torch.equal(a, b) for a, b in zip(buffers, expected, strict=True))


@pytest.mark.parametrize("slot", [-1, -2, -(2**62), 64, 2**40], ids=str)
def test_a_slot_outside_the_cache_is_skipped(slot):
    key, value = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    buffers, (key_cache, value_cache) = caches(4, 2, 16, 5, torch.float32)
    expected, (key_expected, value_expected) = caches(4, 2, 16, 5, torch.float32)
    write_kv_triton(key, value, key_cache, value_cache, torch.tensor([3, slot, 63]))
    write_kv_ref(key, value, key_expected, value_expected, torch.tensor([3, -1, 63]))
    assert all(torch.equal(a, b) for a, b in zip(buffers, expected, strict=True))
    assert (key_cache != UNTOUCHED).sum() == 2 * 2 * 5


def test_heads_with_their_own_stride():
    # [n_head, num_tokens, head_dim] seen as [num_tokens, n_head, head_dim]
    key, value = torch.randn(3, 4, 6).transpose(0, 1), torch.randn(3, 4, 9).transpose(0, 1)[:, :, :6]
    buffers, (key_cache, value_cache) = caches(2, 3, 16, 6, torch.float32)
    expected, (key_expected, value_expected) = caches(2, 3, 16, 6, torch.float32)
    slots = torch.tensor([31, 0, 16, 15])
    write_kv_triton(key, value, key_cache, value_cache, slots)
    write_kv_ref(key, value, key_expected, value_expected, slots)
    assert all(torch.equal(a, b) for a, b in zip(buffers, expected, strict=True))


def test_no_tokens():
    buffers, (key_cache, value_cache) = caches(2, 3, 16, 6, torch.float32)
    nothing = torch.ones(0, 3, 6)
    write_kv_triton(nothing, nothing, key_cache, value_cache, torch.ones(0, dtype=torch.int64))
    assert all((b == UNTOUCHED).all() for b in buffers)
