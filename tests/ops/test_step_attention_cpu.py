"""Attention with products of bfloat16 on a bfloat16 cache: numbers against float64, bits against itself."""

import math

import pytest
import torch

import gpt2rt.ops as ops
from gpt2rt.kernels import refs

FAST = ops.extension_status().loaded and ops.cpu_isa() in ("avx512_bf16", "amx")
needs_pairs = pytest.mark.skipif(not FAST, reason="this instruction set has no products of bfloat16")

# tokens in the cache after the step and tokens of the step, of each sequence
RAGGED = [(40, 40), (17, 3), (300, 100), (1, 1), (530, 0), (257, 1), (256, 7), (66, 66), (333, 1)]


class Case:
    """A ragged batch on a bfloat16 cache whose unwritten slots are NaN and whose unused table entries are wild."""

    def __init__(self, lens=RAGGED, n_head=2, head_dim=64, block_size=16, query_dtype=torch.float32):
        used = [-(-length // block_size) for length, _ in lens]
        free = torch.randperm(sum(used) + 3).tolist()
        self.blocks = [[free.pop() for _ in range(n)] for n in used]
        self.block_size = block_size
        shape = (sum(used) + 3, n_head, block_size, head_dim)
        self.keys, self.values = (torch.full(shape, math.nan, dtype=torch.bfloat16) for _ in range(2))
        for (length, _), blocks in zip(lens, self.blocks, strict=True):
            positions = torch.arange(length)
            where = torch.tensor(blocks, dtype=torch.int64)[positions // block_size], positions % block_size
            for cache in (self.keys, self.values):
                cache[where[0], :, where[1]] = torch.randn(length, n_head, head_dim).bfloat16()
        width = max(used) + 1
        self.table = torch.tensor([b + [10**9] * (width - len(b)) for b in self.blocks], dtype=torch.int32)
        self.lens = torch.tensor([length for length, _ in lens], dtype=torch.int32)
        queries = torch.tensor([0] + [count for _, count in lens])
        self.starts, self.most = queries.cumsum(0).int(), int(queries.max())
        # as a step passes it: a view into a qkv matrix
        qkv = torch.randn(int(queries.sum()), 3 * n_head * head_dim).to(query_dtype)
        self.query = qkv[:, : n_head * head_dim].view(-1, n_head, head_dim)
        self.scale = head_dim**-0.5

    def run(self, rows=slice(None), **changes):
        """The op; `rows`: of the only sequence, which ends with them."""
        table, lens, starts, query = self.table, self.lens, self.starts, self.query[rows]
        if rows != slice(None):
            lens, starts = torch.tensor([rows.stop]).int(), torch.tensor([0, rows.stop - rows.start]).int()
        caches = changes.get("caches", (self.keys, self.values))
        return ops.step_attention(query, *caches, changes.get("table", table), lens, starts, self.scale)

    def double(self, query):
        """Plain torch in float64 with this query."""
        arguments = (self.table, self.lens, self.starts, self.most, self.scale)
        return refs.paged_prefill_attention_ref(query.double(), self.keys.double(), self.values.double(), *arguments)

    def moved(self):
        """Arguments of `run` with the same tokens in other blocks."""
        order = torch.randperm(len(self.keys))
        caches = [torch.empty_like(cache) for cache in (self.keys, self.values)]
        for cache, target in zip((self.keys, self.values), caches, strict=True):
            target[order] = cache
        table = torch.tensor([[int(order[b]) for b in blocks] for blocks in self.blocks[:1]], dtype=torch.int32)
        return {"caches": caches, "table": table}


@needs_pairs
@pytest.mark.parametrize(
    ("head_dim", "block_size"),
    [
        (64, 16),
        (1, 16),
        (3, 8),
        (20, 16),
        (32, 16),
        (48, 5),
        (50, 1),
        (64, 24),
        (80, 8),
        (96, 32),
        (128, 16),
        (256, 256),
    ],
)
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_matches_float64(head_dim, block_size, query_dtype):
    case = Case(head_dim=head_dim, block_size=block_size, query_dtype=query_dtype)
    out = case.run()
    assert out.dtype == query_dtype
    # the rounding of the query is part of the definition; what is left are the weights, each rounded by up to 2**-9
    exact = case.double(case.query.bfloat16())
    absolute = Case.__new__(Case)
    absolute.__dict__.update(case.__dict__, values=case.values.abs())
    bound = absolute.double(case.query.bfloat16()) * 2**-8
    own = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[query_dtype]
    error = (out.double() - exact).abs()
    assert (error <= bound + own * exact.abs() + 2e-6).all()
    # and on average they cancel
    assert error.mean() <= (2**-10 + own) * bound.mean() * 2**8 + 1e-6


@needs_pairs
def test_it_is_not_the_exact_one():
    """The control: products of float32 on the same numbers give other bits, and are nearer to float64."""
    case = Case()
    exact = ops.paged_prefill_attention(
        case.query, case.keys, case.values, case.table, case.lens, case.starts, case.most, case.scale
    )
    fast, truth = case.run(), case.double(case.query)
    assert not torch.equal(fast, exact)
    assert (exact - truth).abs().max() < 1e-5 < (fast - truth).abs().max() < 0.03


def test_without_the_instruction_or_a_bfloat16_cache_it_is_exact():
    for dtype in (torch.float32, torch.float16) if FAST else (torch.float32, torch.float16, torch.bfloat16):
        case = Case(head_dim=20)
        caches = case.keys.to(dtype), case.values.to(dtype)
        arguments = (case.table, case.lens, case.starts, case.most, case.scale)
        assert torch.equal(case.run(caches=caches), ops.paged_prefill_attention(case.query, *caches, *arguments))


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (20, 16), (50, 5), (128, 32)])
def test_tiles_chunks_blocks_and_threads_change_no_bit(head_dim, block_size, monkeypatch):
    length = 600
    case = Case([(length, length)], head_dim=head_dim, block_size=block_size)
    monkeypatch.setenv("GPT2RT_NUM_THREADS", "1")
    whole = case.run()
    moved = case.moved()
    for size, num_threads in ((1, "1"), (1, "32"), (2, "1"), (7, "2"), (33, "32"), (64, "3"), (65, "3"), (300, "2")):
        monkeypatch.setenv("GPT2RT_NUM_THREADS", num_threads)
        for begin in (0, 15, 250, 256, length - size):
            rows = slice(begin, begin + size)
            assert torch.equal(case.run(rows, **moved), whole[rows]), f"{rows}, {num_threads} threads"


@pytest.mark.parametrize("head_dim", [64, 20, 128])
def test_one_token_at_a_time_gives_the_same_bits(head_dim):
    case = Case([(300, 300)], head_dim=head_dim)
    one = torch.cat([case.run(slice(i, i + 1)) for i in range(300)])
    assert torch.equal(one, case.run())


@pytest.mark.parametrize("head_dim", [64, 20])
def test_later_tokens_never_reach_an_earlier_row(head_dim):
    for first in (20, 21, 32, 33):
        case = Case([(80, 80)], head_dim=head_dim)
        before = case.run()
        for position in range(first, 80):
            block = case.blocks[0][position // 16]
            case.keys[block, :, position % 16] = math.inf
            case.values[block, :, position % 16] = math.nan
        after = case.run()
        assert torch.equal(after[:first], before[:first])
        assert after[first:].isnan().all()


def test_large_scores_do_not_overflow():
    case = Case([(300, 4), (40, 1)])
    case.scale = 1e3
    exact = case.double(case.query.bfloat16() if FAST else case.query)
    # the largest score takes all the weight, so what is left is the error of float32 scores of 1e4
    torch.testing.assert_close(case.run().double(), exact, rtol=2e-2, atol=2e-2)


def test_a_wrong_value_is_seen():
    """The negative control: every key and value takes part."""
    case = Case([(300, 2)])
    before = case.run()
    for cache in (case.keys, case.values):
        block = case.blocks[0][int(torch.randint(0, 18, ()))]
        cache[block, 1, 5] += 1.0
        after = case.run()
        assert torch.equal(after[:, 0], before[:, 0])
        assert (after[:, 1] != before[:, 1]).any()
        before = after


def test_refusals():
    case = Case([(20, 4)])
    with pytest.raises(IndexError, match=r"block_table\[0, 1\] is 99"):
        case.run(table=torch.tensor([[0, 99]], dtype=torch.int32))
    with pytest.raises(ValueError, match="key_scales is missing"):
        case.run(caches=(case.keys.to(torch.int8), case.values.to(torch.int8)))
    assert Case([(5, 0)]).run().shape == (0, 2, 64)
