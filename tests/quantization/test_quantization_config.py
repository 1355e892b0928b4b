"""What callers and checkpoints may say about quantisation, and what becomes of it."""

import inspect
import json
import types

import pytest
import torch

from gpt2rt import BitsAndBytesConfig
from gpt2rt.quantization import (
    QuantizationConfig,
    from_checkpoint_config,
    resolve_quantization,
    to_bitsandbytes,
)


@pytest.mark.parametrize(
    ("scheme", "group_size", "activations"),
    [("int8", None, "int8"), ("int4", 64, "int8"), ("nf4", 64, "float32"), ("fp4", 64, "float32")],
)
def test_defaults(scheme, group_size, activations):
    config = QuantizationConfig(scheme)
    assert (config.group_size, config.activations, config.embeddings) == (group_size, activations, "int8")
    assert (config.symmetric, config.double_quant, config.skip_modules, config.method) == (True, False, (), "rtn")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "int3"}, "scheme = 'int3', but it must be one of int8, int4, nf4, fp4"),
        ({"scheme": "int8", "group_size": 64}, "group_size = 64, but for int8 it must be None"),
        ({"scheme": "int4", "group_size": 16}, r"for int4 it must be one of \(32, 64, 128\)"),
        ({"scheme": "int4", "group_size": True}, "group_size = True"),
        ({"scheme": "nf4", "group_size": 100}, r"for nf4 it must be one of \(32, 64, 128, 256"),
        ({"scheme": "int8", "symmetric": False}, "only int4 has zero points"),
        ({"scheme": "int4", "double_quant": True}, "only nf4 and fp4 have it"),
        ({"scheme": "nf4", "activations": "int8"}, "nf4 has only 'float32'"),
        ({"scheme": "nf4", "method": "gptq"}, "nf4 has only 'rtn'; gptq makes int4 and int8"),
        ({"scheme": "int4", "embeddings": "nf4"}, "embeddings = 'nf4', but it must be one of none, float16"),
        ({"scheme": "int4", "activations": "int4"}, "activations = 'int4', but it must be one of int8, float32"),
        ({"scheme": "int4", "method": "awq"}, "method = 'awq', but it must be one of rtn, gptq"),
        ({"scheme": "int4", "symmetric": 1}, "symmetric = 1, expected true or false"),
        ({"scheme": "int4", "skip_modules": "lm_head"}, "skip_modules = 'lm_head', expected a list of names"),
        ({"scheme": "int4", "skip_modules": [1]}, "skip_modules = .*, expected a list of names"),
    ],
)
def test_fields_that_do_not_go(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**fields)


def test_the_dictionary_goes_through_json():
    config = QuantizationConfig("int4", 32, symmetric=False, skip_modules=("lm_head", "h.0"), method="gptq")
    fields = json.loads(json.dumps(config.to_dict()))
    assert fields["quant_method"] == "gpt2rt"
    assert QuantizationConfig.from_dict(fields) == config
    assert resolve_quantization(fields) == config
    assert QuantizationConfig.from_dict({"scheme": "int8"}) == QuantizationConfig("int8")
    for wrong, message in (
        ({"scheme": "int8", "bits": 8}, "'bits' is no field of a quantisation config; they are scheme"),
        ({"group_size": 8}, "needs a scheme: one of int8, int4, nf4, fp4"),
        ({"scheme": "int8", "quant_method": "awq"}, "quant_method = 'awq', expected 'gpt2rt'"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantizationConfig.from_dict(wrong)


@pytest.mark.parametrize(
    ("pattern", "name", "skipped"),
    [
        ("lm_head", "lm_head", True),
        ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn", True),
        ("h.0.attn.c_attn", "h.0.attn.c_attn", True),
        ("h.0", "transformer.h.0.mlp.c_fc", True),
        ("h.1", "transformer.h.10.mlp.c_fc", False),
        ("mlp", "transformer.h.3.mlp.c_proj", True),
        ("c_pro", "transformer.h.3.mlp.c_proj", False),
    ],
)
def test_names_to_skip(pattern, name, skipped):
    assert QuantizationConfig("int8", skip_modules=(pattern,)).skips(name) == skipped


def test_group_sizes_of_matrices():
    assert QuantizationConfig("int8").group_size_of(768) == 768
    assert QuantizationConfig("int4", 128).group_size_of(100) == 128
    assert QuantizationConfig("nf4", 4096).group_size_of(768) == 256
    assert QuantizationConfig("nf4").group_size_of(1600) == 64
    assert QuantizationConfig("fp4").group_size_of(7) == 1
    # the embedding's own
    assert QuantizationConfig("int8", embeddings="int4").group_size_of(768, "int4") == 64
    assert QuantizationConfig("int4", 32, embeddings="int4").group_size_of(768, "int4") == 32


def test_names():
    assert resolve_quantization("int4") == QuantizationConfig("int4")
    assert resolve_quantization("int4-g128") == QuantizationConfig("int4", 128)
    assert resolve_quantization("fp4-g256") == QuantizationConfig("fp4", 256)
    config = QuantizationConfig("nf4", double_quant=True)
    assert resolve_quantization(config) is config
    for wrong, message in (
        ("int3", "quantization = 'int3' is not known; use one of int8, int4, nf4, fp4"),
        ("int4-g48", "group_size = 48"),
        ("int8-g64", "group_size = 64, but for int8 it must be None"),
        (4, "quantization = 4, a int; expected one of"),
        ({"quant_method": "awq"}, "quant_method = 'awq', but weights are quantised as 'gpt2rt' or 'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 4}, "needs a calibration text, which loading has not"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_quantization(wrong)


# ---- bitsandbytes --------------------------------------------------------------------------------------------------

ASKED = [
    ({"load_in_8bit": True}, QuantizationConfig("int8", embeddings="none")),
    ({"load_in_4bit": True}, QuantizationConfig("fp4", embeddings="none")),
    (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        QuantizationConfig("nf4", double_quant=True, embeddings="none"),
    ),
    (
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16, "llm_int8_skip_modules": ["h.0.mlp"]},
        QuantizationConfig("fp4", embeddings="none", skip_modules=("h.0.mlp",)),
    ),
]


@pytest.mark.parametrize(("options", "expected"), ASKED)
def test_what_a_bitsandbytes_config_asks_for(options, expected, hf):
    ours, theirs = BitsAndBytesConfig(**options), hf.module.BitsAndBytesConfig(**options)
    for value in (ours, theirs, ours.to_dict(), theirs.to_dict(), types.SimpleNamespace(**options)):
        assert resolve_quantization(value) == expected
    if "bnb_4bit_compute_dtype" not in options:
        assert resolve_quantization(options) == expected


@pytest.mark.parametrize(("options", "expected"), ASKED)
def test_the_class_is_that_of_transformers(options, expected, hf):
    ours, theirs = BitsAndBytesConfig(**options), hf.module.BitsAndBytesConfig(**options)
    for name in ours.to_dict():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.quantization_method() == theirs.quantization_method()
    assert ours.is_quantizable() == theirs.is_quantizable()
    public = {name: value for name, value in theirs.to_dict().items() if not name.startswith("_")}
    assert ours.to_dict() == public
    assert BitsAndBytesConfig.from_dict(theirs.to_dict()) == ours
    assert json.loads(ours.to_json_string()) == ours.to_diff_dict()
    again = hf.module.BitsAndBytesConfig.from_dict(ours.to_dict())
    assert again.to_dict() == theirs.to_dict()
    assert "load_in_4bit" in repr(ours)
    # and back, where nothing but the scheme is asked for
    back = to_bitsandbytes(expected)
    assert resolve_quantization(back).scheme == expected.scheme


def test_the_signature_is_that_of_transformers(hf):
    def signature(kind):
        parameters = inspect.signature(kind).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}

    assert signature(BitsAndBytesConfig) == signature(hf.module.BitsAndBytesConfig)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ValueError, "are both True"),
        ({"load_in_4bit": "yes"}, TypeError, "load_in_4bit must be True or False, got 'yes'"),
        ({"bnb_4bit_quant_type": "int4"}, ValueError, "must be 'fp4' or 'nf4', got 'int4'"),
        ({"bnb_4bit_compute_dtype": "float17"}, ValueError, "bnb_4bit_compute_dtype must be a torch dtype"),
        ({"bnb_4bit_quant_storage": "int32"}, ValueError, "bnb_4bit_quant_storage must be one of float16"),
        ({"llm_int8_threshold": "6"}, TypeError, "llm_int8_threshold must be a number"),
        ({"llm_int8_skip_modules": "lm_head"}, TypeError, "llm_int8_skip_modules must be a list"),
    ],
)
def test_what_a_bitsandbytes_config_refuses(options, kind, message):
    with pytest.raises(kind, match=message):
        BitsAndBytesConfig(**options)


def test_bitsandbytes_configs_that_cannot_be_met():
    with pytest.raises(ValueError, match="asks for nothing; set load_in_4bit=True or load_in_8bit=True"):
        resolve_quantization(BitsAndBytesConfig())
    with pytest.raises(ValueError, match="llm_int8_has_fp16_weight=True keeps 16-bit weights for training"):
        resolve_quantization(BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True))
    both = types.SimpleNamespace(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ValueError, match="are both True"):
        resolve_quantization(both)
    with pytest.raises(ValueError, match="must be 'fp4' or 'nf4', got 'nf3'"):
        resolve_quantization(types.SimpleNamespace(load_in_4bit=True, bnb_4bit_quant_type="nf3"))
    with pytest.raises(ValueError, match="'load_in_2bit' is no field of a bitsandbytes config"):
        resolve_quantization({"load_in_2bit": True})
    with pytest.raises(ValueError, match="quant_method = 'gptq', expected 'bitsandbytes'"):
        BitsAndBytesConfig.from_dict({"quant_method": "gptq"})
    with pytest.raises(ValueError, match="bitsandbytes has no int4 in groups"):
        to_bitsandbytes(QuantizationConfig("int4"))


def test_configs_for_bitsandbytes():
    assert to_bitsandbytes(QuantizationConfig("int8")).to_diff_dict() == {"load_in_8bit": True}
    config = QuantizationConfig("nf4", double_quant=True, embeddings="none", skip_modules=("h.0.mlp",))
    assert to_bitsandbytes(config, "bfloat16").to_diff_dict() == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
        # transformers leaves the output layer alone only where no list is given
        "llm_int8_skip_modules": ["h.0.mlp", "lm_head"],
    }


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_the_config_of_a_checkpoint():
    own = QuantizationConfig("int4", 32, symmetric=False)
    stored = from_checkpoint_config(own.to_dict())
    assert (stored.layout, stored.config, stored.group_size, stored.desc_act) == ("gpt2rt", own, None, False)
    written = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "_load_in_4bit": True, "a_newer_field": 1}
    for fields in (written, {**written, "quant_method": "bitsandbytes"}):
        stored = from_checkpoint_config(fields)
        assert (stored.layout, stored.config) == ("bitsandbytes", QuantizationConfig("nf4", embeddings="none"))


@pytest.mark.parametrize(
    ("fields", "layout", "group_size", "symmetric"),
    [
        ({}, "gptq", 128, True),
        ({"group_size": 32, "sym": False}, "gptq", 32, False),
        ({"group_size": 64, "checkpoint_format": "gptq_v2"}, "gptq_v2", 64, True),
        ({"quant_method": "gptq", "format": "gptq_v2"}, "gptq_v2", 128, True),
        ({"group_size": -1, "desc_act": True}, "gptq", -1, True),
    ],
)
def test_the_config_of_a_gptq_checkpoint(fields, layout, group_size, symmetric):
    stored = from_checkpoint_config({"bits": 4, **fields})
    assert (stored.layout, stored.group_size) == (layout, group_size)
    assert stored.desc_act == fields.get("desc_act", False)
    held = 128 if group_size == -1 else group_size
    assert stored.config == QuantizationConfig("int4", held, symmetric=symmetric, embeddings="none", method="gptq")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, "gptq with bits = 3 is not read, only 4"),
        ({"bits": 8}, "gptq with bits = 8 is not read, only 4"),
        ({"bits": 4, "group_size": 256}, "gptq with group_size = 256 is not read"),
        ({"bits": 4, "checkpoint_format": "marlin"}, "gptq in checkpoint_format = 'marlin' is not read"),
        ({"bits": 4, "is_marlin_format": True}, "gptq in marlin's order of weights is not read"),
        ({"bits": 4, "dynamic": {"lm_head": {}}}, "settings for single layers"),
        ({"quant_method": "awq", "bits": 4}, "quant_method = 'awq' is not read; gpt2rt reads its own, bitsandbytes"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit is true"),
        ({"scheme": "int4"}, "has no quant_method; its fields are scheme"),
        ([], r"quantization_config is \[\], expected an object"),
    ],
)
def test_checkpoints_that_are_not_read(fields, message):
    with pytest.raises(ValueError, match=message):
        from_checkpoint_config(fields)
