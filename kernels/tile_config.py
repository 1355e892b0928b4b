"""Tiles of ``linear_tiles.py``.

A tile is chosen by the architecture, by the bytes of the products' dtype, by whether the weight has 4 bits (whose tiles
are longer in K, so that a thread still loads 16 bytes of it), by M in buckets and by the width of the output. Stages go
down to what fits the shared memory of a block, 99 KiB on the smallest targets. Up to ``FEW_ROWS`` rows one table serves
all architectures, since blocks and splits of K decide a row's bits, which must not depend on the device. Starting
points, not tuned on a device yet.

Imports nothing but the standard library.
"""

from typing import NamedTuple

from .config_table import LEAST_SHARED_BYTES, SHARED_BYTES, ConfigTable, Line

#: up to so many rows mma.sync tiles are taken, K is split, and layer norm can be a prologue
FEW_ROWS = 64
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


# products in float32 hold their slices of K in registers: narrow tiles, for every format
FLOAT32: tuple[Line, ...] = (
    (16, None, Tile(16, 32, 32, 4, 2)),
    (FEW_ROWS, None, Tile(32, 32, 32, 4, 2)),
    (None, None, Tile(64, 64, 16, 8, 3)),
)
# sm_86, sm_89 and sm_120 have 100 KiB of shared memory in a multiprocessor: room for two blocks of 128 x 64 with three
# stages and for one with four (48 and 72 KiB in the compiled kernels). The others have room for two with four. Stages
# change no bits
OF_100_KIB: tuple[Line, ...] = ((None, 2048, Tile(128, 64, 64, 4, 3)),)
# by (bytes of a product's operand, 4-bit weight). Blocks of 16 and 32 rows are mma.sync on every target, those of 64
# and 128 wgmma on sm_90; float32 multiplies and adds in registers. Wide outputs take wider tiles: every column tile
# reads all of x again. The registers of the largest tile leave room for one block, so its stages take what memory there
# is
TILES: ConfigTable[Tile] = ConfigTable(
    "linear_tiles",
    ("rows", "columns"),
    {
        (2, False): (
            (16, None, Tile(16, 32, 64, 4, 4)),
            (FEW_ROWS, 2048, Tile(32, 32, 64, 4, 4)),
            (FEW_ROWS, None, Tile(32, 64, 64, 4, 4)),
            (256, None, Tile(64, 64, 64, 4, 4)),
            (None, 2048, Tile(128, 64, 64, 4, 4)),
            (None, None, Tile(128, 128, 64, 8, 4)),
        ),
        (2, True): (
            (16, None, Tile(16, 32, 128, 4, 4)),
            (FEW_ROWS, 2048, Tile(32, 32, 128, 4, 4)),
            (FEW_ROWS, None, Tile(32, 64, 64, 4, 4)),
            (256, None, Tile(64, 64, 64, 4, 4)),
            (None, 2048, Tile(128, 64, 64, 4, 4)),
            (None, None, Tile(128, 128, 64, 8, 4)),
        ),
        (4, False): FLOAT32,
        (4, True): FLOAT32,
    },
    others={
        86: {(2, False): OF_100_KIB, (2, True): OF_100_KIB},
        89: {(2, False): OF_100_KIB, (2, True): OF_100_KIB},
        120: {(2, False): OF_100_KIB, (2, True): OF_100_KIB},
    },
)


def tile_for(
    num_rows: int,
    n: int,
    *,
    architecture: int,
    product_bytes: int,
    x_bytes: int,
    four_bits: bool,
    batch_invariant: bool,
) -> Tile:
    """The tile for ``num_rows`` rows and ``n`` columns.

    Args:
        num_rows: M.
        n: N.
        architecture: compute capability of the device as a number, 90 for 9.0; 0 for any.
        product_bytes: bytes of an element of the dtype of the products.
        x_bytes: bytes of an element of x as stored; wider than the products, it takes stages away.
        four_bits: the weight has codes of 4 bits.
        batch_invariant: one tile for every M.
    """
    # the tile that serves every M is the largest of few rows: it pads one row to 32, and reads the weights of many rows
    # half as often as one of 16
    rows = FEW_ROWS if batch_invariant else num_rows
    room = SHARED_BYTES.get(architecture, LEAST_SHARED_BYTES)
    tile = TILES.find(architecture, (product_bytes, four_bits), rows, n)
    stage = tile.block_k * (tile.block_m * max(x_bytes, product_bytes) + tile.block_n * product_bytes)
    return tile._replace(num_stages=max(2, min(tile.num_stages, room // stage)))


def splits_for(n: int, k: int, tile: Tile) -> tuple[int, int]:
    """(splits of K, tiles of K in each) for few rows: never by their number, see ``PROGRAMS``."""
    columns = -(-n // tile.block_n)
    tiles = -(-k // tile.block_k)
    wanted = (2 * PROGRAMS + columns) // (2 * columns)
    each = -(-tiles // max(1, min(wanted, k // LEAST_SPLIT)))
    return -(-tiles // each), each
