"""The float8 KV cache on CPU tensors: the functions run plain torch, the C++ ops refuse it by name."""

import pytest
import torch
from paged_cases import decode, make_cache, make_query, prefill

import gpt2rt.ops as ops
from gpt2rt.kernels import refs

RAW = torch.ops.gpt2rt
FLOAT8 = torch.float8_e4m3fn


def test_codes_are_within_half_a_step_and_the_largest_is_exact(dtype):
    x = torch.randn(50, 3, 40).to(dtype)
    codes, scales = refs.quantize_heads_ref(x, FLOAT8)
    assert codes.dtype == FLOAT8
    largest = x.float().abs().amax(-1)
    torch.testing.assert_close(scales, largest / 448)
    assert (codes.float().abs().amax(-1) == 448).all()
    error = (codes.float() * scales[..., None] - x.float()).abs()
    # 3 bits after the first; below 2^-6 steps of 2^-9
    assert (error <= x.float().abs() / 16 * 1.001 + scales[..., None] * 2**-10).all()


def test_write_is_the_definition(dtype):
    qkv = torch.randn(9, 3, 2, 20).to(dtype)
    qkv[3, 1, 0, 5] = float("nan")
    slots = torch.tensor([5, -1, 0, 31, 17, 16, -1, 30, 2])
    results = []
    for form in (ops.write_kv, refs.write_kv_ref):
        codes = [torch.full((2, 2, 16, 20), 0x55, dtype=torch.uint8) for _ in range(2)]
        scales = [torch.full((2, 2, 16), 7.0) for _ in range(2)]
        form(qkv[:, 1], qkv[:, 2], codes[0].view(FLOAT8), codes[1].view(FLOAT8), slots, *scales)
        results.append(codes + scales)
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0, equal_nan=True)
    # head 0 of the token in slot 31
    assert results[0][2].isnan().nonzero().tolist() == [[1, 0, 15]]


@pytest.mark.parametrize("head_dim", [3, 64])
def test_attention_matches_float64(head_dim, dtype, assert_matmul):
    cache = make_cache([40, 70, 1], 2, head_dim, FLOAT8)
    query = make_query(44, 2, head_dim, dtype)
    y = prefill(ops.paged_prefill_attention, query, cache, [40, 3, 1])
    exact = prefill(refs.paged_prefill_attention_ref, query.double(), cache.wide(), [40, 3, 1])
    assert_matmul(y, prefill(refs.paged_prefill_attention_ref, query, cache, [40, 3, 1]), exact)
    last = torch.stack([query[39], query[42], query[43]])
    torch.testing.assert_close(decode(ops.paged_decode_attention, last, cache), y[[39, 42, 43]])


def test_scales_belong_to_it():
    cache, query = make_cache([20], 2, 8, FLOAT8), make_query(1, 2, 8, torch.float32)
    with pytest.raises(ValueError, match=r"key_scales is missing, but the cache is torch\.float8_e4m3fn"):
        decode(ops.paged_decode_attention, query, cache._replace(key_scales=None))
    with pytest.raises(TypeError, match=r"value_cache has dtype torch\.int8, expected torch\.float8_e4m3fn"):
        decode(ops.paged_decode_attention, query, cache._replace(value=cache.value.view(torch.int8)))


def test_the_cpp_ops_refuse_it_by_name():
    cache, query = make_cache([20], 2, 8, FLOAT8), make_query(1, 2, 8, torch.float32)
    before = cache.key.view(torch.uint8).clone()
    message = "key_cache is Float8_e4m3fn, expected float32, bfloat16, float16 or int8"
    with pytest.raises(ValueError, match=message):
        decode(RAW.paged_decode_attention, query, cache)
    with pytest.raises(ValueError, match=message):
        prefill(RAW.paged_prefill_attention, query, cache, [1])
    with pytest.raises(ValueError, match=message):
        RAW.write_kv(query, query, cache.key, cache.value, torch.tensor([0]), cache.key_scales, cache.value_scales)
    assert torch.equal(cache.key.view(torch.uint8), before)
