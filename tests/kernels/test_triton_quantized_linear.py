"""The op ``quantized_linear`` for GPUs, in triton's interpreter: its storage layout and every group size."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.quantized_linear import dequantize_ref, quantized_linear_ref
from gpt2rt.kernels.quantized_linear_triton import quantized_linear_triton
from gpt2rt.ops._library import op_forms

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODEBOOK = torch.linspace(-1.0, 1.0, 16) ** 3


def make(kind, n, k, group_size):
    """Codes, scales, zeros and codebook of random weights, scaled like a layer's."""
    if kind == "int8":
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        return codes, torch.rand(n) * 0.02 * k**-0.5, None, None
    groups = -(-k // group_size)
    codes = torch.randint(0, 256, (n, -(-k // 2)), dtype=torch.uint8)
    scales = (torch.rand(n, groups) + 0.1) * k**-0.5
    zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8) if kind == "int4z" else None
    return codes, scales if kind == "code4" else scales.half(), zeros, CODEBOOK if kind == "code4" else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "int4z", "code4"])
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size"),
    [(1, 7, 64, 32), (3, 33, 192, 64), (9, 20, 320, 160), (70, 65, 96, 96), (2, 5, 1024, 512)],
)
def test_matches_the_definition(m, n, k, group_size, kind, dtype, cut_rows, as_exact_as_torch):
    weight = make(kind, n, k, group_size)
    x, bias = cut_rows(torch.randn(m, k, dtype=dtype)), torch.randn(n, dtype=dtype)
    wide = dequantize_ref(
        *(t if t is None else t.double() if t.is_floating_point() else t for t in weight), k, group_size
    )
    definition = x.double() @ wide.double().t() + bias.double()
    plain = torch.nn.functional.linear(x, wide.to(dtype), bias)
    as_exact_as_torch(quantized_linear_triton(x, *weight, bias, k, group_size, False), plain, definition)


@pytest.mark.parametrize("kind", ["int8", "int4", "int4z"])
@pytest.mark.parametrize("k", [65, 131])
def test_rows_that_end_within_a_byte_and_a_group(k, kind, as_exact_as_torch):
    weight = make(kind, 19, k, 64)
    x = torch.randn(10, k, dtype=torch.float16)
    wide = dequantize_ref(*weight, k, 64)
    plain = torch.nn.functional.linear(x, wide.half())
    result = quantized_linear_triton(x, *weight, None, k, 64, False)
    as_exact_as_torch(result, plain, x.double() @ wide.double().t())


def test_int8_activations_are_the_definition_itself():
    weight = make("int4", 9, 128, 64)
    x = torch.randn(3, 128, dtype=torch.float16)
    arguments = (x, *weight, None, 128, 64, True)
    assert torch.equal(quantized_linear_triton(*arguments), quantized_linear_ref(*arguments))


def test_no_rows_and_the_form_on_a_gpu():
    weight = make("int8", 9, 32, 0)
    assert quantized_linear_triton(torch.ones(0, 32), *weight, None, 32, 0, False).shape == (0, 9)
    assert op_forms()["quantized_linear"]["cuda"] == "Triton"
