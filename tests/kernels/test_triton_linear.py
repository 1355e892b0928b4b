"""linear in triton's interpreter, both kernels and every tile, against its definition in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.fused_linear import MAX_ROWS
from gpt2rt.kernels.linear import (
    linear_gelu_new_ref,
    linear_gelu_new_triton,
    linear_ref,
    linear_residual_ref,
    linear_residual_triton,
    linear_triton,
)
from gpt2rt.kernels.linear_rows import MAX_WHOLE_K

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FEW_ROWS = [(1, 1, 1), (1, 7, 768), (3, 37, 63), (MAX_ROWS, 64, 128), (5, 33, 2500)]
MANY_ROWS = [(MAX_ROWS + 1, 1, 1), (9, 33, 65), (16, 32, 64), (17, 64, 64), (64, 40, 130), (70, 129, 65), (300, 17, 33)]


def make(m, n, k, dtype, conv1d, cut_rows):
    """x and weight cut out of NaN, scaled like a layer's, and a bias."""
    x = cut_rows(torch.randn(m, k, dtype=dtype))
    scale = k**-0.5
    if conv1d:
        weight = cut_rows(torch.randn(k, n, dtype=dtype) * scale).t()
    else:
        weight = cut_rows(torch.randn(n, k, dtype=dtype) * scale)
    return x, weight, torch.randn(n, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("m", "n", "k"), FEW_ROWS + MANY_ROWS)
def test_matches_definition(m, n, k, conv1d, dtype, cut_rows, as_exact_as_torch):
    x, weight, bias = make(m, n, k, dtype, conv1d, cut_rows)
    definition = linear_ref(x.double(), weight.double(), bias.double())
    as_exact_as_torch(linear_triton(x, weight, bias), torch.nn.functional.linear(x, weight, bias), definition)


@pytest.mark.parametrize("m", [2, 20])
def test_without_bias(m, cut_rows, as_exact_as_torch):
    x, weight, _ = make(m, 21, 50, torch.float16, False, cut_rows)
    definition = linear_ref(x.double(), weight.double(), None)
    as_exact_as_torch(linear_triton(x, weight, None), torch.nn.functional.linear(x, weight), definition)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 37, 63), (17, 64, 64)])
def test_epilogues(m, n, k, dtype, cut_rows, as_exact_as_torch):
    x, weight, bias = make(m, n, k, dtype, True, cut_rows)
    residual = cut_rows(torch.randn(m, n, dtype=dtype))
    y = torch.nn.functional.linear(x, weight, bias)
    exact = x.double(), weight.double(), bias.double()
    as_exact_as_torch(
        linear_residual_triton(x, weight, bias, residual), y + residual, linear_residual_ref(*exact, residual.double())
    )
    gelu = torch.nn.functional.gelu(y, approximate="tanh")
    as_exact_as_torch(linear_gelu_new_triton(x, weight, bias), gelu, linear_gelu_new_ref(*exact))
    plain = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight), approximate="tanh")
    as_exact_as_torch(linear_gelu_new_triton(x, weight, None), plain, linear_gelu_new_ref(exact[0], exact[1], None))


def test_rows_of_weights_longer_than_a_tile(cut_rows, as_exact_as_torch):
    x, weight, bias = make(2, 5, MAX_WHOLE_K + 3, torch.bfloat16, False, cut_rows)
    definition = linear_ref(x.double(), weight.double(), bias.double())
    as_exact_as_torch(linear_triton(x, weight, bias), torch.nn.functional.linear(x, weight, bias), definition)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_how_few_rows_there_are(dtype, conv1d, cut_rows):
    x, weight, bias = make(MAX_ROWS, 19, 70, dtype, conv1d, cut_rows)
    together = linear_triton(x, weight, bias)
    for i in range(MAX_ROWS):
        assert torch.equal(linear_triton(x[i : i + 1], weight, bias)[0], together[i])


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours_in_a_tile(dtype, cut_rows):
    x, weight, bias = make(16, 19, 70, dtype, False, cut_rows)
    together = linear_triton(x, weight, bias)
    assert torch.equal(linear_triton(x[:9], weight, bias), together[:9])
    other = x.clone()
    other[3:] = torch.inf
    assert torch.equal(linear_triton(other, weight, bias)[:3], together[:3])


def test_no_rows():
    assert linear_triton(torch.ones(0, 4), torch.ones(3, 4), torch.ones(3)).shape == (0, 3)
