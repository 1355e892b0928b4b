"""Tiles of ``linear_tiles.py``: static tables, no tuning at run time.

A tile is chosen by the bytes of the products' dtype, by whether the weight has 4 bits (whose tiles are longer in K, so
that a thread still loads 16 bytes of it), by the width of the output and by M in buckets. Every tile fits the 99 KiB of
shared memory that a block has on the smallest target, so one table serves all of sm_80 to sm_120. Starting points, not
tuned on a device yet.

Imports nothing but the standard library.
"""

from typing import NamedTuple

#: up to so many rows mma.sync tiles are taken, K is split, and layer norm can be a prologue
FEW_ROWS = 64
#: what the operands of all stages together may take of shared memory
SHARED_BYTES = 99 * 1024
# programs that draw the memory's bandwidth on a device of 132 multiprocessors; a constant, so that the split, and with
# it a row's bits, do not depend on the device
PROGRAMS = 144
# least elements of K for a split
LEAST_SPLIT = 128


class Tile(NamedTuple):
    """Tile sizes and launch options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# (largest M, largest N, tile), the first that fits; None: any
Table = tuple[tuple[int | None, int | None, Tile], ...]
# products in float32 hold their slices of K in registers: narrow tiles, for every format
FLOAT32: Table = (
    (16, None, Tile(16, 32, 32, 4, 2)),
    (FEW_ROWS, None, Tile(32, 32, 32, 4, 2)),
    (None, None, Tile(64, 64, 16, 8, 3)),
)
# (bytes of a product's operand, 4-bit weight): tiles. Blocks of 16 and 32 rows are mma.sync on every target, those of
# 64 and 128 wgmma on sm_90; float32 multiplies and adds in registers. Wide outputs take wider tiles: every column tile
# reads all of x again
TILES: dict[tuple[int, bool], Table] = {
    (2, False): (
        (16, None, Tile(16, 32, 64, 4, 4)),
        (FEW_ROWS, 2048, Tile(32, 32, 64, 4, 4)),
        (FEW_ROWS, None, Tile(32, 64, 64, 4, 4)),
        (256, None, Tile(64, 64, 64, 4, 4)),
        (None, 2048, Tile(128, 64, 64, 4, 4)),
        (None, None, Tile(128, 128, 64, 8, 3)),
    ),
    (2, True): (
        (16, None, Tile(16, 32, 128, 4, 4)),
        (FEW_ROWS, 2048, Tile(32, 32, 128, 4, 4)),
        (FEW_ROWS, None, Tile(32, 64, 64, 4, 4)),
        (256, None, Tile(64, 64, 64, 4, 4)),
        (None, 2048, Tile(128, 64, 64, 4, 4)),
        (None, None, Tile(128, 128, 64, 8, 3)),
    ),
    (4, False): FLOAT32,
    (4, True): FLOAT32,
}


def tile_for(
    num_rows: int, n: int, *, product_bytes: int, x_bytes: int, four_bits: bool, batch_invariant: bool
) -> Tile:
    """The tile for ``num_rows`` rows and ``n`` columns.

    Args:
        num_rows: M.
        n: N.
        product_bytes: bytes of an element of the dtype of the products.
        x_bytes: bytes of an element of x as stored; wider than the products, it takes stages away.
        four_bits: the weight has codes of 4 bits.
        batch_invariant: one tile for every M.
    """
    # the tile that serves every M is the largest of few rows: it pads one row to 32, and reads the weights of many rows
    # half as often as one of 16
    rows = FEW_ROWS if batch_invariant else num_rows
    for most_rows, most_columns, tile in TILES[product_bytes, four_bits]:
        if (most_rows is None or rows <= most_rows) and (most_columns is None or n <= most_columns):
            stage = tile.block_k * (tile.block_m * max(x_bytes, product_bytes) + tile.block_n * product_bytes)
            return tile._replace(num_stages=max(2, min(tile.num_stages, SHARED_BYTES // stage)))
    raise AssertionError(f"no tile for {num_rows} rows and {n} columns")


def splits_for(n: int, k: int, tile: Tile) -> tuple[int, int]:
    """(splits of K, tiles of K in each) for few rows: never by their number, see ``PROGRAMS``."""
    columns = -(-n // tile.block_n)
    tiles = -(-k // tile.block_k)
    wanted = (2 * PROGRAMS + columns) // (2 * columns)
    each = -(-tiles // max(1, min(wanted, k // LEAST_SPLIT)))
    return -(-tiles // each), each
