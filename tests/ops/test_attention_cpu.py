"""Paged attention in C++."""

import math

import pytest
import torch

import gpt2rt.ops as ops
from gpt2rt.kernels import refs

OPS = torch.ops.gpt2rt

# tokens in the cache after the step and tokens of the step, of each sequence
RAGGED = [(40, 40), (17, 3), (300, 100), (1, 1), (530, 0), (0, 0), (257, 1), (256, 7)]


class Case:
    """A ragged batch on a cache whose unwritten slots are NaN and whose unused table entries are wild."""

    def __init__(self, dtype, lens=RAGGED, n_head=3, head_dim=20, block_size=16):
        self.n_head, self.head_dim, self.block_size = n_head, head_dim, block_size
        used = [-(-length // block_size) for length, _ in lens]
        self.num_blocks = sum(used) + 3
        free = torch.randperm(self.num_blocks).tolist()
        self.blocks = [[free.pop() for _ in range(n)] for n in used]
        width = max(used) + 1
        self.table = torch.tensor([b + [10**9] * (width - len(b)) for b in self.blocks], dtype=torch.int32)
        shape = (self.num_blocks, n_head, block_size, head_dim)
        self.key_cache, self.value_cache = (torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
        for (length, _), table in zip(lens, self.blocks, strict=True):
            positions = torch.arange(length)
            where = torch.tensor(table, dtype=torch.int64)[positions // block_size], positions % block_size
            for cache in (self.key_cache, self.value_cache):
                cache[where[0], :, where[1]] = torch.randn(length, n_head, head_dim).to(dtype)
        self.seq_lens = torch.tensor([length for length, _ in lens], dtype=torch.int32)
        queries = torch.tensor([0] + [q for _, q in lens])
        self.starts = queries.cumsum(0).int()
        self.max_query_len = int(queries.max())
        num_tokens = int(queries.sum())
        # as the model passes it: a view into a qkv matrix
        self.query = torch.randn(num_tokens, 3 * n_head * head_dim).to(dtype)[:, : n_head * head_dim]
        self.query = self.query.view(num_tokens, n_head, head_dim)
        self.scale = head_dim**-0.5

    def prefill(self, op=None):
        op = op or ops.paged_prefill_attention
        return op(
            self.query,
            self.key_cache,
            self.value_cache,
            self.table,
            self.seq_lens,
            self.starts,
            self.max_query_len,
            self.scale,
        )

    def double(self):
        other = object.__new__(Case)
        other.__dict__.update(self.__dict__)
        for name in ("query", "key_cache", "value_cache"):
            setattr(other, name, getattr(self, name).double())
        return other


@pytest.mark.parametrize("head_dim", [1, 3, 48, 50, 64, 80, 256])
def test_prefill_head_dims(head_dim, dtype, assert_matmul):
    case = Case(dtype, lens=[(40, 40), (300, 35), (1, 1)], head_dim=head_dim, n_head=2)
    assert_matmul(
        case.prefill(),
        case.prefill(refs.paged_prefill_attention_ref),
        case.double().prefill(refs.paged_prefill_attention_ref),
    )


@pytest.mark.parametrize("block_size", [1, 5, 8, 16, 24, 256])
def test_prefill_block_sizes(block_size, dtype, assert_matmul):
    case = Case(dtype, block_size=block_size)
    assert_matmul(
        case.prefill(),
        case.prefill(refs.paged_prefill_attention_ref),
        case.double().prefill(refs.paged_prefill_attention_ref),
    )


@pytest.mark.parametrize("head_dim", [20, 64])
def test_decode(head_dim, dtype, assert_matmul):
    case = Case(dtype, lens=[(n, 1) for n in (1, 15, 16, 17, 256, 257, 700)] + [(0, 0)], head_dim=head_dim)
    query = torch.randn(8, 3, head_dim).to(dtype)
    arguments = (case.key_cache, case.value_cache, case.table, case.seq_lens, 700, case.scale)
    out = ops.paged_decode_attention(query, *arguments)
    exact = refs.paged_decode_attention_ref(
        query.double(), case.key_cache.double(), case.value_cache.double(), *arguments[2:]
    )
    assert_matmul(out, refs.paged_decode_attention_ref(query, *arguments), exact)
    assert torch.equal(out[7], torch.zeros_like(out[7])), "a padding row is zero"


def test_decode_and_prefill_agree_to_the_bit(dtype):
    case = Case(dtype)
    last = [int(end) - 1 for end, (_, q) in zip(case.starts[1:], RAGGED, strict=True) if q]
    rows = [i for i, (_, q) in enumerate(RAGGED) if q]
    decoded = ops.paged_decode_attention(
        case.query[last], case.key_cache, case.value_cache, case.table[rows], case.seq_lens[rows], 600, case.scale
    )
    assert torch.equal(decoded, case.prefill()[last])


def test_a_row_does_not_depend_on_tile_neighbours_or_blocks(dtype):
    length = 300
    case = Case(dtype, lens=[(length, length)])
    whole = case.prefill()
    order = torch.randperm(case.num_blocks)
    moved = [torch.empty_like(cache) for cache in (case.key_cache, case.value_cache)]
    for cache, target in zip((case.key_cache, case.value_cache), moved, strict=True):
        target[order] = cache
    table = torch.tensor([[int(order[b]) for b in case.blocks[0]]], dtype=torch.int32)
    for size in (1, 7, 33, 300):
        parts = []
        for begin in range(0, length, size):
            end = min(begin + size, length)
            parts.append(
                ops.paged_prefill_attention(
                    case.query[begin:end], *moved, table, torch.tensor([end], dtype=torch.int32),
                    torch.tensor([0, end - begin], dtype=torch.int32), end - begin, case.scale,
                )
            )  # fmt: skip
        assert torch.equal(torch.cat(parts), whole), f"queries taken {size} at a time"


def test_later_tokens_never_reach_an_earlier_row():
    case = Case(torch.float32, lens=[(40, 40)])
    before = case.prefill()
    table = case.blocks[0]
    # positions 20 to 39 overflow, as a broken later token would
    for position in range(20, 40):
        case.key_cache[table[position // 16], :, position % 16] = math.inf
        case.value_cache[table[position // 16], :, position % 16] = math.nan
    after = case.prefill()
    assert torch.equal(after[:20], before[:20])
    assert after[20:].isnan().all()


def test_large_scores_do_not_overflow():
    case = Case(torch.float32, lens=[(300, 4)])
    case.scale = 1e3
    exact = case.double().prefill(refs.paged_prefill_attention_ref)
    torch.testing.assert_close(case.prefill().double(), exact, rtol=1e-4, atol=1e-4)


def test_no_sequences():
    case = Case(torch.float32, lens=[(5, 0)])
    assert case.prefill().shape == (0, 3, 20)
    none = torch.empty(0, dtype=torch.int32)
    out = ops.paged_decode_attention(case.query, case.key_cache, case.value_cache, case.table[:0], none, 1, 1.0)
    assert out.shape == (0, 3, 20)


def prefill_with(case, **changes):
    arguments = {
        "query": case.query,
        "key_cache": case.key_cache,
        "value_cache": case.value_cache,
        "block_table": case.table,
        "seq_lens": case.seq_lens,
        "query_start_loc": case.starts,
        "max_query_len": case.max_query_len,
        "scale": case.scale,
    }
    return OPS.paged_prefill_attention(*{**arguments, **changes}.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_table": [[0, 99]]}, IndexError, r"block_table\[0, 1\] is 99, but the cache has 5 blocks"),
        ({"block_table": [[-1, 0]]}, IndexError, r"block_table\[0, 0\] is -1"),
        ({"block_table": [[0]]}, ValueError, "needs 2 blocks of 16, but block_table has 1 columns"),
        ({"seq_lens": [3]}, ValueError, r"seq_lens\[0\] is 3, expected at least 4"),
        ({"query_start_loc": [0, 3]}, ValueError, "query_start_loc ends with 3, expected 4"),
        ({"query_start_loc": [1, 4]}, ValueError, r"query_start_loc\[0\] is 1, expected 0"),
        ({"max_query_len": 3}, ValueError, "max_query_len is 3, but sequence 0 has 4 tokens"),
        ({"scale": math.inf}, ValueError, "scale is inf"),
    ],
)
def test_bad_batches(change, error, message):
    case = Case(torch.float32, lens=[(20, 4)])
    tensors = {k: torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for k, v in change.items()}
    with pytest.raises(error, match=message):
        prefill_with(case, **tensors)


def test_falling_starts_are_refused():
    case = Case(torch.float32, lens=[(20, 2), (20, 2)])
    with pytest.raises(ValueError, match="query_start_loc falls from 5 to 4 at sequence 1"):
        prefill_with(case, query_start_loc=torch.tensor([0, 5, 4], dtype=torch.int32))


def test_bad_tensors():
    case = Case(torch.float32, lens=[(20, 4)])
    with pytest.raises(ValueError, match="block_table is int64, expected int32"):
        prefill_with(case, block_table=case.table.long())
    with pytest.raises(ValueError, match="the head_dim of query"):
        prefill_with(case, query=case.query[:, :, :19])
    with pytest.raises(ValueError, match="key_cache must be contiguous"):
        prefill_with(case, key_cache=case.key_cache.transpose(2, 3).contiguous().transpose(2, 3))
    big = torch.zeros(1, 1, 16, 257)
    with pytest.raises(ValueError, match="head_dim is 257, expected 1 to 256"):
        OPS.paged_decode_attention(
            torch.zeros(1, 1, 257), big, big, torch.zeros(1, 1).int(), torch.ones(1).int(), 1, 1.0
        )
    with pytest.raises(ValueError, match=r"max_seq_len is 3, but seq_lens\[0\] is 20"):
        OPS.paged_decode_attention(case.query[:1], case.key_cache, case.value_cache, case.table, case.seq_lens, 3, 1.0)
