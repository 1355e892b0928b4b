"""How the folders beside this file were made: a tiny GPT-2, quantised and saved by transformers with bitsandbytes.

Run once, in an environment of its own, with torch 2.13.0, transformers 5.23.0 and bitsandbytes 0.50.2 on a CPU; the
tests only read the result:

    python make.py

``float`` holds the weights before quantisation. ``expected.safetensors`` in the other folders holds token ids, the
logits of the model that bitsandbytes makes of its own codes (``model.dequantize()``, in float32), and two weights of
it. Rows have 44 columns, so blocks of 64 straddle them; one block is zero, and some weights stand halfway between two
codes. (Rows of a multiple of 16 that is none of 64 would not do: there bitsandbytes' own AVX-512 code gives other
numbers than its plain torch code.)
"""

import pathlib
import shutil

import torch
import transformers as t
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent
IDS = torch.tensor([[1, 5, 7, 9, 30, 2, 2, 19], [0, 3, 3, 8, 25, 11, 4, 6]])

WEIGHTS = ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight")

CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-bfloat16-storage": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}


def float_model():
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 44, "n_head": 4, "n_inner": 128, "vocab_size": 32, "n_positions": 16}
    model = t.GPT2LMHeadModel(t.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
        weight = model.transformer.h[0].mlp.c_fc.weight.t()  # [128, 44], a view
        weight[:2] = 0.0
        # magnitudes that are exact in float16, with 1 as the largest: many lie on the midpoints of fp4's codes
        weight[8:16] = torch.arange(8 * 44).view(8, 44).remainder(49).sub(24) / 24.0
    # int8 starts from float16, so that is what everything starts from
    return model.half().float()


def main():
    model = float_model()
    shutil.rmtree(HERE / "float", ignore_errors=True)
    model.half().save_pretrained(HERE / "float")
    for name, options in CONFIGS.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        config = t.BitsAndBytesConfig(**options)
        quantised = t.GPT2LMHeadModel.from_pretrained(
            HERE / "float", quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        quantised.save_pretrained(folder)
        again = t.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, device_map="cpu").dequantize()
        again = again.float().eval()
        with torch.no_grad():
            logits = again(IDS).logits
        # its layers are nn.Linear then: [out, in]
        state = again.state_dict()
        weights = {key: state[key].clone() for key in WEIGHTS}
        save_file({"input_ids": IDS, "logits": logits, **weights}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
