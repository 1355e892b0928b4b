"""layer_norm and add_layer_norm in triton's interpreter, against their definitions in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.layer_norm import (
    MAX_ROW,
    add_layer_norm_ref,
    add_layer_norm_triton,
    layer_norm_ref,
    layer_norm_triton,
)

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 2), (2, 63), (5, 64), (2, 65), (3, 768), (1, 1600), (2, 4099)]
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 1e-3), torch.bfloat16: (2e-2, 2e-2)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "n"), SHAPES)
def test_layer_norm_matches_definition(num_tokens, n, dtype, cut_rows, close):
    x = cut_rows(torch.randn(num_tokens, n, dtype=dtype) * 3 + 1)
    weight, bias = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)
    definition = layer_norm_ref(x.double(), weight.double(), bias.double(), 1e-5)
    close(layer_norm_triton(x, weight, bias, 1e-5), definition, TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "n"), SHAPES)
def test_add_layer_norm_matches_definition(num_tokens, n, dtype, cut_rows, close):
    # two different row strides: the residual is contiguous
    x, residual = cut_rows(torch.randn(num_tokens, n, dtype=dtype)), torch.randn(num_tokens, n, dtype=dtype)
    weight, bias = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)
    y, total = add_layer_norm_triton(x, residual, weight, bias, 1e-5)
    # a sum of two numbers is rounded once on both sides, so it is equal
    assert torch.equal(total, x + residual)
    # the norm reads the rounded sum: the same bits as the norm of what was returned
    assert torch.equal(y, layer_norm_triton(total, weight, bias, 1e-5))
    close(y, layer_norm_ref(total.double(), weight.double(), bias.double(), 1e-5), TOLERANCE)
    torch.testing.assert_close(
        y, add_layer_norm_ref(x, residual, weight, bias, 1e-5)[0], rtol=TOLERANCE[dtype][0], atol=TOLERANCE[dtype][1]
    )


def test_two_passes_keep_the_digits_of_a_shifted_row():
    # mean(x^2) - mean(x)^2 in float32 would lose the variance of 1 behind a mean of 3000
    x = torch.randn(2, 768) + 3000
    weight, bias = torch.ones(768), torch.zeros(768)
    definition = layer_norm_ref(x.double(), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(layer_norm_triton(x, weight, bias, 1e-5).double(), definition, rtol=1e-4, atol=1e-3)


def test_constant_rows_give_the_bias():
    bias = torch.randn(10)
    y = layer_norm_triton(torch.full((2, 10), 0.5), torch.ones(10), bias, 1e-5)
    assert torch.equal(y, bias.expand(2, 10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype):
    x, residual = torch.randn(5, 100, dtype=dtype), torch.randn(5, 100, dtype=dtype)
    weight, bias = torch.randn(100, dtype=dtype), torch.randn(100, dtype=dtype)
    together = layer_norm_triton(x, weight, bias, 1e-5)
    added = add_layer_norm_triton(x, residual, weight, bias, 1e-5)
    for i in range(5):
        assert torch.equal(layer_norm_triton(x[i : i + 1], weight, bias, 1e-5)[0], together[i])
        alone = add_layer_norm_triton(x[i : i + 1], residual[i : i + 1], weight, bias, 1e-5)
        assert torch.equal(alone[0][0], added[0][i])
        assert torch.equal(alone[1][0], added[1][i])


def test_no_tokens():
    x, w = torch.ones(0, 8), torch.ones(8)
    assert layer_norm_triton(x, w, w, 1e-5).shape == (0, 8)
    assert [t.shape for t in add_layer_norm_triton(x, x, w, w, 1e-5)] == [(0, 8), (0, 8)]


def test_rows_longer_than_a_program_holds_are_refused():
    x, w = torch.ones(1, MAX_ROW + 1), torch.ones(MAX_ROW + 1)
    with pytest.raises(ValueError, match="rows have 32769 elements, expected at most 32768"):
        layer_norm_triton(x, w, w, 1e-5)
