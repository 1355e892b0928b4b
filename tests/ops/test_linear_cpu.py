"""linear and pack_linear in C++."""

import pytest
import torch
from cpu_step_model import aligned_bytes

import gpt2rt.ops as ops
from gpt2rt.kernels import refs

OPS = torch.ops.gpt2rt
SHAPES = [
    (1, 1, 1),
    (1, 64, 64),
    (2, 63, 65),
    (5, 33, 130),
    (6, 255, 64),
    (7, 256, 63),
    (13, 257, 129),
    (20, 768, 191),
    (64, 48, 200),
]


def weight_of(n, k, dtype, orientation):
    """[n, k] with rows contiguous ("linear") or columns contiguous ("conv1d")."""
    return torch.randn(n, k).to(dtype) if orientation == "linear" else torch.randn(k, n).to(dtype).t()


@pytest.mark.parametrize("orientation", ["linear", "conv1d"])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_linear(m, k, n, orientation, dtype, assert_matmul):
    x = torch.randn(m, k + 7).to(dtype)[:, :k]
    weight, bias = weight_of(n, k, dtype, orientation), torch.randn(n).to(dtype)
    y = ops.linear(x, weight, bias)
    assert y.shape == (m, n)
    assert y.is_contiguous()
    assert_matmul(y, refs.linear_ref(x, weight, bias), refs.linear_ref(x.double(), weight.double(), bias.double()))
    without = ops.linear(x, weight, None)
    assert_matmul(without, refs.linear_ref(x, weight, None), refs.linear_ref(x.double(), weight.double(), None))


@pytest.mark.parametrize("orientation", ["linear", "conv1d"])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_linear_with_epilogues(m, k, n, orientation, dtype, assert_matmul):
    x = torch.randn(m, k + 7).to(dtype)[:, :k]
    weight, bias = weight_of(n, k, dtype, orientation) / k**0.5, torch.randn(n).to(dtype)
    residual = torch.randn(m, n + 3).to(dtype)[:, :n]
    before = residual.clone()
    double = [t.double() for t in (x, weight, bias)]
    for given, exact in ((bias, double[2]), (None, None)):
        y = ops.linear_gelu_new(x, weight, given)
        assert y.shape == (m, n)
        assert y.is_contiguous()
        expected = refs.linear_gelu_new_ref(x, weight, given)
        assert_matmul(y, expected, refs.linear_gelu_new_ref(double[0], double[1], exact))
        y = ops.linear_residual(x, weight, given, residual)
        assert y.is_contiguous()
        assert y.data_ptr() != residual.data_ptr()
        expected = refs.linear_residual_ref(x, weight, given, residual)
        assert_matmul(y, expected, refs.linear_residual_ref(double[0], double[1], exact, residual.double()))
    assert torch.equal(residual, before)


def test_epilogues_add_one_rounding_less_than_separate_ops():
    x, weight, bias = torch.randn(9, 100), torch.randn(70, 100), torch.randn(70)
    residual = torch.randn(9, 70)
    # in float32 the separate ops round nothing away, so the bits are the same
    assert torch.equal(ops.linear_residual(x, weight, bias, residual), residual + ops.linear(x, weight, bias))
    assert torch.equal(
        ops.linear_gelu_new(x, weight, bias), ops.bias_gelu_new(ops.linear(x, weight, bias), torch.zeros(70))
    )
    half = [t.bfloat16() for t in (x, weight, bias)]
    exact = refs.linear_gelu_new_ref(*(t.double() for t in half))
    fused = (ops.linear_gelu_new(*half).double() - exact).abs().sum()
    apart = (ops.bias_gelu_new(ops.linear(half[0], half[1]), half[2]).double() - exact).abs().sum()
    assert fused < apart


def test_epilogues_do_not_depend_on_other_rows(dtype):
    x, weight, bias = torch.randn(37, 300).to(dtype), torch.randn(130, 300).to(dtype), torch.randn(130).to(dtype)
    residual = torch.randn(37, 130).to(dtype)
    gelu, added = ops.linear_gelu_new(x, weight, bias), ops.linear_residual(x, weight, bias, residual)
    for row in (0, 5, 36):
        one = x[row : row + 1]
        assert torch.equal(ops.linear_gelu_new(one, weight, bias)[0], gelu[row])
        assert torch.equal(ops.linear_residual(one, weight, bias, residual[row : row + 1])[0], added[row])


def test_linear_takes_views_of_larger_weights():
    base = torch.randn(40, 90)
    x = torch.randn(3, 50)
    for weight in (base[5:25, 10:60], torch.randn(90, 40)[10:60, 5:25].t()):
        torch.testing.assert_close(ops.linear(x, weight, None), x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_empty_sizes():
    assert ops.linear(torch.empty(0, 5), torch.randn(7, 5), torch.zeros(7)).shape == (0, 7)
    assert ops.linear(torch.empty(3, 5), torch.empty(0, 5), torch.zeros(0)).shape == (3, 0)
    # a sum over nothing is 0, to which the bias is added
    assert torch.equal(
        ops.linear(torch.empty(3, 0), torch.empty(2, 0), torch.tensor([1.0, 2.0])), torch.tensor([[1.0, 2.0]] * 3)
    )


def test_a_row_does_not_depend_on_the_others(dtype):
    x, weight, bias = torch.randn(37, 700).to(dtype), torch.randn(130, 700).to(dtype), torch.randn(130).to(dtype)
    whole = ops.linear(x, weight, bias)
    for size in (1, 2, 3, 5, 6, 7, 13):
        parts = torch.cat([ops.linear(x[i : i + size], weight, bias) for i in range(0, 37, size)])
        assert torch.equal(parts, whole), f"rows taken {size} at a time"
    assert torch.equal(ops.linear(x, weight.t().contiguous().t(), bias), whole)


def test_another_order_of_the_sum_gives_other_bits():
    # the control of the test above: equality is not what any float32 sum would give
    x, weight = torch.randn(5, 700), torch.randn(130, 700)
    order = torch.randperm(700)
    assert not torch.equal(ops.linear(x[:, order], weight[:, order], None), ops.linear(x, weight, None))


def unpack(packed, n, k, dtype):
    """[n, k] out of panels, by the documented layout."""
    if dtype == torch.bfloat16:
        # pairs of neighbours along k, the second of the last pair zero if k is odd
        pairs = packed.view(dtype).view(-1, (k + 1) // 2, 64, 2).transpose(2, 3).reshape(-1, (k + 1) // 2 * 2, 64)
        assert not pairs[:, k:].any()
        panels = pairs[:, :k]
    else:
        panels = packed.view(dtype).view(-1, k, 64)
    return panels.permute(0, 2, 1).reshape(-1, k)


@pytest.mark.parametrize("orientation", ["linear", "conv1d"])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (17, 63), (16, 64), (5, 65), (100, 200)])
def test_pack_linear(k, n, orientation, dtype):
    weight = weight_of(n, k, dtype, orientation)
    packed = aligned_bytes(ops.packed_linear_bytes(n, k, dtype))
    packed.fill_(255)
    ops.pack_linear(weight, packed)
    unpacked = unpack(packed, n, k, dtype)
    assert torch.equal(unpacked[:n], weight)
    assert torch.equal(unpacked[n:], torch.zeros_like(unpacked[n:]))


def test_pack_linear_refuses():
    weight = torch.randn(65, 3)
    out = aligned_bytes(2 * 64 * 3 * 4 + 64)
    size = 2 * 64 * 3 * 4
    with pytest.raises(ValueError, match=f"out has {size - 1} bytes, expected {size}"):
        OPS.pack_linear(weight, out[: size - 1])
    with pytest.raises(ValueError, match="multiple of 64 bytes"):
        OPS.pack_linear(weight, out[4 : 4 + size])
    with pytest.raises(ValueError, match="out is float32, expected uint8"):
        OPS.pack_linear(weight, torch.empty(size // 4))
    with pytest.raises(ValueError, match=r"strides \[6, 2\]"):
        OPS.pack_linear(torch.randn(65, 6)[:, ::2], out[:size])
    assert not out.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, w: OPS.linear(x, w.t(), None),
            r"expects rows of 8, x is \[4, 5\]; .* Conv1D weight must be passed as w.t",
        ),
        (lambda x, w: OPS.linear(x, w.half(), None), "weight is float16, expected float32, the dtype of x"),
        (lambda x, w: OPS.linear(x, w, torch.ones(5)), r"bias has shape \[5\], expected \[8\]"),
        (lambda x, w: OPS.linear(x, w, torch.ones(8).half()), "bias is float16"),
        (lambda x, w: OPS.linear(x[0], w, None), r"x has shape \[5\]"),
        (lambda x, w: OPS.linear(x.int(), w, None), "x is int32"),
        (lambda x, w: OPS.linear(x, torch.randn(8, 10)[:, ::2], None), r"strides \[10, 2\], expected 1 in one"),
        (lambda x, w: OPS.linear(torch.randn(5, 4).t(), w, None), "x has stride 4 in its last dimension"),
        (lambda x, w: OPS.linear_residual(x, w, None, torch.ones(4, 7)), "residual"),
        (lambda x, w: OPS.linear_residual(x, w, None, torch.ones(3, 8)), "residual"),
        (lambda x, w: OPS.linear_residual(x, w, None, torch.ones(4, 8).half()), "residual is float16"),
        (lambda x, w: OPS.linear_residual(x, w, None, torch.ones(8, 4).t()), "residual has stride"),
        (lambda x, w: ops.linear_residual(x, w, None, torch.ones(4, 7)), r"residual has shape \[4, 7\], expected"),
        (lambda x, w: OPS.linear_gelu_new(x, w.t(), None), "linear_gelu_new: weight"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 5), torch.randn(8, 5))
