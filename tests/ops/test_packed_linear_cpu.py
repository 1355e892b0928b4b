"""packed_linear and unpack_linear in C++: the products of a step by themselves, on packed weights of every format."""

import dataclasses
import math

import pytest
import torch
from cpu_step_model import aligned_bytes
from quantized_cases import FORMATS, Case, random_case

import gpt2rt.ops as ops
from gpt2rt.kernels.quantized_linear import dequantize_ref, quantized_linear_ref

DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGERS = [name for name in FORMATS if not name.startswith("code4")]
NAMES = [*DENSE, *FORMATS]
# every number of rows in a block, two blocks, the threshold from which groups are unpacked, tiles of 48 and their ends
ROWS = [*range(1, 20), 24, 31, 33, 47, 48, 49, 95, 97, 130]


@dataclasses.dataclass
class Packed:
    """A packed weight, the arguments that go with it and its values in float32."""

    data: torch.Tensor
    options: dict
    values: torch.Tensor
    case: Case | None

    def __call__(self, x, bias=None, **options):
        return ops.packed_linear(x, self.data, bias, out_features=len(self.values), **self.options, **options)


def pack(name, n, k, case=None):
    if name in DENSE:
        weight = torch.randn(n, k).to(DENSE[name])
        data = aligned_bytes(ops.packed_linear_bytes(n, k, weight.dtype))
        ops.pack_linear(weight, data)
        return Packed(data, {"weight_format": name}, weight.float(), None)
    case = case or random_case(name, n, k)
    bits, _, zeros, codebook = FORMATS[name]
    size = ops.packed_quantized_bytes(
        n, k, bits=bits, group_size=case.group_size, has_zeros=zeros, has_codebook=codebook
    )
    data = aligned_bytes(size)
    ops.pack_quantized(*case.tensors, data, **case.sizes)
    options = {"weight_format": name.split("-")[0], "has_zeros": zeros, "codebook": case.codebook}
    if bits == 4:
        options["group_size"] = case.group_size
    return Packed(data, options, dequantize_ref(*case.tensors, k, case.group_size), case)


def sizes(name):
    """(n, k): panels and groups whole and cut off; codebooks need whole groups."""
    if name.startswith("code4"):
        return [(64, 128), (1, 256), (130, 384)]
    return [(64, 128), (1, 1), (65, 7), (63, 200), (130, 331)]


@pytest.mark.parametrize("name", NAMES)
def test_unpacking_gives_the_weight(name):
    for n, k in sizes(name):
        packed = pack(name, n, k)
        options = {key: value for key, value in packed.options.items() if key != "fast"}
        assert torch.equal(ops.unpack_linear(packed.data, n, k, **options), packed.values), (n, k)


@pytest.mark.parametrize("name", NAMES)
def test_exact_products_of_every_number_of_rows(name):
    for n, k in sizes(name):
        packed, x, bias = pack(name, n, k), torch.randn(max(ROWS), k + 3)[:, :k], torch.randn(n)
        exact = x.double() @ packed.values.double().t() + bias.double()
        scale = float((x.double().abs() @ packed.values.double().abs().t()).max()) + 1.0
        whole = packed(x, bias, fast=False, num_threads=1)
        assert float((whole.double() - exact).abs().max()) < 2e-6 * scale, (n, k)
        for m in ROWS:
            out = torch.full((m, n + 5), math.nan)[:, :n]
            y = packed(x[:m], bias, fast=False, num_threads=1 + m % 3, out=out)
            assert y.data_ptr() == out.data_ptr()
            assert torch.equal(y, whole[:m]), (n, k, m)


@pytest.mark.parametrize("name", INTEGERS)
def test_int8_rows_of_every_number(name):
    for n, k in sizes(name):
        packed, x, bias = pack(name, n, k), torch.randn(max(ROWS), k + 3)[:, :k], torch.randn(n)
        expected = quantized_linear_ref(x, *packed.case.tensors, bias, k, packed.case.group_size, True)
        size = expected.abs().amax(dim=1, keepdim=True) + 1.0
        whole = packed(x, bias, num_threads=1)
        assert float(((whole - expected).abs() / size).max()) < 2e-6, (n, k)
        for m in ROWS:
            out = torch.full((m, n + 5), math.nan)[:, :n]
            packed(x[:m], bias, num_threads=1 + m % 3, out=out)
            assert torch.equal(out, whole[:m]), (n, k, m)


@pytest.mark.parametrize("name", ["int4-g64", "int4-g64-zeros", "code4-g64"])
@pytest.mark.parametrize("group", [96, 256, 512, 4096])
def test_groups_of_other_sizes(name, group):
    """Groups that are no power of two, too large to be unpacked, or larger than the row."""
    n, k = 70, 512 if group < 4096 and group != 96 else 288 if group == 96 else 4096
    generator = torch.Generator().manual_seed(group)
    case = random_case(name, n, k)
    groups = -(-k // group)
    case.group_size = group
    case.scales = (torch.rand((n, groups), generator=generator) * 0.01 + 0.001).to(case.scales.dtype)
    if case.zeros is not None:
        case.zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator)
    packed, x = pack(name, n, k, case), torch.randn(20, k)
    exact = x.double() @ packed.values.double().t()
    scale = float((x.double().abs() @ packed.values.double().abs().t()).max())
    for m in (1, 3, 8, 9, 20):
        y = packed(x[:m], fast=False)
        assert float((y.double() - exact[:m]).abs().max()) < 2e-6 * scale, m
        if case.codebook is None:
            expected = quantized_linear_ref(x[:m], *case.tensors, None, k, group, True)
            assert float((packed(x[:m]) - expected).abs().max()) < 2e-6 * float(expected.abs().max()), m


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_sums_are_exact(name):
    """With scales of 1 the result is the product of integers, on every instruction set; nothing saturates."""
    n, k = 66, 256
    case = random_case(name, n, k)
    case.scales = torch.ones_like(case.scales)
    if name == "int8":
        case.codes[0], case.codes[1] = 127, -127
        numbers = case.codes.long()
    else:
        case.codes[0], case.codes[1] = 0xFF, 0x00
        numbers = dequantize_ref(*case.tensors, k, case.group_size).long()
    x = torch.randint(-127, 128, (17, k)).float()
    # the largest of every group is 127, so that the scale of the row is 1
    x[:, ::32] = 127.0
    x[0], x[1] = 127.0, -127.0
    packed = pack(name, n, k, case)
    for m in (1, 2, 7, 17):
        assert torch.equal(packed(x[:m]).long(), x[:m].long() @ numbers.t()), m


def test_a_row_shows_one_changed_bit():
    """The control of the comparisons above."""
    packed, x = pack("int8", 64, 128), torch.randn(2, 128)
    before = packed(x)
    packed.data[0] ^= 1
    assert not torch.equal(packed(x), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_format": "int5"}, "expected one of float32"),
        ({"group_size": 48}, "group_size is 48"),
        ({"group_size": 128}, "packed has shape"),
        ({"has_zeros": True}, "packed has shape"),
        ({"codebook": torch.zeros(16)}, "a codebook belongs to"),
        ({"weight_format": "code4"}, "a codebook belongs to"),
        ({"out_features": 0}, "expected at least 1 x 1"),
        ({"out": torch.zeros(3, 69)}, "out has shape"),
    ],
)
def test_refusals(change, message):
    packed, x = pack("int4-g64", 70, 256), torch.randn(3, 256)
    options = {"out_features": 70, **packed.options, **change}
    with pytest.raises(ValueError, match=message):
        ops.packed_linear(x, packed.data, **options)


def test_more_refusals():
    packed, x = pack("int8", 70, 256), torch.randn(3, 256)
    with pytest.raises(ValueError, match="zero points belong to int4"):
        ops.packed_linear(x, packed.data, out_features=70, weight_format="int8", has_zeros=True)
    askew = aligned_bytes(packed.data.numel() + 64)[4 : 4 + packed.data.numel()]
    with pytest.raises(ValueError, match="multiple of 64 bytes"):
        ops.packed_linear(x, askew, out_features=70, weight_format="int8")
    with pytest.raises(TypeError, match="x has dtype"):
        packed(x.bfloat16())
    assert packed(x[:0]).shape == (0, 70)
