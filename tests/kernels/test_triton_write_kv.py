"""write_kv in triton's interpreter: copies and codes must be exact, and nothing else may change."""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from gpt2rt.kernels.kv_formats import cache_format, decoded, stored
from gpt2rt.kernels.refs import LARGEST_CODE
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


@pytest.mark.parametrize("stored_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_of_another_float_dtype(dtype, stored_dtype):
    key, value = torch.randn(2, 3, 2, 20, dtype=dtype).unbind(0)
    buffers, (key_cache, value_cache) = caches(2, 2, 16, 20, stored_dtype)
    expected, (key_expected, value_expected) = caches(2, 2, 16, 20, stored_dtype)
    slots = torch.tensor([31, 0, 7])
    write_kv_triton(key, value, key_cache, value_cache, slots)
    write_kv_ref(key, value, key_expected, value_expected, slots)
    assert all(torch.equal(a, b) for a, b in zip(buffers, expected, strict=True))


def written(form, key, value, slots, num_blocks, block_size, codes):
    """Codes as bytes, and scales, with guard blocks on both sides, after a write to an 8-bit cache."""
    _, n_head, head_dim = key.shape
    codes_and_scales = []
    for _ in range(2):
        codes_and_scales.append(torch.full((num_blocks + 2, n_head, block_size, head_dim), 0x55, dtype=torch.uint8))
        codes_and_scales.append(torch.full((num_blocks + 2, n_head, block_size), UNTOUCHED))
    key_codes, key_scales, value_codes, value_scales = (buffer[1:-1] for buffer in codes_and_scales)
    form(key, value, key_codes.view(codes), value_codes.view(codes), slots, key_scales, value_scales)
    return codes_and_scales


def assert_as_defined(key, value, slots, num_blocks, block_size, codes):
    ours = written(write_kv_triton, key, value, slots, num_blocks, block_size, codes)
    theirs = written(write_kv_ref, key, value, slots, num_blocks, block_size, codes)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("codes", LARGEST_CODE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "n_head", "head_dim", "block_size"),
    [(1, 1, 1, 16), (9, 3, 5, 8), (5, 12, 64, 16), (3, 2, 80, 32), (2, 17, 129, 64)],
)
def test_codes_and_scales_are_the_definition(num_tokens, n_head, head_dim, block_size, dtype, codes):
    qkv = torch.randn(num_tokens, 3, n_head, head_dim).to(dtype)
    # heads of very different size, of zeros, and one below the smallest that counts
    qkv[0, 1, 0], qkv[0, 2, -1] = 0.0, 1e-31
    qkv[-1, 2, 0] *= 1e-20 if dtype != torch.float16 else 1e-4
    qkv[-1, 1, -1] *= 1e4
    slots = torch.randperm(4 * block_size)[:num_tokens]
    assert_as_defined(qkv[:, 1], qkv[:, 2], slots, 4, block_size, codes)


@pytest.mark.parametrize("codes", LARGEST_CODE, ids=str)
def test_every_code_every_tie_and_their_neighbours(codes):
    # the largest element is the largest code, so that codes are the elements, rounded
    number = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(codes).float()
    number = number[number.isfinite() & (number.abs() <= LARGEST_CODE[codes])].unique()
    ties = (number[1:] + number[:-1]) / 2
    elements = torch.cat(
        [number, ties, ties.nextafter(torch.tensor(math.inf)), ties.nextafter(torch.tensor(-math.inf))]
    )
    elements = torch.nn.functional.pad(elements, (0, -len(elements) % 255)).view(-1, 1, 255)
    heads = torch.cat([elements, torch.full((len(elements), 1, 1), LARGEST_CODE[codes])], -1)
    heads[0, 0, 0] = -0.0
    assert_as_defined(heads, -heads, torch.arange(len(heads)), 1, 16, codes)


@pytest.mark.parametrize("codes", LARGEST_CODE, ids=str)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_that_is_not_finite_has_no_scale(dtype, broken, codes):
    key, value = torch.randn(2, 3, 2, 20).to(dtype).unbind(0)
    key[1, 0, 7] = broken
    assert_as_defined(key, value, torch.arange(3), 1, 16, codes)
    scales = written(write_kv_triton, key, value, torch.arange(3), 1, 16, codes)[1][1]
    assert scales[:, :3].isnan().tolist() == [[False, True, False], [False] * 3]


@pytest.mark.parametrize("codes", LARGEST_CODE, ids=str)
def test_numbers_near_the_ends_of_float32(codes):
    sizes = torch.tensor([3.4e38, 1e38, 2e-30, 1e-30, 9.9e-31, 1e-45]).view(6, 1, 1)
    heads = torch.linspace(-1, 1, 9).expand(6, 1, 9) * sizes
    assert_as_defined(heads, heads.flip(0), torch.arange(6), 1, 16, codes)


@pytest.mark.parametrize("codes", LARGEST_CODE, ids=str)
@pytest.mark.parametrize("slot", [-1, -(2**62), 64, 2**40], ids=str)
def test_a_slot_outside_an_8_bit_cache_is_skipped(slot, codes):
    key, value = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    ours = written(write_kv_triton, key, value, torch.tensor([3, slot, 63]), 4, 16, codes)
    theirs = written(write_kv_ref, key, value, torch.tensor([3, -1, 63]), 4, 16, codes)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert (ours[1] != UNTOUCHED).sum() == 2 * 2


@triton.jit
def _decode_kernel(codes_ptr, y_ptr, FORMAT: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(y_ptr + i, decoded(tl.load(codes_ptr + i), FORMAT))


@pytest.mark.parametrize("codes", LARGEST_CODE, ids=str)
def test_every_code_is_decoded_exactly(codes):
    cache = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(codes)
    y = torch.empty(256, dtype=torch.float32)
    _decode_kernel[(1,)](stored(cache), y, FORMAT=cache_format(cache))
    unit = 256 if codes == torch.float8_e4m3fn else 1
    stored_codes = cache.float().isfinite()
    assert stored_codes.sum() >= 254
    assert torch.equal((y * unit)[stored_codes], cache.float()[stored_codes])
