"""That bitsandbytes reads what gpt2rt writes: a program for an environment that has bitsandbytes.

Run with torch 2.13.0, transformers 5.23.0, bitsandbytes 0.50.2 and gpt2rt, on a CPU:

    python check_written.py

Models come from the files beside this one and from a float model that gpt2rt quantises itself. Each is saved by gpt2rt
and loaded by transformers with bitsandbytes. Compared are the numbers that bitsandbytes makes of every weight, bit for
bit for 4 bits and within one rounding of float32 for int8, and the logits of these numbers.

The numbers of 4 bits are those of bitsandbytes' generic form. Where blocks straddle rows, its AVX-512 form may take the
scale of a wrong block (seen in 0.50.2: weights of [144, 48] come back wrong by more than their size), so there are no
logits of bitsandbytes to compare with then.
"""

import pathlib
import sys
import tempfile

import bitsandbytes as bnb
import torch
import transformers as t
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

import gpt2rt

HERE = pathlib.Path(__file__).resolve().parent
IDS = torch.tensor([[1, 5, 7, 9, 30, 2, 2, 19], [0, 3, 3, 8, 25, 11, 4, 6]])

QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 stored as float16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "float16"},
    "fp4 double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "fp4, without the MLPs": {"load_in_4bit": True, "llm_int8_skip_modules": ["mlp"]},
    "int8": {"load_in_8bit": True},
    "int8, without one layer": {"load_in_8bit": True, "llm_int8_skip_modules": ["transformer.h.0.attn.c_proj"]},
}


def numbers(module):
    """The weight [out, in] that a layer of bitsandbytes stands for, or None for another layer."""
    if isinstance(module, bnb.nn.Linear4bit):
        state = module.weight.quant_state
        absmax = state.absmax
        if state.nested:
            absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
        data = module.weight.data.reshape(-1).view(torch.uint8)
        return _dequantize_4bit_compute(data, absmax, state.code, state.blocksize, state.shape, torch.float32)
    if isinstance(module, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return None


def compare(name, ours):
    """Raise AssertionError unless transformers and bitsandbytes read the same model from what ``ours`` is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder, quantization_format="bitsandbytes")
        kind = getattr(t, type(ours).__name__)
        theirs = kind.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
        again = type(ours).from_pretrained(folder)
    layers, straddles = 0, False
    for path, module in theirs.named_modules():
        expected = numbers(module)
        layer = ours.get_submodule(path)
        if expected is None:
            assert not isinstance(layer, gpt2rt.models.quantized.QuantizedLayer), path
            continue
        layers += 1
        straddles |= (
            isinstance(module, bnb.nn.Linear4bit) and expected.size(1) % module.weight.quant_state.blocksize != 0
        )
        if isinstance(module, bnb.nn.Linear8bitLt):
            torch.testing.assert_close(layer.dequantize(), expected, rtol=2e-7, atol=0.0)
        else:
            assert torch.equal(layer.dequantize(), expected), path
        assert torch.equal(again.get_submodule(path).dequantize(), layer.dequantize()), path
    assert layers, "bitsandbytes made no layer its own"
    if straddles:
        print(f"{name}: {layers} layers")
        return
    # the products themselves are rounded differently: bitsandbytes multiplies int8 with one scale a row
    floats = theirs.dequantize().float()
    with torch.no_grad():
        expected, found = floats(IDS).logits, ours.dequantize()(IDS).logits
    error = (expected - found).abs().max().item()
    assert error < 1e-4 * expected.abs().max().item() + 1e-5, error
    print(f"{name}: {layers} layers, logits within {error:.1e} of {expected.abs().max().item():.1f}")


def main():
    for folder in sorted(path.parent for path in HERE.glob("*/expected.safetensors")):
        compare(f"{folder.name}, loaded", gpt2rt.GPT2LMHeadModel.from_pretrained(folder))
    for name, options in QUANTISED.items():
        config = t.BitsAndBytesConfig(**options)
        compare(name, gpt2rt.GPT2LMHeadModel.from_pretrained(HERE / "float", quantization_config=config))
    double = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    tiny = gpt2rt.GPT2LMHeadModel.from_pretrained("gpt2rt/tiny-gpt2", quantization_config=double)
    compare("the embedded model, nf4 double", tiny)
    config = gpt2rt.GPT2Config(
        n_layer=1, n_embd=45, n_head=3, vocab_size=32, n_positions=16, num_labels=3, pad_token_id=0
    )
    with tempfile.TemporaryDirectory() as folder:
        gpt2rt.GPT2ForSequenceClassification(config).save_pretrained(folder)
        odd = gpt2rt.GPT2ForSequenceClassification.from_pretrained(folder, load_in_4bit=True)
    compare("fp4, odd rows, a classifier", odd)


if __name__ == "__main__":
    sys.exit(main())
