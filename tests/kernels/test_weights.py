"""Packing for the GPU kernels: every format unpacks to the numbers that it was packed from."""

import pytest
import torch

from gpt2rt.kernels.fused_linear import Partials, merge_partials_ref
from gpt2rt.kernels.weights import CHUNK, GROUP_SIZES, pack_dense, pack_quantized, pack_words, unpack_words
from gpt2rt.quantization import QuantizationConfig, QuantizedWeight, quantize_rtn


def packed(weight: QuantizedWeight, dtype=torch.float16):
    return pack_quantized(
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.codebook,
        in_features=weight.shape[1],
        group_size=weight.group_size,
        compute_dtype=dtype,
    )


def test_words_hold_the_codes_in_the_documented_order():
    codes = torch.randint(0, 16, (3, 2 * CHUNK))
    words = pack_words(codes)
    assert words.shape == (3, 16)
    assert words.dtype == torch.int32
    for n, k in ((0, 0), (1, 63), (2, 64), (2, 127), (0, 57)):
        chunk, element = divmod(k, CHUNK)
        plane, word = divmod(element, 8)
        assert (int(words[n, 8 * chunk + word]) >> (4 * plane)) & 15 == codes[n, k]
    assert torch.equal(unpack_words(words), codes)


def test_dense_weights_are_kept_where_their_rows_are_contiguous():
    weight = torch.randn(5, 7)
    assert pack_dense(weight).data.data_ptr() == weight.data_ptr()
    turned = pack_dense(weight.t())
    assert turned.data.stride(1) == 1
    assert torch.equal(turned.dequantize(), weight.t())
    assert turned.num_bytes == 4 * 35


@pytest.mark.parametrize("k", [64, 96, 200, 256])
@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("int8", {}),
        *(("int4", {"group_size": g, "symmetric": symmetric}) for g in GROUP_SIZES for symmetric in (True, False)),
        ("nf4", {"group_size": 32}),
        ("fp4", {"group_size": 64}),
    ],
)
def test_quantised_weights_keep_their_numbers(scheme, options, k):
    weight = quantize_rtn(torch.randn(5, k), QuantizationConfig(scheme, **options))
    result = packed(weight)
    expected = {"int8": "int8", "int4": "int4"}.get(scheme, "code4")
    if weight.group_size not in GROUP_SIZES and scheme != "int8":
        # NF4 and FP4 blocks that straddle rows come in groups of their common part
        expected = "dense"
        assert torch.equal(result.dequantize(torch.float16), weight.dequantize(torch.float16))
    else:
        assert torch.equal(result.dequantize(), weight.dequantize())
    assert (result.format, result.shape) == (expected, (5, k))


def test_codes_past_the_row_are_harmless():
    """What is behind K must not reach the sum through a group's scale: kernels give it x = 0, so any code will do."""
    weight = quantize_rtn(torch.randn(3, 70), QuantizationConfig("int4", group_size=64))
    result = packed(weight)
    assert result.data.shape == (3, 16)
    assert torch.equal(result.dequantize(), weight.dequantize())


def test_merged_partials_are_attention():
    values, lse = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4)
    seq_lens = torch.tensor([256, 65, 0], dtype=torch.int32)
    values[1, :, 2:], lse[1, :, 2:], values[2], lse[2] = torch.nan, torch.nan, torch.nan, torch.nan
    merged = merge_partials_ref(Partials(values, lse, seq_lens), dtype=torch.float64).view(3, 2, 8)
    weights = torch.exp2(lse[0].double())
    expected = (weights[..., None] * values[0].double()).sum(1) / weights.sum(1, keepdim=True)
    torch.testing.assert_close(merged[0], expected)
    weights = torch.exp2(lse[1, :, :2].double())
    expected = (weights[..., None] * values[1, :, :2].double()).sum(1) / weights.sum(1, keepdim=True)
    torch.testing.assert_close(merged[1], expected)
    assert torch.equal(merged[2], torch.zeros(2, 8, dtype=torch.float64))
