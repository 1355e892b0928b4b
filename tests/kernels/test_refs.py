"""The definitions themselves, against torch's own functions and transformers' formulas, in float64.

Plain torch: these run in every test run, with or without triton.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from gpt2rt.kernels.refs import (
    add_layer_norm_ref,
    bias_gelu_new_ref,
    embedding_ref,
    layer_norm_ref,
    linear_gelu_new_ref,
    linear_ref,
    linear_residual_ref,
    paged_decode_attention_ref,
    paged_prefill_attention_ref,
    write_kv_ref,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize(("num_tokens", "n"), [(0, 4), (1, 1), (3, 63), (2, 768)])
def test_layer_norm(num_tokens, n):
    x, weight, bias = randn(num_tokens, n) * 3 + 2, randn(n), randn(n)
    torch.testing.assert_close(layer_norm_ref(x, weight, bias, 1e-5), F.layer_norm(x, (n,), weight, bias, 1e-5))


def test_layer_norm_eps_stands_inside_the_root():
    x, one, zero = randn(2, 8) * 1e-3, torch.ones(8).double(), torch.zeros(8).double()
    torch.testing.assert_close(layer_norm_ref(x, one, zero, 0.5), F.layer_norm(x, (8,), one, zero, 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_layer_norm_normalises_the_rounded_sum(dtype):
    x, residual = randn(3, 40, dtype=dtype), randn(3, 40, dtype=dtype)
    weight, bias = randn(40, dtype=dtype), randn(40, dtype=dtype)
    y, total = add_layer_norm_ref(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, layer_norm_ref(total, weight, bias, 1e-5))


def test_bias_gelu_new():
    x, bias = randn(5, 30) * 4, randn(30)
    u = x + bias
    torch.testing.assert_close(bias_gelu_new_ref(x, bias), F.gelu(u, approximate="tanh"))
    # the formula as transformers' NewGELUActivation writes it
    written = 0.5 * u * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (u + 0.044715 * torch.pow(u, 3.0))))
    torch.testing.assert_close(bias_gelu_new_ref(x, bias), written)


def test_embedding():
    wte, wpe = randn(11, 6), randn(5, 6)
    ids, positions = torch.tensor([0, 10, 3, 3]), torch.tensor([4, 0, 1, 2])
    torch.testing.assert_close(
        embedding_ref(ids, positions, wte, wpe), F.embedding(ids, wte) + F.embedding(positions, wpe)
    )


@pytest.mark.parametrize(
    ("ids", "positions", "message"),
    [
        ([0, 11], [0, 0], "input_ids holds 11, expected 0 to 10: wte has 11 rows"),
        ([-1, 3], [0, 0], "input_ids holds -1, expected 0 to 10"),
        ([1, 2], [0, 5], "position_ids holds 5, expected 0 to 4: wpe has 5 rows"),
        ([1, 2], [-3, 4], "position_ids holds -3, expected 0 to 4"),
    ],
)
def test_embedding_refuses_unknown_ids(ids, positions, message):
    with pytest.raises(IndexError, match=message):
        embedding_ref(torch.tensor(ids), torch.tensor(positions), randn(11, 6), randn(5, 6))


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_linear(conv1d):
    x, bias = randn(4, 7), randn(5)
    weight = randn(7, 5).t() if conv1d else randn(5, 7)
    torch.testing.assert_close(linear_ref(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(linear_ref(x, weight, None), F.linear(x, weight))
    assert linear_ref(x, weight, bias).is_contiguous()
    y = F.linear(x, weight, bias)
    torch.testing.assert_close(linear_residual_ref(x, weight, bias, y), y + y)
    torch.testing.assert_close(linear_gelu_new_ref(x, weight, bias), F.gelu(y, approximate="tanh"))
    torch.testing.assert_close(linear_gelu_new_ref(x, weight, None), F.gelu(F.linear(x, weight), approximate="tanh"))


def test_linear_sums_in_float32():
    # 2048 + 1 is 2048 in float16: a sum kept in float16 would never leave 2048
    x, weight = torch.ones(1, 4096, dtype=torch.float16), torch.ones(1, 4096, dtype=torch.float16)
    assert linear_ref(x, weight, None).item() == 4096


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv_token_by_token(dtype):
    qkv = randn(5, 3, 2, 4, dtype=dtype)
    slots = [17, -1, 0, 31, 5]
    key_cache, value_cache = torch.zeros(3, 2, 16, 4, dtype=dtype), torch.zeros(3, 2, 16, 4, dtype=dtype)
    write_kv_ref(qkv[:, 1], qkv[:, 2], key_cache, value_cache, torch.tensor(slots))
    written = torch.zeros(3, 2, 16, dtype=torch.bool)
    for token, slot in enumerate(slots):
        if slot >= 0:
            assert torch.equal(key_cache[slot // 16, :, slot % 16], qkv[token, 1])
            assert torch.equal(value_cache[slot // 16, :, slot % 16], qkv[token, 2])
            written[slot // 16, :, slot % 16] = True
    assert (key_cache[~written] == 0).all()
    assert (value_cache[~written] == 0).all()


@pytest.mark.parametrize("slot", [-2, 48])
def test_write_kv_refuses_a_slot_outside_the_cache(slot):
    key_cache, value_cache = torch.zeros(3, 2, 16, 4), torch.zeros(3, 2, 16, 4)
    rows = torch.ones(2, 2, 4)
    with pytest.raises(IndexError, match=rf"slot_mapping holds {slot}, expected -1 \(skip\) or 0 to 47"):
        write_kv_ref(rows, rows, key_cache, value_cache, torch.tensor([1, slot]))
    assert not key_cache.any()
    assert not value_cache.any()


def paged(seq_lens, n_head, head_dim, block_size):
    """Contiguous keys and values of each sequence, the same in a paged cache, and its tables."""
    contiguous = [(randn(n_head, n, head_dim), randn(n_head, n, head_dim)) for n in seq_lens]
    used = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(used) + 2
    free = torch.randperm(num_blocks).tolist()
    caches = [torch.full((num_blocks, n_head, block_size, head_dim), math.nan, dtype=torch.float64) for _ in range(2)]
    table = torch.full((len(seq_lens), max(used) + 1), -1, dtype=torch.int32)
    for s, pair in enumerate(contiguous):
        for b in range(used[s]):
            table[s, b] = block = free.pop()
            for cache, rows in zip(caches, pair, strict=True):
                piece = rows[:, b * block_size : (b + 1) * block_size]
                cache[block, :, : piece.shape[1]] = piece
    return contiguous, caches, table, torch.tensor(seq_lens, dtype=torch.int32)


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize(
    ("seq_lens", "query_lens"), [([1], [1]), ([7, 20], [7, 20]), ([33, 5, 16], [4, 0, 1]), ([17, 40], [16, 23])]
)
def test_paged_prefill_attention(seq_lens, query_lens, block_size):
    contiguous, (key_cache, value_cache), table, lens = paged(seq_lens, 3, 5, block_size)
    query = randn(sum(query_lens), 3, 5)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    y = paged_prefill_attention_ref(query, key_cache, value_cache, table, lens, starts, max(query_lens), 0.4)
    first = 0
    for (key, value), n, q_len in zip(contiguous, seq_lens, query_lens, strict=True):
        visible = torch.ones(q_len, n, dtype=torch.bool).tril(n - q_len)
        q = query[first : first + q_len].transpose(0, 1)
        expected = F.scaled_dot_product_attention(q, key, value, attn_mask=visible, scale=0.4)
        torch.testing.assert_close(y[first : first + q_len], expected.transpose(0, 1))
        first += q_len


@pytest.mark.parametrize("block_size", [1, 16])
def test_paged_decode_attention(block_size):
    seq_lens = [1, 16, 0, 37]
    contiguous, (key_cache, value_cache), table, lens = paged(seq_lens, 3, 5, block_size)
    query = randn(4, 3, 5)
    y = paged_decode_attention_ref(query, key_cache, value_cache, table, lens, 37, 0.4)
    for s, (key, value) in enumerate(contiguous):
        expected = F.scaled_dot_product_attention(query[s].unsqueeze(1), key, value, scale=0.4).squeeze(1)
        torch.testing.assert_close(y[s], expected if seq_lens[s] else torch.zeros(3, 5).double())


def test_attention_refuses_contradictions():
    _, (key_cache, value_cache), table, lens = paged([20, 5], 2, 4, 16)
    caches, query = (key_cache, value_cache), randn(8, 2, 4)

    def prefill(table=table, lens=lens, starts=(0, 4, 8), longest=4):
        return paged_prefill_attention_ref(query, *caches, table, lens, torch.tensor(starts), longest, 0.5)

    assert prefill().shape == (8, 2, 4)
    with pytest.raises(ValueError, match="query_start_loc runs from 0 to 7, expected 0 to 8"):
        prefill(starts=(0, 4, 7))
    with pytest.raises(ValueError, match=r"sequence 1 has 6 queries, expected 0 to 5 \(seq_len 5, max_query_len 6\)"):
        prefill(starts=(0, 2, 8), longest=6)
    with pytest.raises(ValueError, match="sequence 0 has 4 queries, expected 0 to 3"):
        prefill(longest=3)
    with pytest.raises(ValueError, match="sequence 0 has 60 tokens = 4 blocks of 16, but block_table has 3 columns"):
        prefill(lens=torch.tensor([60, 5]))
    with pytest.raises(IndexError, match="block_table of sequence 0 holds -1, expected 0 to 4"):
        prefill(lens=torch.tensor([40, 5]))
    with pytest.raises(IndexError, match="block_table of sequence 0 holds 99, expected 0 to 4"):
        prefill(table=torch.full_like(table, 99))
    with pytest.raises(ValueError, match=r"seq_lens\[0\] is 20, expected 0 to max_seq_len 19"):
        paged_decode_attention_ref(query[:2], *caches, table, lens, 19, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_keep_the_dtype_and_round_once(dtype):
    # the float64 result of the same numbers, rounded, differs from the float32 one by less than one step of the dtype
    x, w, b = randn(4, 8, dtype=dtype), randn(8, dtype=dtype), randn(8, dtype=dtype)
    m = randn(6, 8, dtype=dtype)
    pairs = [
        (layer_norm_ref(x, w, b, 1e-5), layer_norm_ref(x.double(), w.double(), b.double(), 1e-5)),
        (bias_gelu_new_ref(x, b), bias_gelu_new_ref(x.double(), b.double())),
        (linear_ref(x, m, None), linear_ref(x.double(), m.double(), None)),
    ]
    for narrow, wide in pairs:
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)
