"""The fused linear layer on tensor cores, in triton's interpreter, against its definition in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels import tile_config
from gpt2rt.kernels.config_table import LEAST_SHARED_BYTES, SHARED_BYTES
from gpt2rt.kernels.fused_linear import Append, Norm, fused_linear_ref
from gpt2rt.kernels.fusion import ACTIVATIONS
from gpt2rt.kernels.linear_tiles import fused_linear_tiles_triton, workspace_bytes
from gpt2rt.kernels.weights import pack_dense, pack_quantized

pytestmark = [
    pytest.mark.kernel,
    # NaN and infinities are put into neighbouring rows on purpose
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16]
# (M, N, K): every bucket of rows (to 16, 64, 256 and more), and odd sizes
SHAPES = [(1, 1, 1), (9, 33, 65), (17, 70, 130), (64, 40, 257), (70, 129, 65), (257, 33, 100)]
QUANTIZED_SHAPES = [(9, 35, 200), (17, 35, 129), (65, 34, 129), (257, 34, 64)]
# more columns than narrow tiles are for
WIDE_SHAPES = [(17, 2049, 65), (257, 2049, 66)]
CODEBOOK = torch.linspace(-1.0, 1.0, 16) ** 3


def dense(n, k, dtype, cut_rows):
    """A weight scaled like a layer's, cut out of NaN."""
    return pack_dense(cut_rows(torch.randn(n, k, dtype=dtype) * k**-0.5))


def quantized(kind, n, k, dtype, group_size=64):
    """Random codes of a format ("int8", "int4", "int4z", "code4"), scaled like a layer's weights."""
    if kind == "int8":
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        scales, zeros = torch.rand(n) * 0.02 * k**-0.5, None
    else:
        groups = -(-k // group_size)
        codes = torch.randint(0, 256, (n, -(-k // 2)), dtype=torch.uint8)
        scales = (torch.rand(n, groups) + 0.1) * k**-0.5
        scales = scales if kind == "code4" else (0.2 * scales).half()
        zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8) if kind == "int4z" else None
    codebook = CODEBOOK if kind == "code4" else None
    return pack_quantized(codes, scales, zeros, codebook, in_features=k, group_size=group_size, compute_dtype=dtype)


def run(x, weight, bias, *, out_dtype=None, out=None, batch_invariant=False, pdl=False, **layer):
    """The launcher, on a poisoned output (unless one is given) and a workspace of exactly the bytes it asks for."""
    append = layer.get("append")
    columns = weight.shape[0] if append is None else weight.shape[0] // 3
    if out is None:
        out = torch.empty(x.size(0), columns, dtype=out_dtype or x.dtype)
    size = workspace_bytes(weight, x.size(0), batch_invariant=batch_invariant)
    # as float32, the guards of poisoned memory stand around it
    workspace = torch.empty(size // 4, dtype=F32).view(torch.uint8)
    fused_linear_tiles_triton(
        x, weight, bias, out, workspace=workspace, batch_invariant=batch_invariant, pdl=pdl, **layer
    )
    return out


def check(x, weight, bias, as_exact_as_torch, *, out_dtype=None, **layer):
    """Against float64, with an error of twice that of plain torch on the dequantised weight in the products' dtype."""
    result = run(x, weight, bias, out_dtype=out_dtype, **layer)
    named = {k: v for k, v in layer.items() if k in ("norm", "activation", "residual")}
    definition = fused_linear_ref(x.double(), weight, bias, **named)
    norm, dtype = layer.get("norm"), weight.compute_dtype
    h = (
        x
        if norm is None
        else torch.nn.functional.layer_norm(x.float(), (x.size(1),), norm.weight.float(), norm.bias.float(), norm.eps)
    )
    bare = pack_dense(weight.dequantize(dtype).float())
    plain = fused_linear_ref(h.to(dtype).float(), bare, bias, **{**named, "norm": None}).to(result.dtype)
    as_exact_as_torch(result, plain, definition)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_dense_matches_the_definition(m, n, k, dtype, cut_rows, as_exact_as_torch):
    check(cut_rows(torch.randn(m, k, dtype=dtype)), dense(n, k, dtype, cut_rows), torch.randn(n), as_exact_as_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "int4z", "code4"])
@pytest.mark.parametrize(("m", "n", "k"), QUANTIZED_SHAPES)
def test_quantized_weights_match_the_definition(m, n, k, kind, dtype, cut_rows, as_exact_as_torch):
    weight = quantized(kind, n, k, dtype)
    check(cut_rows(torch.randn(m, k, dtype=dtype)), weight, torch.randn(n, dtype=dtype), as_exact_as_torch)


@pytest.mark.parametrize("kind", ["dense", "int4z"])
@pytest.mark.parametrize(("m", "n", "k"), WIDE_SHAPES)
def test_wide_outputs(m, n, k, kind, cut_rows, as_exact_as_torch):
    weight = dense(n, k, F16, cut_rows) if kind == "dense" else quantized(kind, n, k, F16)
    check(torch.randn(m, k, dtype=F16), weight, torch.randn(n), as_exact_as_torch)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("kind", ["int4", "int4z", "code4"])
@pytest.mark.parametrize("m", [9, 65])
def test_groups_of_every_size(m, kind, group_size, as_exact_as_torch):
    weight = quantized(kind, 20, 270, F16, group_size)
    assert weight.format != "dense"
    check(torch.randn(m, 270, dtype=F16), weight, None, as_exact_as_torch)


@pytest.mark.parametrize("architecture", [0, *SHARED_BYTES])
def test_the_shapes_reach_every_tile(architecture):
    for product_bytes, four_bits in tile_config.TILES.kinds:
        sizes = {"product_bytes": product_bytes, "x_bytes": 2, "four_bits": four_bits, "batch_invariant": False}
        reached = {
            tile_config.tile_for(m, n, architecture=architecture, **sizes)
            for m, n, _ in (QUANTIZED_SHAPES if four_bits else SHAPES) + WIDE_SHAPES
        }
        lines = tile_config.TILES.lines(architecture, (product_bytes, four_bits))
        # stages may be fewer than in the table
        assert {tile[:4] for tile in reached} == {tile[:4] for _, _, tile in lines}
        # nothing that decides the bits of few rows depends on the device
        few = {line for line in lines if line[0] is not None and line[0] <= tile_config.FEW_ROWS}
        assert few <= set(tile_config.TILES.lines(0, (product_bytes, four_bits)))


@pytest.mark.parametrize("kind", ["dense", "int4"])
def test_groups_of_programs(kind, cut_rows, as_exact_as_torch):
    # 9 row tiles, a group of 8 and one of 1, and 3 column tiles
    weight = dense(130, 70, F16, cut_rows) if kind == "dense" else quantized(kind, 130, 70, F16)
    check(torch.randn(1030, 70, dtype=F16), weight, torch.randn(130), as_exact_as_torch)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compute", DTYPES, ids=str)
def test_activations_of_another_dtype_than_the_products(x_dtype, compute, cut_rows, as_exact_as_torch):
    x = cut_rows(torch.randn(10, 70, dtype=x_dtype))
    check(x, dense(33, 70, compute, cut_rows), torch.randn(33, dtype=x_dtype), as_exact_as_torch, out_dtype=F32)


@pytest.mark.parametrize("kind", ["dense", "int8", "int4z"])
@pytest.mark.parametrize(("m", "k"), [(9, 100), (20, 256), (33, 700)])
def test_norm_of_rows_far_from_zero(m, k, kind, cut_rows, as_exact_as_torch):
    weight = dense(35, k, F16, cut_rows) if kind == "dense" else quantized(kind, 35, k, F16)
    # a mean of 50 deviations would cost a sum of squares four digits
    x = cut_rows(torch.randn(m, k) + 50.0)
    norm = Norm(torch.randn(k, dtype=F16), torch.randn(k, dtype=F16), 1e-5)
    check(x, weight, torch.randn(35, dtype=F16), as_exact_as_torch, out_dtype=F16, norm=norm)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [9, 65])
def test_activations(m, activation, as_exact_as_torch):
    # 9 rows of 300 elements are two splits, 65 rows are none: both kernels finish
    weight = pack_dense(torch.randn(40, 300, dtype=F16) * 300**-0.5)
    assert workspace_bytes(weight, 9) > 0
    check(torch.randn(m, 300, dtype=F16), weight, torch.randn(40), as_exact_as_torch, activation=activation)


@pytest.mark.parametrize(("m", "k"), [(9, 300), (16, 100), (65, 100)])
def test_residual_in_place_and_beside(m, k, cut_rows, as_exact_as_torch):
    weight, x = dense(37, k, BF16, cut_rows), torch.randn(m, k, dtype=BF16)
    residual = cut_rows(torch.randn(m, 37))
    beside = check(x, weight, torch.randn(37), as_exact_as_torch, out_dtype=F32, residual=residual, activation="relu")
    bias = torch.randn(37)
    beside = run(x, weight, bias, out_dtype=F32, residual=residual)
    before = residual.clone()
    run(x, weight, bias, out=residual, residual=residual)
    assert torch.equal(residual, beside)
    assert not torch.equal(residual, before)


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "head_dim", "k"), [(9, 24, 300), (20, 20, 72), (65, 24, 70)])
def test_keys_and_values_go_to_their_slots(m, head_dim, k, cache_dtype, cut_rows):
    n_head, block_size, num_blocks = 3, 4, 25
    width = n_head * head_dim
    weight, bias = dense(3 * width, k, F16, cut_rows), torch.randn(3 * width)
    x = cut_rows(torch.randn(m, k, dtype=F16))
    together = run(x, weight, bias, out_dtype=cache_dtype).view(m, 3, n_head, head_dim)
    slots = torch.randperm(num_blocks * block_size)[:m]
    slots[2], slots[5], slots[7] = -1, num_blocks * block_size, 2**40
    keys, values = (torch.full((num_blocks, n_head, block_size, head_dim), 7.0, dtype=cache_dtype) for _ in range(2))
    queries = run(x, weight, bias, out_dtype=cache_dtype, append=Append(keys, values, slots))
    assert torch.equal(queries, together[:, 0].flatten(1))
    kept = (slots >= 0) & (slots < num_blocks * block_size)
    assert kept.sum() == m - 3
    for cache, part in ((keys, together[:, 1]), (values, together[:, 2])):
        expected = torch.full_like(cache, 7.0)
        expected[slots[kept] // block_size, :, slots[kept] % block_size] = part[kept]
        assert torch.equal(cache, expected)


@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "code4"])
def test_a_row_has_the_same_bits_for_every_m_in_batch_invariant_mode(kind, cut_rows):
    k = 300
    weight = dense(35, k, F16, cut_rows) if kind == "dense" else quantized(kind, 35, k, F16)
    norm = Norm(torch.randn(k), torch.randn(k), 1e-5)
    x, bias = torch.randn(70, k), torch.randn(35)

    def product(rows):
        return run(rows, weight, bias, out_dtype=F32, norm=norm, activation="gelu_new", batch_invariant=True)

    together = product(x)
    assert workspace_bytes(weight, 70, batch_invariant=True) > 0
    for first, last in ((41, 42), (7, 16), (30, 63)):
        # another number of rows, another place in the tile, and other neighbours
        assert torch.equal(product(x[first:last]), together[first:last])
    spoiled = x.clone()
    spoiled[1::2] = torch.inf
    assert torch.equal(product(spoiled)[::2], together[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("low", "high"), [(1, 16), (17, 64), (65, 256)])
def test_a_row_does_not_depend_on_its_neighbours_within_a_bucket(low, high, dtype, cut_rows):
    x, weight = torch.randn(high, 300, dtype=dtype), dense(19, 300, dtype, cut_rows)
    together = run(x, weight, None)
    assert torch.equal(run(x[:low], weight, None), together[:low])
    spoiled = x.clone()
    spoiled[low:] = torch.nan
    assert torch.equal(run(spoiled, weight, None)[:low], together[:low])


def test_no_split_is_empty_and_few_columns_are_split_more():
    for kind in tile_config.TILES.kinds:
        lines = tile_config.TILES.lines(0, kind)
        for tile in {tile for most_rows, _, tile in lines if most_rows is not None and most_rows <= 64}:
            for n in (1, 40, 768, 1600, 2304, 6400, 50257):
                for k in (1, 127, 128, 300, 768, 1600, 6400, 8191):
                    splits, tiles = tile_config.splits_for(n, k, tile)
                    assert (splits - 1) * tiles * tile.block_k < k <= splits * tiles * tile.block_k, (tile, n, k)
    # GPT-2 124M: 72 column tiles of queries, keys and values, 24 of the projections
    tile = tile_config.TILES.find(0, (2, False), 16, 2304)
    assert tile_config.splits_for(2304, 768, tile) == (2, 6)
    assert tile_config.splits_for(768, 3072, tile) == (6, 8)


@pytest.mark.parametrize("architecture", [0, *SHARED_BYTES])
def test_every_tile_fits_the_shared_memory(architecture):
    room = SHARED_BYTES.get(architecture, LEAST_SHARED_BYTES)
    for product_bytes in (2, 4):
        for x_bytes in (2, 4):
            for four_bits in (False, True):
                for m in (1, 17, 65, 257):
                    for n in (100, 5000):
                        tile = tile_config.tile_for(
                            m,
                            n,
                            architecture=architecture,
                            product_bytes=product_bytes,
                            x_bytes=x_bytes,
                            four_bits=four_bits,
                            batch_invariant=False,
                        )
                        stage = tile.block_k * (
                            tile.block_m * max(x_bytes, product_bytes) + tile.block_n * product_bytes
                        )
                        assert tile.num_stages >= 2
                        assert tile.num_stages * stage <= room


def test_no_rows_and_what_does_not_fit():
    weight = pack_dense(torch.randn(6, 300, dtype=F16))
    assert run(torch.ones(0, 300, dtype=F16), weight, None).shape == (0, 6)
    norm = Norm(torch.ones(300), torch.zeros(300), 1e-5)
    with pytest.raises(ValueError, match="norm with 65 rows, expected at most 64"):
        run(torch.ones(65, 300), weight, None, norm=norm)
    with pytest.raises(ValueError, match=r"x has shape \[9, 299\]"):
        run(torch.ones(9, 299), weight, None)
    with pytest.raises(ValueError, match="no activation 'swish'"):
        run(torch.ones(9, 300), weight, None, activation="swish")
    small = torch.empty(100, dtype=torch.uint8)
    with pytest.raises(ValueError, match="workspace has 100 elements"):
        fused_linear_tiles_triton(torch.ones(9, 300), weight, None, torch.empty(9, 6), workspace=small)
    cache = torch.zeros(2, 1, 4, 3)
    with pytest.raises(ValueError, match="wants a weight of 9 rows"):
        run(torch.ones(9, 300), weight, None, append=Append(cache, cache, torch.zeros(9, dtype=torch.int64)))
    cache = cache.to(torch.int8)
    with pytest.raises(ValueError, match=r"append to caches of torch\.int8"):
        run(torch.ones(9, 300), weight, None, append=Append(cache, cache, torch.zeros(9, dtype=torch.int64)))


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize(("n", "k"), [(768, 3072), (2304, 768), (6400, 1600), (40, 300)])
def test_fewer_rows_need_no_more_workspace(kind, n, k):
    weight = pack_dense(torch.zeros(n, k, dtype=F16)) if kind == "dense" else quantized(kind, n, k, F16)
    for batch_invariant in (False, True):
        needs = [workspace_bytes(weight, m, batch_invariant=batch_invariant) for m in (1, 9, 16, 17, 64, 65, 300)]
        assert needs == sorted(needs)
