"""OpenAI GPT's files: both libraries read what the other wrote, in every class; what does not fit is refused."""

import json
import warnings

import pytest
import torch
from checkpoints import edit, edit_config, same_weights
from openai_gpt_models import copy_of, make, random_ids
from safetensors.torch import load_file

from gpt2rt import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    OpenAIGPTConfig,
    OpenAIGPTDoubleHeadsModel,
    OpenAIGPTForSequenceClassification,
    OpenAIGPTLMHeadModel,
    OpenAIGPTModel,
)
from gpt2rt.errors import CheckpointError, ConfigError

KINDS = [OpenAIGPTModel, OpenAIGPTLMHeadModel, OpenAIGPTDoubleHeadsModel, OpenAIGPTForSequenceClassification]
EMBEDDING = "transformer.tokens_embed.weight"


@pytest.fixture
def strict_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def saved(tmp_path):
    """A folder with a language model's files."""
    make().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def as_bin(folder):
    """Turn a safetensors checkpoint into the older format."""
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


# ---- both libraries --------------------------------------------------------------------------------------------------


@pytest.mark.proves("O6", "L3")
@pytest.mark.usefixtures("strict_warnings")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_with_transformers_are_bit_equal(tmp_path, hf, kind, dtype, tied):
    model = make(kind, num_labels=3, tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "ours")
    theirs, info = getattr(hf.module, kind.__name__).from_pretrained(
        tmp_path / "ours", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.dtype == dtype
    assert same_weights(model, theirs)
    if tied and "lm_head.weight" in model.state_dict():
        assert theirs.lm_head.weight is theirs.transformer.tokens_embed.weight
    theirs.save_pretrained(tmp_path / "theirs")
    back, info = kind.from_pretrained(tmp_path / "theirs", dtype="auto", output_loading_info=True)
    assert same_weights(back, model)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    again = kind.from_pretrained(as_bin(tmp_path / "theirs"), dtype="auto")
    assert same_weights(again, model)
    ids = random_ids(1, 6)
    with torch.no_grad():
        name = "last_hidden_state" if kind is OpenAIGPTModel else "logits"
        assert torch.equal(back(ids)[name], model(ids)[name])


@pytest.mark.proves("O6")
def test_the_files_are_those_of_transformers(saved, tmp_path, hf):
    copy_of(hf, make()).save_pretrained(tmp_path / "theirs")
    assert {path.name for path in saved.iterdir()} == {path.name for path in (tmp_path / "theirs").iterdir()}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (saved, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    assert "lm_head.weight" not in ours
    configs = [json.loads((folder / "config.json").read_text()) for folder in (saved, tmp_path / "theirs")]
    configs[1].pop("transformers_version")
    assert configs[0] == configs[1]
    assert configs[0]["model_type"] == "openai-gpt"


@pytest.mark.proves("O6", "D8")
def test_transformers_saves_double_heads_under_the_other_name_and_we_under_the_common_one(tmp_path, hf):
    """Its other classes then start with random embeddings; ours find the tensor, and so do its classes in our files."""
    model = make(OpenAIGPTDoubleHeadsModel)
    copy_of(hf, model).save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    stored = {side: set(load_file(tmp_path / side / "model.safetensors")) for side in ("ours", "theirs")}
    assert stored["theirs"] - stored["ours"] == {"lm_head.weight"}
    assert stored["ours"] - stored["theirs"] == {EMBEDDING}
    embedding = model.transformer.tokens_embed.weight
    for side in ("ours", "theirs"):
        for kind in KINDS:
            with warnings.catch_warnings():
                # a head of another kind is made up or left over
                warnings.simplefilter("ignore")
                loaded = kind.from_pretrained(tmp_path / side)
            assert same_weights(loaded.base_model, model.transformer), (side, kind)
            head = loaded.get_output_embeddings()
            assert head is None or head.weight is loaded.get_input_embeddings().weight
    for kind in KINDS:
        theirs = getattr(hf.module, kind.__name__).from_pretrained(tmp_path / "ours")
        assert torch.equal(theirs.get_input_embeddings().weight, embedding)


@pytest.mark.proves("O6")
@pytest.mark.usefixtures("strict_warnings")
@pytest.mark.parametrize("kind", [OpenAIGPTLMHeadModel, OpenAIGPTDoubleHeadsModel])
def test_the_shared_tensor_may_be_stored_under_either_name_or_both(tmp_path, kind):
    model = make(kind)
    model.save_pretrained(tmp_path)

    def both(tensors):
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()

    def head_only(tensors):
        tensors["lm_head.weight"] = tensors.pop(EMBEDDING)

    for change in (both, head_only):
        loaded = kind.from_pretrained(edit(tmp_path, change))
        assert same_weights(loaded, model)
        assert loaded.lm_head.weight is loaded.transformer.tokens_embed.weight


@pytest.mark.usefixtures("strict_warnings")
def test_a_bare_gpt2_finds_its_embedding_under_the_name_of_the_output_layer(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8))
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("transformer.wte.weight")}))
    assert same_weights(GPT2Model.from_pretrained(tmp_path), model.transformer)
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), model)


@pytest.mark.proves("O6")
def test_an_untied_file_gives_its_output_layer_to_no_embedding(tmp_path):
    make(tie_word_embeddings=False).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if name != EMBEDDING})
    for kind in (OpenAIGPTModel, OpenAIGPTLMHeadModel):
        with pytest.raises(CheckpointError, match=r"lacks 1 weights .*tokens_embed.weight"):
            kind.from_pretrained(tmp_path)


@pytest.mark.proves("O6")
def test_two_different_copies_of_a_tied_weight_are_kept_apart(saved):
    edit(saved, lambda tensors: {**tensors, "lm_head.weight": tensors[EMBEDDING] + 1})
    with pytest.warns(UserWarning, match=r"lm_head.weight differs from the embedding"):
        loaded = OpenAIGPTLMHeadModel.from_pretrained(saved)
    assert torch.equal(loaded.lm_head.weight, loaded.transformer.tokens_embed.weight + 1)
    assert not loaded.config.tie_word_embeddings


# ---- between the classes ---------------------------------------------------------------------------------------------


@pytest.mark.proves("L1")
@pytest.mark.usefixtures("strict_warnings")
def test_base_and_head_checkpoints_are_interchangeable(saved, tmp_path):
    """The published checkpoint is that of a bare model: names without "transformer."."""
    model = make()
    base = OpenAIGPTModel.from_pretrained(saved)
    assert same_weights(base, model.transformer)
    base.save_pretrained(tmp_path / "base")
    assert "tokens_embed.weight" in load_file(tmp_path / "base" / "model.safetensors")
    assert same_weights(OpenAIGPTLMHeadModel.from_pretrained(tmp_path / "base"), model)
    assert same_weights(OpenAIGPTLMHeadModel.from_pretrained(as_bin(tmp_path / "base")), model)


@pytest.mark.proves("fault:F12")
@pytest.mark.parametrize("kind", [OpenAIGPTForSequenceClassification, OpenAIGPTDoubleHeadsModel])
def test_a_head_that_the_file_lacks_is_made_up_with_a_warning(saved, kind):
    with pytest.warns(UserWarning, match=r"does not provide (score|multiple_choice_head).*newly initialised"):
        model = kind.from_pretrained(saved)
    assert same_weights(model.transformer, make().transformer)
    with pytest.raises(CheckpointError, match="lacks"):
        kind.from_pretrained(saved, strict=True)


@pytest.mark.proves("fault:F13")
@pytest.mark.usefixtures("strict_warnings")
def test_buffers_of_old_files_are_skipped_but_not_the_bias_of_c_attn(saved):
    def add_buffers(tensors):
        for layer in range(2):
            tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64)
        tensors["transformer.position_ids"] = torch.arange(64)
        tensors["transformer.h.0.attn.c_attn.bias"] += 1

    edit_config(saved, n_ctx=64, n_special=0, predict_special_tokens=True)
    model = OpenAIGPTLMHeadModel.from_pretrained(edit(saved, add_buffers))
    expected = make().transformer.h[0].attn.c_attn.bias + 1
    assert torch.equal(model.transformer.h[0].attn.c_attn.bias, expected)
    assert model.config.n_ctx == 64


def test_a_loaded_model_generates_what_the_saved_one_does(saved):
    loaded = OpenAIGPTLMHeadModel.from_pretrained(saved)
    prompts = [[1, 2, 3], [9]]
    assert torch.equal(loaded.generate(prompts, max_new_tokens=8), make().generate(prompts, max_new_tokens=8))
    assert loaded.generation_config.eos_token_id is None


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F22")
def test_the_wrong_family_is_refused_and_the_right_one_named(saved, tmp_path):
    for kind in (GPT2LMHeadModel, GPT2Model, GPT2Config):
        with pytest.raises(ConfigError, match=r"model_type 'openai-gpt' .*no class named GPT2.*OpenAIGPTLMHeadModel"):
            kind.from_pretrained(saved)
    small = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "gpt2")
    for kind in (*KINDS, OpenAIGPTConfig):
        with pytest.raises(ConfigError, match=r"model_type 'gpt2' .*no class named OpenAIGPT.*GPT2LMHeadModel"):
            kind.from_pretrained(tmp_path / "gpt2")
    # the same for old files that do not name their type
    config = json.loads((saved / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"model_type 'openai-gpt'"):
        GPT2LMHeadModel.from_pretrained(saved)
    assert same_weights(OpenAIGPTLMHeadModel.from_pretrained(saved), make())
    with pytest.raises(TypeError, match="needs a OpenAIGPTConfig, got GPT2Config"):
        OpenAIGPTLMHeadModel(small)
    with pytest.raises(TypeError, match="config is a GPT2Config, OpenAIGPTLMHeadModel needs a OpenAIGPTConfig"):
        OpenAIGPTLMHeadModel.from_pretrained(saved, config=small)


@pytest.mark.proves("fault:F11", "fault:F12", "fault:F14", "fault:F16", "fault:F19")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("transformer.h.1.ln_2.bias"),
            r"lacks 1 weights of OpenAIGPTLMHeadModel: transformer.h.1.ln_2",
        ),
        (lambda t: t.pop(EMBEDDING), r"lacks 1 weights .*tokens_embed.weight"),
        (
            lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": t["transformer.h.0.mlp.c_fc.weight"].t()}),
            r"mlp.c_fc.weight' has shape \[128, 32\], the model expects \[32, 128\]; it is stored transposed",
        ),
        (lambda t: t[EMBEDDING][3].fill_(float("nan")), r"tokens_embed.weight' holds 32 NaN or infinite values"),
        (
            lambda t: t.update({"transformer.h.0.ln_1.bias": torch.zeros(32, dtype=torch.int8)}),
            r"ln_1.bias' has dtype torch.int8",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if ".h.1." in name],
            r"holds weights of 1 blocks, but config.json says n_layer = 2",
        ),
        (lambda t: t.update({"tokens_embed.weight": t[EMBEDDING].clone()}), r"which are the same weight"),
    ],
    ids=["a norm", "the embedding", "transposed", "nan", "int8", "a block", "twice"],
)
def test_damaged_checkpoints_are_refused(saved, change, message):
    def change_in_place(tensors):
        change(tensors)

    edit(saved, change_in_place)
    with pytest.raises(CheckpointError, match=message):
        OpenAIGPTLMHeadModel.from_pretrained(saved)


@pytest.mark.proves("fault:F13")
def test_left_over_tensors_are_named(saved):
    edit(saved, lambda tensors: {**tensors, "transformer.ln_f.weight": torch.ones(32)})
    with pytest.warns(UserWarning, match=r"does not use: transformer.ln_f.weight"):
        OpenAIGPTLMHeadModel.from_pretrained(saved)


def test_shards_and_the_sizes_of_the_config(saved, tmp_path):
    model = OpenAIGPTLMHeadModel.from_pretrained(saved)
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert same_weights(OpenAIGPTLMHeadModel.from_pretrained(tmp_path / "shards"), model)
    with pytest.raises(
        CheckpointError, match=r"tokens_embed.weight' has shape \[100, 32\], the model expects \[90, 32\]"
    ):
        OpenAIGPTLMHeadModel.from_pretrained(edit_config(saved, vocab_size=90))
