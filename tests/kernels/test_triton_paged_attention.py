"""Paged attention in triton's interpreter, prefill and decode, against the definitions in float64."""

import math
import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.paged_decode_attention import (
    MERGE,
    SPLIT,
    paged_decode_attention_ref,
    paged_decode_attention_triton,
)
from gpt2rt.kernels.paged_prefill_attention import (
    paged_prefill_attention_ref,
    paged_prefill_attention_triton,
)

# some tests ask for NaN
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Cache(NamedTuple):
    """A paged cache in which everything that no sequence owns is NaN."""

    key: Tensor  # [num_blocks, n_head, block_size, head_dim]
    value: Tensor
    block_table: Tensor  # [num_seqs, max_blocks_per_seq], int32; unused entries point far outside
    seq_lens: Tensor  # [num_seqs], int32

    def wide(self) -> "Cache":
        return self._replace(key=self.key.double(), value=self.value.double())

    def rows(self, first: int, last: int) -> "Cache":
        return self._replace(block_table=self.block_table[first:last], seq_lens=self.seq_lens[first:last])


def make_cache(seq_lens, n_head, head_dim, dtype, block_size=16) -> Cache:
    """Blocks in random physical order; slots past the end of a sequence hold NaN."""
    used = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(used) + 3
    physical = torch.randperm(num_blocks).int()
    key, value = (torch.full((num_blocks, n_head, block_size, head_dim), math.nan, dtype=dtype) for _ in range(2))
    table = torch.full((len(seq_lens), max(used) + 1), 2**30, dtype=torch.int32)
    taken = 0
    for s, n in enumerate(seq_lens):
        table[s, : used[s]] = physical[taken : taken + used[s]]
        taken += used[s]
        for i in range(0, n, block_size):
            filled = min(block_size, n - i)
            block = int(table[s, i // block_size])
            key[block, :, :filled] = torch.randn(n_head, filled, head_dim, dtype=dtype)
            value[block, :, :filled] = torch.randn(n_head, filled, head_dim, dtype=dtype)
    return Cache(key, value, table, torch.tensor(seq_lens, dtype=torch.int32))


def make_query(num_tokens, n_head, head_dim, dtype) -> Tensor:
    """The q part of a qkv matrix; the other parts are NaN."""
    qkv = torch.full((num_tokens, 3, n_head, head_dim), math.nan, dtype=dtype)
    qkv[:, 0] = torch.randn(num_tokens, n_head, head_dim, dtype=dtype)
    return qkv[:, 0]


def plain_torch(query, cache, query_lens, scale) -> Tensor:
    """Attention by plain torch operations in the storage dtype, on keys and values in one piece."""
    rows, first = [], 0
    block_size = cache.key.shape[2]
    for s, (n, q_len) in enumerate(zip(cache.seq_lens.tolist(), query_lens, strict=True)):
        blocks = cache.block_table[s, : -(-n // block_size)].long()
        key, value = (c[blocks].transpose(0, 1).flatten(1, 2)[:, :n] for c in (cache.key, cache.value))
        q = query[first : first + q_len].transpose(0, 1)
        future = torch.ones(q_len, n, dtype=torch.bool).triu(n - q_len + 1)
        weights = ((q * scale) @ key.transpose(1, 2)).masked_fill(future, -math.inf).softmax(-1)
        rows.append((weights @ value).transpose(0, 1))
        first += q_len
    return torch.cat(rows)


def prefill(form, query, cache, query_lens, scale=0.3, slack=0) -> Tensor:
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    longest = max(query_lens) + slack
    return form(query, cache.key, cache.value, cache.block_table, cache.seq_lens, starts, longest, scale)


def decode(form, query, cache, scale=0.3, slack=0) -> Tensor:
    longest = int(cache.seq_lens.max()) + slack
    return form(query, cache.key, cache.value, cache.block_table, cache.seq_lens, longest, scale)


PREFILLS = [
    # seq_lens, query_lens (fewer than seq_lens: a prefix is in the cache already), n_head, head_dim, block_size
    ([1], [1], 1, 1, 16),
    ([5], [5], 2, 64, 16),
    ([17, 64, 3], [17, 64, 3], 3, 20, 16),
    ([65, 33, 7], [65, 2, 0], 2, 48, 16),
    ([130, 16, 100], [70, 1, 99], 1, 80, 16),
    ([40, 21], [13, 21], 2, 33, 8),
    ([70], [40], 1, 130, 32),
    ([20], [20], 1, 256, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("seq_lens", "query_lens", "n_head", "head_dim", "block_size"), PREFILLS)
def test_prefill_matches_definition(seq_lens, query_lens, n_head, head_dim, block_size, dtype, as_exact_as_torch):
    cache = make_cache(seq_lens, n_head, head_dim, dtype, block_size)
    query, scale = make_query(sum(query_lens), n_head, head_dim, dtype), head_dim**-0.5
    as_exact_as_torch(
        prefill(paged_prefill_attention_triton, query, cache, query_lens, scale),
        plain_torch(query, cache, query_lens, scale),
        prefill(paged_prefill_attention_ref, query.double(), cache.wide(), query_lens, scale),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_rows_do_not_depend_on_the_batch_or_the_chunks(dtype):
    seq_lens = [100, 9, 70]
    cache = make_cache(seq_lens, 2, 24, dtype)
    query = make_query(sum(seq_lens), 2, 24, dtype)
    together = prefill(paged_prefill_attention_triton, query, cache, seq_lens, slack=50)
    alone = prefill(paged_prefill_attention_triton, query[:100], cache.rows(0, 1), [100])
    assert torch.equal(alone, together[:100])
    first = 0
    for chunk in (1, 37, 62):
        now = cache.rows(0, 1)._replace(seq_lens=torch.tensor([first + chunk], dtype=torch.int32))
        rows = prefill(paged_prefill_attention_triton, query[first : first + chunk], now, [chunk])
        assert torch.equal(rows, together[first : first + chunk])
        first += chunk


def test_prefill_ignores_later_positions():
    # row i must not change when what follows it does, not even to values that swamp everything
    cache = make_cache([80], 1, 16, torch.float32)
    query = make_query(80, 1, 16, torch.float32)
    before = prefill(paged_prefill_attention_triton, query, cache, [80])
    block, offset = int(cache.block_table[0, 50 // 16]), 50 % 16
    cache.key[block, :, offset], cache.value[block, :, offset] = 1e4, 1e4
    after = prefill(paged_prefill_attention_triton, query, cache, [80])
    assert torch.equal(after[:50], before[:50])
    assert not torch.equal(after[50:], before[50:])


def test_prefill_of_large_scores_does_not_overflow(as_exact_as_torch):
    cache = make_cache([40], 1, 16, torch.float16)
    query = make_query(40, 1, 16, torch.float16) * 200
    cache.key.mul_(200)
    wide = cache._replace(key=cache.key.float(), value=cache.value.float())
    # plain float16 scores would be infinite: the comparison is with float32 and one rounding
    as_exact_as_torch(
        prefill(paged_prefill_attention_triton, query, cache, [40]),
        plain_torch(query.float(), wide, [40], 0.3).half(),
        prefill(paged_prefill_attention_ref, query.double(), cache.wide(), [40]),
    )


@pytest.mark.parametrize("bad", [-1, 10**6], ids=["negative", "beyond"])
def test_prefill_gives_nan_where_a_block_is_outside_the_cache(bad):
    cache = make_cache([40, 20], 2, 8, torch.float32)
    query = make_query(60, 2, 8, torch.float32)
    expected = prefill(paged_prefill_attention_ref, query, cache, [40, 20])
    cache.block_table[0, 1] = bad
    y = prefill(paged_prefill_attention_triton, query, cache, [40, 20])
    assert y[16:40].isnan().all()
    torch.testing.assert_close(y[:16], expected[:16])
    torch.testing.assert_close(y[40:], expected[40:])


def test_prefill_gives_nan_past_the_end_of_the_block_table():
    cache = make_cache([40], 2, 8, torch.float32)
    query = make_query(40, 2, 8, torch.float32)
    y = prefill(paged_prefill_attention_triton, query, cache._replace(block_table=cache.block_table[:, :2]), [40])
    assert y[32:].isnan().all()
    assert y[:32].isfinite().all()


DECODES = [
    # seq_lens, n_head, head_dim, block_size
    ([1], 1, 1, 16),
    ([5, 64, 65], 2, 64, 16),
    ([63, 0, 129, 128], 2, 20, 16),
    ([200, 17], 2, 80, 16),
    ([90], 3, 48, 8),
    ([70], 1, 130, 32),
    ([33], 1, 256, 16),
    ([SPLIT * MERGE + 70, 3], 1, 8, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("seq_lens", "n_head", "head_dim", "block_size"), DECODES)
def test_decode_matches_definition(seq_lens, n_head, head_dim, block_size, dtype, as_exact_as_torch):
    cache = make_cache(seq_lens, n_head, head_dim, dtype, block_size)
    query, scale = make_query(len(seq_lens), n_head, head_dim, dtype), head_dim**-0.5
    y = decode(paged_decode_attention_triton, query, cache, scale)
    used = [s for s, n in enumerate(seq_lens) if n]
    some = cache._replace(block_table=cache.block_table[used], seq_lens=cache.seq_lens[used])
    as_exact_as_torch(
        y[used],
        plain_torch(query[used], some, [1] * len(used), scale),
        decode(paged_decode_attention_ref, query.double(), cache.wide(), scale)[used],
    )
    assert all((y[s] == 0).all() for s, n in enumerate(seq_lens) if n == 0)


@pytest.mark.parametrize("largest", ["first", "last"])
def test_decode_merges_splits_of_very_different_weight(largest, as_exact_as_torch):
    # two groups of splits; the running maximum of the merge either stays or moves with the second group
    n = SPLIT * MERGE + 70
    cache = make_cache([n], 1, 8, torch.float32)
    block = 0 if largest == "first" else (n - 1) // 16
    cache.key[int(cache.block_table[0, block])] *= 4
    query = make_query(1, 1, 8, torch.float32)
    as_exact_as_torch(
        decode(paged_decode_attention_triton, query, cache, 1.0),
        plain_torch(query, cache, [1], 1.0),
        decode(paged_decode_attention_ref, query.double(), cache.wide(), 1.0),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_rows_do_not_depend_on_the_batch(dtype):
    seq_lens = [70, 0, 200, 1]
    cache = make_cache(seq_lens, 2, 24, dtype)
    query = make_query(4, 2, 24, dtype)
    # a longer bound gives more splits, and more than one group of them in the merge
    together = decode(paged_decode_attention_triton, query, cache, slack=SPLIT * MERGE)
    for s, n in enumerate(seq_lens):
        if n:
            alone = decode(paged_decode_attention_triton, query[s : s + 1], cache.rows(s, s + 1))
            assert torch.equal(alone[0], together[s])


def test_decode_rows_do_not_depend_on_physical_blocks():
    cache = make_cache([100], 2, 24, torch.float32)
    query = make_query(1, 2, 24, torch.float32)
    moved = torch.randperm(cache.key.shape[0])
    key, value, table = torch.zeros_like(cache.key), torch.zeros_like(cache.value), cache.block_table.clone()
    key[moved], value[moved] = cache.key, cache.value
    table[0, :7] = moved[cache.block_table[0, :7].long()].int()
    expected = decode(paged_decode_attention_triton, query, cache)
    assert torch.equal(decode(paged_decode_attention_triton, query, Cache(key, value, table, cache.seq_lens)), expected)


def test_decode_gives_nan_where_a_block_is_outside_the_cache():
    cache = make_cache([100, 20, 20], 2, 8, torch.float32)
    query = make_query(3, 2, 8, torch.float32)
    expected = decode(paged_decode_attention_ref, query, cache)
    cache.block_table[0, 5] = cache.key.shape[0]
    cache.block_table[2, :] = -7
    y = decode(paged_decode_attention_triton, query, cache)
    assert y[0].isnan().all()
    assert y[2].isnan().all()
    torch.testing.assert_close(y[1], expected[1])


def test_decode_gives_nan_for_a_sequence_longer_than_it_was_told():
    cache = make_cache([100, 20], 1, 8, torch.float32)
    query = make_query(2, 1, 8, torch.float32)
    y = paged_decode_attention_triton(query, cache.key, cache.value, cache.block_table, cache.seq_lens, SPLIT, 0.3)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_only_padding_rows_and_no_rows():
    cache = make_cache([0, 0], 2, 8, torch.float16)
    assert (decode(paged_decode_attention_triton, make_query(2, 2, 8, torch.float16), cache) == 0).all()
    nothing = make_query(0, 2, 8, torch.float16)
    assert decode(
        paged_decode_attention_triton, nothing, cache.rows(0, 0)._replace(seq_lens=cache.seq_lens), slack=1
    ).shape == (0, 2, 8)
    assert prefill(paged_prefill_attention_triton, nothing, cache, [0, 0]).shape == (0, 2, 8)


def test_heads_wider_than_a_tile_are_refused():
    cache = make_cache([4], 1, 257, torch.float16)
    query = make_query(1, 1, 257, torch.float16)
    with pytest.raises(ValueError, match="head_dim is 257, expected at most 256"):
        decode(paged_decode_attention_triton, query, cache)
    with pytest.raises(ValueError, match="head_dim is 257, expected at most 256"):
        prefill(paged_prefill_attention_triton, query, cache, [1])
