"""The C++ row ops against their definitions."""

import math

import pytest
import torch

import gpt2rt.ops as ops
from gpt2rt.kernels import refs

OPS = torch.ops.gpt2rt
SHAPES = [
    (1, 1),
    (3, 2),
    (2, 15),
    (2, 16),
    (5, 17),
    (3, 63),
    (2, 64),
    (1, 65),
    (4, 127),
    (3, 768),
    (2, 1025),
    (300, 40),
]


def strided(num_tokens, n, dtype, gap=3):
    """Rows of n elements with a gap of NaN after each."""
    wide = torch.randn(num_tokens, n + gap, dtype=torch.float32).to(dtype)
    wide[:, n:] = math.nan
    return wide[:, :n]


@pytest.mark.parametrize(("num_tokens", "n"), SHAPES)
def test_layer_norm(num_tokens, n, dtype, assert_row_reduction):
    x, weight, bias = strided(num_tokens, n, dtype), torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    y = ops.layer_norm(x, weight, bias, 1e-5)
    assert y.is_contiguous()
    assert_row_reduction(y, refs.layer_norm_ref(x, weight, bias, 1e-5))


def test_layer_norm_keeps_digits_of_a_large_mean():
    # mean(x^2) - mean(x)^2 would lose all of them
    x = 1000.0 + torch.randn(4, 768)
    expected = refs.layer_norm_ref(x.double(), torch.ones(768).double(), torch.zeros(768).double(), 1e-5)
    torch.testing.assert_close(
        ops.layer_norm(x, torch.ones(768), torch.zeros(768), 1e-5).double(), expected, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(("num_tokens", "n"), SHAPES)
def test_add_layer_norm(num_tokens, n, dtype, assert_row_reduction):
    x, residual = strided(num_tokens, n, dtype), strided(num_tokens, n, dtype, gap=5)
    weight, bias = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    y, total = ops.add_layer_norm(x, residual, weight, bias, 1e-5)
    expected, expected_total = refs.add_layer_norm_ref(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, expected_total)
    assert_row_reduction(y, expected)


@pytest.mark.parametrize(("num_tokens", "n"), SHAPES)
def test_bias_gelu_new(num_tokens, n, dtype, assert_elementwise):
    x, bias = 3 * strided(num_tokens, n, dtype), torch.randn(n).to(dtype)
    assert_elementwise(ops.bias_gelu_new(x, bias), refs.bias_gelu_new_ref(x, bias))


def test_bias_gelu_new_at_the_ends():
    x = torch.tensor(
        [[-math.inf, -1e30, -100.0, -11.0, -5.0, -1e-30, 0.0, 1e-30, 5.0, 100.0, 1e30, math.inf, math.nan]]
    )
    y = ops.bias_gelu_new(x, torch.zeros(13))
    expected = refs.bias_gelu_new_ref(x.double(), torch.zeros(13).double())
    # -inf * 0 is NaN in the definition, and 1e30^3 overflows only in float32; the limits are 0 and x
    expected[0, :2] = 0.0
    expected[0, 0] = math.nan
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_exp_is_accurate_to_a_few_ulp():
    # through gelu_new(u) = u * sigmoid(2 z), which needs exp(-2 z) from about e^-60 to e^60
    u = torch.linspace(-8, 8, 200_003).view(1, -1)
    w = u.double()
    exact = w * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (w + 0.044715 * w**3))
    error = (ops.bias_gelu_new(u, torch.zeros(u.size(1))).double() - exact).abs() / exact.abs().clamp_min(1e-30)
    # a rounding of the argument, up to 60, moves the result by as many times its own
    assert error.max() < 60 * 4 * 2**-24


@pytest.mark.parametrize(("num_tokens", "n"), SHAPES)
def test_embedding(num_tokens, n, dtype):
    wte, wpe = torch.randn(31, n).to(dtype), torch.randn(17, n).to(dtype)
    ids, positions = torch.randint(0, 31, (num_tokens,)), torch.randint(0, 17, (num_tokens,))
    assert torch.equal(ops.embedding(ids, positions, wte, wpe), refs.embedding_ref(ids, positions, wte, wpe))


@pytest.mark.parametrize("bad", [-1, 31, 2**40, -(2**63)])
def test_embedding_refuses_ids_outside_the_table(bad):
    wte, wpe = torch.randn(31, 8), torch.randn(17, 8)
    with pytest.raises(IndexError, match=rf"input_ids\[1\] is {bad}, but wte has 31 rows"):
        OPS.embedding(torch.tensor([0, bad]), torch.tensor([0, 1]), wte, wpe)
    with pytest.raises(IndexError, match=r"position_ids\[0\] is 17, but wpe has 17 rows"):
        OPS.embedding(torch.tensor([0]), torch.tensor([17]), wte, wpe)


def kv_case(dtype, cache_dtype, num_tokens=9, n_head=3, head_dim=20, block_size=16, num_blocks=6):
    qkv = torch.randn(num_tokens, 3 * n_head * head_dim).to(dtype)
    _, key, value = (part.view(num_tokens, n_head, head_dim) for part in qkv.split(n_head * head_dim, dim=1))
    caches = [torch.full((num_blocks, n_head, block_size, head_dim), math.nan, dtype=cache_dtype) for _ in range(2)]
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[2] = -1
    return key, value, *caches, slots


@pytest.mark.parametrize(
    "shape", [{}, {"head_dim": 1}, {"head_dim": 80, "block_size": 5}, {"n_head": 1, "num_tokens": 1}]
)
def test_write_kv(shape, dtype):
    if shape.get("num_tokens") == 1:
        key, value, key_cache, value_cache, slots = kv_case(dtype, dtype, num_tokens=4, n_head=1)
        key, value, slots = key[:1], value[:1], slots[:1]
    else:
        key, value, key_cache, value_cache, slots = kv_case(dtype, dtype, **shape)
    expected = key_cache.clone(), value_cache.clone()
    refs.write_kv_ref(key, value, *expected, slots)
    ops.write_kv(key, value, key_cache, value_cache, slots)
    for actual, wanted in zip((key_cache, value_cache), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
    assert not key_cache.isnan().all()


@pytest.mark.parametrize("bad", [-2, 96, 2**62])
def test_write_kv_writes_nothing_for_a_bad_slot(bad):
    key, value, key_cache, value_cache, slots = kv_case(torch.float32, torch.float32)
    slots[8] = bad
    with pytest.raises(IndexError, match=rf"slot_mapping\[8\] is {bad}, but the cache has 96 slots"):
        OPS.write_kv(key, value, key_cache, value_cache, slots)
    assert key_cache.isnan().all()
    assert value_cache.isnan().all()


def test_no_tokens_give_empty_results(dtype):
    x, w = torch.empty(0, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    assert ops.layer_norm(x, w, w, 1e-5).shape == (0, 8)
    assert [t.shape for t in ops.add_layer_norm(x, x, w, w, 1e-5)] == [(0, 8), (0, 8)]
    assert ops.bias_gelu_new(x, w).shape == (0, 8)
    none = torch.empty(0, dtype=torch.int64)
    assert ops.embedding(none, none, w.view(1, 8), w.view(1, 8)).shape == (0, 8)
    key, value, key_cache, value_cache, _ = kv_case(dtype, dtype)
    ops.write_kv(key[:0], value[:0], key_cache, value_cache, none)
    assert key_cache.isnan().all()


def test_rows_of_nan_and_infinity_stay_in_their_row():
    x = torch.randn(3, 40)
    x[1, 7] = math.nan
    w = torch.ones(40)
    y = ops.layer_norm(x, w, w, 1e-5)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], ops.layer_norm(x[[0, 2]], w, w, 1e-5))


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 6e-8, 2e-8, 5.97e-8, 1e-40, math.inf, math.nan, 3.1415927]
)
def test_rounding_to_16_bits_is_torchs(value, dtype):
    # write_kv copies; the addition of zero rounds through float32
    wide = torch.full((1, 37), value)
    zero = torch.zeros(37, dtype=dtype)
    total = ops.add_layer_norm(wide.to(dtype), zero.view(1, 37), zero, zero, 1e-5)[1]
    torch.testing.assert_close(total, wide.to(dtype) + zero, rtol=0, atol=0, equal_nan=True)


def test_sums_round_to_nearest_even(dtype):
    # all pairs of small floats whose sum falls between two 16-bit numbers
    a = torch.randn(64, 257).to(dtype)
    b = (torch.randn(64, 257) * 0.01).to(dtype)
    w = torch.ones(257, dtype=dtype)
    assert torch.equal(ops.add_layer_norm(a, b, w, w, 1e-5)[1], (a.float() + b.float()).to(dtype))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: OPS.layer_norm(x.double(), w, w, 1e-5), "x is float64, expected float32, bfloat16 or float16"),
        (lambda x, w: OPS.layer_norm(x, w[:3], w, 1e-5), r"weight has shape \[3\], expected \[8\]"),
        (lambda x, w: OPS.layer_norm(x, w, w.half(), 1e-5), "bias is float16, expected float32, the dtype of x"),
        (lambda x, w: OPS.layer_norm(x, w, w, math.nan), "eps is nan, expected a finite number"),
        (lambda x, w: OPS.layer_norm(x.t(), torch.ones(4), torch.ones(4), 1e-5), r"x has stride 8 .*\.contiguous"),
        (lambda x, w: OPS.layer_norm(x[0], w, w, 1e-5), r"x has shape \[8\], expected \[num_tokens, n\]"),
        (lambda x, w: OPS.layer_norm(x[:, :0], w[:0], w[:0], 1e-5), "at least one element"),
        (lambda x, w: OPS.add_layer_norm(x, x[:2], w, w, 1e-5), r"residual has shape \[2, 8\], expected 4"),
        (lambda x, w: OPS.bias_gelu_new(x, w[:7]), r"bias has shape \[7\], expected \[8\]"),
        (lambda x, w: OPS.embedding(x[0].int(), x[0].long(), x, x), "input_ids is int32, expected int64"),
        (lambda x, w: OPS.embedding(x[0].long(), x[0, :3].long(), x, x), r"position_ids has shape \[3\], expected 8"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(4, 8), torch.ones(8))
