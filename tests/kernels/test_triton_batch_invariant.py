"""Batch-invariant attention in triton's interpreter: the same bits in decoding and in chunks of any size."""

import os

import pytest
import torch
from paged_cases import FLOATS, make_cache, make_query, plain_torch, prefill, starts_of

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.paged_decode_attention import SPLIT, merge_splits_triton, paged_decode_partials_triton
from gpt2rt.kernels.paged_prefill_attention import paged_prefill_attention_ref, paged_prefill_into_triton

# some tests ask for NaN
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    # a split of which a row sees nothing has the logarithm of 0
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
]


def chunk(query, cache, query_lens, scale=0.3):
    key, value, table, lens, *scales = cache
    out = torch.empty(query.shape, dtype=query.dtype)
    starts = starts_of(query_lens)
    batch = (table, lens, starts, max(query_lens))
    paged_prefill_into_triton(query, key, value, *batch, out, scale, *scales, batch_invariant=True)
    return out


def decoded(query, cache, room=0, scale=0.3):
    """One query a sequence; ``room`` for more splits than the longest sequence has."""
    key, value, table, lens, *scales = cache
    num_seqs, n_head, head_dim = query.shape
    num_splits = -(-int(lens.max()) // SPLIT) + room
    values = torch.empty((num_seqs, n_head, num_splits, head_dim), dtype=torch.float32)
    lse = torch.empty((num_seqs, n_head, num_splits), dtype=torch.float32)
    paged_decode_partials_triton(query, key, value, table, lens, values, lse, scale, *scales, batch_invariant=True)
    out = torch.empty(query.shape, dtype=query.dtype)
    merge_splits_triton(values, lse, lens, out)
    return out


CASES = [(dtype, dtype) for dtype in FLOATS] + [(torch.float16, torch.int8), (torch.bfloat16, torch.float8_e4m3fn)]


@pytest.mark.parametrize(("dtype", "stored"), CASES, ids=str)
def test_matches_the_definition(dtype, stored, as_exact_as_torch):
    seq_lens, query_lens = [130, 16, 100], [70, 1, 99]
    cache = make_cache(seq_lens, 1, 40, stored)
    query = make_query(sum(query_lens), 1, 40, dtype)
    as_exact_as_torch(
        chunk(query, cache, query_lens),
        plain_torch(query, cache, query_lens, 0.3),
        prefill(paged_prefill_attention_ref, query.double(), cache.wide(), query_lens),
    )


@pytest.mark.parametrize(("dtype", "stored"), [CASES[0], *CASES[2:]], ids=str)
def test_a_token_has_the_same_bits_decoded_and_in_chunks_of_any_size(dtype, stored):
    length = 150
    cache = make_cache([length, 9], 1, 24, stored)
    query = make_query(length + 9, 1, 24, dtype)
    whole = chunk(query, cache, [length, 9])
    assert torch.equal(chunk(query[:length], cache.rows(0, 1), [length]), whole[:length])
    for size in (1, 7, 64, 65):
        # the small ones at the borders of the splits and around them
        firsts = {1: (0, 63, 64, 149), 7: (0, 56, 63, 126, 147)}.get(size, range(0, length, size))
        for first in firsts:
            last = min(first + size, length)
            rows = chunk(query[first:last], cache.cut(last), [last - first])
            assert torch.equal(rows, whole[first:last]), f"tokens {first} to {last - 1} in a chunk"
    for position in (0, 1, 15, 63, 64, 127, 128, 149):
        row = decoded(query[position : position + 1], cache.cut(position + 1), room=position % 2)
        assert torch.equal(row[0], whole[position]), f"token {position} decoded"


def test_decoding_in_company():
    seq_lens = [70, 0, 200, 1]
    cache, query = make_cache(seq_lens, 2, 24, torch.float16), make_query(4, 2, 24, torch.float16)
    together = decoded(query, cache)
    assert (together[1] == 0).all()
    for s, n in enumerate(seq_lens):
        if n:
            assert torch.equal(decoded(query[s : s + 1], cache.rows(s, s + 1))[0], together[s])


def test_a_block_outside_the_cache_gives_nan():
    cache, query = make_cache([100, 20], 2, 8, torch.float32), make_query(120, 2, 8, torch.float32)
    expected = chunk(query, cache, [100, 20])
    cache.block_table[0, 1] = cache.key.shape[0]
    y = chunk(query, cache, [100, 20])
    assert y[16:100].isnan().all()
    assert torch.equal(y[:16], expected[:16])
    assert torch.equal(y[100:], expected[100:])
    assert decoded(query[99:100], cache.cut(100)).isnan().all()
