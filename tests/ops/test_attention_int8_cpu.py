"""The int8 KV cache in C++: its codes and scales to the bit, attention against its values in float64."""

import math

import pytest
import torch

import gpt2rt.ops as ops
from gpt2rt.kernels import refs

OPS = torch.ops.gpt2rt


def new_cache(num_blocks, n_head, block_size, head_dim):
    """Keys and values, and their scales; what is not written shows as NaN."""
    shape = (num_blocks, n_head, block_size, head_dim)
    return [torch.full(shape, 77, dtype=torch.int8) for _ in range(2)], [
        torch.full(shape[:3], math.nan) for _ in range(2)
    ]


def write(keys, values, caches, slots, scales, op=ops.write_kv):
    op(keys, values, *caches, slots, *scales)


@pytest.mark.parametrize("head_dim", [1, 3, 20, 64, 80, 256])
def test_codes_and_scales_are_the_definition(head_dim, dtype):
    qkv = torch.randn(9, 3, 2, head_dim).to(dtype)
    qkv[1] = 0.0
    qkv[2, 1, 0] *= 1e-20
    qkv[3, 2, 1] *= 100.0
    # ties between two codes
    qkv[4, 1, 0] = (torch.arange(head_dim) % 8 + 0.5).to(dtype)
    if head_dim > 1:
        qkv[4, 1, 0, -1] = 127.0
    slots = torch.tensor([5, -1, 0, 31, 17, 16, -1, 30, 2])
    ours, theirs = new_cache(2, 2, 16, head_dim), new_cache(2, 2, 16, head_dim)
    write(qkv[:, 1], qkv[:, 2], ours[0], slots, ours[1])
    write(qkv[:, 1], qkv[:, 2], theirs[0], slots, theirs[1], refs.write_kv_ref)
    for mine, reference in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("head_dim", [3, 64])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf], ids=str)
def test_a_head_that_is_not_finite_has_no_scale(head_dim, broken, dtype):
    keys = torch.randn(3, 2, head_dim).to(dtype)
    keys[1, 0, head_dim // 2] = broken
    caches, scales = new_cache(1, 2, 16, head_dim)
    write(keys, torch.randn(3, 2, head_dim).to(dtype), caches, torch.arange(3), scales)
    assert scales[0][0, :, :3].isnan().tolist() == [[False, True, False], [False] * 3]
    out = ops.paged_prefill_attention(
        torch.randn(3, 2, head_dim).to(dtype), *caches, torch.zeros(1, 1).int(), torch.tensor([3]).int(),
        torch.tensor([0, 3]).int(), 3, 1.0, *scales,
    )  # fmt: skip
    # only what attends to it
    assert out.isnan().flatten(1).any(1).tolist() == [False, True, True]
    assert not out[:, 1].isnan().any()


def test_numbers_near_the_ends_of_float32():
    keys = torch.tensor([3e38, -1.5e38, 2e-30, 1e-31, 1e-45]).reshape(5, 1, 1).expand(5, 1, 4).contiguous()
    caches, scales = new_cache(1, 1, 8, 4)
    write(keys, keys, caches, torch.arange(5), scales)
    values = caches[0][0, 0, :5].double() * scales[0][0, 0, :5, None]
    torch.testing.assert_close(values[:3], keys[:3, 0].double(), rtol=1e-6, atol=0.0)
    # below 1e-30 a head counts as zero
    assert torch.equal(values[3:], torch.zeros(2, 4, dtype=torch.float64))


class Case:
    """Sequences of some lengths on an int8 cache whose unwritten slots are NaN and whose unused entries are wild."""

    def __init__(self, dtype, lens, n_head=3, head_dim=20, block_size=16):
        used = [-(-length // block_size) for length, _ in lens]
        free = torch.randperm(sum(used) + 2).tolist()
        tables = [[free.pop() for _ in range(n)] for n in used]
        self.caches, self.scales = new_cache(sum(used) + 2, n_head, block_size, head_dim)
        for (length, _), table in zip(lens, tables, strict=True):
            slots = torch.tensor(
                [table[p // block_size] * block_size + p % block_size for p in range(length)], dtype=torch.int64
            )
            keys, values = (torch.randn(length, n_head, head_dim).to(dtype) for _ in range(2))
            write(keys, values, self.caches, slots, self.scales)
        width = max(used) + 1
        self.table = torch.tensor([table + [10**9] * (width - len(table)) for table in tables], dtype=torch.int32)
        self.lens = torch.tensor([length for length, _ in lens], dtype=torch.int32)
        queries = torch.tensor([0] + [count for _, count in lens])
        self.starts, self.most = queries.cumsum(0).int(), int(queries.max())
        self.query = torch.randn(int(queries.sum()), n_head, head_dim).to(dtype)
        self.scale = head_dim**-0.5

    def prefill(self, op=ops.paged_prefill_attention, dtype=None):
        query = self.query if dtype is None else self.query.to(dtype)
        arguments = (self.table, self.lens, self.starts, self.most, self.scale)
        return op(query, *self.caches, *arguments, *self.scales)


@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(1, 16), (3, 8), (20, 16), (48, 5), (64, 16), (80, 24), (256, 16), (64, 256)]
)
def test_attention_matches_float64(head_dim, block_size, dtype, assert_matmul):
    case = Case(dtype, [(40, 40), (300, 70), (1, 1), (257, 1), (19, 0)], head_dim=head_dim, block_size=block_size)
    plain = case.prefill(refs.paged_prefill_attention_ref)
    assert_matmul(case.prefill(), plain, case.prefill(refs.paged_prefill_attention_ref, torch.float64))


@pytest.mark.parametrize("head_dim", [20, 64])
def test_decode_matches_float64_and_prefill_to_the_bit(head_dim, dtype, assert_matmul):
    lengths = (1, 15, 16, 17, 256, 257, 700, 0)
    case = Case(dtype, [(n, min(n, 1)) for n in lengths], head_dim=head_dim)
    query = torch.cat([case.query, torch.randn(1, 3, head_dim).to(dtype)])
    arguments = (*case.caches, case.table, case.lens, 700, case.scale, *case.scales)
    out = ops.paged_decode_attention(query, *arguments)
    exact = refs.paged_decode_attention_ref(query.double(), *arguments)
    assert_matmul(out, refs.paged_decode_attention_ref(query, *arguments), exact)
    assert torch.equal(out[-1], torch.zeros_like(out[-1])), "a padding row is zero"
    assert torch.equal(out[:-1], case.prefill())


@pytest.mark.parametrize("head_dim", [20, 64])
def test_tiles_chunks_and_threads_change_no_bit(head_dim, dtype, monkeypatch):
    length = 600
    case = Case(dtype, [(length, length)], head_dim=head_dim)
    whole = case.prefill()
    for size, num_threads in ((1, "1"), (1, "32"), (7, "2"), (33, "32"), (65, "3")):
        monkeypatch.setenv("GPT2RT_NUM_THREADS", num_threads)
        for begin in (0, 250, length - size):
            end = min(begin + size, length)
            out = ops.paged_prefill_attention(
                case.query[begin:end], *case.caches, case.table, torch.tensor([end], dtype=torch.int32),
                torch.tensor([0, end - begin], dtype=torch.int32), end - begin, case.scale, *case.scales,
            )  # fmt: skip
            assert torch.equal(out, whole[begin:end]), f"{size} queries from {begin} on, {num_threads} threads"


def test_a_wrong_scale_is_seen():
    """The negative control of the tests above: scales take part in every number."""
    case = Case(torch.float32, [(300, 4)])
    before = case.prefill()
    case.scales[1][case.table[0, 3], 1, 5] *= 2.0
    assert not torch.equal(case.prefill()[:, 1], before[:, 1])
    assert torch.equal(case.prefill()[:, 0], before[:, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key_scales": None}, ValueError, "key_scales is missing, but the cache is"),
        ({"value_scales": None}, ValueError, "value_scales is missing, but the cache is"),
        ({"key_scales": torch.ones(4, 3, 15)}, ValueError, r"key_scales has shape \[4, 3, 15\], expected"),
        ({"key_scales": torch.ones(4, 3, 16).double()}, (TypeError, ValueError), "key_scales .*float64, expected"),
        ({"value_scales": torch.ones(4, 16, 3).transpose(1, 2)}, ValueError, "value_scales must be contiguous"),
        ({"value_cache": torch.ones(4, 3, 16, 20)}, (TypeError, ValueError), "value_cache"),
        ({"key_cache": torch.ones(4, 3, 16, 20).to(torch.uint8)}, (TypeError, ValueError), "key_cache .*uint8"),
    ],
)
@pytest.mark.parametrize("checked", ["by the function", "by the op"])
def test_scales_that_do_not_fit(change, error, message, checked):
    case = Case(torch.float32, [(20, 4)])
    good = {
        "query": case.query,
        "key_cache": case.caches[0],
        "value_cache": case.caches[1],
        "block_table": case.table,
        "seq_lens": case.lens,
        "query_start_loc": case.starts,
        "max_query_len": 4,
        "scale": 1.0,
        "key_scales": case.scales[0],
        "value_scales": case.scales[1],
    }
    assert case.caches[0].shape == (4, 3, 16, 20)
    op = ops.paged_prefill_attention if checked == "by the function" else OPS.paged_prefill_attention
    with pytest.raises(error, match=message):
        op(*{**good, **change}.values())


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_caches_have_no_scales(cache_dtype):
    cache, scales = torch.zeros(1, 1, 8, 4, dtype=cache_dtype), torch.zeros(1, 1, 8)
    keys = torch.zeros(1, 1, 4)
    for op in (ops.write_kv, OPS.write_kv):
        with pytest.raises(ValueError, match="key_scales was given, but the cache is"):
            op(keys, keys, cache, cache.clone(), torch.zeros(1, dtype=torch.int64), scales, scales)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_cache_may_have_another_dtype_than_the_model(cache_dtype, dtype):
    keys, values, query = torch.randn(3, 20, 2, 8).to(dtype).unbind(0)
    caches = [torch.full((2, 2, 16, 8), math.nan, dtype=cache_dtype) for _ in range(2)]
    ops.write_kv(keys, values, *caches, torch.arange(20))
    arguments = (torch.tensor([[0, 1]]).int(), torch.tensor([20]).int(), torch.tensor([0, 20]).int(), 20, 0.3)
    out = ops.paged_prefill_attention(query, *caches, *arguments)
    expected = refs.paged_prefill_attention_ref(query, *caches, *arguments)
    rtol = 2e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(out, expected, rtol=rtol, atol=1e-3)
