"""GPTQ: against the algorithm written out plainly, and against rounding to nearest where inputs are correlated."""

import math

import pytest
import torch

from gpt2rt.quantization import QuantizationConfig, quantize_rtn
from gpt2rt.quantization.codebooks import unpack_4bit
from gpt2rt.quantization.gptq import DAMPING, Hessian, inverse_factor, quantize_gptq
from gpt2rt.quantization.rtn import int4_scales

CONFIGS = [
    QuantizationConfig("int4", 32),
    QuantizationConfig("int4", 64, symmetric=False),
    QuantizationConfig("int4", 128),
    QuantizationConfig("int8"),
]


def problem(rows, columns, tokens=400, seed=0):
    """A weight [rows, columns], and inputs [tokens, columns] whose columns depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixed
    return torch.randn(rows, columns, generator=generator), inputs


def hessian_of(inputs):
    hessian = Hessian(inputs.size(-1))
    hessian.add(inputs)
    return hessian.mean()


def output_error(quantized, weight, inputs):
    return (inputs @ (quantized.dequantize() - weight).t()).square().mean().item()


def written_out(weight, hessian, config):
    """Equations 2 and 3 of the paper: after each column the rest is updated, and the inverse loses that column."""
    rows, columns = weight.shape
    values = weight.double().clone()
    inverse = torch.linalg.inv(hessian + DAMPING * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64))
    codes = torch.empty(rows, columns, dtype=torch.int64)
    row_scales = values.abs().amax(1) / 127
    for k in range(columns):
        if config.scheme == "int8":
            codes[:, k] = (values[:, k] / row_scales).round().clamp(-127, 127)
            found = codes[:, k] * row_scales
        else:
            if k % config.group_size == 0:
                group = values[:, k : k + config.group_size].float().contiguous()
                scales, zeros = int4_scales(group, config.symmetric)
            codes[:, k] = ((values[:, k] / scales.double()).round() + zeros).clamp(0, 15)
            found = (codes[:, k] - zeros) * scales.double()
        error = (values[:, k] - found) / inverse[k, k]
        values[:, k:] -= error.unsqueeze(1) * inverse[k, k:]
        inverse = inverse - inverse[:, k : k + 1] * inverse[k : k + 1, :] / inverse[k, k]
    return codes


@pytest.mark.parametrize("config", CONFIGS, ids=["int4-g32", "int4-g64-zeros", "int4-g128", "int8"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 40), (16, 128), (24, 200)])
def test_it_is_the_algorithm_of_the_paper(config, rows, columns):
    weight, inputs = problem(rows, columns)
    hessian = hessian_of(inputs)
    quantized = quantize_gptq(weight, hessian, config)
    quantized.check()
    codes = quantized.codes if config.scheme == "int8" else unpack_4bit(quantized.codes, columns)
    expected = written_out(weight, hessian, config)
    # float32 and float64 may round a number between two codes to different sides
    assert ((codes.int() - expected).abs() > 0).float().mean() <= 0.01


@pytest.mark.parametrize("config", CONFIGS, ids=["int4-g32", "int4-g64-zeros", "int4-g128", "int8"])
def test_it_beats_rounding_where_inputs_are_correlated(config):
    weight, inputs = problem(64, 192, tokens=2400)
    seen, unseen = inputs[:2000], inputs[2000:]
    compensated = quantize_gptq(weight, hessian_of(seen), config)
    rounded = quantize_rtn(weight, config)
    assert (compensated.scheme, compensated.group_size) == (rounded.scheme, rounded.group_size)
    assert compensated.num_bytes == rounded.num_bytes
    # on inputs that it has not seen too, although the weights themselves are further away
    for part in (seen, unseen):
        assert output_error(compensated, weight, part) < 0.7 * output_error(rounded, weight, part)
    assert (compensated.dequantize() - weight).square().mean() > (rounded.dequantize() - weight).square().mean()


def test_without_correlations_it_is_rounding():
    weight, _ = problem(16, 192)
    for config in CONFIGS[1:]:
        same = quantize_gptq(weight, torch.eye(192, dtype=torch.float64), config)
        assert torch.equal(same.codes, quantize_rtn(weight, config).codes)
        assert torch.equal(same.scales, quantize_rtn(weight, config).scales)


def test_the_hessian_of_another_layer_makes_it_worse():
    weight, inputs = problem(64, 192)
    _, others = problem(64, 192, seed=1)
    config = CONFIGS[1]
    right, wrong = (quantize_gptq(weight, hessian_of(x), config) for x in (inputs, others))
    assert output_error(wrong, weight, inputs) > 1.5 * output_error(right, weight, inputs)


def test_inputs_that_are_always_zero():
    weight, inputs = problem(16, 96)
    inputs[:, 10:20] = 0.0
    inputs[:, 95] = 0.0
    config = QuantizationConfig("int4", 32)
    quantized = quantize_gptq(weight, hessian_of(inputs), config)
    quantized.check()
    # their weights are kept as well as any, for another text may need them
    error = (quantized.dequantize() - weight)[:, 10:20].abs().max()
    assert error < 0.5
    nothing = quantize_gptq(weight, torch.zeros(96, 96), config)
    assert torch.equal(nothing.codes, quantize_rtn(weight, config).codes)


def test_the_factor_of_the_inverse():
    _, inputs = problem(1, 150)
    hessian = hessian_of(inputs)
    factor = inverse_factor(hessian).double()
    assert torch.equal(factor, factor.triu())
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(150)
    torch.testing.assert_close(factor.t() @ factor @ damped, torch.eye(150, dtype=torch.float64), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="not positive definite"):
        inverse_factor(-hessian)


def test_the_hessian_is_summed_over_parts():
    _, inputs = problem(1, 30)
    hessian = Hessian(30)
    for part in inputs.view(4, 100, 30).split([1, 3]):
        hessian.add(part)
    assert hessian.num_tokens == 400
    expected = 2 * inputs.double().t() @ inputs.double() / 400
    torch.testing.assert_close(hessian.mean(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_and_strides(dtype):
    weight, inputs = problem(16, 96)
    weight, hessian, config = weight.to(dtype), hessian_of(inputs), CONFIGS[0]
    expected = quantize_gptq(weight.float(), hessian, config)
    before = weight.clone()
    for given in (weight, weight.t().contiguous().t()):
        found = quantize_gptq(given, hessian, config)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)
    assert torch.equal(weight, before)


def test_refusals():
    weight, inputs = problem(8, 64)
    config = QuantizationConfig("int4")
    with pytest.raises(ValueError, match=r"the Hessian of a \[8, 64\] weight is \[64, 64\], got \[32, 32\]"):
        quantize_gptq(weight, torch.eye(32), config)
    with pytest.raises(ValueError, match="gptq makes int4 and int8, not nf4"):
        quantize_gptq(weight, torch.eye(64), QuantizationConfig("nf4"))
    with pytest.raises(ValueError, match="no inputs were gathered"):
        Hessian(64).mean()
    inputs[3, 5] = math.nan
    with pytest.raises(ValueError, match="inputs on the calibration text are NaN or infinite"):
        hessian_of(inputs)
    weight[1, 2] = math.inf
    with pytest.raises(ValueError, match=r"1 of 512 weights are NaN or infinite, the first at \[1, 2\]"):
        quantize_gptq(weight, torch.eye(64), config)
