"""from_pretrained on local files: key names, dtypes, what is missing or wrong (L1, faults F11-F16, F19)."""

import os
import warnings

import pytest
import torch
from checkpoints import WithScore, edit, edit_config, same_weights, small_config
from safetensors.torch import load_file

from gpt2rt import GPT2LMHeadModel
from gpt2rt.errors import CheckpointError, ConfigError
from gpt2rt.models import GPT2Model


@pytest.fixture
def strict_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- a clean load ----------------------------------------------------------------------------------------------------


@pytest.mark.proves("I32")
@pytest.mark.proves("L3")
@pytest.mark.usefixtures("strict_warnings")
def test_a_saved_model_comes_back_bit_for_bit(model, saved):
    loaded, info = GPT2LMHeadModel.from_pretrained(saved, output_loading_info=True)
    assert same_weights(model, loaded)
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.config.name_or_path == loaded.name_or_path == str(saved)
    assert info == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_loading_leaves_the_random_state_alone(saved):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    GPT2LMHeadModel.from_pretrained(saved)
    assert torch.equal(torch.rand(3), expected)


def test_loaded_weights_do_not_depend_on_the_file(model, saved):
    loaded = GPT2LMHeadModel.from_pretrained(saved)
    os.truncate(saved / "model.safetensors", 0)
    assert same_weights(model, loaded)


def test_later_initialisation_leaves_loaded_weights_alone(model, saved):
    loaded = GPT2LMHeadModel.from_pretrained(saved)
    loaded.post_init()
    assert same_weights(model, loaded)


@pytest.mark.proves("L1")
@pytest.mark.usefixtures("strict_warnings")
def test_base_and_head_checkpoints_are_interchangeable(model, saved, tmp_path):
    base, info = GPT2Model.from_pretrained(saved, output_loading_info=True)
    assert same_weights(base, model.transformer)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    base.save_pretrained(tmp_path / "base")
    assert "wte.weight" in load_file(tmp_path / "base" / "model.safetensors")
    head, info = GPT2LMHeadModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert same_weights(head, model)
    assert info["missing_keys"] == info["unexpected_keys"] == set()


@pytest.mark.proves("L1", "fault:F13")
@pytest.mark.usefixtures("strict_warnings")
def test_old_mask_buffers_are_skipped_but_not_the_bias_of_c_attn(model, saved):
    def add_buffers(tensors):
        for layer in range(2):
            tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["transformer.h.0.attn.c_attn.bias"] += 1

    loaded = GPT2LMHeadModel.from_pretrained(edit(saved, add_buffers))
    expected = model.transformer.h[0].attn.c_attn.bias + 1
    assert torch.equal(loaded.transformer.h[0].attn.c_attn.bias, expected)


@pytest.mark.proves("I32")
@pytest.mark.proves("L1")
@pytest.mark.usefixtures("strict_warnings")
def test_the_shared_tensor_may_be_stored_under_either_name_or_both(model, saved):
    def both(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    def head_only(tensors):
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")

    for change in (both, head_only):
        loaded = GPT2LMHeadModel.from_pretrained(edit(saved, change))
        assert same_weights(loaded, model)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
    GPT2Model.from_pretrained(edit(saved, lambda t: {**t, "transformer.wte.weight": t["lm_head.weight"].clone()}))


@pytest.mark.proves("L1")
def test_two_different_copies_of_a_tied_weight_are_kept_apart(model, saved, hf):
    def differ(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    edit(saved, differ)
    with pytest.warns(UserWarning, match=r"lm_head.weight differs from the embedding"):
        loaded = GPT2LMHeadModel.from_pretrained(saved)
    assert torch.equal(loaded.lm_head.weight, model.transformer.wte.weight + 1)
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)
    theirs = hf.module.GPT2LMHeadModel.from_pretrained(saved)
    assert same_weights(loaded, theirs)
    loaded.save_pretrained(saved)
    again = GPT2LMHeadModel.from_pretrained(saved)
    assert not again.config.tie_word_embeddings
    assert same_weights(again, loaded)


@pytest.mark.proves("L1", "fault:F12")
def test_an_untied_output_layer(tmp_path):
    untied = GPT2LMHeadModel(small_config(tie_word_embeddings=False))
    assert not torch.equal(untied.lm_head.weight, untied.transformer.wte.weight)
    untied.save_pretrained(tmp_path)
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), untied)
    edit(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of GPT2LMHeadModel: lm_head.weight; pass tie_word_emb"):
        GPT2LMHeadModel.from_pretrained(tmp_path)
    tied = GPT2LMHeadModel.from_pretrained(tmp_path, tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    with pytest.warns(UserWarning, match=r"does not provide lm_head.weight: newly initialised"):
        GPT2LMHeadModel.from_pretrained(tmp_path, strict=False)


def test_cross_attention_weights(tmp_path):
    model = GPT2LMHeadModel(small_config(add_cross_attention=True))
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda t: {**t, "transformer.h.0.crossattention.masked_bias": torch.tensor(-1e4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), model)


# ---- dtype and device ------------------------------------------------------------------------------------------------


@pytest.mark.proves("L2")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("asked", [None, "auto", "float32", "bfloat16", torch.float16], ids=str)
def test_dtype_of_the_loaded_model(model, tmp_path, stored, asked):
    model.to(stored).save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=asked)
    expected = {None: stored, "auto": stored}.get(asked)
    if asked is None and stored == torch.float16:
        expected = torch.float32
    if expected is None:
        expected = torch.float16 if asked == torch.float16 else getattr(torch, asked)
    assert loaded.dtype == loaded.config.dtype == expected
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    reference = {key: value.to(expected) for key, value in model.state_dict().items()}
    assert all(torch.equal(value, reference[key]) for key, value in loaded.state_dict().items())


def test_mixed_dtypes_load_as_one_that_holds_all(saved):
    def mix(tensors):
        for i, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].to((torch.float16, torch.bfloat16)[i % 2])

    assert GPT2LMHeadModel.from_pretrained(edit(saved, mix), dtype="auto").dtype == torch.float32


def test_float64_files_load_as_float32(model, saved):
    edit(saved, lambda tensors: {name: tensor.double() for name, tensor in tensors.items()})
    loaded = GPT2LMHeadModel.from_pretrained(saved)
    assert loaded.dtype == torch.float32
    assert same_weights(loaded, model)
    assert GPT2LMHeadModel.from_pretrained(saved, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_dtypes_that_make_no_sense(saved, keyword):
    for wrong in ("float17", torch.int8, "half precision", torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="dtype"):
            GPT2LMHeadModel.from_pretrained(saved, **{keyword: wrong})
    with pytest.raises(ValueError, match="differ"):
        GPT2LMHeadModel.from_pretrained(saved, dtype="float32", torch_dtype="float16")


@pytest.mark.proves("L2")
@pytest.mark.parametrize("keywords", [{"device": "cpu"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}])
def test_devices(saved, keywords):
    assert GPT2LMHeadModel.from_pretrained(saved, **keywords).device == torch.device("cpu")


@pytest.mark.proves("L2")
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"device_map": {"transformer": 0, "lm_head": 1}}, r"splits the model"),
        ({"device_map": "balanced"}, r"'balanced' is no device"),
        ({"device": "gpu"}, r"'gpu' is no device"),
        ({"device": "meta"}, r"holds no weights"),
        ({"device": "cpu", "device_map": "cpu"}, r"both given"),
        ({"device": 99}, r"device cuda:99 was asked for, but torch sees \d+ CUDA devices"),
    ],
    ids=str,
)
def test_devices_that_are_refused(saved, keywords, message):
    with pytest.raises(ValueError, match=message):
        GPT2LMHeadModel.from_pretrained(saved, **keywords)


def test_device_map_auto_means_cuda_if_there_is_one(saved):
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert GPT2LMHeadModel.from_pretrained(saved, device_map="auto").device.type == kind


# ---- what is missing, extra or wrong ---------------------------------------------------------------------------------


@pytest.mark.proves("fault:F11")
def test_f11_a_transposed_weight_is_recognised(saved):
    name = "transformer.h.1.mlp.c_fc.weight"
    edit(saved, lambda tensors: {**tensors, name: tensors[name].T})
    with pytest.raises(CheckpointError, match=r"transposed") as caught:
        GPT2LMHeadModel.from_pretrained(saved)
    for part in (name, "[40, 24]", "[24, 40]", str(saved)):
        assert part in str(caught.value)


@pytest.mark.proves("fault:F11")
def test_f11_another_wrong_shape_names_both(saved):
    name = "transformer.ln_f.weight"
    edit(saved, lambda tensors: {**tensors, name: torch.ones(25)})
    with pytest.raises(CheckpointError, match=r"has shape \[25\], the model expects \[24\]"):
        GPT2LMHeadModel.from_pretrained(saved, ignore_mismatched_sizes=True)


@pytest.mark.proves("fault:F12")
def test_f12_missing_keys_are_listed(saved):
    gone = ["transformer.h.0.ln_1.bias", "transformer.wpe.weight"]
    edit(saved, lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in gone})
    for strict in (None, True, False):
        with pytest.raises(CheckpointError, match=r"lacks 2 weights of GPT2LMHeadModel") as caught:
            GPT2LMHeadModel.from_pretrained(saved, strict=strict)
        assert all(name in str(caught.value) for name in gone)


@pytest.mark.proves("L1", "fault:F12")
def test_f12_task_heads_are_initialised_with_a_warning(saved, model):
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=r"does not provide score.weight: newly initialised") as seen:
        loaded, info = WithScore.from_pretrained(saved, output_loading_info=True)
    assert len(seen) == 1
    assert info["missing_keys"] == {"score.weight"}
    assert loaded.score.weight.std() > 0
    assert same_weights(loaded.transformer, model.transformer)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of WithScore: score.weight"):
        WithScore.from_pretrained(saved, strict=True)


def test_half_a_head_keeps_the_half_that_is_there(tmp_path):
    whole = WithScore(small_config(), bias=True)
    torch.nn.init.ones_(whole.score.weight)
    whole.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != "score.bias"})
    with pytest.warns(UserWarning, match=r"score.bias"):
        loaded = WithScore.from_pretrained(tmp_path, True)
    assert torch.equal(loaded.score.weight, whole.score.weight)
    assert torch.equal(loaded.score.bias, torch.zeros(2))


@pytest.mark.proves("L2")
def test_ignore_mismatched_sizes_is_for_heads_only(tmp_path):
    WithScore(small_config()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'score.weight' has shape \[2, 24\], the model expects \[5, 24\]"):
        WithScore.from_pretrained(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match=r"score.weight \(shape \[2, 24\] in the file\)"):
        loaded, info = WithScore.from_pretrained(
            tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert loaded.score.weight.shape == (5, 24)
    assert loaded.score.weight.std() > 0
    assert info["mismatched_keys"] == {("score.weight", (2, 24), (5, 24))}


@pytest.mark.proves("fault:F13")
def test_f13_unexpected_keys_warn_once(saved, model):
    extra = {"transformer.h.0.adapter.weight": torch.ones(2), "value_head.bias": torch.ones(1)}
    edit(saved, lambda tensors: {**tensors, **extra})
    with pytest.warns(UserWarning, match=r"does not use: transformer.h.0.adapter.weight, value_head.bias") as seen:
        loaded = GPT2LMHeadModel.from_pretrained(saved)
    assert len(seen) == 1
    assert same_weights(loaded, model)
    with pytest.raises(CheckpointError, match=r"holds 2 tensors that GPT2LMHeadModel does not have"):
        GPT2LMHeadModel.from_pretrained(saved, strict=True)


@pytest.mark.proves("fault:F14", "fault:F15")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_f14_f15_nan_and_infinity(saved, bad, dtype):
    name = "transformer.h.1.mlp.c_proj.weight"

    def spoil(tensors):
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        tensors[name][3, 5] = bad
        return tensors

    edit(saved, spoil)
    with pytest.raises(CheckpointError, match=r"holds 1 NaN or infinite values of 960.*check_finite=False") as caught:
        GPT2LMHeadModel.from_pretrained(saved)
    assert name in str(caught.value)
    loaded = GPT2LMHeadModel.from_pretrained(saved, check_finite=False)
    assert not torch.isfinite(loaded.transformer.h[1].mlp.c_proj.weight[3, 5])


def test_values_too_large_for_the_dtype_asked_for(saved):
    edit(saved, lambda tensors: {**tensors, "transformer.ln_f.weight": torch.full((24,), 1e5)})
    with pytest.raises(CheckpointError, match=r"ln_f.weight.* beyond 65504, the largest of torch.float16"):
        GPT2LMHeadModel.from_pretrained(saved, dtype="float16")
    GPT2LMHeadModel.from_pretrained(saved, dtype="bfloat16")


@pytest.mark.proves("fault:F16")
def test_f16_integers_are_no_weights(saved):
    name = "transformer.h.0.attn.c_attn.weight"
    edit(saved, lambda tensors: {**tensors, name: tensors[name].to(torch.int8)})
    with pytest.raises(CheckpointError, match=r"c_attn.weight' has dtype torch.int8, expected float32"):
        GPT2LMHeadModel.from_pretrained(saved)


@pytest.mark.proves("fault:F17")
def test_f17_floats_are_no_quantised_checkpoint(saved):
    edit_config(saved, quantization_config={"load_in_4bit": True})
    with pytest.raises(CheckpointError, match=r"c_attn.weight' holds torch.float32, but quantization_config says fp4"):
        GPT2LMHeadModel.from_pretrained(saved)


@pytest.mark.proves("fault:F19")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 3}, r"holds weights of 2 blocks, but config.json says n_layer = 3"),
        ({"n_layer": 1}, r"holds weights of 2 blocks, but config.json says n_layer = 1"),
        ({"vocab_size": 62}, r"wte.weight' has shape \[61, 24\], the model expects \[62, 24\]"),
        ({"n_positions": 17}, r"wpe.weight' has shape \[16, 24\], the model expects \[17, 24\]"),
        ({"n_embd": 48, "vocab_size": 10**7}, r"has shape \[61, 24\], the model expects \[10000000, 48\]"),
    ],
    ids=str,
)
def test_f19_config_and_file_disagree(saved, fields, message):
    with pytest.raises(CheckpointError, match=message):
        GPT2LMHeadModel.from_pretrained(edit_config(saved, **fields))


@pytest.mark.proves("fault:F18", "fault:F20")
def test_f18_f20_broken_configs_come_before_the_weights(saved):
    edit_config(saved, n_embd=10**9, n_head=1)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="at most"):
        GPT2LMHeadModel.from_pretrained(saved)


def test_two_names_for_one_weight(saved):
    edit(saved, lambda tensors: {**tensors, "wpe.weight": tensors["transformer.wpe.weight"].clone()})
    with pytest.raises(CheckpointError, match=r"holds both 'transformer.wpe.weight' and 'wpe.weight'"):
        GPT2LMHeadModel.from_pretrained(saved)


def test_a_folder_without_weights_says_what_was_looked_for(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: expected model.safetensors or .*pytorch_model.bin"):
        GPT2LMHeadModel.from_pretrained(saved)
    (saved / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found model.onnx \(an ONNX graph\), which gpt2rt does not read"):
        GPT2LMHeadModel.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        GPT2LMHeadModel.from_pretrained(saved)
