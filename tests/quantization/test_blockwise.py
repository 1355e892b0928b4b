"""nf4 and fp4: the same bits as bitsandbytes, whose codes of a tiny model lie in ``golden`` (see its ``make.py``)."""

import json
import pathlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gpt2rt.quantization import QuantizationConfig, quantize_rtn
from gpt2rt.quantization.blockwise import (
    NestedScales,
    dynamic_map,
    from_blocks,
    nest_scales,
    quantize_flat,
    to_blocks,
)
from gpt2rt.quantization.codebooks import codebook, pack_4bit

GOLDEN = pathlib.Path(__file__).parent / "golden"
LAYERS = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
FOUR_BITS = ["nf4", "nf4-double", "nf4-bfloat16-storage", "fp4"]


@pytest.fixture(scope="module")
def floats():
    """The weights before quantisation, [out, in] float32."""
    state = load_file(GOLDEN / "float" / "model.safetensors")
    return {name: state[f"{name}.weight"].t().float() for name in LAYERS}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", FOUR_BITS)
@pytest.mark.parametrize("layer", LAYERS)
def test_codes_are_those_of_bitsandbytes(name, layer, floats):
    state = load_file(GOLDEN / name / "model.safetensors")
    weight = floats[layer]
    codes, absmax = quantize_flat(weight.reshape(-1), name.partition("-")[0], 64)
    assert torch.equal(pack_4bit(codes), bits(state[f"{layer}.weight"]).view(-1))
    assert torch.equal(codebook(name.partition("-")[0]), state[f"{layer}.weight.quant_map"])
    if name != "nf4-double":
        assert torch.equal(bits(absmax), bits(state[f"{layer}.weight.absmax"]))


@pytest.mark.parametrize("layer", LAYERS)
def test_nested_scales_are_those_of_bitsandbytes(layer, floats):
    state = load_file(GOLDEN / "nf4-double" / "model.safetensors")
    _, absmax = quantize_flat(floats[layer].reshape(-1), "nf4", 64)
    nested = nest_scales(absmax)
    described = json.loads(bytes(state[f"{layer}.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert nested.offset.item() == described["nested_offset"]
    assert torch.equal(nested.absmax, state[f"{layer}.weight.nested_absmax"])
    assert torch.equal(nested.table, state[f"{layer}.weight.nested_quant_map"])
    # its CPU code rounds to one of 65536 steps before it looks for the nearest value; so do we here
    scaled = (absmax - nested.offset) / nested.absmax.repeat_interleave(256)[: absmax.numel()]
    steps = torch.floor((scaled + 1) * 32767.5 + 0.5) / 32767.5 - 1
    nearest = (steps.unsqueeze(1) - nested.table).abs().argmin(1).to(torch.uint8)
    stored = state[f"{layer}.weight.absmax"]
    assert torch.equal(nearest, stored)
    assert (nested.codes == stored).float().mean() > 0.98


@pytest.mark.parametrize("name", FOUR_BITS)
def test_numbers_are_those_of_bitsandbytes(name):
    state, expected = (load_file(GOLDEN / name / f"{part}.safetensors") for part in ("model", "expected"))
    compared = 0
    for layer in LAYERS:
        if f"{layer}.weight" not in expected:
            continue
        shape = tuple(expected[f"{layer}.weight"].shape)
        packed = bits(state[f"{layer}.weight"]).view(-1)
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1)
        absmax = state[f"{layer}.weight.absmax"]
        if name == "nf4-double":
            described = json.loads(bytes(state[f"{layer}.weight.quant_state.bitsandbytes__nf4"].tolist()))
            absmax = NestedScales(
                absmax,
                state[f"{layer}.weight.nested_absmax"],
                state[f"{layer}.weight.nested_quant_map"],
                torch.tensor(described["nested_offset"]),
            ).dequantize()
        weight = from_blocks(codes, absmax, name.partition("-")[0], shape, 64)
        weight.check()
        assert torch.equal(weight.dequantize(), expected[f"{layer}.weight"])
        # the blocks straddle rows, so this cannot hold by chance
        assert shape[1] % 64
        compared += 1
    assert compared == 2


@pytest.mark.parametrize("layer", LAYERS)
def test_int8_codes_are_those_of_bitsandbytes(layer, floats):
    state = load_file(GOLDEN / "int8" / "model.safetensors")
    weight = quantize_rtn(floats[layer], QuantizationConfig("int8"))
    assert torch.equal(weight.codes, state[f"{layer}.weight"])
    assert torch.equal(weight.scales, state[f"{layer}.SCB"] / 127)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 64), (5, 36), (7, 129), (33, 100)])
def test_each_code_is_nearest_in_its_block(scheme, block_size, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    config = QuantizationConfig(scheme, block_size)
    quantized = quantize_rtn(weight, config)
    assert quantized.group_size == config.group_size_of(shape[1])
    table, flat = codebook(scheme).double(), weight.reshape(-1).double()
    found = quantized.dequantize().reshape(-1)
    for start in range(0, flat.numel(), block_size):
        block = flat[start : start + block_size]
        absmax = block.abs().max()
        errors = (table * absmax - block.unsqueeze(1)).abs()
        mine = (found[start : start + block_size] - block).abs()
        assert (mine <= errors.min(1).values + 1e-6 * absmax).all()


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_midpoints_belong_to_the_lower_value(scheme):
    table = codebook(scheme).sort().values
    middles = (table[1:] + table[:-1]) / 2
    above = torch.nextafter(middles, torch.tensor(2.0))
    # a block with 1 in it is scaled by 1
    values = torch.cat([middles, torch.ones(1), above, torch.ones(1)])
    codes, absmax = quantize_flat(values, scheme, 16)
    assert absmax.tolist() == [1.0, 1.0]
    assert torch.equal(codebook(scheme)[codes[:15].int()], table[:-1])
    assert torch.equal(codebook(scheme)[codes[16:31].int()], table[1:])


def test_every_code_occurs_and_none_else():
    torch.manual_seed(0)
    for scheme in ("nf4", "fp4"):
        codes, _ = quantize_flat(torch.randn(1 << 16), scheme, 64)
        assert codes.unique().tolist() == list(range(16))
        assert codes.dtype == torch.uint8


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 140),
    st.sampled_from([32, 64, 128, 4096]),
    st.sampled_from(["nf4", "fp4"]),
    st.integers(0, 2**31),
)
def test_blocks_survive_the_way_there_and_back(rows, columns, block_size, scheme, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows * columns,), generator=generator).to(torch.uint8)
    absmax = torch.rand(-(-rows * columns // block_size), generator=generator)
    weight = from_blocks(codes, absmax, scheme, (rows, columns), block_size)
    weight.check()
    expected = codebook(scheme)[codes.int()] * absmax.repeat_interleave(block_size)[: rows * columns]
    assert torch.equal(weight.dequantize().view(-1), expected)
    found = to_blocks(weight, block_size)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1], absmax)


def test_blocks_of_another_size_are_refused():
    weight = quantize_rtn(torch.randn(4, 128), QuantizationConfig("nf4", 64))
    with pytest.raises(ValueError, match=r"scales of the \[4, 128\] matrix differ inside blocks of 128"):
        to_blocks(weight, 128)
    with pytest.raises(ValueError, match="groups of 64 columns do not make blocks of 32"):
        to_blocks(weight, 32)
    with pytest.raises(ValueError, match=r"512 codes and 9 scales, but \[4, 128\] in blocks of 64 has 512 and 8"):
        from_blocks(torch.zeros(512, dtype=torch.uint8), torch.ones(9), "nf4", (4, 128), 64)


def test_the_dynamic_map():
    table = dynamic_map()
    assert table.shape == (256,)
    assert torch.equal(table, table.sort().values)
    assert len(table.unique()) == 256
    # symmetric but for 0 and 1, which have no partner
    others = table[(table != 0) & (table != 1)]
    assert torch.equal(others, -others.flip(0))
    for exponent in range(-6, 1):
        decade = table[(table > 0.1 * 10.0**exponent) & (table < 10.0**exponent)]
        count = 2 ** (6 + exponent)
        assert decade.numel() == count
        expected = 10.0**exponent * (0.1 + 0.9 * (torch.arange(count) + 0.5) / count)
        torch.testing.assert_close(decade, expected, rtol=1e-6, atol=0)


def test_double_quantisation_costs_little():
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    once, twice = (quantize_rtn(weight, QuantizationConfig("nf4", double_quant=nested)) for nested in (False, True))
    assert torch.equal(once.codes, twice.codes)
    assert not torch.equal(once.scales, twice.scales)
    # steps of the map are up to 0.9 / 64 of the largest distance from the mean, so half of that
    largest = (once.scales - once.scales.mean()).abs().max()
    assert (once.scales - twice.scales).abs().max() <= largest * 0.0071
    errors = [(q.dequantize() - weight).square().mean().item() for q in (once, twice)]
    assert errors[1] < 1.01 * errors[0]


def test_scales_that_are_all_alike():
    nested = nest_scales(torch.full((300,), 2.5))
    assert torch.equal(nested.dequantize(), torch.full((300,), 2.5))
