"""Paged prefill attention in triton's interpreter against the definition in float64."""

import os

import pytest
import torch
from paged_cases import CODES, FLOATS, make_cache, make_query, plain_torch, prefill, starts_of

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.paged_prefill_attention import (
    TILES,
    PrefillTile,
    paged_prefill_attention_ref,
    paged_prefill_attention_triton,
    paged_prefill_into_triton,
)

# some tests ask for NaN
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("seq_lens", "query_lens", "n_head", "head_dim", "block_size"), PREFILLS)
def test_prefill_matches_definition(seq_lens, query_lens, n_head, head_dim, block_size, dtype, as_exact_as_torch):
    cache = make_cache(seq_lens, n_head, head_dim, dtype, block_size)
    query, scale = make_query(sum(query_lens), n_head, head_dim, dtype), head_dim**-0.5
    as_exact_as_torch(
        prefill(paged_prefill_attention_triton, query, cache, query_lens, scale),
        plain_torch(query, cache, query_lens, scale),
        prefill(paged_prefill_attention_ref, query.double(), cache.wide(), query_lens, scale),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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


# query, cache; 8-bit caches with tiles of every padded width, and floats of another dtype than the query's
QUANTIZED = [
    # seq_lens, query_lens, n_head, head_dim, block_size
    ([65, 33, 7], [65, 2, 0], 2, 48, 16),
    ([40, 21], [13, 21], 2, 33, 8),
    ([70], [40], 1, 64, 64),
    ([20], [20], 1, 130, 16),
]


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("seq_lens", "query_lens", "n_head", "head_dim", "block_size"), QUANTIZED)
def test_prefill_of_8_bit_caches(seq_lens, query_lens, n_head, head_dim, block_size, dtype, codes, as_exact_as_torch):
    cache = make_cache(seq_lens, n_head, head_dim, codes, block_size)
    query, scale = make_query(sum(query_lens), n_head, head_dim, dtype), head_dim**-0.5
    as_exact_as_torch(
        prefill(paged_prefill_attention_triton, query, cache, query_lens, scale),
        plain_torch(query, cache, query_lens, scale),
        prefill(paged_prefill_attention_ref, query.double(), cache.wide(), query_lens, scale),
    )


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_small_and_large_values_keep_their_digits(codes, size, as_exact_as_torch):
    # scales of values near 1e-5 would leave the range of float16 if they met the softmax weights
    cache = make_cache([70], 1, 16, codes)
    cache.value_scales.mul_(size)
    query = make_query(5, 1, 16, torch.float16)
    as_exact_as_torch(
        prefill(paged_prefill_attention_triton, query, cache, [5]),
        plain_torch(query, cache, [5], 0.3),
        prefill(paged_prefill_attention_ref, query.double(), cache.wide(), [5]),
    )


@pytest.mark.parametrize("stored", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_cache_of_another_dtype_than_the_query(dtype, stored):
    cache, query = make_cache([20], 1, 20, stored), make_query(7, 1, 20, dtype)
    y = prefill(paged_prefill_attention_triton, query, cache, [7])
    expected = prefill(paged_prefill_attention_ref, query, cache, [7])
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_a_scale_that_is_nan_spoils_the_rows_that_see_it(codes):
    cache = make_cache([40], 2, 8, codes)
    cache.key_scales[cache.block_table[0, 1], 1, 4] = float("nan")
    y = prefill(paged_prefill_attention_triton, make_query(40, 2, 8, torch.float32), cache, [40])
    assert y[:, 0].isfinite().all()
    assert y[:20, 1].isfinite().all()
    assert y[20:, 1].isnan().all()


def test_prefill_into_rows_of_a_wider_matrix_with_another_tile(as_exact_as_torch):
    # the rows of a larger buffer, as an executor keeps them; rows past the last query stay as they are
    cache, query = make_cache([70, 30], 2, 24, torch.float16), make_query(55, 2, 24, torch.float16)
    buffer = torch.full((55, 60), 7.0, dtype=torch.float16)
    key, value, table, lens, *_ = cache
    with TILES.trying(PrefillTile(16, 32, 4, 1)):
        paged_prefill_into_triton(query, key, value, table, lens, starts_of([40, 11]), 40, buffer[:, 4:52], 0.3)
    assert (buffer[:, :4] == 7).all()
    assert (buffer[:, 52:] == 7).all()
    assert (buffer[51:] == 7).all()
    as_exact_as_torch(
        buffer[:51, 4:52].contiguous().view(51, 2, 24),
        plain_torch(query, cache, [40, 11], 0.3),
        prefill(paged_prefill_attention_ref, query[:51].double(), cache.wide(), [40, 11]),
    )


def test_no_queries():
    cache, nothing = make_cache([4, 5], 2, 8, torch.float16), make_query(0, 2, 8, torch.float16)
    assert prefill(paged_prefill_attention_triton, nothing, cache, [0, 0]).shape == (0, 2, 8)


def test_heads_wider_than_a_tile_are_refused():
    cache, query = make_cache([4], 1, 257, torch.float16), make_query(1, 1, 257, torch.float16)
    with pytest.raises(ValueError, match="head_dim is 257, expected at most 256"):
        prefill(paged_prefill_attention_triton, query, cache, [1])
