"""Auto classes choose by ``model_type`` and refuse what there is not."""

import json

import pytest
import torch

import gpt2rt
from gpt2rt import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    OpenAIGPTConfig,
)
from gpt2rt.config import auto as config_auto

SHAPE = {"vocab_size": 100, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
CONFIGS = {"gpt2": GPT2Config, "openai-gpt": OpenAIGPTConfig}
CLASSES = [
    (AutoModel, "gpt2", "GPT2Model"),
    (AutoModelForCausalLM, "gpt2", "GPT2LMHeadModel"),
    (AutoModelForSequenceClassification, "gpt2", "GPT2ForSequenceClassification"),
    (AutoModelForTokenClassification, "gpt2", "GPT2ForTokenClassification"),
    (AutoModelForQuestionAnswering, "gpt2", "GPT2ForQuestionAnswering"),
    (AutoModel, "openai-gpt", "OpenAIGPTModel"),
    (AutoModelForCausalLM, "openai-gpt", "OpenAIGPTLMHeadModel"),
    (AutoModelForSequenceClassification, "openai-gpt", "OpenAIGPTForSequenceClassification"),
]


@pytest.mark.parametrize(("auto", "kind", "name"), CLASSES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.proves("L2")
def test_the_class_follows_the_files(auto, kind, name, tmp_path, hf):
    model = auto.from_config(CONFIGS[kind](**SHAPE)).eval()
    assert type(model).__name__ == name
    # transformers chooses the same
    assert (
        type(getattr(hf.module, auto.__name__).from_config(hf.module.AutoConfig.for_model(kind, **SHAPE))).__name__
        == name
    )
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not info["missing_keys"]
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_keywords_are_those_of_the_class(tmp_path):
    GPT2LMHeadModel(GPT2Config(**SHAPE)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_pdrop=0.3)
    assert model.dtype == torch.bfloat16
    assert model.config.attn_pdrop == 0.3
    with pytest.raises(TypeError, match="unknown keywords: 'frob'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, frob=1)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    # a config decides, as an object and as a place
    config = GPT2Config.from_pretrained(tmp_path, resid_pdrop=0.25)
    for given in (config, str(tmp_path)):
        assert type(AutoModel.from_pretrained(tmp_path, config=given)) is GPT2Model
    state = model.state_dict()
    assert AutoModelForCausalLM.from_pretrained(None, config=config, state_dict=state).config.resid_pdrop == 0.25
    with pytest.raises(ValueError, match="both config and state_dict"):
        AutoModel.from_pretrained(None)


def test_from_config():
    config = GPT2Config(**SHAPE)
    assert AutoModel.from_config(config, dtype="bfloat16").dtype == torch.bfloat16
    assert AutoModel.from_config(config, attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="attn_implementation = 'flash', but it must be one of"):
        AutoModel.from_config(config, attn_implementation="flash")
    with pytest.raises(TypeError, match="unknown keywords: revision"):
        AutoModel.from_config(config, revision="main")
    with pytest.raises(TypeError, match="config is a dict, expected a config"):
        AutoModel.from_config({"model_type": "gpt2"})
    with pytest.raises(OSError, match=r"AutoModel is made by AutoModel.from_pretrained"):
        AutoModel(config)


@pytest.mark.parametrize("auto", [AutoModelForTokenClassification, AutoModelForQuestionAnswering])
def test_heads_that_do_not_exist(auto, tmp_path):
    OpenAIGPTConfig(**SHAPE).save_pretrained(tmp_path)
    for make in (lambda: auto.from_pretrained(tmp_path), lambda: auto.from_config(OpenAIGPTConfig(**SHAPE))):
        with pytest.raises(ValueError, match=r"has no class for OpenAIGPTConfig .* it makes GPT2For"):
            make()


@pytest.mark.proves("fault:F22")
def test_other_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"gpt2rt runs gpt2 and openai-gpt models; .* has model_type 'llama'"):
            auto.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"nothing. does not exist"):
        AutoModel.from_pretrained(tmp_path / "nothing")


# ---- AutoConfig ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model_type": "gpt2"}, GPT2Config),
        ({"model_type": "openai-gpt"}, OpenAIGPTConfig),
        ({"architectures": ["OpenAIGPTLMHeadModel"]}, OpenAIGPTConfig),
        ({"architectures": ["GPT2LMHeadModel"]}, GPT2Config),
        ({"afn": "gelu"}, OpenAIGPTConfig),
        ({"n_embd": 32}, GPT2Config),
    ],
    ids=str,
)
def test_config_class(values, expected, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**SHAPE, **values}))
    for place in (tmp_path, path):
        config = AutoConfig.from_pretrained(place, n_layer=3)
        assert type(config) is expected
        assert (config.n_layer, config.n_embd) == (3, 32)
    config, unused = AutoConfig.from_pretrained(tmp_path, frob=1, return_unused_kwargs=True)
    assert unused == {"frob": 1}
    assert config.name_or_path == str(tmp_path)
    with pytest.raises(TypeError, match="frob"):
        AutoConfig.from_pretrained(tmp_path, frob=1)


def test_for_model():
    assert AutoConfig.for_model("openai-gpt", n_layer=3).n_layer == 3
    with pytest.raises(ValueError, match="model_type = 'bert', but it must be one of gpt2, openai-gpt"):
        AutoConfig.for_model("bert")
    with pytest.raises(OSError, match="AutoConfig is made by"):
        AutoConfig()


# ---- register ------------------------------------------------------------------------------------------------------


class ShoutConfig(GPT2Config):
    model_type = "shout"


class ShoutModel(GPT2LMHeadModel):
    config_class = ShoutConfig


@pytest.fixture
def registries(monkeypatch):
    monkeypatch.setattr(config_auto, "CONFIG_CLASSES", dict(config_auto.CONFIG_CLASSES))
    monkeypatch.setattr(AutoModelForCausalLM, "_registered", {})


def test_register(registries, tmp_path):
    with pytest.raises(ValueError, match=r"ShoutConfig.model_type is 'shout', but it is registered as 'loud'"):
        AutoConfig.register("loud", ShoutConfig)
    with pytest.raises(ValueError, match=r"ShoutModel.config_class is ShoutConfig, but .* for GPT2Config"):
        AutoModelForCausalLM.register(GPT2Config, ShoutModel)
    AutoConfig.register("shout", ShoutConfig)
    AutoModelForCausalLM.register(ShoutConfig, ShoutModel)
    ShoutModel(ShoutConfig(**SHAPE)).save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is ShoutModel
    for again in (
        lambda: AutoConfig.register("shout", ShoutConfig),
        lambda: AutoModelForCausalLM.register(ShoutConfig, ShoutModel),
    ):
        with pytest.raises(ValueError, match="exist_ok=True"):
            again()
    # other kinds have no such class
    with pytest.raises(ValueError, match="AutoModelForTokenClassification has no class for ShoutConfig"):
        AutoModelForTokenClassification.from_pretrained(tmp_path)


def test_replace_a_class(registries):
    class Louder(GPT2LMHeadModel):
        pass

    with pytest.raises(ValueError, match="already has a class for GPT2Config"):
        AutoModelForCausalLM.register(GPT2Config, Louder)
    AutoModelForCausalLM.register(GPT2Config, Louder, exist_ok=True)
    assert type(AutoModelForCausalLM.from_config(GPT2Config(**SHAPE))) is Louder
    assert type(AutoModel.from_config(GPT2Config(**SHAPE))) is gpt2rt.GPT2Model
