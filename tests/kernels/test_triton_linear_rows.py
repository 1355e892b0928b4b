"""The fused linear layer for few rows in triton's interpreter, against its definition in float64."""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from kernel_weights import make_weight

from gpt2rt.kernels.fused_linear import MAX_ROWS, Append, Norm, Partials, fused_linear_ref, merge_partials_ref
from gpt2rt.kernels.fusion import ACTIVATIONS
from gpt2rt.kernels.linear_rows import (
    FORMAT_BITS,
    MAX_SPLITS,
    MAX_WHOLE_K,
    TILES,
    fused_linear_rows_triton,
    rows_config,
)

pytestmark = pytest.mark.kernel

FOUR_BITS = [f"{name} g{group}" for name in ("int4", "int4z", "table") for group in (32, 64, 128)]
KINDS = ["f32", "f16", "bf16", "int8", *FOUR_BITS]
# m, n, k: the 124M and the 1.5B model, single elements, primes, neighbours of the tiles and of the chunks
SHAPES = [(1, 7, 768), (2, 5, 1600), (3, 1, 1), (8, 9, 63), (2, 17, 129)]


def make_norm(k):
    return Norm(1 + 0.1 * torch.randn(k), 0.1 * torch.randn(k), 1e-5)


def assert_near(result, definition, digits=2e-6):
    """Within ``digits`` of the largest element; a NaN that was left or read shows."""
    assert definition.dtype == torch.float64
    error = (result.double() - definition).abs().max().item()
    assert error <= digits * max(1.0, definition.abs().max().item()), f"largest error {error:.2e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_definition(m, n, k, kind, cut_rows):
    x, weight, bias, norm = cut_rows(torch.randn(m, k)), make_weight(kind, n, k), torch.randn(n), make_norm(k)
    out = torch.empty(m, n, dtype=torch.float32)
    fused_linear_rows_triton(x, weight, bias, out, norm=norm)
    assert_near(out, fused_linear_ref(x.double(), weight, bias, norm=norm))


@pytest.mark.parametrize("kind", ["f16", "int8", "int4z g64"])
def test_every_tile(kind):
    bits = FORMAT_BITS[make_weight(kind, 1, 64).format]
    lines = TILES.lines(0, bits)
    lengths = [most - 5 for most, _ in lines]
    assert [rows_config(make_weight(kind, 1, k))[0:3:2] for k in lengths] == [tile for _, tile in lines]
    for k in lengths:
        x, weight = torch.randn(2, k), make_weight(kind, 5, k)
        out = torch.empty(2, 5, dtype=torch.float32)
        fused_linear_rows_triton(x, weight, None, out)
        assert_near(out, fused_linear_ref(x.double(), weight, None))


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4z g64", "table g32"])
def test_rows_longer_than_registers_hold(kind, cut_rows):
    k = MAX_WHOLE_K + 3
    x, weight, bias, norm = cut_rows(torch.randn(2, k) + 3), make_weight(kind, 5, k), torch.randn(5), make_norm(k)
    out = torch.empty(2, 5, dtype=torch.float32)
    fused_linear_rows_triton(x, weight, bias, out, norm=norm)
    assert_near(out, fused_linear_ref(x.double(), weight, bias, norm=norm))
    fused_linear_rows_triton(x, weight, bias, out)
    assert_near(out, fused_linear_ref(x.double(), weight, bias), digits=1e-5)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("out_dtype", "digits"), [(torch.float32, 2e-6), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)], ids=str
)
def test_storage_dtypes(x_dtype, out_dtype, digits, cut_rows):
    x, weight = cut_rows(torch.randn(3, 130, dtype=x_dtype)), make_weight("bf16", 21, 130)
    bias, norm = torch.randn(21, dtype=torch.bfloat16), Norm(*(p.bfloat16() for p in make_norm(130)[:2]), 1e-5)
    out = torch.empty(3, 21, dtype=out_dtype)
    fused_linear_rows_triton(x, weight, bias, out, norm=norm)
    assert_near(out, fused_linear_ref(x.double(), weight, bias, norm=norm), digits)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, cut_rows):
    # large enough for every branch, small enough for exp in the interpreter
    x, weight, bias = cut_rows(2 * torch.randn(2, 40)), make_weight("f32", 33, 40), torch.randn(33)
    out = torch.empty(2, 33, dtype=torch.float32)
    fused_linear_rows_triton(x, weight, bias, out, activation=activation)
    assert_near(out, fused_linear_ref(x.double(), weight, bias, activation=activation))


@pytest.mark.parametrize("in_place", [False, True])
def test_residual(in_place, cut_rows):
    x, weight, bias = torch.randn(3, 70), make_weight("int4 g64", 11, 70), torch.randn(11)
    residual = cut_rows(torch.randn(3, 11))
    definition = fused_linear_ref(x.double(), weight, bias, activation="silu", residual=residual)
    before = residual.clone()
    out = residual if in_place else torch.empty(3, 11, dtype=torch.float32)
    fused_linear_rows_triton(x, weight, bias, out, activation="silu", residual=residual)
    assert_near(out, definition)
    assert in_place or torch.equal(residual, before)


def test_rows_of_out_may_lie_apart(cut_rows):
    x, weight = torch.randn(3, 70), make_weight("f16", 11, 70)
    out = cut_rows(torch.zeros(3, 11))
    fused_linear_rows_triton(x, weight, None, out)
    assert_near(out, fused_linear_ref(x.double(), weight, None))
    assert torch.as_strided(out, (2, 5), (out.stride(0), 1), out.storage_offset() + 11).isnan().all()


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4z g32", "table g64"])
@pytest.mark.parametrize(("n", "k"), [(5, 130), (1, MAX_WHOLE_K + 3)])
def test_bits_of_a_row_do_not_depend_on_the_other_rows(kind, n, k):
    x, weight, bias, norm = torch.randn(MAX_ROWS, k), make_weight(kind, n, k), torch.randn(n), make_norm(k)

    def run(rows):
        out = torch.empty(rows.size(0), n, dtype=torch.float32)
        fused_linear_rows_triton(rows, weight, bias, out, norm=norm, activation="gelu_new")
        return out

    together = run(x)
    for i in (0, MAX_ROWS - 1):
        assert torch.equal(run(x[i : i + 1])[0], together[i])
    other = x[:3].clone()
    other[1] = math.nan
    with_nan = run(other)
    assert torch.equal(with_nan[[0, 2]], together[[0, 2]])
    assert with_nan[1].isnan().all()


@pytest.mark.parametrize(("n_head", "head_dim"), [(2, 16), (3, 5), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_append_writes_queries_keys_and_values(n_head, head_dim, dtype):
    e, block_size, num_blocks = n_head * head_dim, 4, 3
    x, weight, bias, norm = torch.randn(5, e), make_weight("f16", 3 * e, e), torch.randn(3 * e), make_norm(e)
    # nowhere, the last slot, one past it, the first, and one in the middle
    slots = torch.tensor([-1, 11, 12, 0, 6])
    caches = [torch.full((num_blocks, n_head, block_size, head_dim), math.nan, dtype=dtype) for _ in range(2)]
    out = torch.empty(5, e, dtype=dtype)
    fused_linear_rows_triton(x, weight, bias, out, norm=norm, append=Append(*caches, slots))
    definition = fused_linear_ref(x.double(), weight, bias, norm=norm)
    digits = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert_near(out, definition[:, :e], digits)
    for cache, columns in zip(caches, definition[:, e:].split(e, dim=1), strict=True):
        placed = cache.transpose(1, 2).reshape(num_blocks * block_size, e)
        assert_near(placed[slots[[1, 3, 4]]], columns[[1, 3, 4]], digits)
        placed[slots[[1, 3, 4]]] = math.nan
        assert placed.isnan().all()


# the kernel subtracts infinities where it then takes another value
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
@pytest.mark.parametrize("num_splits", [1, 3, MAX_SPLITS])
@pytest.mark.parametrize(("n_head", "head_dim", "kind"), [(3, 64, "f16"), (2, 80, "int4 g32"), (1, 5, "f32")])
def test_partials_are_merged(num_splits, n_head, head_dim, kind):
    k, n = n_head * head_dim, 9
    # a full row, a padding row, a row that ends in the first split, and one with a split it has no room for
    seq_lens = torch.tensor([64 * num_splits, 0, 1, 64 * num_splits + 1], dtype=torch.int32)
    values = torch.randn(4, n_head, num_splits, head_dim)
    lse = 3 * torch.randn(4, n_head, num_splits)
    for row, seq_len in enumerate(seq_lens.tolist()):
        # what attention never writes
        values[row, :, -(-seq_len // 64) :] = math.nan
        lse[row, :, -(-seq_len // 64) :] = -math.inf
    partials = Partials(values, lse, seq_lens)
    weight, bias, residual = make_weight(kind, n, k), torch.randn(n), torch.randn(4, n)
    out = torch.empty(4, n, dtype=torch.float32)
    fused_linear_rows_triton(None, weight, bias, out, residual=residual, partials=partials)
    merged = merge_partials_ref(partials, dtype=torch.float64)
    definition = fused_linear_ref(merged, weight, bias, residual=residual)
    assert_near(out[:3], definition[:3])
    assert_near(out[1], (residual[1] + bias).double())
    assert out[3].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
def test_partials_of_long_rows():
    n_head, head_dim = 129, 64
    values, lse = torch.randn(1, n_head, 2, head_dim), torch.randn(1, n_head, 2)
    partials = Partials(values, lse, torch.tensor([100], dtype=torch.int32))
    weight = make_weight("int8", 3, n_head * head_dim)
    out = torch.empty(1, 3, dtype=torch.float32)
    fused_linear_rows_triton(None, weight, None, out, partials=partials)
    assert_near(out, fused_linear_ref(merge_partials_ref(partials, dtype=torch.float64), weight, None))


def test_a_broken_split_spoils_its_row_alone():
    values, lse = torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2)
    lse[0, 0, 1] = math.nan
    out = torch.empty(2, 3, dtype=torch.float32)
    partials = Partials(values, lse, torch.tensor([100, 100], dtype=torch.int32))
    fused_linear_rows_triton(None, make_weight("f32", 3, 16), None, out, partials=partials)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_no_rows():
    fused_linear_rows_triton(torch.ones(0, 4), make_weight("f32", 3, 4), None, torch.empty(0, 3, dtype=torch.float32))


def test_what_would_reach_outside_is_refused():
    weight, out = make_weight("f32", 12, 4), torch.zeros(2, 12)
    x, slots = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    cache = torch.zeros(1, 2, 4, 2)

    def partials(num_splits, n_head=2):
        return Partials(torch.ones(2, n_head, num_splits, 2), torch.ones(2, n_head, num_splits), torch.ones(2).int())

    refused = [
        (None, out, {}, "got neither"),
        (x, out, {"partials": partials(1)}, "got both"),
        (torch.ones(2, 5), out, {}, r"x is \[2, 5\].*expected \[2, 4\]"),
        (torch.ones(4, 2).t(), out, {}, "contiguous rows"),
        (x, torch.zeros(2, 11), {}, r"out is \[2, 11\].*expected \[2, 12\]"),
        (None, out, {"partials": partials(MAX_SPLITS + 1)}, "merge longer contexts"),
        (None, out, {"partials": partials(1, n_head=3)}, "n_head \\* head_dim = 4"),
        (None, out, {"partials": partials(1), "norm": make_norm(4)}, "norm of merged attention"),
        (x, out[:, :4], {"append": Append(cache, cache, slots), "residual": out}, "residual cannot be added"),
        (x, out[:, :4], {"append": Append(cache.char(), cache.char(), slots)}, "write_kv serves other caches"),
        (x, out[:, :4], {"append": Append(cache[:, :1], cache[:, :1], slots)}, "1 heads of 2"),
        (x, out, {"append": Append(cache, cache, slots)}, r"out is \[2, 12\].*expected \[2, 4\]"),
    ]
    for given, target, options, message in refused:
        with pytest.raises(ValueError, match=message):
            fused_linear_rows_triton(given, weight, None, target, **options)
