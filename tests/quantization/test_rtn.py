"""Rounding to the nearest code: against the definition, an element at a time, and within its error bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2rt.quantization import QuantizationConfig, quantize_rtn
from gpt2rt.quantization import rtn as module
from gpt2rt.quantization.codebooks import unpack_4bit

SHAPES = [(1, 1), (1, 65), (3, 64), (5, 100), (130, 33)]


def random_matrix(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_its_definition(shape):
    weight = random_matrix(shape)
    quantized = quantize_rtn(weight, QuantizationConfig("int8"))
    quantized.check()
    for n, row in enumerate(weight.double()):
        largest = row.abs().max()
        assert quantized.scales[n].item() == pytest.approx((largest / 127).item(), rel=1e-6)
        # half a step, and the rounding of the product with 127 / max
        assert (quantized.codes[n] - row * 127 / largest).abs().max() <= 0.5 + 1e-4
        assert quantized.codes[n].abs().max() == 127


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_takes_the_nearest_code(shape, group_size, symmetric):
    weight = random_matrix(shape)
    quantized = quantize_rtn(weight, QuantizationConfig("int4", group_size, symmetric=symmetric))
    quantized.check()
    assert (quantized.zeros is None) == symmetric
    rows, columns = shape
    codes = unpack_4bit(quantized.codes, columns)
    for n in range(rows):
        for k in range(columns):
            scale = quantized.scales[n, k // group_size].item()
            zero = 8 if symmetric else quantized.zeros[n, k // group_size].item()
            errors = [abs((code - zero) * scale - weight[n, k].item()) for code in range(16)]
            assert errors[codes[n, k]] <= min(errors) * (1 + 1e-5) + 1e-9


def squared_error(quantized, weight):
    return (quantized.dequantize() - weight).square().sum().item()


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_scales_are_the_best_of_those_tried(symmetric, monkeypatch):
    weight, config = random_matrix((64, 256)), QuantizationConfig("int4", symmetric=symmetric)
    best = squared_error(quantize_rtn(weight, config), weight)
    alone = []
    for clip in module.CLIPS:
        monkeypatch.setattr(module, "CLIPS", (clip,))
        alone.append(squared_error(quantize_rtn(weight, config), weight))
    # each group has its own best, so that all together are better than any
    assert best < min(alone)
    # the rule without the search: max / 7 from -7 to 7
    if symmetric:
        groups = weight.view(64, 4, 64)
        scales = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
        plain = ((groups / scales).round() * scales - groups).square().sum().item()
        assert best < 0.75 * plain


def test_the_sign_of_the_scale_follows_the_largest_weight():
    weight = torch.linspace(-0.2, 0.2, 64).repeat(2, 1)
    weight[0, 5], weight[1, 5] = 1.0, -1.0
    quantized = quantize_rtn(weight, QuantizationConfig("int4"))
    # code 0 stands for -8 steps, the longer end
    assert quantized.scales[0, 0] < 0 < quantized.scales[1, 0]
    assert (unpack_4bit(quantized.codes, 64)[:, 5] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 150),
    st.floats(-30, 30),
    st.sampled_from([("int8", None), ("int4", 32), ("int4", 64), ("nf4", 64), ("fp4", 32), ("nf4", 128)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_errors_are_bounded(rows, columns, exponent, scheme, symmetric, seed):
    name, group_size = scheme
    if name == "int4":
        # float16 scales
        exponent = max(-2.0, min(exponent, 4.0))
    weight = random_matrix((rows, columns), seed) * 10.0**exponent
    config = QuantizationConfig(name, group_size, symmetric=symmetric or name != "int4")
    quantized = quantize_rtn(weight, config)
    quantized.check()
    error = (quantized.dequantize() - weight).abs()
    largest = weight.abs().max().item()
    if name == "int8":
        bound = weight.abs().amax(1, keepdim=True) / 254
    elif name == "int4":
        # the range ends at 0.72 of the largest at worst; without the cut, half a step of a seventh
        bound = 0.29 * largest + 0.1 * largest
    else:
        # half the widest gap of the table, for the largest weight of any block
        bound = (0.16 if name == "nf4" else 0.17) * largest
    assert (error <= bound * (1 + 1e-4) + 1e-37).all()


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
def test_what_is_exact_stays_exact(scheme):
    """Quantising the numbers of a quantised matrix gives the same numbers."""
    config = QuantizationConfig(scheme, symmetric=scheme != "int4")
    once = quantize_rtn(random_matrix((8, 128)), config).dequantize()
    again = quantize_rtn(once, config).dequantize()
    if scheme == "int4":
        # a range that was cut may be cut again
        assert (once - again).abs().max() < 0.1
        return
    torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["int8", "int4", "int4 with zeros", "nf4", "fp4"])
def test_zeros_stay_zero(scheme):
    weight = random_matrix((6, 128))
    weight[2], weight[4, 64:] = 0.0, 0.0
    weight[0, :64:3] = 0.0
    config = QuantizationConfig(scheme.split()[0], symmetric="zeros" not in scheme)
    values = quantize_rtn(weight, config).dequantize()
    assert (values[weight == 0] == 0).all()
    assert torch.isfinite(values).all()
    assert (quantize_rtn(torch.zeros(3, 70), config).dequantize() == 0).all()


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
def test_numbers_close_to_zero(scheme):
    weight = random_matrix((4, 128)) * 1e-41
    values = quantize_rtn(weight, QuantizationConfig(scheme)).dequantize()
    assert (values - weight).abs().max() <= weight.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_dtypes_and_strides(scheme, dtype):
    weight = random_matrix((100, 70), dtype=dtype)
    expected = quantize_rtn(weight.float(), QuantizationConfig(scheme))
    strided = torch.empty(70, 200, dtype=dtype)[:, ::2].t()
    strided.copy_(weight)
    for given_weight in (weight, weight.t().contiguous().t(), strided):
        found = quantize_rtn(given_weight, QuantizationConfig(scheme))
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)
        assert found.codes.is_contiguous()


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_rows_are_quantised_alike_in_any_company(scheme, monkeypatch):
    weight, config = random_matrix((37, 128)), QuantizationConfig(scheme)
    whole = quantize_rtn(weight, config)
    monkeypatch.setattr(module, "_CHUNK", 256)
    assert torch.equal(quantize_rtn(weight, config).dequantize(), whole.dequantize())
    assert torch.equal(quantize_rtn(weight[5:6], config).dequantize(), whole.dequantize()[5:6])


def test_another_scheme_for_embeddings():
    weight = random_matrix((10, 96))
    config = QuantizationConfig("int4", 32, embeddings="int8")
    assert quantize_rtn(weight, config, scheme="int8").scheme == "int8"
    nf4 = QuantizationConfig("nf4", 256, embeddings="int4")
    embedding = quantize_rtn(weight, nf4, scheme="int4")
    assert (embedding.scheme, embedding.group_size, embedding.activations) == ("int4", 64, "float32")
    with pytest.raises(ValueError, match="scheme = 'float16', but the schemes are"):
        quantize_rtn(weight, config, scheme="float16")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
def test_weights_that_are_not_finite(scheme, bad):
    weight = random_matrix((5, 64))
    weight[3, 7] = bad
    with pytest.raises(ValueError, match=r"1 of 320 weights are NaN or infinite, the first at \[3, 7\]"):
        quantize_rtn(weight, QuantizationConfig(scheme))


def test_weights_that_int4_cannot_hold():
    with pytest.raises(ValueError, match="the largest weight is 1e\\+06, which needs a scale beyond float16"):
        quantize_rtn(torch.full((2, 64), 1e6), QuantizationConfig("int4"))
    quantize_rtn(torch.full((2, 64), 4e5), QuantizationConfig("int4")).check()


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(0, 4)])
def test_what_is_no_weight(weight):
    with pytest.raises(ValueError, match="expected a weight"):
        quantize_rtn(weight, QuantizationConfig("int8"))
