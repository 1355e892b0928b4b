"""bias_gelu_new in triton's interpreter, against its definition in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.bias_gelu_new import bias_gelu_new_ref, bias_gelu_new_triton

# exp(-2z) and u^3 may overflow: the result is a limit all the same
pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")]

# tight in float32: a constant of the formula with a digit less must show
TOLERANCE = {torch.float32: (1.3e-6, 1e-6), torch.float16: (1e-3, 1e-5), torch.bfloat16: (1.6e-2, 1e-5)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_tokens", "n"), [(1, 1), (3, 63), (2, 64), (7, 50), (2, 1024), (2, 1025), (3, 3072)])
def test_matches_definition(num_tokens, n, dtype, cut_rows, close):
    x, bias = cut_rows(torch.randn(num_tokens, n, dtype=dtype) * 3), torch.randn(n, dtype=dtype)
    close(bias_gelu_new_triton(x, bias), bias_gelu_new_ref(x.double(), bias.double()), TOLERANCE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_extremes_saturate(dtype):
    # u^3 overflows float32 at 1e13, and exp(-2z) long before: neither may give NaN
    u = torch.tensor([[0.0, -0.0, 60000.0, -60000.0, 300.0, -300.0, -8.0]], dtype=dtype)
    if dtype != torch.float16:
        u = torch.cat([u, torch.tensor([[1e30, -1e30]], dtype=dtype)], dim=1)
    y = bias_gelu_new_triton(u, torch.zeros(u.shape[1], dtype=dtype))
    assert torch.equal(y[:, :6].relu(), u[:, :6].relu())
    assert (y[u <= -300] == 0).all()
    assert (y[u >= 300] == u[u >= 300]).all()


def test_a_row_does_not_depend_on_its_batch():
    x, bias = torch.randn(4, 1100), torch.randn(1100)
    together = bias_gelu_new_triton(x, bias)
    for i in range(4):
        assert torch.equal(bias_gelu_new_triton(x[i : i + 1], bias)[0], together[i])


def test_no_tokens():
    assert bias_gelu_new_triton(torch.ones(0, 8), torch.ones(8)).shape == (0, 8)
