"""The arguments of from_pretrained, and what a loaded model can be asked and told."""

import io
import sys
import warnings

import pytest
import torch
from checkpoints import edit, edit_config, same_weights, small_config

from gpt2rt import GPT2Config, GPT2LMHeadModel
from gpt2rt.checkpoint.weights import progress
from gpt2rt.config import PretrainedConfig
from gpt2rt.errors import CheckpointError, ConfigError
from gpt2rt.models import GPT2Model

# ---- config, state_dict and other arguments --------------------------------------------------------------------------


@pytest.mark.proves("L2")
def test_a_config_object_is_used_and_never_changed(model, saved):
    config = GPT2Config.from_pretrained(saved)
    before = config.to_dict()
    loaded = GPT2LMHeadModel.from_pretrained(saved, config=config, dtype="bfloat16", attn_pdrop=0.3)
    assert config.to_dict() == before
    assert (loaded.config.attn_pdrop, loaded.config.dtype) == (0.3, torch.bfloat16)
    assert GPT2LMHeadModel.from_pretrained(saved, config=str(saved)).config.n_layer == 2
    with pytest.raises(TypeError, match=r"config is a PretrainedConfig"):
        GPT2LMHeadModel.from_pretrained(saved, config=PretrainedConfig())


def test_a_state_dict_replaces_the_files(model, saved):
    state = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    loaded = GPT2LMHeadModel.from_pretrained(saved, state_dict=state)
    assert torch.equal(loaded.transformer.wpe.weight, model.transformer.wpe.weight + 1)
    state["transformer.wpe.weight"].zero_()
    assert torch.equal(loaded.transformer.wpe.weight, model.transformer.wpe.weight + 1), "memory is shared"
    assert same_weights(
        GPT2LMHeadModel.from_pretrained(None, config=model.config, state_dict=model.state_dict()), model
    )
    with pytest.raises(ValueError, match=r"both config and state_dict must be given"):
        GPT2LMHeadModel.from_pretrained(None, config=model.config)


def test_generation_settings(saved):
    loaded = GPT2LMHeadModel.from_pretrained(saved)
    (saved / "generation_config.json").write_text('{"top_k": 7, "do_sample": true}')
    assert GPT2LMHeadModel.from_pretrained(saved).generation_config.top_k == 7
    assert GPT2LMHeadModel.from_pretrained(saved, generation_config=loaded.generation_config).generation_config is (
        loaded.generation_config
    )
    # old checkpoints have them in config.json
    (saved / "generation_config.json").unlink()
    edit_config(saved, top_k=9, do_sample=True, eos_token_id=3)
    old = GPT2LMHeadModel.from_pretrained(saved)
    assert (old.generation_config.top_k, old.generation_config.eos_token_id) == (9, 3)
    with pytest.raises(ValueError, match="does not generate"):
        GPT2Model.from_pretrained(saved, generation_config=loaded.generation_config)


def test_attention_implementations(saved):
    for name in ("gpt2rt", "eager", "sdpa"):
        assert GPT2LMHeadModel.from_pretrained(saved, attn_implementation=name).config._attn_implementation == name
    with pytest.raises(ValueError, match=r"attn_implementation = 'flash_attention_2', but it must be one of gpt2rt"):
        GPT2LMHeadModel.from_pretrained(saved, attn_implementation="flash_attention_2")


@pytest.mark.proves("L2", "fault:F23")
def test_names_of_transformers_are_honoured_or_refused_one_by_one(saved):
    from gpt2rt.checkpoint.options import REFUSED, WITHOUT_EFFECT

    for name, (harmless, reason) in REFUSED.items():
        for value in harmless:
            GPT2LMHeadModel.from_pretrained(saved, **{name: value})
        with pytest.raises(ValueError, match=rf"from_pretrained: {name} is not supported: {reason[:20]}"):
            GPT2LMHeadModel.from_pretrained(saved, **{name: object()})
    GPT2LMHeadModel.from_pretrained(saved, **dict.fromkeys(WITHOUT_EFFECT, True))
    for keywords, message in (
        ({"trust_remote_code": True}, "never runs code"),
        ({"weights_only": False}, "never unpickles"),
    ):
        with pytest.raises(ValueError, match=message):
            GPT2LMHeadModel.from_pretrained(saved, **keywords)
    with pytest.raises(TypeError, match=r"unknown keywords: 'dtpye'"):
        GPT2LMHeadModel.from_pretrained(saved, dtpye="float16")


@pytest.mark.proves("L2")
def test_every_keyword_that_transformers_pops_is_known_here(hf):
    """A keyword of theirs is an argument of ours or in the list of refusals, so none falls through to TypeError."""
    import inspect
    import re

    from gpt2rt.checkpoint.options import REFUSED, WITHOUT_EFFECT

    ours = {*inspect.signature(GPT2LMHeadModel.from_pretrained).parameters, *REFUSED, *WITHOUT_EFFECT}
    base = hf.module.PreTrainedModel.from_pretrained
    source = inspect.getsource(base)
    theirs = set(re.findall(r'kwargs\.pop\(\s*"(\w+)"', source)) | set(inspect.signature(base).parameters)
    internal = {"_from_auto", "_from_pipeline", "_commit_hash", "cls"}
    # popped inside a loop over names
    theirs |= set(re.findall(r"for name in \[(.*?)\]", source)[0].replace('"', "").split(", "))
    assert len(theirs) > 25
    assert {"from_tf", "from_flax", "key_mapping", "low_cpu_mem_usage"} <= theirs
    assert theirs - ours - internal == set()


@pytest.mark.proves("L3")
def test_every_keyword_of_saving_and_uploading_is_known_here(hf):
    import inspect

    from gpt2rt.checkpoint.options import SAVE_REFUSED, SAVE_WITHOUT_EFFECT
    from gpt2rt.checkpoint.upload import UPLOAD_KEYWORDS

    base = hf.module.PreTrainedModel
    ours = {*inspect.signature(GPT2LMHeadModel.save_pretrained).parameters, *SAVE_REFUSED, *SAVE_WITHOUT_EFFECT}
    theirs = inspect.signature(base.save_pretrained).parameters
    assert set(theirs) - ours == set()
    # positions count too: model.save_pretrained(folder, True, state_dict)
    assert list(inspect.signature(GPT2LMHeadModel.save_pretrained).parameters)[:8] == list(theirs)[:8]
    from transformers.utils.hub import PushToHubMixin

    pushed = {*inspect.signature(PushToHubMixin.push_to_hub).parameters} - {"self"}
    assert pushed - {*UPLOAD_KEYWORDS, "token", "max_shard_size", *SAVE_REFUSED} == set()


@pytest.mark.proves("L2")
def test_key_mapping_renames_the_tensors_of_the_file(model, saved):
    def rename(tensors):
        return {name.replace("transformer.", "decoder.").replace(".attn.", ".att."): t for name, t in tensors.items()}

    edit(saved, rename)
    with pytest.raises(CheckpointError, match="lacks"):
        GPT2LMHeadModel.from_pretrained(saved)
    mapping = {r"^decoder\.": "transformer.", r"\.att\.(\w+)": r".attn.\1"}
    loaded, info = GPT2LMHeadModel.from_pretrained(saved, key_mapping=mapping, output_loading_info=True)
    assert same_weights(loaded, model)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    state = {f"x.{name}": tensor for name, tensor in model.state_dict().items()}
    assert same_weights(GPT2LMHeadModel.from_pretrained(saved, state_dict=state, key_mapping={"^x.": ""}), model)
    with pytest.raises(ValueError, match=r"key_mapping: '\(': 'x' is no regular expression with its replacement"):
        GPT2LMHeadModel.from_pretrained(saved, key_mapping={"(": "x"})
    with pytest.raises(CheckpointError, match=r"key_mapping renames both .* and .* to 'x'"):
        GPT2LMHeadModel.from_pretrained(saved, key_mapping={".+": "x"})
    with pytest.raises(CheckpointError, match=r"a tensor's name has 3002 characters, at most 1024"):
        GPT2LMHeadModel.from_pretrained(saved, state_dict={"x" * 3002: torch.ones(1)}, key_mapping=mapping)


def test_a_file_or_a_missing_folder_as_name(saved):
    with pytest.raises(CheckpointError, match=r"is a file, expected a folder"):
        GPT2LMHeadModel.from_pretrained(saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the folder './nowhere' does not exist"):
        GPT2LMHeadModel.from_pretrained("./nowhere")
    with pytest.raises(CheckpointError, match=r"has no subfolder 'deep'"):
        GPT2LMHeadModel.from_pretrained(saved, subfolder="deep")
    with pytest.raises(CheckpointError, match=r"leads outside the checkpoint"):
        GPT2LMHeadModel.from_pretrained(saved, subfolder="../checkpoint")


@pytest.mark.proves("L2")
def test_subfolder_and_variant(model, tmp_path):
    model.save_pretrained(tmp_path / "deep", variant="fp16")
    assert (tmp_path / "deep" / "model.fp16.safetensors").is_file()
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path, subfolder="deep", variant="fp16"), model)
    with pytest.raises(CheckpointError, match=r"expected model.safetensors or"):
        GPT2LMHeadModel.from_pretrained(tmp_path, subfolder="deep")


def test_embedded_ids(monkeypatch, model, tmp_path):
    from gpt2rt.checkpoint import resolve

    monkeypatch.setattr(resolve, "embedded_folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "tiny-test")
    assert same_weights(GPT2LMHeadModel.from_pretrained("gpt2rt/tiny-test"), model)
    for unknown in ("gpt2rt/huge", "gpt2rt/../x", "gpt2rt/"):
        with pytest.raises(CheckpointError, match=r"is no embedded model; known: gpt2rt/tiny-test"):
            GPT2LMHeadModel.from_pretrained(unknown)


@pytest.mark.proves("F18")
def test_resize_token_embeddings(model, saved):
    old = model.transformer.wte.weight.detach().clone()
    for count in (70, 50):
        assert model.resize_token_embeddings(count).num_embeddings == count
        assert model.config.vocab_size == count
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.lm_head.out_features == count
        kept = min(count, 61)
        assert torch.equal(model.transformer.wte.weight[:kept], old[:kept])
        assert model(torch.tensor([[1, count - 1]])).logits.shape == (1, 2, count)
    model.resize_token_embeddings(64)
    torch.testing.assert_close(model.transformer.wte.weight[60], old[:50].mean(0))
    model.resize_token_embeddings(pad_to_multiple_of=16)
    assert model.config.vocab_size == 64
    model.save_pretrained(saved)
    assert same_weights(GPT2LMHeadModel.from_pretrained(saved), model)
    with pytest.raises(ValueError, match=r"new_num_tokens = 0"):
        model.resize_token_embeddings(0)


def test_resize_without_a_tie_and_with_random_rows():
    model = GPT2LMHeadModel(small_config(tie_word_embeddings=False))
    model.resize_token_embeddings(64, mean_resizing=False)
    assert model.lm_head.weight.shape == model.transformer.wte.weight.shape == (64, 24)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert model.transformer.wte.weight[61:].std() > 0


def test_what_every_model_answers(model):
    embedding, positions = 61 * 24, 16 * 24
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - embedding - positions
    model.transformer.wpe.weight.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == model.num_parameters() - positions
    assert model.base_model is model.transformer
    assert model.get_input_embeddings() is model.transformer.wte
    assert model.get_output_embeddings() is model.lm_head
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert model.can_generate()
    assert not model.transformer.can_generate()
    with pytest.raises(TypeError, match=r"needs a GPT2Config, got str; to load a checkpoint use"):
        GPT2LMHeadModel("gpt2")
    model.config.n_head = 5
    with pytest.raises(ConfigError, match="n_embd = 24 with n_head = 5"):
        GPT2LMHeadModel(model.config)


class Terminal(io.StringIO):
    def __init__(self, tty):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "file"])
def test_the_progress_bar_shows_on_terminals_only(monkeypatch, tty):
    screen = Terminal(tty)
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(progress(["a", "b"], 10**9)) == ["a", "b"]
    assert ("Loading weights" in screen.getvalue()) == tty
    assert list(progress(["a", "b"], 1000)) == ["a", "b"]
    assert screen.getvalue().count("Loading weights: 100%") <= 1


@pytest.mark.proves("D10")
def test_a_small_vocabulary_with_the_end_token_of_gpt2(tmp_path, hf):
    """transformers writes eos 50256 beside a vocabulary of 61; there, generating without a prompt is an IndexError."""
    theirs = hf.module.GPT2LMHeadModel(hf.module.GPT2Config(n_layer=2, n_embd=24, n_head=3, vocab_size=61))
    theirs.save_pretrained(tmp_path)
    assert '"eos_token_id": 50256' in (tmp_path / "generation_config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, None)
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3).shape == (1, 5)
    with pytest.raises(ValueError, match="`bos_token_id` has to be defined"):
        model.generate(max_new_tokens=3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 300], "pad_token_id": 7}')
    with pytest.warns(UserWarning, match=r"eos_token_id = \[5, 300\] lies outside the vocabulary of 61 tokens"):
        settings = GPT2LMHeadModel.from_pretrained(tmp_path).generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == ([5], 7)
