"""Quantised checkpoints in gpt2rt's own layout: written, read again bit for bit, and quantised while loading."""

import copy
import json
import weakref

import openai_gpt_models
import pytest
import torch
from checkpoints import edit, same_weights, small_config
from quantized_models import FORMATS
from safetensors.torch import load_file

from gpt2rt import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    OpenAIGPTLMHeadModel,
    QuantizationConfig,
    pipeline,
    quantize_model,
)
from gpt2rt.checkpoint.weights import FileWeights
from gpt2rt.models import Conv1D
from gpt2rt.models.quantized import QuantizedConv1D, QuantizedLayer
from gpt2rt.quantization import quantize_rtn

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def config():
    return small_config(n_embd=64, n_head=2)


def logits(model):
    with torch.no_grad():
        return model(IDS)[0]


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_saved_is_read_again_bit_for_bit(saved, tmp_path, form):
    model = GPT2LMHeadModel.from_pretrained(saved, quantization=FORMATS[form])
    model.save_pretrained(tmp_path / "q")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "q")
    assert same_weights(model, again)
    assert [b.dtype for b in again.buffers()] == [b.dtype for b in model.buffers()]
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config == model.config.quantization_config
    assert again.lm_head.weight is again.transformer.wte.weight
    # and a second time, the same files
    again.save_pretrained(tmp_path / "q2")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "q2" / name).read_bytes() == (tmp_path / "q" / name).read_bytes()


def test_the_layout(saved, tmp_path):
    form = {"scheme": "int4", "group_size": 32, "symmetric": False, "embeddings": "int8", "skip_modules": ["h.1.mlp"]}
    model = GPT2LMHeadModel.from_pretrained(saved, quantization=form)
    model.save_pretrained(tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    name = "transformer.h.0.mlp.c_proj.weight"
    found = {key: (tensors[key].dtype, list(tensors[key].shape)) for key in tensors if key.startswith(name)}
    assert found == {
        name: (torch.uint8, [64, 20]),
        f"{name}_scales": (torch.float16, [64, 2]),
        f"{name}_zeros": (torch.uint8, [64, 2]),
    }
    assert tensors["transformer.wte.weight"].dtype == torch.int8
    assert list(tensors["transformer.wte.weight_scales"].shape) == [61]
    assert tensors["transformer.h.1.mlp.c_fc.weight"].dtype == torch.float32
    assert not any(key.startswith("lm_head") for key in tensors)
    said = json.loads((tmp_path / "q" / "config.json").read_text())
    assert said["quantization_config"] == {
        "quant_method": "gpt2rt",
        **form,
        "double_quant": False,
        "activations": "int8",
        "method": "rtn",
    }
    assert said["dtype"] == "float32"


@pytest.mark.parametrize("form", FORMATS)
def test_weights_are_quantised_as_they_are_read(saved, model, form):
    """What comes out is what the quantiser makes of each float weight; the rest is untouched."""
    quantised = GPT2LMHeadModel.from_pretrained(saved, quantization=FORMATS[form])
    config = quantised.config.quantization_config
    floats = dict(model.named_modules())
    for name, layer in quantised.named_modules():
        if not isinstance(layer, QuantizedLayer):
            assert not isinstance(layer, Conv1D)
            continue
        weight = floats[name].weight.detach()
        inner = isinstance(layer, QuantizedConv1D)
        scheme = config.scheme if inner else config.embeddings
        if scheme in ("float16", "bfloat16"):
            assert torch.equal(layer.weight, weight.to(getattr(torch, scheme)))
            continue
        expected = quantize_rtn(weight.t() if inner else weight, config, scheme=scheme)
        assert torch.equal(layer.dequantize(), expected.dequantize())
        assert layer.quantized.activations == config.activations
    theirs = dict(quantised.named_parameters())
    assert len(theirs) > 10
    for name, parameter in theirs.items():
        assert torch.equal(parameter, model.get_parameter(name))


def test_quantize_model_gives_the_same(saved, model):
    for form in FORMATS.values():
        loaded = GPT2LMHeadModel.from_pretrained(saved, quantization=form)
        assert same_weights(loaded, quantize_model(copy.deepcopy(model), form, progress=False))


@pytest.mark.parametrize("form", ["int4-g32-zeros", "nf4-double"])
def test_shards_and_other_classes(saved, tmp_path, form):
    model = GPT2LMHeadModel.from_pretrained(saved, quantization=FORMATS[form])
    model.save_pretrained(tmp_path / "q", max_shard_size=10_000)
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 2
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "q")
    assert same_weights(model, again)
    bare = GPT2Model.from_pretrained(tmp_path / "q")
    assert same_weights(bare, model.transformer)
    bare.save_pretrained(tmp_path / "bare")
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "bare"), model)
    with pytest.warns(UserWarning, match=r"does not provide score.weight"):
        classifier = GPT2ForSequenceClassification.from_pretrained(tmp_path / "q", num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    assert same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier"), classifier)


def test_openai_gpt_and_auto_classes(tmp_path):
    floats = openai_gpt_models.make(n_embd=64, n_head=2)
    floats.save_pretrained(tmp_path / "f")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "f", quantization="int4-g32")
    assert isinstance(model, OpenAIGPTLMHeadModel)
    assert model.quantization_scheme == "int4"
    model.save_pretrained(tmp_path / "q")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert same_weights(model, again)
    assert again.lm_head.weight is again.transformer.tokens_embed.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_floats(saved, tmp_path, dtype):
    model = GPT2LMHeadModel.from_pretrained(saved, quantization="nf4", dtype=dtype)
    full = GPT2LMHeadModel.from_pretrained(saved, quantization="nf4")
    assert model.dtype == model.config.dtype == dtype
    # the codes come from the weights as stored, not from rounded ones
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, full.transformer.h[0].attn.c_attn.weight)
    model.save_pretrained(tmp_path / "q")
    assert json.loads((tmp_path / "q" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "q", dtype="auto"), model)
    # float16 computes slowly on a CPU
    expected = torch.float32 if dtype == torch.float16 else dtype
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "q").dtype == expected
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "q", dtype="float32").dtype == torch.float32


def test_a_state_dict_is_not_taken_from_its_owner(saved, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(saved, quantization="int4-g32")
    state = {f"x.{name}": tensor for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config)
    other = GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=state, key_mapping={r"^x\.": ""})
    assert same_weights(model, other)
    ours = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()] if tensor.numel()}
    assert not any(t.data_ptr() in ours for t in [*other.parameters(), *other.buffers()] if t.numel())


def test_an_output_layer_that_was_trained_apart_stays_apart(saved, tmp_path):
    edit(saved, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].flip(0)})
    with pytest.warns(UserWarning, match=r"lm_head.weight differs from the embedding"):
        model = GPT2LMHeadModel.from_pretrained(saved, quantization="int8")
    assert torch.equal(model.lm_head.dequantize(), model.transformer.wte.dequantize().flip(0))
    model.save_pretrained(tmp_path / "q")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "q")
    assert same_weights(model, again)
    assert again.config.tie_word_embeddings is False
    # the same in a quantised file whose config claims a tie
    said = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": True}))
    with pytest.warns(UserWarning, match=r"lm_head.weight differs from the embedding"):
        assert same_weights(model, GPT2LMHeadModel.from_pretrained(tmp_path / "q"))


def test_a_second_copy_of_a_tied_weight_is_no_other_weight(saved, tmp_path):
    GPT2LMHeadModel.from_pretrained(saved, quantization="int8").save_pretrained(tmp_path / "q")
    copies = ("weight", "weight_scales")
    edit(tmp_path / "q", lambda t: {**t, **{f"lm_head.{x}": t[f"transformer.wte.{x}"].clone() for x in copies}})
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "q", strict=True)
    assert again.lm_head.weight is again.transformer.wte.weight


def test_layers_left_out_are_named_in_the_config(saved, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(saved, quantization="int8")
    # the caller makes one layer float again
    old = model.transformer.h[1].attn.c_proj
    conv = Conv1D(64, 64)
    with torch.no_grad():
        conv.weight.copy_(old.dequantize().t())
        conv.bias.copy_(old.bias)
    model.transformer.h[1].attn.c_proj = conv
    model.eval().save_pretrained(tmp_path / "q")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "q")
    assert again.config.quantization_config.skip_modules == ("h.1.attn.c_proj",)
    assert same_weights(model, again)


def test_what_no_config_can_say_is_refused(saved, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(saved, quantization="int8")
    layer = model.transformer.h[1].attn.c_proj
    layer.quantized = quantize_rtn(layer.dequantize(), QuantizationConfig("int4"))
    with pytest.raises(
        ValueError, match=r"h.1.attn.c_proj is \('int4', 64, 'int8'\), but the config of the model says"
    ):
        model.save_pretrained(tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_a_dequantised_model_is_saved_as_floats(saved, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(saved, quantization="nf4").dequantize()
    model.save_pretrained(tmp_path / "f")
    assert "quantization_config" not in json.loads((tmp_path / "f" / "config.json").read_text())
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "f"), model)


def test_layers_with_and_without_zero_points_are_saved_together(tmp_path):
    model = GPT2LMHeadModel(small_config(n_embd=64, n_head=2)).eval()
    asymmetric = QuantizationConfig("int4", 32, symmetric=False, activations="float32")
    quantize_model(model, asymmetric, progress=False)
    layer = model.transformer.h[0].attn.c_proj
    layer.quantized = quantize_rtn(layer.dequantize(), QuantizationConfig("int4", 32, activations="float32"))
    expected = logits(model)
    model.save_pretrained(tmp_path / "q")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "q")
    assert torch.equal(logits(again), expected)
    assert bool((again.transformer.h[0].attn.c_proj.weight_zeros == 8).all())


# ---- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "scheme", "method"),
    [
        ({"quantization": "int8"}, "int8", "gpt2rt"),
        ({"quantization": QuantizationConfig("fp4")}, "fp4", "gpt2rt"),
        ({"quantization_config": {"scheme": "int4", "group_size": 128}}, "int4", "gpt2rt"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "nf4", "bitsandbytes"),
        ({"load_in_4bit": True}, "fp4", "bitsandbytes"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "int8", "bitsandbytes"),
    ],
)
def test_ways_to_ask(saved, keywords, scheme, method):
    model = GPT2LMHeadModel.from_pretrained(saved, **keywords)
    assert (model.quantization_scheme, model.quantization_method) == (scheme, method)
    # bitsandbytes leaves embedding and output layer alone
    assert isinstance(model.lm_head, torch.nn.Linear) == (method == "bitsandbytes")
    assert not hasattr(GPT2LMHeadModel.from_pretrained(saved).config, "quantization_config")


def test_transformers_own_config_object(saved, hf):
    asked = hf.module.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "h.0.mlp.c_fc"])
    model = GPT2LMHeadModel.from_pretrained(saved, quantization_config=asked)
    assert model.quantization_scheme == "int8"
    assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
    assert model.config.quantization_config.llm_int8_skip_modules == ["lm_head", "h.0.mlp.c_fc"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"quantization": "int5"}, r"'int5' is not known; use one of int8, int4, nf4, fp4"),
        ({"quantization": "int4", "load_in_4bit": True}, r"quantization and load_in_4bit were given"),
        ({"load_in_8bit": True, "load_in_4bit": True}, r"load_in_4bit and load_in_8bit were given"),
        ({"quantization": 4}, r"expected one of int8, int4, nf4, fp4"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quant_method = 'awq'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_read(saved, keywords, message):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        GPT2LMHeadModel.from_pretrained(saved, **keywords)


def test_a_quantised_checkpoint_is_not_quantised_again(saved, tmp_path):
    GPT2LMHeadModel.from_pretrained(saved, quantization="int8").save_pretrained(tmp_path / "q")
    with pytest.raises(
        ValueError, match=r"is quantised as int8 already and cannot be quantised as int4; load the float"
    ):
        GPT2LMHeadModel.from_pretrained(tmp_path / "q", quantization="int4")
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "q", quantization="int8").is_quantized
    with pytest.warns(UserWarning, match=r"is quantised already, as .*; what else was asked for has no effect"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "q", quantization={"scheme": "int8", "embeddings": "none"})


def test_pipelines_pass_it_through():
    for keywords in ({"quantization": "int4"}, {"model_kwargs": {"quantization": "int4"}}):
        pipe = pipeline("text-generation", "gpt2rt/tiny-gpt2", **keywords)
        assert pipe.model.quantization_scheme == "int4"
        assert pipe("ROMEO:", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("ROMEO:")


def test_no_float_model_stands_beside_the_quantised_one(tmp_path, monkeypatch):
    """The float weights that are alive at once are never more than two tensors."""
    config = GPT2Config(n_layer=6, n_embd=64, n_head=2, vocab_size=256, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "f")
    alive, counts, kept = [0], [], []
    read = FileWeights.read

    def gone():
        alive[0] -= 1

    def counted(self, name):
        tensor = read(self, name)
        if "c_" in name and tensor.dim() == 2:
            alive[0] += 1
            counts.append(alive[0])
            weakref.finalize(tensor, gone)
            kept.extend([tensor] if keeps else [])
        return tensor

    monkeypatch.setattr(FileWeights, "read", counted)
    keeps = False
    GPT2LMHeadModel.from_pretrained(tmp_path / "f", quantization="int4")
    assert len(counts) == 24
    assert max(counts) <= 2
    assert alive == [0]
    # what the count would say of a loader that kept them
    keeps = True
    GPT2LMHeadModel.from_pretrained(tmp_path / "f", quantization="int4")
    assert max(counts) == 24
