"""Paged decode attention in triton's interpreter against the definition in float64."""

import math
import os

import pytest
import torch
from paged_cases import CODES, FLOATS, Cache, decode, make_cache, make_query, plain_torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.fused_linear import Partials, merge_partials_ref
from gpt2rt.kernels.paged_decode_attention import (
    SPLIT,
    TILES,
    DecodeTile,
    merge_splits_triton,
    paged_decode_attention_ref,
    paged_decode_attention_triton,
    paged_decode_partials_triton,
)

# some tests ask for NaN
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

# more tokens than the merge reads at a time
LONG = 8 * SPLIT


DECODES = [
    # seq_lens, n_head, head_dim, block_size
    ([1], 1, 1, 16),
    ([5, 64, 65], 2, 64, 16),
    ([63, 0, 129, 128], 2, 20, 16),
    ([200, 17], 2, 80, 16),
    ([90], 3, 48, 8),
    ([70], 1, 130, 32),
    ([33], 1, 256, 16),
    ([LONG + 70, 3], 1, 8, 16),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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
    n = LONG + 70
    cache = make_cache([n], 1, 8, torch.float32)
    block = 0 if largest == "first" else (n - 1) // 16
    cache.key[int(cache.block_table[0, block])] *= 4
    query = make_query(1, 1, 8, torch.float32)
    as_exact_as_torch(
        decode(paged_decode_attention_triton, query, cache, 1.0),
        plain_torch(query, cache, [1], 1.0),
        decode(paged_decode_attention_ref, query.double(), cache.wide(), 1.0),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_decode_rows_do_not_depend_on_the_batch(dtype):
    seq_lens = [70, 0, 200, 1]
    cache = make_cache(seq_lens, 2, 24, dtype)
    query = make_query(4, 2, 24, dtype)
    # a longer bound gives more splits, and more than one group of them in the merge
    together = decode(paged_decode_attention_triton, query, cache, slack=LONG)
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


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("seq_lens", "n_head", "head_dim", "block_size"),
    [([5, 64, 65], 2, 64, 16), ([63, 0, 129, 128], 2, 20, 8), ([70], 1, 130, 64), ([90], 1, 80, 32)],
)
def test_decode_of_8_bit_caches(seq_lens, n_head, head_dim, block_size, dtype, codes, as_exact_as_torch):
    cache = make_cache(seq_lens, n_head, head_dim, codes, block_size)
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


@pytest.mark.parametrize("stored", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_cache_of_another_dtype_than_the_query(dtype, stored):
    cache, query = make_cache([70], 1, 20, stored), make_query(1, 1, 20, dtype)
    y = decode(paged_decode_attention_triton, query, cache)
    expected = decode(paged_decode_attention_ref, query, cache)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_a_scale_that_is_nan_spoils_its_row_and_head_only(codes):
    cache = make_cache([70, 70], 2, 8, codes)
    cache.value_scales[cache.block_table[1, 2], 0, 3] = math.nan
    y = decode(paged_decode_attention_triton, make_query(2, 2, 8, torch.float32), cache)
    assert y.isnan().all(-1).tolist() == [[False, False], [True, False]]
    assert y[0].isfinite().all()


def partials(query, cache, num_splits, **options):
    """(values, lse) of ``paged_decode_partials_triton`` in poisoned buffers."""
    key, value, table, lens, *scales = cache
    num_seqs, n_head, head_dim = query.shape
    values = torch.empty((num_seqs, n_head, num_splits, head_dim), dtype=torch.float32)
    lse = torch.empty((num_seqs, n_head, num_splits), dtype=torch.float32)
    paged_decode_partials_triton(query, key, value, table, lens, values, lse, 0.3, *scales, **options)
    return values, lse


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_partials_of_each_split(batch_invariant):
    seq_lens = [130, 0, 64]
    cache, query = make_cache(seq_lens, 2, 24, torch.float32), make_query(3, 2, 24, torch.float32)
    values, lse = partials(query, cache, 4, batch_invariant=batch_invariant)
    wide = cache.wide()
    for s, n in enumerate(seq_lens):
        blocks = wide.block_table[s, : -(-n // 16)].long()
        key, value = (c[blocks].transpose(0, 1).flatten(1, 2)[:, :n] for c in (wide.key, wide.value))
        scores = (key @ query[s].double()[..., None])[..., 0] * 0.3
        for split in range(4):
            part = slice(split * SPLIT, min(n, (split + 1) * SPLIT))
            if split * SPLIT >= n:
                # no tokens: the lse says so and no value is written
                assert (lse[s, :, split] == -math.inf).all()
                assert values[s, :, split].isnan().all()
                continue
            expected = scores[:, part].softmax(-1)[:, None] @ value[:, part]
            torch.testing.assert_close(values[s, :, split].double(), expected[:, 0], rtol=1e-5, atol=1e-5)
            logs = scores[:, part].logsumexp(-1) * math.log2(math.e)
            torch.testing.assert_close(lse[s, :, split].double(), logs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merging_into_rows_of_a_matrix(dtype):
    # 19 splits, of which the rows use 1, 8, 9, none and all; unused ones are NaN
    seq_lens = torch.tensor([1, 8 * SPLIT, 8 * SPLIT + 1, 0, 19 * SPLIT], dtype=torch.int32)
    values, lse = torch.randn(5, 2, 19, 20), torch.randn(5, 2, 19) * 5
    unused = torch.arange(19) * SPLIT >= seq_lens[:, None]
    values[unused[:, None].expand(5, 2, 19)], lse[unused[:, None].expand(5, 2, 19)] = math.nan, math.nan
    out = torch.full((5, 50), 7.0, dtype=dtype)
    merge_splits_triton(values, lse, seq_lens, out[:, 5:45])
    expected = merge_partials_ref(Partials(values, lse, seq_lens), dtype=torch.float64)
    rtol, atol = {torch.float32: (1e-5, 1e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (1e-2, 1e-2)}[dtype]
    torch.testing.assert_close(out[:, 5:45].double(), expected, rtol=rtol, atol=atol)
    assert (out[3, 5:45] == 0).all()
    assert (out[:, :5] == 7).all()
    assert (out[:, 45:] == 7).all()


def test_room_for_more_splits_changes_no_bit():
    values, lse = torch.randn(1, 2, 30, 20), torch.randn(1, 2, 30) * 5
    lens = torch.tensor([5 * SPLIT], dtype=torch.int32)
    results = []
    for room in (5, 6, 8, 13, 30):
        out = torch.empty((1, 2, 20), dtype=torch.float32)
        merge_splits_triton(values[:, :, :room].contiguous(), lse[:, :, :room].contiguous(), lens, out)
        results.append(out)
    assert all(torch.equal(out, results[0]) for out in results)


@pytest.mark.parametrize("dtype", [torch.float16, *CODES], ids=str)
def test_every_way_to_read_a_split(dtype, as_exact_as_torch):
    cache, query = make_cache([150], 1, 24, dtype), make_query(1, 1, 24, torch.float32)
    for tile in (DecodeTile(16, 2, 3), DecodeTile(32, 4, 2), DecodeTile(64, 1, 1)):
        with TILES.trying(tile):
            values, lse = partials(query, cache, 3)
        out = torch.empty((1, 1, 24), dtype=torch.float32)
        merge_splits_triton(values, lse, cache.seq_lens, out)
        as_exact_as_torch(
            out,
            plain_torch(query, cache, [1], 0.3),
            decode(paged_decode_attention_ref, query.double(), cache.wide()),
        )


def test_only_padding_rows_and_no_rows():
    cache = make_cache([0, 0], 2, 8, torch.float16)
    assert (decode(paged_decode_attention_triton, make_query(2, 2, 8, torch.float16), cache) == 0).all()
    nothing = make_query(0, 2, 8, torch.float16)
    assert decode(
        paged_decode_attention_triton, nothing, cache.rows(0, 0)._replace(seq_lens=cache.seq_lens), slack=1
    ).shape == (0, 2, 8)


def test_heads_wider_than_a_tile_are_refused():
    cache, query = make_cache([4], 1, 257, torch.float16), make_query(1, 1, 257, torch.float16)
    with pytest.raises(ValueError, match="head_dim is 257, expected at most 256"):
        decode(paged_decode_attention_triton, query, cache)
