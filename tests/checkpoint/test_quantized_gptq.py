"""GPTQ checkpoints in the layout of AutoGPTQ and GPTQModel, generated from its description."""

import json

import numpy as np
import pytest
import torch
from checkpoints import edit, edit_config, same_weights, small_config
from quantized_models import gptq_layer, greedy
from safetensors.torch import load_file, save_file

from gpt2rt import GPT2LMHeadModel
from gpt2rt.errors import CheckpointError
from gpt2rt.models import Conv1D
from gpt2rt.models.quantized import QuantizedConv1D

NAME = "transformer.h.0.mlp.c_fc"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def config():
    return small_config(n_embd=256, n_head=4, n_inner=320)


@pytest.fixture
def gptq(model, saved):
    """``gptq(...)``: the folder in this layout, and the matrix [inputs, outputs] of each layer."""

    def make(group_size=64, layout="gptq", symmetric=False, order=None, separate=False, **fields):
        rng = np.random.default_rng(0)
        tensors = load_file(saved / "model.safetensors")
        matrices = {}
        for name, module in model.named_modules():
            if isinstance(module, Conv1D):
                tensors.pop(f"{name}.weight")
                parts, matrices[name] = gptq_layer(
                    rng,
                    module.nx,
                    module.nf,
                    group_size,
                    zero_offset=1 if layout == "gptq" else 0,
                    symmetric=symmetric,
                    order=None if order is None else order(rng, module.nx),
                )
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
                # AutoGPTQ saves halves
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"].half()
        save_file(tensors, saved / "model.safetensors")
        said = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": order is not None}
        said |= {"sym": symmetric, "checkpoint_format": layout, "damp_percent": 0.01, **fields}
        if separate:
            (saved / "quantize_config.json").write_text(
                json.dumps({k: v for k, v in said.items() if k != "quant_method"})
            )
        else:
            edit_config(saved, quantization_config=said)
        return saved, matrices

    return make


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_weights_are_those_of_the_layout(gptq, layout, group_size):
    folder, matrices = gptq(group_size, layout)
    model = GPT2LMHeadModel.from_pretrained(folder)
    assert len(matrices) == 8
    for name, matrix in matrices.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedConv1D)
        assert layer.scheme == "int4"
        assert layer.quantized.group_size == (128 if group_size == -1 else group_size)
        assert torch.equal(layer.dequantize(), matrix.t())
    assert model.quantization_method == "gpt2rt"
    said = model.config.quantization_config
    assert (said.scheme, said.symmetric, said.embeddings, said.method) == ("int4", False, "none", "gptq")
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("symmetric", [False, True])
def test_logits_generation_and_our_own_layout(gptq, tmp_path, symmetric):
    folder, matrices = gptq(symmetric=symmetric)
    model = GPT2LMHeadModel.from_pretrained(folder)
    floats = GPT2LMHeadModel.from_pretrained(folder).dequantize()
    for name, matrix in matrices.items():
        assert torch.equal(floats.get_submodule(name).weight, matrix)
    with torch.no_grad():
        expected = floats(IDS).logits
        error = (model(IDS).logits - expected).abs().max().item()
    assert error < 0.05 * expected.abs().max().item()
    found = model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(found, greedy(model, IDS, 5))
    assert model.config.quantization_config.symmetric is symmetric
    model.save_pretrained(tmp_path / "own")
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "own"), model)


def test_zero_points_that_a_symmetric_config_does_not_mention(gptq, tmp_path):
    folder, matrices = gptq(sym=True)
    model = GPT2LMHeadModel.from_pretrained(folder)
    assert model.config.quantization_config.symmetric is False
    assert torch.equal(model.get_submodule(NAME).dequantize(), matrices[NAME].t())
    model.save_pretrained(tmp_path / "own")
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "own"), model)


def test_groups_in_no_order_are_kept_as_floats_with_one_warning(gptq, recwarn, tmp_path):
    def shuffled(rng, inputs):
        return rng.permutation(np.arange(inputs) // 64)

    folder, matrices = gptq(order=shuffled)
    model = GPT2LMHeadModel.from_pretrained(folder)
    told = [str(w.message) for w in recwarn if "desc_act" in str(w.message)]
    assert len(told) == 1
    assert "8 layers were quantised with desc_act=True" in told[0]
    assert not model.is_quantized
    assert not hasattr(model.config, "quantization_config")
    for name, matrix in matrices.items():
        layer = model.get_submodule(name)
        assert type(layer) is Conv1D
        assert torch.equal(layer.weight, matrix)
        assert layer.weight.is_contiguous()
    model.save_pretrained(tmp_path / "floats")
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "floats"), model)


def test_desc_act_with_groups_in_order_stays_in_4_bits(gptq):
    folder, matrices = gptq(order=lambda rng, inputs: np.arange(inputs) // 64)
    model = GPT2LMHeadModel.from_pretrained(folder)
    assert model.quantization_scheme == "int4"
    assert torch.equal(model.get_submodule(NAME).dequantize(), matrices[NAME].t())


def test_a_layer_without_g_idx(gptq):
    folder, matrices = gptq()
    edit(folder, lambda tensors: {key: value for key, value in tensors.items() if not key.endswith("g_idx")})
    model = GPT2LMHeadModel.from_pretrained(folder)
    assert torch.equal(model.get_submodule(NAME).dequantize(), matrices[NAME].t())


@pytest.mark.parametrize("own_name", [False, True])
def test_the_files_of_older_versions(gptq, own_name):
    folder, matrices = gptq(128, separate=True)
    if own_name:
        (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    model = GPT2LMHeadModel.from_pretrained(folder)
    assert torch.equal(model.get_submodule(NAME).dequantize(), matrices[NAME].t())


def test_prefixes_and_a_dtype(gptq):
    folder, matrices = gptq()
    edit(folder, lambda tensors: {key.removeprefix("transformer."): value for key, value in tensors.items()})
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_submodule(NAME).dequantize(), matrices[NAME].t())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, r"gptq with bits = 3 is not read, only 4"),
        ({"bits": 8}, r"gptq with bits = 8 is not read, only 4"),
        ({"group_size": 16}, r"gptq with group_size = 16 is not read"),
        ({"group_size": 128}, r"qzeros. has shape \[4, 96\], expected \[2, 96\] .* with group_size = 128"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format = 'marlin' is not read"),
        ({"bits": None}, r"gptq with bits = None"),
    ],
)
def test_what_is_not_read(gptq, fields, message):
    folder, _ = gptq()
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**said, **fields})
    with pytest.raises(CheckpointError, match=message):
        GPT2LMHeadModel.from_pretrained(folder)


def changed(part, change):
    return lambda tensors: {**tensors, f"{NAME}.{part}": change(tensors[f"{NAME}.{part}"])}


def without(part):
    return lambda tensors: {key: value for key, value in tensors.items() if key != f"{NAME}.{part}"}


DAMAGE = {
    "no scales": (without("scales"), r"has no scales"),
    "no qzeros": (without("qzeros"), r"has no qzeros"),
    "no qweight": (without("qweight"), r"lacks 1 weights of GPT2LMHeadModel: .*c_fc.weight"),
    "qweight of another shape": (
        changed("qweight", lambda t: t.t()),
        r"qweight' has shape \[320, 32\], expected \[32, 320\]",
    ),
    "qweight of another dtype": (
        changed("qweight", torch.Tensor.long),
        r"qweight' has dtype torch.int64, expected torch.int32",
    ),
    "scales of float32": (
        changed("scales", torch.Tensor.float),
        r"scales' has dtype torch.float32, expected torch.float16",
    ),
    "too few groups": (changed("scales", lambda t: t[:3]), r"scales' has shape \[3, 320\], expected \[4, 320\]"),
    "groups that do not exist": (changed("g_idx", lambda t: t + 1), r"g_idx' holds 1 to 4, expected groups 0 to 3"),
    "negative groups": (changed("g_idx", lambda t: t - 1), r"g_idx' holds -1 to 2, expected groups 0 to 3"),
    "scales that are nan": (changed("scales", lambda t: t * torch.nan), r"scales are not finite"),
    "scales that are nan, groups in no order": (
        lambda tensors: changed("g_idx", lambda t: t.flip(0))(changed("scales", lambda t: t * torch.nan)(tensors)),
        r"holds scales that are not finite",
    ),
    "floats beside the codes": (
        lambda tensors: {**tensors, f"{NAME}.weight": torch.zeros(256, 320)},
        r"is the quantised form of '.*c_fc.weight', which the checkpoint holds as floats too",
    ),
    "floats in place of the codes": (
        lambda tensors: without("qweight")({**tensors, f"{NAME}.weight": torch.zeros(256, 320)}),
        r"c_fc.weight' holds torch.float32, but quantization_config says int4 for it",
    ),
}


@pytest.mark.proves("fault:F17")
@pytest.mark.parametrize("case", DAMAGE)
def test_f17_damaged_files_are_refused(gptq, case):
    change, message = DAMAGE[case]
    folder, _ = gptq()
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        GPT2LMHeadModel.from_pretrained(folder)
