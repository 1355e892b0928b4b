"""What gpu_tune.py measures: lines of the kernels' tables, problems that look them up, and what else they could say.

A line serves a range of sizes, and is measured on those of GPT-2's that lie in it: n_embd 768, 1024, 1280 and 1600 with
12, 16, 20 and 25 heads of 64, and a vocabulary of 50257. Lines for heads wider than 64 have no such size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from gpt2rt.kernels import (
    batch_invariant_attention,
    bias_gelu_new,
    embedding,
    embedding_rows,
    head,
    layer_norm,
    linear,
    linear_rows,
    merge_splits,
    norm_rows,
    paged_decode_attention,
    paged_prefill_attention,
    penalties,
    sampling_select,
    tile_config,
    write_kv,
)
from gpt2rt.kernels.batch_invariant_attention import InvariantTile
from gpt2rt.kernels.config_table import ALL, Chunk, ConfigTable
from gpt2rt.kernels.linear import ColumnsTile
from gpt2rt.kernels.linear_rows import RowsTile
from gpt2rt.kernels.paged_decode_attention import DecodeTile
from gpt2rt.kernels.paged_prefill_attention import PrefillTile
from gpt2rt.kernels.tile_config import Tile

F16, F32 = torch.float16, torch.float32
WIDTHS = (768, 1024, 1280, 1600)
HEADS = (12, 16, 20, 25)
VOCABULARY = 50257
#: format of the lab -> bits of a weight in the tables
BITS = {"dense": 16, "int8": 8, "int4": 4}
#: weights that a thread may hold of a tile: fewer leave loads unused, more spill
WEIGHTS_A_THREAD = (16, 128)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of a table.

    Attributes:
        table: where it stands.
        key: the kind of the line, as the table has it.
        sizes: what the present line is found by.
        problems: (operation of the lab, one of its sizes); what decides between the candidates.
        candidates: configurations to compare with the present one.
        form: of the lab's problem that looks the line up.
        dtype: of weights and activations.
        narrower: limits of a line that would serve no more than these problems; None: those of the present line.
    """

    table: ConfigTable
    key: Any
    sizes: tuple[int, ...]
    problems: tuple[tuple[str, dict[str, Any]], ...]
    candidates: tuple[Any, ...]
    form: str = "Triton"
    dtype: torch.dtype = F16
    narrower: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in zip(self.table.limits, self.sizes, strict=True))
        kind = "" if self.key == ALL else f" {self.key}"
        return f"{self.table.name}{kind}{f': {sizes}' if sizes else ''}"

    def present(self, architecture: int) -> Any:
        """The configuration that the table has."""
        return self.table.find(architecture, self.key, *self.sizes)

    def line(self, architecture: int, config: str) -> str:
        """What to paste into the table for a configuration."""
        limits = self.narrower
        if limits is None:
            limits = self.table.line(architecture, self.key, *self.sizes)[:-1]
        return f"({', '.join([*map(str, limits), config])}{'' if limits else ','})"


def _row_tiles(block_k: int, most_rows: int) -> tuple[RowsTile, ...]:
    low, high = WEIGHTS_A_THREAD
    sizes = ((1 << i, warps) for warps in (2, 4, 8) for i in range(most_rows.bit_length()))
    return tuple(RowsTile(n, warps) for n, warps in sizes if low <= n * block_k // (32 * warps) <= high)


def _rows(format: str) -> Iterable[Entry]:
    """linear_rows: what a layer's products of one row and of eight take, by the power of two that holds a row."""
    for limit in (1024, 2048, 4096, 8192):
        sizes = []
        for width in WIDTHS:
            layers = ((width, 3 * width, "qkv"), (width, width, "proj"), (width, 4 * width, "fc"))
            for k, n, role in (*layers, (4 * width, width, "down")):
                if limit // 2 < k <= limit:
                    # the same machine code for both numbers of rows
                    sizes += [{"rows": rows, "k": k, "n": n, "role": role, "format": format} for rows in (1, 8)]
        problems = tuple(("linear_rows", size) for size in sizes)
        tiles = _row_tiles(limit, 16)
        yield Entry(linear_rows.TILES, BITS[format], (limit,), problems, tiles, narrower=(limit,))


def _head(format: str) -> Iterable[Entry]:
    for limit in (1024, 2048):
        problems = tuple(
            ("head_argmax", {"rows": rows, "k": k, "n": VOCABULARY, "format": format})
            for k in WIDTHS
            if limit // 2 < k <= limit
            for rows in (1, 8)
        )
        yield Entry(head.TILES, BITS[format], (limit,), problems, _row_tiles(limit, 32), narrower=(limit,))


DECODE_TILES = (
    *(DecodeTile(16, warps, stages) for warps, stages in ((1, 2), (2, 2), (2, 4))),
    *(DecodeTile(32, warps, stages) for warps, stages in ((1, 2), (2, 2), (4, 2), (2, 3))),
    *(DecodeTile(64, warps, 1) for warps in (2, 4)),
)


def _attended(name: str, heads: Iterable[int], cache: str, sizes: Iterable[dict[str, int]]):
    """Problems of attention."""
    return tuple((name, {**size, "heads": h, "head_dim": 64, "cache": cache}) for h in heads for size in sizes)


def _decoded(heads: Iterable[int] = HEADS, cache: str = "float"):
    sizes = ({"seqs": s, "context": c} for s, c in ((1, 256), (1, 1024), (64, 512)))
    return _attended("paged_decode_attention", heads, cache, list(sizes))


def _decode() -> Iterable[Entry]:
    yield Entry(paged_decode_attention.TILES, 2, (64,), _decoded(), DECODE_TILES)
    merged = [{"seqs": s, "splits": 16, "heads": h, "head_dim": 64} for h in HEADS for s in (1, 64)]
    yield Entry(merge_splits.WARPS, ALL, (64,), tuple(("merge_splits", size) for size in merged), (1, 2, 4))


PREFILL_TILES = (
    *(PrefillTile(64, n, 4, stages) for n, stages in ((32, 2), (64, 2), (64, 3), (128, 2))),
    *(PrefillTile(128, n, 8, stages) for n, stages in ((32, 2), (64, 2), (64, 3), (128, 2))),
)


def _prompts(*shapes: tuple[int, int, int]):
    return [{"seqs": seqs, "queries": queries, "context": context} for seqs, queries, context in shapes]


def _prefilled(heads: Iterable[int], *shapes: tuple[int, int, int], cache: str = "float"):
    return _attended("paged_prefill_attention", heads, cache, _prompts(*shapes))


def _prefill() -> Iterable[Entry]:
    few, many = paged_prefill_attention.FEW_QUERIES, paged_prefill_attention.FEW_QUERIES + 1
    table = paged_prefill_attention.TILES
    small = _prefilled((12, 25), (1, 128, 128), (8, 128, 128), (1, 512, 1024)) + _prefilled((12,), (1, 1024, 1024))
    yield Entry(table, 2, (few, 64), small, PREFILL_TILES)
    yield Entry(table, 2, (many, 64), _prefilled((20, 25), (1, 1024, 1024), (4, 1024, 1024)), PREFILL_TILES)


def _caches() -> Iterable[Entry]:
    """Attention over caches of 8 bits."""
    yield Entry(paged_decode_attention.TILES, 1, (64,), _decoded((12, 25), "int8"), DECODE_TILES)
    problems = _prefilled((12, 25), (1, 128, 1024), (1, 1024, 1024), cache="int8")
    yield Entry(paged_prefill_attention.TILES, 1, (1024 * 25, 64), problems, PREFILL_TILES)


def _tiles(format: str, dtype: torch.dtype = F16) -> Iterable[Entry]:
    table, bytes_, four_bits = tile_config.TILES, dtype.itemsize, format == "int4"
    narrow = ((768, 768, "proj"), (3072, 768, "down"), (1600, 1600, "proj"), (6400, 1600, "down"))
    wide = ((768, 3072, "fc"), (1600, 6400, "fc"))
    few = tuple(Tile(16, *rest) for rest in ((32, 64, 4, 4), (32, 64, 4, 6), (64, 64, 4, 4), (32, 128, 4, 3)))
    some = tuple(Tile(32, *rest) for rest in ((32, 64, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 4, 3)))
    many = (
        *(Tile(64, n, 64, 4, 4) for n in (64, 128)),
        *(Tile(128, 64, 64, 4, stages) for stages in (3, 4)),
        Tile(128, 128, 64, 8, 3),
    )
    largest = (*many[1:], Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3))
    for rows, columns, counts, shapes, candidates in (
        (16, 6400, (16,), narrow[:2] + wide, few),
        (64, 1600, (64,), narrow, few + some),
        (64, 6400, (64,), wide, some),
        (256, 6400, (128, 256), narrow[:2] + wide, many),
        (1024, 1600, (512, 1024), narrow, many),
        (1024, 6400, (512, 1024), wide, largest),
    ):
        problems = tuple(
            ("linear_tiles", {"rows": m, "k": k, "n": n, "role": role, "format": format})
            for k, n, role in shapes
            for m in counts
        )
        yield Entry(table, (bytes_, four_bits), (rows, columns), problems, candidates, dtype=dtype)


def _codes() -> Iterable[Entry]:
    """Weights of 8 and 4 bits."""
    for format in ("int8", "int4"):
        yield from _rows(format)
        yield from _head(format)
    yield from _tiles("int4")


def _norms() -> Iterable[Entry]:
    for table, operation in ((norm_rows.WARPS, "norm_rows"), (layer_norm.WARPS, "layer_norm")):
        for limit in (1024, 2048):
            widths = [n for n in WIDTHS if limit // 2 < n <= limit]
            problems = tuple((operation, {"rows": rows, "n": n}) for n in widths for rows in (1, 64, 8192))
            yield Entry(table, ALL, (limit,), problems, (1, 2, 4, 8, 16))


def _sampling() -> Iterable[Entry]:
    sizes = [{"rows": rows, "vocab": VOCABULARY} for rows in (1, 64)]
    problems = [("argmax", size) for size in sizes]
    problems += [("sample", {**size, "settings": settings}) for settings in ("plain", "all") for size in sizes]
    chunks = tuple(Chunk(size, warps) for size, warps in ((1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8)))
    yield Entry(sampling_select.CHUNKS, ALL, (), tuple(problems), chunks)
    yield Entry(penalties.CHUNKS, "scores", (), tuple(("penalties", size) for size in sizes), chunks)
    counted = tuple(("count_tokens", {"rows": rows, "vocab": VOCABULARY}) for rows in (1, 256))
    yield Entry(penalties.CHUNKS, "ids", (), counted, tuple(Chunk(size, size // 64) for size in (64, 128, 256, 512)))


def _elements() -> Iterable[Entry]:
    """Kernels that go over rows piece by piece, and the product with a weight as Conv1D has it."""
    chunks = tuple(Chunk(size, warps) for size, warps in ((256, 1), (512, 2), (1024, 2), (1024, 4), (2048, 8)))
    counts = (1, 64, 8192)
    words = {"vocab": VOCABULARY}
    for table, operation, sizes in (
        (embedding_rows, "embedding_rows", [{"n": n, **words, "format": "dense"} for n in WIDTHS]),
        (embedding, "embedding", [{"n": n, **words} for n in WIDTHS]),
        (bias_gelu_new, "bias_gelu_new", [{"n": 4 * n} for n in WIDTHS]),
    ):
        problems = tuple((operation, {"rows": rows, **size}) for size in sizes for rows in counts)
        yield Entry(table.CHUNKS, ALL, (6400,), problems, chunks)
    written = tuple(
        ("write_kv", {"rows": rows, "heads": h, "head_dim": 64, "cache": "float"}) for h in HEADS for rows in (1, 1024)
    )
    yield Entry(write_kv.CHUNKS, ALL, (), written, (Chunk(256, 1), Chunk(512, 2), Chunk(1024, 4), Chunk(2048, 8)))
    shapes = [(k, n) for width in WIDTHS for k, n in ((width, 3 * width), (4 * width, width))]
    products = tuple(("linear", {"rows": rows, "k": k, "n": n, "conv1d": True}) for k, n in shapes for rows in (1, 8))
    tiles = tuple(
        ColumnsTile(n, k, warps) for n, k, warps in ((16, 128, 4), (16, 256, 8), (32, 64, 4), (32, 128, 8), (64, 64, 8))
    )
    yield Entry(linear.TILES, 2, (), products, tiles)


def _invariant() -> Iterable[Entry]:
    """Attention of the batch-invariant mode; both kernels have one line, so both decide."""
    tiles = tuple(
        InvariantTile(n, warps, stages)
        for n, warps, stages in ((16, 4, 2), (32, 4, 2), (32, 4, 3), (64, 4, 1), (64, 4, 2), (64, 8, 2))
    )
    problems = _decoded((12, 25)) + _prefilled((12, 25), (1, 128, 128), (1, 1024, 1024))
    form = "Triton: batch invariant"
    yield Entry(batch_invariant_attention.TILES, 2, (64,), problems, tiles, form)


def _float32() -> Iterable[Entry]:
    yield Entry(paged_decode_attention.TILES, 4, (64,), _decoded((12, 25)), DECODE_TILES, dtype=F32)
    tiles = tuple(
        PrefillTile(m, n, w, 1) for m, n, w in ((16, 32, 4), (32, 16, 4), (32, 32, 4), (32, 32, 8), (64, 32, 8))
    )
    problems = _prefilled((12, 25), (1, 128, 128), (1, 1024, 1024))
    yield Entry(paged_prefill_attention.TILES, 4, (1024 * 25, 64), problems, tiles, dtype=F32)
    shapes = ((768, 768, "proj"), (3072, 768, "down"), (768, 3072, "fc"))
    for rows, candidates in (
        (16, (Tile(16, 32, 32, 4, 2), Tile(16, 32, 64, 4, 2), Tile(16, 64, 32, 4, 2))),
        (64, (Tile(32, 32, 32, 4, 2), Tile(32, 64, 32, 8, 2), Tile(32, 32, 64, 4, 2))),
        (1024, (Tile(64, 64, 16, 8, 3), Tile(64, 64, 32, 8, 2), Tile(128, 64, 16, 8, 3))),
    ):
        problems = tuple(
            ("linear_tiles", {"rows": rows, "k": k, "n": n, "role": role, "format": "dense"}) for k, n, role in shapes
        )
        yield Entry(tile_config.TILES, (4, False), (rows, 3072), problems, candidates, dtype=F32)


#: name -> (what is tuned, its entries); what a step spends its time in comes first
SECTIONS: dict[str, tuple[str, Callable[[], Iterable[Entry]]]] = {
    "rows": ("products of up to 8 rows, float16 weights", lambda: _rows("dense")),
    "head": ("the output layer of greedy decoding, float16 weights", lambda: _head("dense")),
    "decode": ("attention of one query a sequence, and its merge", _decode),
    "prefill": ("attention of prompts", _prefill),
    "tiles": ("products of more than 8 rows, float16 weights", lambda: _tiles("dense")),
    "codes": ("products with weights of 8 and 4 bits", _codes),
    "caches": ("attention over 8-bit caches", _caches),
    "norms": ("layer norms", _norms),
    "sampling": ("chunks of the vocabulary", _sampling),
    "elements": ("embeddings, activation, writes to the cache, products with Conv1D's weights", _elements),
    "invariant": ("attention of the batch-invariant mode", _invariant),
    "float32": ("float32 attention and products", _float32),
}


def chosen(text: str) -> list[str]:
    """Names of sections out of names with commas between; empty: all.

    Raises:
        ValueError: there is no such section.
    """
    names = [name.strip() for name in text.split(",")] if text else list(SECTIONS)
    for name in names:
        if name not in SECTIONS:
            raise ValueError(f"there is no section {name!r}; choose from {', '.join(SECTIONS)}")
    return names
