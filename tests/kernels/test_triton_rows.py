"""The first and the last steps of a chain in triton's interpreter: embedding into the residual stream, norm of rows."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.embedding_rows import embedding_rows_ref, embedding_rows_triton
from gpt2rt.kernels.fused_linear import Norm
from gpt2rt.kernels.norm_rows import norm_rows_ref, norm_rows_triton
from gpt2rt.kernels.weights import pack_dense, pack_quantized
from gpt2rt.quantization import QuantizationConfig, quantize_rtn

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = {
    "dense": None,
    "int8": QuantizationConfig("int8"),
    "int4": QuantizationConfig("int4", group_size=32),
    "int4 with zeros": QuantizationConfig("int4", group_size=64, symmetric=False),
    "nf4": QuantizationConfig("nf4", group_size=64),
}


def table(name, num_rows, width, dtype):
    weight = torch.randn(num_rows, width)
    config = FORMATS[name]
    if config is None:
        return pack_dense(weight.to(dtype))
    q = quantize_rtn(weight, config)
    options = {"in_features": width, "group_size": q.group_size, "compute_dtype": dtype}
    return pack_quantized(q.codes, q.scales, q.zeros, q.codebook, **options)


@pytest.mark.parametrize("width", [64, 100, 1152])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(dtype, name, width, cut_rows):
    wte, wpe = table(name, 21, width, dtype), cut_rows(torch.randn(9, width, dtype=dtype))
    ids = torch.tensor([0, 20, 3, 3, -1, 21, 5, 5])
    positions = torch.tensor([0, 8, 1, 1, 0, 0, 9, -1])
    for out_dtype in (torch.float32, dtype):
        out = cut_rows(torch.full((8, width), torch.nan, dtype=out_dtype))
        embedding_rows_triton(ids, positions, wte, wpe, out)
        expected = embedding_rows_ref(ids, positions, wte, wpe.double())
        assert expected[4:].isnan().all()
        # one rounding of the scale, one of the sum
        torch.testing.assert_close(
            out.double(), expected, rtol=2 * torch.finfo(out_dtype).eps, atol=1e-6, equal_nan=True
        )


@pytest.mark.parametrize("n", [1, 63, 768, 1600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_chosen_rows(dtype, n, cut_rows):
    x = cut_rows(torch.randn(7, n) * 3 + 1)
    norm = Norm(torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype), 1e-5)
    rows = torch.tensor([6, 0, 0, 7, -1])
    out = cut_rows(torch.full((5, n), torch.nan, dtype=dtype))
    norm_rows_triton(x, norm, out, rows=rows)
    expected = norm_rows_ref(x.double(), norm, rows[:3])
    torch.testing.assert_close(out[:3].double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)
    assert out[3:].isnan().all()
    copied = cut_rows(torch.full((5, n), torch.nan))
    norm_rows_triton(x, None, copied, rows=rows)
    assert torch.equal(copied[:3], x[rows[:3]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_in_place(dtype, cut_rows):
    x = cut_rows(torch.randn(4, 130, dtype=dtype))
    norm = Norm(torch.randn(130), torch.randn(130), 1e-6)
    expected = norm_rows_ref(x.double(), norm)
    norm_rows_triton(x, norm, x)
    torch.testing.assert_close(x.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_nothing_to_do_and_rows_that_are_too_long():
    x = torch.randn(0, 8)
    norm_rows_triton(x, None, x)
    embedding_rows_triton(torch.zeros(0).long(), torch.zeros(0).long(), table("int8", 3, 8, torch.float32), x, x)
    with pytest.raises(ValueError, match="32769 elements, expected at most 32768"):
        norm_rows_triton(torch.zeros(1, 32769), None, torch.zeros(1, 32769))
