"""quantized_linear and pack_quantized in C++ against their definition in torch."""

import pytest
import torch
from cpu_step_model import aligned_bytes
from quantized_cases import FORMATS, random_case

import gpt2rt.ops as ops
from gpt2rt.kernels.quantized_linear import dequantize_ref, quantize_activations_ref, quantized_linear_ref

OPS = torch.ops.gpt2rt
INTEGERS = [name for name in FORMATS if not name.startswith("code4")]


def shapes(name):
    """(rows, n, k); codebooks need whole groups."""
    odd = [(1, 1, 1), (3, 65, 7), (2, 64, 63), (5, 130, 200), (1, 200, 331), (17, 70, 129)]
    even = [(1, 64, 128), (2, 192, 768), (6, 65, 256), (7, 64, 384), (13, 100, 640), (40, 129, 128), (100, 64, 256)]
    return even + ([] if name.startswith("code4") else odd)


CASES = [(name, *shape) for name in FORMATS for shape in shapes(name)]


def exact(x, case, bias):
    """In float64."""
    weight = dequantize_ref(*case.tensors, case.in_features, case.group_size).double()
    return x.double() @ weight.t() + (0.0 if bias is None else bias.double())


@pytest.mark.parametrize(("name", "m", "n", "k"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_activations(name, m, n, k, dtype):
    case = random_case(name, n, k)
    x = torch.randn(m, k + 5)[:, :k].to(dtype)
    bias = torch.randn(n).to(dtype)
    y = ops.quantized_linear(x, *case.tensors, bias, **case.sizes, int8_activations=False)
    expected = exact(x, case, bias)
    scale = float(exact(x.abs(), case, None).abs().max()) + 1.0
    assert y.dtype == dtype
    assert y.shape == (m, n)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(y.double(), expected, rtol=0 if dtype == torch.float32 else 8e-3, atol=tolerance * scale)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_activations(name, dtype):
    for m, n, k in shapes(name):
        case = random_case(name, n, k)
        x = torch.randn(m, k).to(dtype) * torch.logspace(-2, 2, m)[:, None].to(dtype)
        bias = torch.randn(n).to(dtype)
        y = ops.quantized_linear(x, *case.tensors, bias, **case.sizes, int8_activations=True)
        expected = quantized_linear_ref(x.float(), *case.tensors, bias.float(), k, case.group_size, True)
        # the same integers; only the sums over groups may be rounded elsewhere
        size = expected.abs().amax(dim=1, keepdim=True) + 1.0
        error = ((y.float() - expected).abs() / size).max()
        assert error < (2e-6 if dtype == torch.float32 else 1e-3), (m, n, k, float(error))
        # and it is not the exact product
        if k > 64:
            assert (expected - exact(x.float(), case, bias.float()).float()).abs().max() > 1e-5


def test_int8_activations_are_near_the_exact_product():
    for name in INTEGERS:
        case, x = random_case(name, 64, 768), torch.randn(8, 768)
        y = ops.quantized_linear(x, *case.tensors, None, **case.sizes, int8_activations=True)
        expected = exact(x, case, None)
        assert float((y - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damage_stays_in_its_row_and_shows(name, value):
    case, x = random_case(name, 70, 256), torch.randn(3, 256)
    clean = ops.quantized_linear(x, *case.tensors, None, **case.sizes, int8_activations=True)
    x[1, 100] = value
    y = ops.quantized_linear(x, *case.tensors, None, **case.sizes, int8_activations=True)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_activations_of_every_size():
    x = torch.tensor([[0.0] * 64, [1e-38] * 64, [1e-30] * 64, [3e38] * 64, [1.0, -1.0] * 32])
    codes, scales = quantize_activations_ref(x, 64)
    assert codes.view(5, 64)[:, 0].tolist() == [0, 0, 127, 127, 127]
    case = random_case("int8", 64, 64)
    y = ops.quantized_linear(x, *case.tensors, None, **case.sizes, int8_activations=True)
    torch.testing.assert_close(y, quantized_linear_ref(x, *case.tensors, None, 64, 64, True), rtol=1e-5, atol=0)
    assert y[:2].eq(0).all()
    assert scales[1] == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("int8_activations", [False, True])
def test_rows_do_not_depend_on_company(name, int8_activations):
    """Bit-equal alone, in any batch, on any number of threads."""
    if int8_activations and name not in INTEGERS:
        pytest.skip("a codebook has no integers to multiply")
    case, x = random_case(name, 150, 256), torch.randn(101, 256)
    options = {**case.sizes, "int8_activations": int8_activations}
    together = ops.quantized_linear(x, *case.tensors, None, **options)
    for begin, end in [(0, 1), (0, 2), (3, 6), (7, 11), (20, 28), (0, 37), (50, 101)]:
        part = ops.quantized_linear(x[begin:end], *case.tensors, None, **options)
        assert torch.equal(part, together[begin:end]), (begin, end)
    # negative control: the comparison sees one bit
    wrong = together[0:1].clone()
    wrong.view(torch.int32)[0, 0] ^= 1
    assert not torch.equal(wrong, together[0:1])


@pytest.mark.parametrize("name", FORMATS)
def test_pack_writes_every_byte(name):
    bits, _, zeros, codebook = FORMATS[name]
    n, k = (70, 256) if codebook else (70, 203)
    case = random_case(name, n, k)
    size = ops.packed_quantized_bytes(
        n, k, bits=bits, group_size=case.group_size, has_zeros=zeros, has_codebook=codebook
    )
    one, two = aligned_bytes(size).fill_(0x5A), aligned_bytes(size).fill_(0xA5)
    ops.pack_quantized(*case.tensors, one, **case.sizes)
    ops.pack_quantized(*case.tensors, two, **case.sizes)
    assert torch.equal(one, two)
    changed = case.codes.clone()
    changed[-1, -1] ^= 16
    ops.pack_quantized(changed, *case.tensors[1:], two, **case.sizes)
    assert (one != two).sum() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": lambda t: t[:-1]}, "scales has shape"),
        ({"scales": lambda t: t.float()}, "scales"),
        ({"codes": lambda t: t[:, :-1].contiguous()}, "codes has shape"),
        ({"codes": lambda t: t.t().contiguous().t()}, "codes"),
        ({"zeros": lambda t: torch.zeros(70, 2, dtype=torch.uint8)}, "zeros has shape"),
        ({"zeros": lambda t: torch.zeros(70, 4)}, "zeros"),
    ],
)
def test_refusals(change, message):
    case, x = random_case("int4-g64", 70, 256), torch.randn(2, 256)
    for name, f in change.items():
        setattr(case, name, f(getattr(case, name)))
    with pytest.raises((ValueError, TypeError), match=message):
        ops.quantized_linear(x, *case.tensors, None, **case.sizes, int8_activations=True)


def test_more_refusals():
    case, x = random_case("code4-g64", 70, 256), torch.randn(2, 256)
    with pytest.raises(ValueError, match="no integers"):
        ops.quantized_linear(x, *case.tensors, None, **case.sizes, int8_activations=True)
    with pytest.raises(ValueError, match="the codes are no integers"):
        OPS.quantized_linear(x, *case.tensors, None, 256, 64, True)
    with pytest.raises(ValueError, match="has no kernel"):
        ops.quantized_linear(x, *case.tensors, None, in_features=256, group_size=24, int8_activations=False)
    with pytest.raises(ValueError, match="expected in_features"):
        ops.quantized_linear(x[:, :255], *case.tensors, None, **case.sizes, int8_activations=False)
    with pytest.raises(TypeError, match="codes have dtype"):
        ops.quantized_linear(x, case.codes.int(), *case.tensors[1:], None, **case.sizes, int8_activations=False)
    size = ops.packed_quantized_bytes(70, 256, bits=4, group_size=64, has_zeros=False, has_codebook=True)
    with pytest.raises(ValueError, match="multiple of 64 bytes"):
        ops.pack_quantized(*case.tensors, aligned_bytes(size + 64)[4 : 4 + size], **case.sizes)
    with pytest.raises(ValueError, match="expected"):
        ops.pack_quantized(*case.tensors, aligned_bytes(64), **case.sizes)
