"""The CUDA C++ kernel for few rows of 4-bit weights, run on the host, against the definition in float64.

The source is the device's own; ``tests/support/cuda_on_host.h`` stands in for the device.
"""

import ctypes
import dataclasses
import math

import pytest
import torch
from cuda_rows_host import library, register, why_not
from kernel_weights import make_weight

from gpt2rt.kernels import linear_rows_cuda
from gpt2rt.kernels.fused_linear import (
    Append,
    Norm,
    Partials,
    fused_linear_ref,
    fused_linear_rows,
    fused_linear_triton,
    merge_partials_ref,
)
from gpt2rt.kernels.fusion import ACTIVATIONS
from gpt2rt.kernels.linear_rows_cuda import MAX_K, fused_linear_rows_cuda, serves

if why_not() is not None:
    pytest.skip(str(why_not()), allow_module_level=True)

KINDS = [f"{name} g{group}" for name in ("int4", "int4z", "table") for group in (32, 64, 128)]
# m, n, k: lengths of the 124M and the 1.5B model, single elements, primes, neighbours of the chunks and of the steps
SHAPES = [(1, 7, 768), (2, 5, 1600), (3, 1, 1), (8, 9, 63), (5, 17, 129), (1, 16, 4096)]
DTYPES = {torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.fixture(scope="module", autouse=True)
def op_on_the_host():
    return register()


def make_norm(k):
    return Norm(1 + 0.1 * torch.randn(k), 0.1 * torch.randn(k), 1e-5)


def rounded(weight, dtype):
    """What the kernel multiplies by: entries of the codebook in the compute dtype."""
    if weight.codebook is None:
        return weight
    return dataclasses.replace(weight, codebook=weight.codebook.to(dtype).float())


def normed(x, norm):
    mean = x.double().mean(-1, keepdim=True)
    centred = x.double() - mean
    factor = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return centred * factor * norm.weight.double() + norm.bias.double()


def assert_near(result, definition, digits=3e-6):
    error = (result.double() - definition).abs().max().item()
    assert error <= digits * max(1.0, definition.abs().max().item()), f"largest error {error:.2e}"


def as_dtype(kind, n, k, dtype):
    return dataclasses.replace(make_weight(kind, n, k), compute_dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_the_definition_on_rounded_activations(m, n, k, kind, dtype, cut_rows):
    """Rounding x is the only rounding but float32's own: with x rounded beforehand only the latter is left."""
    weight, bias = as_dtype(kind, n, k, dtype), torch.randn(n)
    x = torch.randn(m, k).to(dtype).float()
    out = torch.full((m, n), math.nan)
    fused_linear_rows_cuda(cut_rows(x), weight, bias, out)
    assert_near(out, fused_linear_ref(x.double(), rounded(weight, dtype), bias))
    # the same from 16-byte loads and from a tensor of that dtype
    for same in (x, x.to(dtype)):
        again = torch.full((m, n), math.nan)
        fused_linear_rows_cuda(same, weight, bias, again)
        assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int4 g64", "int4z g32", "table g128"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES[:5])
def test_norm(m, n, k, kind, dtype, cut_rows):
    x, weight, norm = 3 + torch.randn(m, k), as_dtype(kind, n, k, dtype), make_norm(k)
    out = torch.full((m, n), math.nan)
    fused_linear_rows_cuda(cut_rows(x), weight, None, out, norm=norm)
    definition = fused_linear_ref(x.double(), rounded(weight, dtype), None, norm=norm)
    # half a unit of the last place of each normalised element, at worst all of one sign
    allowed = DTYPES[dtype] * normed(x, norm).abs() @ rounded(weight, dtype).dequantize().double().abs().t()
    assert ((out.double() - definition).abs() <= allowed + 1e-5).all()
    # and as large as rounding x in torch makes it
    plain = fused_linear_ref(normed(x, norm).to(dtype).double(), rounded(weight, dtype), None)
    assert (out - definition).abs().max() <= 2 * (plain - definition).abs().max() + 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual_in_place(activation):
    x, weight, bias = torch.randn(3, 130).half().float(), make_weight("int4z g64", 33, 130), torch.randn(33)
    out = torch.randn(3, 33)
    definition = fused_linear_ref(x.double(), weight, bias, activation=activation, residual=out.double())
    fused_linear_rows_cuda(x, weight, bias, out, activation=activation, residual=out)
    assert_near(out, definition)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_rounds_once(dtype):
    x, weight = torch.randn(2, 128).half(), make_weight("int4 g32", 20, 128)
    wide, narrow = torch.full((2, 20), math.nan), torch.full((2, 20), math.nan, dtype=dtype)
    fused_linear_rows_cuda(x, weight, None, wide)
    fused_linear_rows_cuda(x, weight, None, narrow)
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize("kind", ["int4 g64", "int4z g32", "table g32"])
def test_bits_of_a_row_do_not_depend_on_the_others(kind):
    x, weight, norm = torch.randn(8, 300), make_weight(kind, 18, 300), make_norm(300)
    x[5, 7] = math.inf
    alone = torch.full((8, 18), math.nan)
    for m in range(8):
        fused_linear_rows_cuda(x[m : m + 1], weight, None, alone[m : m + 1], norm=norm)
    for rows in range(1, 9):
        together = torch.full((rows, 18), 7.0)
        fused_linear_rows_cuda(x[:rows], weight, None, together, norm=norm)
        assert torch.equal(together.nan_to_num(123.0), alone[:rows].nan_to_num(123.0))
    assert alone[5].isnan().all()
    assert not alone[[0, 1, 2, 3, 4, 6, 7]].isnan().any()


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_append(cache_dtype):
    heads, head_dim, block_size = 3, 16, 4
    e = heads * head_dim
    x, weight, bias = torch.randn(4, e).half().float(), make_weight("int4 g64", 3 * e, e), torch.randn(3 * e)
    caches = [torch.full((3, heads, block_size, head_dim), math.nan, dtype=cache_dtype) for _ in range(2)]
    # padding and a slot behind the cache are skipped
    slots = torch.tensor([5, -1, 11, 12])
    out = torch.full((4, e), math.nan)
    fused_linear_rows_cuda(x, weight, bias, out, append=Append(*caches, slots))
    plain = torch.full((4, 3 * e), math.nan)
    fused_linear_rows_cuda(x, weight, bias, plain)
    assert torch.equal(out, plain[:, :e])
    for i, cache in enumerate(caches, start=1):
        expected = torch.full_like(cache, math.nan)
        for row in (0, 2):
            block, offset = divmod(int(slots[row]), block_size)
            expected[block, :, offset] = plain[row, i * e : (i + 1) * e].view(heads, head_dim).to(cache_dtype)
        assert torch.equal(cache.isnan(), expected.isnan())
        assert torch.equal(cache.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize(("heads", "head_dim", "splits"), [(3, 64, 1), (2, 40, 8), (12, 64, 4)])
def test_merges_split_attention(heads, head_dim, splits):
    k, m = heads * head_dim, 3
    values = torch.randn(m, heads, splits, head_dim)
    lse = 3 * torch.randn(m, heads, splits)
    seq_lens = torch.tensor([64 * splits, 1, 0], dtype=torch.int32)
    # what was not computed is not read
    for row in range(m):
        used = -(-int(seq_lens[row]) // 64)
        values[row, :, used:], lse[row, :, used:] = math.nan, math.nan
    weight, residual = make_weight("int4z g64", 21, k), torch.randn(m, 21)
    out = torch.full((m, 21), math.nan)
    partials = Partials(values, lse, seq_lens)
    fused_linear_rows_cuda(None, weight, None, out, residual=residual, partials=partials)
    merged = merge_partials_ref(partials, dtype=torch.float64)
    definition = fused_linear_ref(merged, weight, None, residual=residual)
    allowed = DTYPES[torch.float16] * merged.abs() @ weight.dequantize().double().abs().t()
    assert ((out.double() - definition).abs() <= allowed + 1e-5).all()


@pytest.mark.parametrize("kind", ["int4z g32", "table g64"])
def test_blocks_of_two_tiles(kind):
    """Weights of many rows; one of them fills neither the last block nor its first tile."""
    for n in (3072, 3072 + 32 + 5):
        x, weight, norm = torch.randn(3, 192), make_weight(kind, n, 192), make_norm(192)
        out, one_tile = torch.full((3, n), math.nan), torch.full((3, 1000), math.nan)
        fused_linear_rows_cuda(x, weight, None, out, norm=norm)
        h = normed(x, norm)
        definition = fused_linear_ref(x.double(), rounded(weight, torch.float16), None, norm=norm)
        allowed = 2**-11 * h.abs() @ rounded(weight, torch.float16).dequantize().double().abs().t()
        assert ((out.double() - definition).abs() <= allowed + 1e-5).all()
        parts = [None if part is None else part[:1000] for part in (weight.data, weight.scales, weight.zeros)]
        less = dataclasses.replace(weight, shape=(1000, 192), data=parts[0], scales=parts[1], zeros=parts[2])
        fused_linear_rows_cuda(x, less, None, one_tile, norm=norm)
        assert torch.equal(out[:, :1000], one_tile)


def test_norm_of_any_dtype_and_place():
    x, weight, out = torch.randn(2, 130), make_weight("int4 g64", 5, 130), torch.full((2, 5), math.nan)
    buffer = (1 + 0.1 * torch.randn(262)).half()
    narrow = Norm(buffer[1:131], buffer[132:].bfloat16(), 1e-5)
    fused_linear_rows_cuda(x, weight, None, out, norm=narrow)
    wide = Norm(narrow.weight.float(), narrow.bias.float(), 1e-5)
    expected = torch.full((2, 5), math.nan)
    fused_linear_rows_cuda(x, weight, None, expected, norm=wide)
    assert torch.equal(out, expected)


def test_longest_row():
    """All steps that a block holds, and none more."""
    assert library().max_elements() == MAX_K
    x, weight = torch.randn(1, MAX_K).half(), make_weight("int4 g128", 3, MAX_K)
    out = torch.full((1, 3), math.nan)
    fused_linear_rows_cuda(x, weight, None, out)
    assert_near(out, fused_linear_ref(x.double(), weight, None))


def test_launches_are_tritons_unless_enabled(monkeypatch):
    """Off by default; once enabled, what it has goes there, whatever the caller was."""
    weight, out = make_weight("int4 g64", 6, 64), torch.full((2, 6), math.nan)
    on_device = type("Out", (), {"is_cuda": True})()
    assert not serves(weight, on_device)
    monkeypatch.setattr(linear_rows_cuda, "_enabled", False)
    linear_rows_cuda.enable()
    assert serves(weight, on_device)
    assert not serves(weight, out)
    partials = Partials(torch.zeros(2, 2, 1, 32), torch.zeros(2, 2, 1), torch.ones(2, dtype=torch.int32))
    assert serves(weight, on_device, partials)
    odd = Partials(torch.zeros(2, 32, 1, 2), torch.zeros(2, 32, 1), torch.ones(2, dtype=torch.int32))
    assert not serves(weight, on_device, odd)
    others = [make_weight(kind, 6, 64) for kind in ("int8", "f16")]
    others += [as_dtype("int4 g64", 6, 64, torch.float32), make_weight("int4 g64", 1, MAX_K + 1)]
    assert not any(serves(other, on_device) for other in others)

    monkeypatch.setattr(linear_rows_cuda, "serves", lambda weight, out, partials=None: True)
    x = torch.randn(2, 64).half()
    fused_linear_triton(x, weight, None, out, workspace=torch.empty(0, dtype=torch.uint8))
    assert_near(out, fused_linear_ref(x.double(), weight, None))
    merged = torch.full((2, 6), math.nan)
    fused_linear_rows(None, weight, None, merged, partials=partials)
    assert torch.equal(merged, torch.zeros(2, 6))


def test_a_weight_that_it_does_not_have_is_refused():
    with pytest.raises(ValueError, match="is int8 in groups of 0"):
        fused_linear_rows_cuda(torch.zeros(1, 64), make_weight("int8", 6, 64), None, torch.empty(1, 6))


@pytest.mark.parametrize(("bfloat", "dtype"), list(enumerate(DTYPES)))
def test_every_code_unpacks_exactly(bfloat, dtype):
    """Each of 16 codes at each of 8 places, with each zero point; other nibbles random."""
    generator = torch.Generator().manual_seed(0)
    values, codebook = (ctypes.c_uint16 * 8)(), torch.randn(16, generator=generator)
    for zero in range(16):
        for code in range(16):
            codes = torch.randint(0, 16, (8,), generator=generator)
            codes[(code + zero) % 8] = code
            word = ctypes.c_uint32(sum(int(c) << (4 * j) for j, c in enumerate(codes)))
            other = 15 - zero
            library().unpack_integers(word, zero, other, bfloat, values)
            found = torch.tensor(list(values)).to(torch.uint16).view(dtype)
            assert torch.equal(found.long(), codes - torch.tensor([zero] * 4 + [other] * 4))
            library().unpack_codes(word, ctypes.c_void_p(codebook.data_ptr()), bfloat, values)
            assert torch.equal(torch.tensor(list(values)).to(torch.uint16).view(dtype), codebook[codes].to(dtype))
