"""Every GPT-2 class, both ways: what we write transformers loads bit for bit, and back; old forms of the keys."""

import warnings

import pytest
import torch
from checkpoints import same_weights, small_config
from safetensors.torch import load_file, save_file

import gpt2rt

CLASSES = {
    "GPT2Model": {},
    "GPT2LMHeadModel": {},
    "GPT2DoubleHeadsModel": {},
    "GPT2ForQuestionAnswering": {},
    "GPT2ForSequenceClassification": {"num_labels": 3},
    "GPT2ForTokenClassification": {"num_labels": 5},
}
HEADS = {
    "GPT2DoubleHeadsModel": ["multiple_choice_head.summary.bias", "multiple_choice_head.summary.weight"],
    "GPT2ForQuestionAnswering": ["qa_outputs.bias", "qa_outputs.weight"],
    "GPT2ForSequenceClassification": ["score.weight"],
    "GPT2ForTokenClassification": ["classifier.bias", "classifier.weight"],
}


def make(name):
    torch.manual_seed(0)
    model = getattr(gpt2rt, name)(small_config(**CLASSES[name])).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def load(cls, folder, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = cls.from_pretrained(folder, output_loading_info=True, **keywords)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    return model


@pytest.mark.proves("L3")
@pytest.mark.parametrize("size", ["1GB", "10KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("name", CLASSES)
def test_both_ways_bit_for_bit(tmp_path, hf, name, size):
    model = make(name)
    model.save_pretrained(tmp_path / "ours", max_shard_size=size)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (size == "10KB")
    theirs, info = getattr(hf.module, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same_weights(model, theirs)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    assert same_weights(load(type(model), tmp_path / "theirs"), model)
    ours, other = (load_keys(tmp_path / folder) for folder in ("ours", "theirs"))
    assert ours == other


def load_keys(folder):
    return {key for path in folder.glob("*.safetensors") for key in load_file(path)}


@pytest.mark.proves("L1", "fault:F13")
@pytest.mark.parametrize("kind", ["safetensors", "bin", "legacy bin"])
@pytest.mark.parametrize("name", CLASSES)
def test_old_forms_of_the_keys(tmp_path, name, kind):
    """Files of transformers 2 to 4: the bare model without its prefix, mask buffers, a second copy of the embedding."""
    model = make(name)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {key.removeprefix("transformer."): value.clone() for key, value in model.state_dict().items()}
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if kind == "safetensors":
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    assert same_weights(load(type(model), tmp_path), model)


@pytest.mark.proves("L1", "fault:F12")
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_the_file_lacks_is_named(tmp_path, name):
    base = make("GPT2LMHeadModel")
    base.save_pretrained(tmp_path)
    cls = getattr(gpt2rt, name)
    with pytest.warns(UserWarning, match=r"newly initialised, train before use") as seen:
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(HEADS[name])
    messages = [str(warning.message) for warning in seen]
    assert all(any(key in message for message in messages) for key in HEADS[name])
    assert same_weights(model.transformer, base.transformer)


@pytest.mark.proves("I32")
@pytest.mark.proves("L1")
def test_a_tied_output_layer_may_be_absent_and_an_untied_one_may_not(tmp_path):
    model = make("GPT2DoubleHeadsModel")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load(type(model), tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    with pytest.raises(OSError, match=r"lacks 1 weights of GPT2DoubleHeadsModel: lm_head.weight"):
        type(model).from_pretrained(tmp_path, tie_word_embeddings=False)
