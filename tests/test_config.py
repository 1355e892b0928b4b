"""The configs: transformers' fields and files, and every rule with its message (faults F18, F20, F21, F22, F23)."""

import copy
import json
import math
import pickle

import pytest
import torch

from gpt2rt.config import GENERATION_FIELDS, GPT2Config, OpenAIGPTConfig, PretrainedConfig, openai_gpt_activation
from gpt2rt.errors import CheckpointError, ConfigError

KINDS = [GPT2Config, OpenAIGPTConfig]


def write(folder, text):
    (folder / "config.json").write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return folder


# ---- parity with transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fields_and_defaults_are_those_of_transformers(hf, kind):
    theirs = getattr(hf.module, kind.__name__)().to_dict()
    ours = kind().to_dict()
    theirs.pop("transformers_version")
    assert ours == theirs


CHANGED = {"n_embd": 48, "n_head": 3, "foo": [1, {"a": None}], "num_labels": 4, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (GPT2Config, {}),
        (GPT2Config, CHANGED),
        (GPT2Config, {"n_inner": 50}),
        (OpenAIGPTConfig, {}),
        (OpenAIGPTConfig, CHANGED),
        (OpenAIGPTConfig, {"afn": "relu", "pad_token_id": 3, "eos_token_id": [4, 5], "summary_activation": "tanh"}),
    ],
    ids=["defaults", "changed", "n_inner", "openai defaults", "openai changed", "openai own"],
)
def test_config_json_of_either_side_is_read_by_the_other(tmp_path, hf, kind, fields):
    ours = kind(**fields)
    ours.save_pretrained(tmp_path / "ours")
    theirs = getattr(hf.module, kind.__name__).from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = kind.from_pretrained(tmp_path / "theirs")
    left, right = ours.to_diff_dict(), back.to_diff_dict()
    right.pop("transformers_version")
    assert left == right
    files = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")]
    assert files[0] == {key: value for key, value in files[1].items() if key != "transformers_version"}


def test_generation_fields_are_those_transformers_moves_out_of_the_config(hf):
    moved = set(hf.module.GenerationConfig._get_default_generation_params()) - {"use_cache"}
    assert moved == GENERATION_FIELDS


@pytest.mark.parametrize("kind", KINDS)
def test_general_names_read_write_and_construct(kind):
    config = kind(hidden_size=48, num_attention_heads=3, num_hidden_layers=2, max_position_embeddings=64)
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (48, 3, 2, 64)
    assert (config.hidden_size, config.num_attention_heads) == (48, 3)
    config.hidden_size = 96
    assert config.n_embd == 96
    assert "hidden_size" not in config.to_dict()


def test_a_field_under_both_names_with_different_values_is_an_error():
    with pytest.raises(ConfigError, match=r"n_embd = 768 and hidden_size = 64 name the same field"):
        GPT2Config.from_dict({"n_embd": 768, "hidden_size": 64})


def test_labels():
    config = GPT2Config(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config = GPT2Config(id2label={"0": "no", "1": "yes"})
    assert (config.id2label, config.label2id, config.num_labels) == ({0: "no", 1: "yes"}, {"no": 0, "yes": 1}, 2)
    config.num_labels = 1
    assert config.label2id == {"LABEL_0": 0}
    with pytest.raises(ConfigError, match=r"num_labels = 3, but id2label names 2"):
        GPT2Config(id2label={0: "a", 1: "b"}, num_labels=3)


def test_dtype_is_a_torch_dtype_inside_and_a_name_in_the_file(tmp_path):
    config = GPT2Config(torch_dtype="float16")
    assert config.dtype == config.torch_dtype == torch.float16
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    assert GPT2Config.from_pretrained(tmp_path).dtype == torch.float16
    for wrong in ("float17", "int8"):
        with pytest.raises(ConfigError, match=r"dtype"):
            GPT2Config(dtype=wrong)


def test_unknown_keys_are_kept_and_sampling_settings_are_not(tmp_path):
    write(tmp_path, {"model_type": "gpt2", "n_ctx": 1024, "task_specific_params": {"a": 1}, "do_sample": True})
    config = GPT2Config.from_pretrained(tmp_path)
    assert config.n_ctx == 1024
    assert config.task_specific_params == {"a": 1}
    assert not hasattr(config, "do_sample")
    assert config.n_positions == 1024


def test_keywords_override_the_file_and_unknown_ones_are_refused(tmp_path):
    write(tmp_path, {"model_type": "gpt2", "hidden_size": 48, "n_head": 3, "num_labels": 5})
    config = GPT2Config.from_pretrained(tmp_path, n_embd=96, num_labels=2, dtype="float16")
    assert (config.n_embd, config.num_labels, config.dtype) == (96, 2, torch.float16)
    with pytest.raises(TypeError, match=r"'n_hed': no such field of GPT2Config"):
        GPT2Config.from_pretrained(tmp_path, n_hed=4)
    config, unused = GPT2Config.from_pretrained(tmp_path, n_hed=4, n_layer=3, return_unused_kwargs=True)
    assert (config.n_layer, unused) == (3, {"n_hed": 4})


def test_copies_are_equal_and_independent():
    config = GPT2Config(n_embd=48, n_head=3, extra={"deep": [1]})
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), GPT2Config.from_dict(config.to_dict())):
        assert twin == config
        twin.extra["deep"].append(2)
        assert twin != config
    assert config.extra == {"deep": [1]}
    assert "n_embd" in repr(config)


def test_a_failed_update_changes_nothing():
    config = GPT2Config()
    with pytest.raises(ConfigError, match="n_head"):
        config.update({"n_layer": 3, "n_head": 7})
    assert (config.n_layer, config.n_head) == (12, 12)
    config.update({"n_layer": 3})
    assert config.n_layer == 3


# ---- rules (F18, F20) ------------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F18")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 0}, r"n_head = 0, but it must be an integer from 1"),
        ({"n_layer": -1}, r"n_layer = -1"),
        ({"n_layer": "12"}, r"n_layer = '12', but it must be an integer"),
        ({"n_layer": 0}, r"n_layer = 0"),
        ({"n_layer": 10**9}, r"n_layer = 1000000000"),
        ({"n_embd": 768.0}, r"n_embd = 768.0"),
        ({"vocab_size": True}, r"vocab_size = True"),
        ({"n_embd": 100, "n_head": 12}, r"n_embd = 100 with n_head = 12.*multiple.*96 and 108"),
        ({"n_positions": 0}, r"n_positions = 0"),
        ({"n_inner": 0}, r"n_inner = 0"),
        ({"activation_function": "gleu"}, r"activation_function = 'gleu', but it must be one of .*gelu_new"),
        ({"activation_function": None}, r"activation_function = None"),
        ({"layer_norm_epsilon": 0}, r"layer_norm_epsilon = 0, but it must be a number above 0"),
        ({"layer_norm_epsilon": math.nan}, r"layer_norm_epsilon = nan"),
        ({"initializer_range": -0.1}, r"initializer_range = -0.1"),
        ({"resid_pdrop": 1.5}, r"resid_pdrop = 1.5, but it must be a number from 0.0 to 1.0"),
        ({"attn_pdrop": "0.1"}, r"attn_pdrop = '0.1'"),
        ({"summary_type": "median"}, r"summary_type = 'median', but it must be one of attn, cls_index"),
        ({"summary_activation": "tan"}, r"summary_activation = 'tan'.* or None"),
        ({"use_cache": 1}, r"use_cache = 1, but it must be true or false"),
        ({"scale_attn_weights": None}, r"scale_attn_weights = None"),
        ({"eos_token_id": "50256"}, r"eos_token_id = '50256'"),
        ({"eos_token_id": []}, r"eos_token_id = \[\]"),
        ({"bos_token_id": [1]}, r"bos_token_id = \[1\]"),
        ({"num_labels": 0}, r"num_labels = 0"),
        ({"problem_type": "guessing"}, r"problem_type = 'guessing'"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, r"needs num_labels >= 2"),
        ({"id2label": ["a", "b"]}, r"id2label"),
        ({"architectures": "GPT2Model"}, r"architectures = 'GPT2Model'"),
        ({"output_attentions": "yes"}, r"output_attentions = 'yes'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_every_rule_names_field_value_and_rule(fields, message):
    with pytest.raises(ConfigError, match=message):
        GPT2Config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 0}, r"n_head = 0, but it must be an integer from 1"),
        ({"n_layer": "12"}, r"n_layer = '12', but it must be an integer"),
        ({"n_layer": 10**9}, r"n_layer = 1000000000"),
        ({"n_embd": 100, "n_head": 12}, r"OpenAIGPTConfig: n_embd = 100 with n_head = 12.*multiple"),
        ({"n_positions": 0}, r"n_positions = 0"),
        ({"afn": "gleu"}, r"afn = 'gleu', but it must be one of .*gelu_new"),
        ({"afn": None}, r"afn = None"),
        ({"layer_norm_epsilon": 0}, r"layer_norm_epsilon = 0, but it must be a number above 0"),
        ({"initializer_range": math.inf}, r"initializer_range = inf"),
        ({"embd_pdrop": -0.5}, r"embd_pdrop = -0.5, but it must be a number from 0.0 to 1.0"),
        ({"summary_type": "median"}, r"summary_type = 'median'"),
        ({"summary_activation": 3}, r"summary_activation = 3.* or None"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings = 1, but it must be true or false"),
        ({"eos_token_id": []}, r"eos_token_id = \[\]"),
        ({"pad_token_id": "0"}, r"pad_token_id = '0', but it must be a token id or None"),
        ({"num_labels": 0}, r"num_labels = 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.proves("fault:F18")
def test_every_rule_of_openai_gpt_names_field_value_and_rule(fields, message):
    with pytest.raises(ConfigError, match=message):
        OpenAIGPTConfig(**fields)


@pytest.mark.proves("O8")
def test_openai_gpt_has_no_special_tokens_unless_they_are_given():
    config = OpenAIGPTConfig()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    with pytest.warns(UserWarning, match=r"OpenAIGPTConfig: pad_token_id = 97 lies outside the vocabulary of 97 tok"):
        config = OpenAIGPTConfig(vocab_size=97, pad_token_id=97, bos_token_id=3, eos_token_id=[5, 96])
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, 3, [5, 96])


def test_the_activation_that_afn_means():
    """transformers builds the tanh form for "gelu", and refuses "gelu_new", which its documentation lists."""
    meant = {"gelu": "gelu_new", "gelu_new": "gelu_new", "gelu_python": "gelu_python", "swish": "swish"}
    assert {afn: openai_gpt_activation(OpenAIGPTConfig(afn=afn).afn) for afn in meant} == meant


def test_the_published_config_of_openai_gpt_is_read(tmp_path):
    """Of 2019: with fields that no longer exist, among them the length under its old name."""
    write(
        tmp_path,
        {
            "afn": "gelu",
            "architectures": ["OpenAIGPTLMHeadModel"],
            "model_type": "openai-gpt",
            "n_ctx": 512,
            "n_positions": 512,
            "n_special": 0,
            "predict_special_tokens": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 40478,
        },
    )
    config = OpenAIGPTConfig.from_pretrained(tmp_path)
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions, config.n_ctx) == (768, 12, 12, 512, 512)
    assert not hasattr(config, "use_cache")


@pytest.mark.proves("fault:F20")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{"n_embd": 10**9, "n_head": 1}, {"n_positions": 10**9, "vocab_size": 10**9}])
def test_absurd_sizes_are_refused_before_anything_is_allocated(fields, kind):
    with pytest.raises(ConfigError, match=r"make about .* weights, but a model may have at most"):
        kind(**fields)


def test_the_real_sizes_pass():
    for embd, layers, heads in ((768, 12, 12), (1024, 24, 16), (1280, 36, 20), (1600, 48, 25)):
        GPT2Config(n_embd=embd, n_layer=layers, n_head=heads)


@pytest.mark.proves("D10")
def test_token_ids_outside_the_vocabulary_are_unset(recwarn):
    # GPT-2's own default would be an index error with any smaller vocabulary
    config = GPT2Config(vocab_size=97)
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"pad_token_id = -1 lies outside the vocabulary of 97 tokens"):
        config = GPT2Config(vocab_size=97, pad_token_id=-1, eos_token_id=96)
    assert (config.pad_token_id, config.eos_token_id) == (None, 96)
    with pytest.warns(UserWarning, match=r"eos_token_id = \[5, 300\]"):
        assert GPT2Config(vocab_size=97, eos_token_id=[5, 300]).eos_token_id == [5]


# ---- files (F21, F22, F23) -------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F21")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"not valid JSON"),
        ('{"n_layer": 1', r"config.json \(13 bytes\) is not valid JSON"),
        ("[1, 2]", r"holds a JSON list, expected an object"),
        ("[" * 100_000, r"not valid JSON"),
    ],
    ids=["empty", "cut", "list", "deep"],
)
def test_a_damaged_config_file_is_a_checkpoint_error(tmp_path, text, message):
    with pytest.raises(CheckpointError, match=message):
        GPT2Config.from_pretrained(write(tmp_path, text))


@pytest.mark.proves("fault:F21")
def test_a_config_that_is_no_text_or_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        GPT2Config.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"not UTF-8"):
        GPT2Config.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"does not exist"):
        GPT2Config.from_json_file(tmp_path / "other.json")


@pytest.mark.proves("fault:F22")
@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLM"]},
        {},
        {"foo": 1},
    ],
    ids=["model_type", "architectures", "empty", "foreign"],
)
def test_configs_of_other_models_are_refused(tmp_path, values):
    for kind in KINDS:
        with pytest.raises(ConfigError, match=r"gpt2rt runs gpt2 and openai-gpt models; .*") as caught:
            kind.from_pretrained(write(tmp_path, values))
        if "model_type" in values:
            assert "'llama'" in str(caught.value)


@pytest.mark.proves("fault:F22")
@pytest.mark.parametrize(
    "values",
    [
        ({"model_type": "gpt2"}, {"model_type": "openai-gpt"}),
        ({"architectures": ["GPT2Model"]}, {"architectures": ["OpenAIGPTModel"]}),
        ({"n_layer": 2, "activation_function": "relu"}, {"n_layer": 2, "afn": "relu"}),
    ],
    ids=["model_type", "architectures", "own field"],
)
def test_the_config_of_the_other_family_is_refused_by_name(tmp_path, values):
    gpt2, openai = values
    assert GPT2Config.from_pretrained(write(tmp_path, gpt2)).model_type == "gpt2"
    with pytest.raises(ConfigError, match=r"'gpt2'.*no class named OpenAIGPT\.\.\. reads; use GPT2Config"):
        OpenAIGPTConfig.from_pretrained(tmp_path)
    assert OpenAIGPTConfig.from_pretrained(write(tmp_path, openai)).model_type == "openai-gpt"
    with pytest.raises(ConfigError, match=r"'openai-gpt'.*no class named GPT2\.\.\. reads; use OpenAIGPTConfig"):
        GPT2Config.from_pretrained(tmp_path)


def test_old_configs_without_model_type_are_read(tmp_path):
    for kind in KINDS:
        assert kind.from_pretrained(write(tmp_path, {"n_layer": 2, "n_embd": 24, "n_head": 2})).n_layer == 2
    assert GPT2Config.from_pretrained(write(tmp_path, {"architectures": ["GPT2LMHeadModel"]})).n_layer == 12


@pytest.mark.proves("fault:F23")
def test_code_of_a_checkpoint_is_never_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "configuration_evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    write(tmp_path, {"model_type": "gpt2", "auto_map": {"AutoConfig": "configuration_evil.C"}})
    with pytest.warns(UserWarning, match=r"auto_map"):
        config = GPT2Config.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"trust_remote_code=True: gpt2rt never runs code"):
        GPT2Config.from_pretrained(tmp_path, trust_remote_code=True)
    assert not marker.exists()
    assert "auto_map" not in config.to_dict()


def test_saving_checks_the_rules_and_keeps_the_old_file(tmp_path):
    config = GPT2Config(n_layer=2)
    config.save_pretrained(tmp_path)
    config.n_layer = 0
    with pytest.raises(ConfigError, match="n_layer = 0"):
        config.save_pretrained(tmp_path)
    assert GPT2Config.from_json_file(tmp_path / "config.json").n_layer == 2
    with pytest.raises(CheckpointError, match="is a file, expected a folder"):
        GPT2Config().save_pretrained(tmp_path / "config.json")


def test_the_base_class_is_shared():
    assert all(issubclass(kind, PretrainedConfig) for kind in KINDS)
    assert not hasattr(PretrainedConfig(), "n_embd")
