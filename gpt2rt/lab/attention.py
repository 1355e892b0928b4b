"""Problems of the paged cache: writing to it, attention over it, merging what was split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2rt.kernels import refs
from gpt2rt.kernels.fused_linear import Partials, merge_partials_ref

from .problem import DEFINITION, Place, Problem, load, poison, size_of, tried

BLOCK_SIZE = 16
SPLIT = 64
#: what a cache holds -> its dtype; "float" is the dtype of the place
CACHES = {"float": None, "int8": torch.int8, "float8": torch.float8_e4m3fn}
#: tiles tried beside those of the tables: name -> arguments of DecodeTile and PrefillTile
DECODE_VARIANTS = {"n16": (16, 2, 2), "n32 w4": (32, 4, 2), "n64": (64, 4, 1)}
PREFILL_VARIANTS = {"64x64 w4 s3": (64, 64, 4, 3), "128x64 w8": (128, 64, 8, 2), "64x32 w4": (64, 32, 4, 2)}


class Paged(NamedTuple):
    """Sequences of one length in a paged cache, blocks in random order.

    Attributes:
        key, value: [num_blocks, H, block_size, D].
        table: [S, max_blocks] int32.
        lens: [S] int32.
        scales: key's and value's, [num_blocks, H, block_size] float32 each, of an 8-bit cache; else two times None.
    """

    key: Tensor
    value: Tensor
    table: Tensor
    lens: Tensor
    scales: tuple[Tensor | None, Tensor | None]

    @property
    def num_bytes(self) -> int:
        return size_of(self.key, self.value, *self.scales)

    def contiguous(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as torch's attention wants them, [S, H, L, D]; all sequences have one length."""
        length = int(self.lens[0])

        def lay(cache: Tensor, scales: Tensor | None) -> Tensor:
            tokens = cache if scales is None else cache.float() * scales[..., None]
            return tokens.to(dtype)[self.table.long()].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()

        return lay(self.key, self.scales[0]), lay(self.value, self.scales[1])


def make_paged(place: Place, seqs: int, context: int, heads: int, head_dim: int, cache: str) -> Paged:
    each = -(-context // BLOCK_SIZE)
    shape = seqs * each, heads, BLOCK_SIZE, head_dim
    table = place.permutation(seqs * each).view(seqs, each).to(torch.int32)
    lens = torch.full((seqs,), context, dtype=torch.int32, device=place.device)
    dtype = CACHES[cache]
    key, value = place.normal(*shape), place.normal(*shape)
    if dtype is None:
        return Paged(key, value, table, lens, (None, None))
    (key, key_scales), (value, value_scales) = (refs.quantize_heads_ref(x, dtype) for x in (key, value))
    return Paged(key, value, table, lens, (key_scales, value_scales))


def _several(place: Place, first: Paged) -> list[Paged]:
    """Copies of a cache, as many as make it cold."""
    count = place.copies(first.num_bytes)
    scales = first.scales
    return [first] + [
        Paged(first.key.clone(), first.value.clone(), first.table, first.lens, scales) for _ in range(count - 1)
    ]


def write_kv(place: Place, *, rows: int, heads: int, head_dim: int, cache: str) -> Problem:
    qkv = place.normal(rows, 3, heads, head_dim)
    key, value = qkv[:, 1], qkv[:, 2]
    slots = place.permutation(2 * rows)[:rows]
    blocks = -(-2 * rows // BLOCK_SIZE)
    shape = blocks, heads, BLOCK_SIZE, head_dim
    dtype = CACHES[cache]
    caches = [torch.empty(shape, dtype=dtype or place.dtype, device=place.device) for _ in range(2)]
    scales = [] if dtype is None else [torch.empty(shape[:3], device=place.device) for _ in range(2)]

    def written(store: list[Tensor]) -> tuple[Tensor, ...]:
        # codes are compared as integers
        return tuple(t.view(torch.uint8) if t.itemsize == 1 else t.double() for t in store)

    # the schema of the op wants both or neither
    both: list[Tensor | None] = [*scales] if scales else [None, None]
    forms = place.forms(
        "write_kv", "write_kv:write_kv_triton", refs.write_kv_ref, lambda _: (key, value, *caches, slots, *both)
    )
    if cache == "float8":
        # the float8 cache is the GPU's
        forms.pop("C++", None)
    if dtype is None:
        block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE

        def plain(_: int) -> None:
            caches[0][block, :, offset] = key
            caches[1][block, :, offset] = value

        forms["torch"] = plain

    def prepare() -> None:
        for store in (*caches, *scales):
            store.zero_()

    def expected() -> tuple[Tensor, ...]:
        before = [torch.zeros_like(store) for store in (*caches, *scales)]
        refs.write_kv_ref(key, value, before[0], before[1], slots, *before[2:])
        return written(before)

    moved = size_of(key, value) + 2 * rows * heads * (head_dim * caches[0].itemsize + 4 * bool(scales)) + 8 * rows
    return Problem(forms, expected, moved=moved, prepare=prepare, outputs=lambda _: written([*caches, *scales]))


def paged_decode_attention(place: Place, *, seqs: int, context: int, heads: int, head_dim: int, cache: str) -> Problem:
    """One query a sequence: splits of the context, then the merge."""
    paged = make_paged(place, seqs, context, heads, head_dim, cache)
    stores = _several(place, paged)
    query, scale = place.normal(seqs, 3, heads, head_dim)[:, 0], head_dim**-0.5
    forms = place.forms(
        "paged_decode_attention",
        "paged_decode_attention:paged_decode_attention_triton",
        refs.paged_decode_attention_ref,
        lambda i: (query, stores[i].key, stores[i].value, paged.table, paged.lens, context, scale, *paged.scales),
    )
    if cache == "float8":
        # the float8 cache is the GPU's
        forms.pop("C++", None)
    if place.has_triton:
        from gpt2rt.kernels.paged_decode_attention import (
            TILES,
            DecodeTile,
            merge_splits_triton,
            paged_decode_partials_triton,
        )

        splits = -(-context // SPLIT)
        values = torch.empty((seqs, heads, splits, head_dim), device=place.device)
        lse = torch.empty((seqs, heads, splits), device=place.device)
        out = torch.empty((seqs, heads, head_dim), dtype=place.dtype, device=place.device)

        def run(i: int, **options: Any) -> Tensor:
            caches = stores[i].key, stores[i].value
            batch = paged.table, paged.lens, values, lse
            paged_decode_partials_triton(query, *caches, *batch, scale, *paged.scales, **options)
            merge_splits_triton(values, lse, paged.lens, out)
            return out

        forms["Triton: batch invariant"] = lambda i: run(i, batch_invariant=True)
        if place.device.type == "cuda":
            for name, numbers in DECODE_VARIANTS.items():
                forms[f"Triton: {name}"] = tried(TILES, DecodeTile(*numbers), run)
    whole = [store.contiguous(place.dtype) for store in stores]
    forms["torch, contiguous"] = lambda i: F.scaled_dot_product_attention(query[:, :, None], *whole[i])[:, :, 0]

    def expected() -> Tensor:
        batch = paged.table, paged.lens, context
        return refs.paged_decode_attention_ref(query.double(), paged.key, paged.value, *batch, scale, *paged.scales)

    return Problem(
        forms,
        expected,
        moved=paged.num_bytes * context // (paged.table.size(1) * BLOCK_SIZE) + 2 * size_of(query),
        operations=4 * seqs * context * heads * head_dim,
        copies=len(stores),
    )


def paged_prefill_attention(
    place: Place, *, seqs: int, queries: int, context: int, heads: int, head_dim: int, cache: str
) -> Problem:
    """The last ``queries`` tokens of each sequence, causal."""
    paged = make_paged(place, seqs, context, heads, head_dim, cache)
    stores = _several(place, paged)
    query, scale = place.normal(seqs * queries, 3, heads, head_dim)[:, 0], head_dim**-0.5
    starts = (torch.arange(seqs + 1, device=place.device) * queries).to(torch.int32)
    forms = place.forms(
        "paged_prefill_attention",
        "paged_prefill_attention:paged_prefill_attention_triton",
        refs.paged_prefill_attention_ref,
        lambda i: (
            query,
            stores[i].key,
            stores[i].value,
            paged.table,
            paged.lens,
            starts,
            queries,
            scale,
            *paged.scales,
        ),
    )
    if cache == "float8":
        # the float8 cache is the GPU's
        forms.pop("C++", None)
    if place.has_triton:
        from gpt2rt.kernels.paged_prefill_attention import TILES, PrefillTile, paged_prefill_into_triton

        out = torch.empty(query.shape, dtype=place.dtype, device=place.device)

        def run(i: int, **options: Any) -> Tensor:
            batch = paged.table, paged.lens, starts, queries
            paged_prefill_into_triton(
                query, stores[i].key, stores[i].value, *batch, out, scale, *paged.scales, **options
            )
            return out

        forms["Triton: batch invariant"] = lambda i: run(i, batch_invariant=True)
        if place.device.type == "cuda" and place.dtype.itemsize == 2 and head_dim <= 64:
            for name, numbers in PREFILL_VARIANTS.items():
                forms[f"Triton: {name}"] = tried(TILES, PrefillTile(*numbers), run)
    if queries == context:
        whole = [store.contiguous(place.dtype) for store in stores]

        def plain(i: int) -> Tensor:
            q = query.unflatten(0, (seqs, queries)).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, *whole[i], is_causal=True)
            return y.transpose(1, 2).flatten(0, 1)

        forms["torch, contiguous"] = plain

    def expected() -> Tensor:
        batch = paged.table, paged.lens, starts, queries
        return refs.paged_prefill_attention_ref(query.double(), paged.key, paged.value, *batch, scale, *paged.scales)

    pairs = queries * (2 * context - queries + 1) // 2
    return Problem(
        forms,
        expected,
        moved=paged.num_bytes + 2 * size_of(query),
        operations=4 * seqs * heads * head_dim * pairs,
        copies=len(stores),
    )


def merge_splits(place: Place, *, seqs: int, splits: int, heads: int, head_dim: int) -> Problem:
    values = place.normal(seqs, heads, splits, head_dim, dtype=torch.float32)
    lse = place.normal(seqs, heads, splits, dtype=torch.float32)
    lens = place.integers(1, splits * SPLIT + 1, seqs, dtype=torch.int32)
    lens[0] = splits * SPLIT
    out = torch.empty((seqs, heads * head_dim), dtype=place.dtype, device=place.device)
    forms: dict[str, Callable[[int], Any]] = {}
    if place.has_triton:
        launch = load("merge_splits:merge_splits_triton")

        def run(_: int) -> Tensor:
            launch(values, lse, lens, out)
            return out

        forms["Triton"] = run
    forms[DEFINITION] = lambda _: merge_partials_ref(Partials(values, lse, lens), SPLIT).to(place.dtype)
    return Problem(
        forms,
        lambda: merge_partials_ref(Partials(values, lse, lens), SPLIT, torch.float64),
        moved=size_of(values, lse, lens, out),
        prepare=lambda: poison(out),
    )
