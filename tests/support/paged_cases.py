"""Paged caches, queries and calls for the tests of paged attention."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2rt.kernels.refs import LARGEST_CODE, quantize_heads_ref

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CODES = list(LARGEST_CODE)


class Cache(NamedTuple):
    """A paged cache in which everything that no sequence owns is NaN."""

    key: Tensor  # [num_blocks, n_head, block_size, head_dim]
    value: Tensor
    block_table: Tensor  # [num_seqs, max_blocks_per_seq], int32; unused entries point far outside
    seq_lens: Tensor  # [num_seqs], int32
    key_scales: Tensor | None = None  # [num_blocks, n_head, block_size] of an 8-bit cache
    value_scales: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Cache":
        """The values that it holds, as a float cache."""
        key, value = (
            c.to(dtype) if s is None else (c.double() * s.double()[..., None]).to(dtype)
            for c, s in ((self.key, self.key_scales), (self.value, self.value_scales))
        )
        return self._replace(key=key, value=value, key_scales=None, value_scales=None)

    def wide(self) -> "Cache":
        return self.to(torch.float64)

    def rows(self, first: int, last: int) -> "Cache":
        return self._replace(block_table=self.block_table[first:last], seq_lens=self.seq_lens[first:last])

    def cut(self, length: int) -> "Cache":
        """The first sequence alone, when it had so many tokens."""
        return self.rows(0, 1)._replace(seq_lens=torch.tensor([length], dtype=torch.int32))


def make_cache(seq_lens, n_head, head_dim, dtype, block_size=16) -> Cache:
    """Blocks in random physical order; slots past the end of a sequence hold NaN, in 8-bit caches also as scales."""
    used = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(used) + 3
    physical = torch.randperm(num_blocks).int()
    drawn = torch.float32 if dtype in CODES else dtype
    key, value = (torch.full((num_blocks, n_head, block_size, head_dim), math.nan, dtype=drawn) for _ in range(2))
    table = torch.full((len(seq_lens), max(used) + 1), 2**30, dtype=torch.int32)
    taken = 0
    for s, n in enumerate(seq_lens):
        table[s, : used[s]] = physical[taken : taken + used[s]]
        taken += used[s]
        for i in range(0, n, block_size):
            filled = min(block_size, n - i)
            block = int(table[s, i // block_size])
            key[block, :, :filled] = torch.randn(n_head, filled, head_dim, dtype=drawn)
            value[block, :, :filled] = torch.randn(n_head, filled, head_dim, dtype=drawn)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    if dtype not in CODES:
        return Cache(key, value, table, lens)
    (key, key_scales), (value, value_scales) = (quantize_heads_ref(x, dtype) for x in (key, value))
    for codes, scales in ((key, key_scales), (value, value_scales)):
        # NaN in float8, and the largest code of int8
        codes.view(torch.uint8)[scales.isnan()] = 0x7F
    return Cache(key, value, table, lens, key_scales, value_scales)


def make_query(num_tokens, n_head, head_dim, dtype) -> Tensor:
    """The q part of a qkv matrix; the other parts are NaN."""
    qkv = torch.full((num_tokens, 3, n_head, head_dim), math.nan, dtype=dtype)
    qkv[:, 0] = torch.randn(num_tokens, n_head, head_dim, dtype=dtype)
    return qkv[:, 0]


def plain_torch(query, cache, query_lens, scale) -> Tensor:
    """Attention by plain torch operations in the query's dtype, on keys and values in one piece."""
    rows, first = [], 0
    block_size = cache.key.shape[2]
    cache = cache.to(query.dtype)
    for s, (n, q_len) in enumerate(zip(cache.seq_lens.tolist(), query_lens, strict=True)):
        blocks = cache.block_table[s, : -(-n // block_size)].long()
        key, value = (c[blocks].transpose(0, 1).flatten(1, 2)[:, :n] for c in (cache.key, cache.value))
        q = query[first : first + q_len].transpose(0, 1)
        future = torch.ones(q_len, n, dtype=torch.bool).triu(n - q_len + 1)
        weights = ((q * scale) @ key.transpose(1, 2)).masked_fill(future, -math.inf).softmax(-1)
        rows.append((weights @ value).transpose(0, 1))
        first += q_len
    return torch.cat(rows)


def starts_of(query_lens) -> Tensor:
    return torch.tensor([0, *query_lens]).cumsum(0).int()


def prefill(form, query, cache, query_lens, scale=0.3, slack=0) -> Tensor:
    """A call of ``paged_prefill_attention`` in one of its forms; ``slack`` widens the bound of the query length."""
    key, value, table, lens, *scales = cache
    return form(query, key, value, table, lens, starts_of(query_lens), max(query_lens) + slack, scale, *scales)


def decode(form, query, cache, scale=0.3, slack=0) -> Tensor:
    """A call of ``paged_decode_attention`` in one of its forms; ``slack`` widens the bound of the sequence length."""
    key, value, table, lens, *scales = cache
    return form(query, key, value, table, lens, int(lens.max()) + slack, scale, *scales)
