"""What the numbers of a quantised matrix are, and which tensors do not make one."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2rt.quantization import QuantizedWeight
from gpt2rt.quantization.codebooks import codebook, pack_4bit, unpack_4bit

SHAPES = [(1, 1), (1, 65), (3, 64), (5, 100), (7, 129)]


def random_weight(scheme, shape, group_size=64, zeros=False, seed=0):
    """Any codes and scales that the scheme allows."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape

    def below(high, *size):
        return torch.randint(0, high, size, generator=generator)

    if scheme == "int8":
        codes = (below(255, rows, columns) - 127).to(torch.int8)
        return QuantizedWeight("int8", shape, columns, codes, torch.randn(rows, generator=generator))
    codes = pack_4bit(below(16, rows, columns).to(torch.uint8))
    if scheme == "int4":
        groups = -(-columns // group_size)
        scales = torch.randn(rows, groups, generator=generator).half()
        points = below(16, rows, groups).to(torch.uint8) if zeros else None
        return QuantizedWeight("int4", shape, group_size, codes, scales, points)
    scales = torch.rand(rows, columns // group_size, generator=generator)
    return QuantizedWeight(scheme, shape, group_size, codes, scales, activations="float32")


def by_hand(weight):
    """The definition, an element at a time, with Python's numbers."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns)
    for n in range(rows):
        for k in range(columns):
            if weight.scheme == "int8":
                values[n, k] = weight.codes[n, k].item() * weight.scales[n].item()
                continue
            byte, g = weight.codes[n, k // 2].item(), k // weight.group_size
            code = byte % 16 if k % 2 else byte // 16
            if weight.scheme == "int4":
                zero = 8 if weight.zeros is None else weight.zeros[n, g].item()
                values[n, k] = (code - zero) * weight.scales[n, g].item()
            else:
                values[n, k] = codebook(weight.scheme)[code].item() * weight.scales[n, g].item()
    return values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", ["int8", "int4", "int4 with zeros"])
def test_the_numbers_of_integers(scheme, shape):
    weight = random_weight(scheme.split()[0], shape, group_size=32, zeros="zeros" in scheme)
    weight.check()
    assert torch.equal(weight.dequantize(), by_hand(weight))


@pytest.mark.parametrize(("shape", "group_size"), [((1, 1), 1), ((3, 64), 64), ((5, 100), 4), ((2, 35), 5)])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_the_numbers_of_codebooks(scheme, shape, group_size):
    weight = random_weight(scheme, shape, group_size)
    weight.check()
    assert torch.equal(weight.dequantize(), by_hand(weight))


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
def test_rows_are_those_of_the_matrix(scheme):
    weight = random_weight(scheme, (9, 128), zeros=scheme == "int4")
    ids = torch.tensor([[8, 0, 0], [3, 8, 1]])
    assert torch.equal(weight.rows(ids), weight.dequantize()[ids])
    assert weight.rows(ids[:0]).shape == (0, 3, 128)


def test_dtypes_round_once_at_the_end():
    weight = random_weight("int4", (4, 64))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))


def test_sizes():
    assert random_weight("int8", (3, 100)).num_bytes == 3 * 100 + 3 * 4
    weight = random_weight("int4", (3, 100), zeros=True)
    assert weight.num_bytes == 3 * 50 + 3 * 2 * 2 + 3 * 2
    assert random_weight("int4", (64, 64)).bits_per_weight == 4 + 16 / 64
    assert random_weight("nf4", (64, 64)).bits_per_weight == 4 + 32 / 64


def test_moving_to_its_own_device_is_free():
    weight = random_weight("int4", (3, 64), zeros=True)
    assert weight.to("cpu") is weight
    moved = weight.to("meta")
    assert moved.codes.device.type == moved.scales.device.type == moved.zeros.device.type == "meta"
    # there are no values to look at
    moved.check()


def test_the_tables():
    nf4, fp4 = codebook("nf4"), codebook("fp4")
    assert nf4.dtype == fp4.dtype == torch.float32
    assert torch.equal(nf4, nf4.sort().values)
    assert (nf4[0], nf4[7], nf4[15]) == (-1.0, 0.0, 1.0)
    # the quantiles of the normal distribution that the paper's appendix E describes
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    expected = torch.cat([above, torch.zeros(1), below]).sort().values
    torch.testing.assert_close(nf4, expected / expected.max(), rtol=0, atol=1e-6)
    # a sign and eight magnitudes
    assert torch.equal(fp4[8:], -fp4[:8])
    assert sorted(fp4[:8].tolist()) == pytest.approx([0, 0.0625 / 12, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1], abs=1e-7)
    for scheme in ("nf4", "fp4"):
        # every code, in both halves of a byte
        codes = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
        weight = QuantizedWeight(
            scheme, (256, 2), 2, pack_4bit(codes), torch.full((256, 1), 3.0), activations="float32"
        )
        assert torch.equal(weight.dequantize(), codebook(scheme)[codes.int()] * 3.0)
    with pytest.raises(ValueError, match=r"'int4' has no codebook; .* nf4, fp4"):
        codebook("int4")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_packing_is_undone(rows, columns, seed):
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_4bit(codes)
    assert packed.shape == (rows, -(-columns // 2))
    assert torch.equal(unpack_4bit(packed, columns), codes)


def test_the_first_of_a_pair_is_in_the_high_bits():
    assert pack_4bit(torch.tensor([[1, 2, 15]], dtype=torch.uint8)).tolist() == [[0x12, 0xF0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "int3"}, "scheme = 'int3', but the schemes are int8, int4, nf4, fp4"),
        ({"shape": (4, 0)}, "shape = (4, 0), expected (out_features, in_features)"),
        ({"group_size": 48}, "group_size of int4 must be one of (32, 64, 128), got 48"),
        ({"group_size": 32}, "scales have shape [4, 2], expected [4, 4], one scale for each 32 of 100 columns"),
        ({"codes": torch.zeros(4, 100, dtype=torch.uint8)}, "codes have shape [4, 100], expected [4, 50]"),
        ({"codes": torch.zeros(4, 50, dtype=torch.int8)}, "codes have dtype torch.int8, expected torch.uint8"),
        ({"scales": None}, "scales must be a tensor, got NoneType"),
        ({"scales": torch.ones(4, 2)}, "scales have dtype torch.float32, expected torch.float16"),
        ({"zeros": torch.ones(4, 1, dtype=torch.uint8)}, "zeros have shape [4, 1], expected [4, 2]"),
        ({"zeros": torch.ones(4, 2)}, "zeros have dtype torch.float32, expected torch.uint8"),
        ({"activations": "int4"}, "activations = 'int4', expected one of int8, float32"),
    ],
)
def test_tensors_that_make_no_matrix(change, message):
    weight = random_weight("int4", (4, 100))
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(weight, **change)


def test_fields_that_contradict_the_scheme():
    int8, nf4 = random_weight("int8", (4, 100)), random_weight("nf4", (4, 128))
    with pytest.raises(ValueError, match="so group_size must be the 100 columns of the matrix, got 64"):
        dataclasses.replace(int8, group_size=64)
    with pytest.raises(ValueError, match="zeros belong to int4 with zero points; int8 has none"):
        dataclasses.replace(int8, zeros=torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="nf4 multiplies float32 activations"):
        dataclasses.replace(nf4, activations="int8")
    with pytest.raises(ValueError, match="group_size of nf4 must divide the 128 columns, got 48"):
        dataclasses.replace(nf4, group_size=48)


@pytest.mark.proves("fault:F17")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_scales_that_are_not_finite(scheme, bad):
    weight = random_weight(scheme, (4, 128))
    weight.check()
    place = [2] if scheme == "int8" else [2, 1]
    weight.scales[tuple(place)] = bad
    with pytest.raises(
        ValueError, match=rf"1 of {weight.scales.numel()} scales are not finite, .*{re.escape(str(place))}"
    ):
        weight.check()


@pytest.mark.proves("fault:F17")
def test_codes_outside_their_table():
    weight = random_weight("int8", (4, 100))
    weight.codes[3, 99] = -128
    with pytest.raises(ValueError, match="int8 codes are -127 to 127, got 1 of -128"):
        weight.check()
    weight = random_weight("int4", (4, 100), zeros=True)
    weight.zeros[0, 1] = 0x88
    with pytest.raises(ValueError, match="zero points of int4 are 0 to 15, got 136; are they still packed"):
        weight.check()
    with pytest.raises(ValueError, match="4-bit codes are 0 to 15, got 16"):
        pack_4bit(torch.full((1, 2), 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must be uint8, got torch\.int64"):
        pack_4bit(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="5 4-bit codes take 3 bytes, but the rows have 2"):
        unpack_4bit(torch.zeros(1, 2, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match=r"must be uint8, got torch\.int32"):
        unpack_4bit(torch.zeros(1, 2, dtype=torch.int32), 4)
