"""Damaged quantised checkpoints (faults F14-F17): refused with file, tensor and reason, before memory is taken."""

import json

import pytest
import torch
from checkpoints import edit, edit_config, small_config
from safetensors.torch import load_file

from gpt2rt import GPT2LMHeadModel
from gpt2rt.errors import CheckpointError
from gpt2rt.models import loading

NAME = "transformer.h.0.mlp.c_fc.weight"
WTE = "transformer.wte.weight"


@pytest.fixture
def config():
    return small_config(n_embd=64, n_head=2)


@pytest.fixture
def quantized(saved, tmp_path):
    """``quantized(form)``: a folder with the model's files in a quantised format."""

    def make(form):
        folder = tmp_path / "quantized"
        GPT2LMHeadModel.from_pretrained(saved, quantization=form).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def nothing_is_filled(monkeypatch):
    """Fail if a weight gets memory."""

    def fill(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "fill_model", fill)


def changed(name, change):
    """An edit of one tensor."""
    return lambda tensors: {**tensors, name: change(tensors[name])}


def without(*names):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in names}


INT4 = {"scheme": "int4", "group_size": 32, "symmetric": False}

HEADERS = {
    "no scales, int8": ("int8", without(f"{NAME}_scales"), rf"{NAME}' has no scales: '{NAME}_scales' is missing"),
    "no scales, nf4": ("nf4", without(f"{NAME}_scales"), rf"{NAME}' has no scales"),
    "no scales of the embedding": ("int8", without(f"{WTE}_scales"), rf"{WTE}' has no scales"),
    "no zero points": (
        INT4,
        without(f"{NAME}_zeros"),
        rf"{NAME}' has no zero points: '{NAME}_zeros' is missing, but config.json says symm",
    ),
    "zero points of a symmetric weight": (
        "int4",
        lambda tensors: {**tensors, f"{NAME}_zeros": torch.zeros(40, 1, dtype=torch.uint8)},
        rf"{NAME}_zeros' holds zero points, but config.json says symmetric = true",
    ),
    "another number of groups": (
        INT4,
        changed(f"{NAME}_scales", lambda t: t[:, :1]),
        rf"{NAME}_scales' has shape \[40, 1\], expected \[40, 2\]: config.json says int4 for it with group_size = 32",
    ),
    "scales of another dtype": (
        "int4",
        changed(f"{NAME}_scales", torch.Tensor.float),
        rf"{NAME}_scales' has dtype torch.float32, expected torch.float16",
    ),
    "codes of another shape": (
        "int4",
        changed(NAME, lambda t: t[:, :-1]),
        rf"{NAME}' has shape \[40, 31\], expected \[40, 32\]: config.json says int4",
    ),
    "codes cut off": ("int8", changed(NAME, lambda t: t[:-1]), rf"{NAME}' has shape \[39, 64\], expected \[40, 64\]"),
    "floats in place of codes": (
        "int8",
        lambda tensors: without(f"{NAME}_scales")({**tensors, NAME: torch.zeros(64, 40)}),
        rf"{NAME}' holds torch.float32, but quantization_config says int8 for it",
    ),
    "codes of a layer that is never quantised": (
        "int8",
        lambda tensors: {
            **tensors,
            "transformer.wpe.weight": torch.zeros(16, 64, dtype=torch.int8),
            "transformer.wpe.weight_scales": torch.ones(16),
        },
        r"transformer.wpe.weight' holds codes, but quantization_config says that it is not quantised",
    ),
    "codes of a norm": (
        "int8",
        lambda tensors: {**tensors, "transformer.ln_f.weight": torch.zeros(64, dtype=torch.int8)},
        r"ln_f.weight' holds codes, but is for transformer.ln_f.weight: LayerNorm cannot be quantised",
    ),
    "a bias of integers": (
        "int8",
        changed("transformer.h.0.mlp.c_fc.bias", torch.Tensor.int),
        r"c_fc.bias' has dtype torch.int32, expected float32",
    ),
    "another dtype of the table": (
        {"scheme": "int8", "embeddings": "float16"},
        changed(WTE, torch.Tensor.bfloat16),
        rf"{WTE}' holds torch.bfloat16, but quantization_config says float16 for it",
    ),
}


@pytest.mark.proves("fault:F17")
@pytest.mark.parametrize("case", HEADERS)
def test_f17_headers_that_do_not_fit(quantized, nothing_is_filled, case):
    form, change, message = HEADERS[case]
    # the fixture forbids filling, so the checkpoint is made with it lifted
    folder = made(quantized, form)
    edit(folder, change)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor '.*{message}") as caught:
        GPT2LMHeadModel.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def made(quantized, form):
    from gpt2rt.checkpoint.load import fill_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "fill_model", fill_model)
        return quantized(form)


VALUES = {
    "nan scale": (
        "int8",
        changed(f"{NAME}_scales", lambda t: t.index_fill(0, torch.tensor([3]), torch.nan)),
        r"scales are",
    ),
    "infinite scale": ("nf4", changed(f"{NAME}_scales", lambda t: t * torch.inf), r"scales are not finite"),
    "code -128": (
        "int8",
        changed(NAME, lambda t: torch.full_like(t, -128)),
        r"int8 codes are -127 to 127, got 2560 of -128",
    ),
    "zero point 16": (INT4, changed(f"{NAME}_zeros", lambda t: t + 16), r"zero points of int4 are 0 to 15"),
    "nan in the table's scales": ("int8", changed(f"{WTE}_scales", lambda t: t * torch.nan), r"scales are not finite"),
}


@pytest.mark.proves("fault:F17")
@pytest.mark.parametrize("case", VALUES)
def test_f17_values_outside_their_tables(quantized, case):
    form, change, message = VALUES[case]
    folder = edit(quantized(form), change)
    with pytest.raises(CheckpointError, match=rf"tensor '({NAME}|{WTE})' cannot be used: .*{message}"):
        GPT2LMHeadModel.from_pretrained(folder)
    # on request they are taken as they are
    GPT2LMHeadModel.from_pretrained(folder, check_finite=False)


@pytest.mark.proves("fault:F14", "fault:F15")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["transformer.ln_f.weight", "transformer.h.0.mlp.c_fc.bias", "transformer.wpe.weight"])
def test_f14_f15_floats_of_a_quantised_checkpoint_are_checked_too(quantized, name, value):
    folder = edit(quantized("int4"), changed(name, lambda t: t.index_fill(0, torch.tensor([2]), value)))
    with pytest.raises(CheckpointError, match=rf"{name}' holds (1|64) NaN or infinite values"):
        GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.proves("fault:F14", "fault:F15")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
def test_f14_f15_weights_that_are_not_finite_are_not_quantised(saved, form, value):
    edit(saved, changed(NAME, lambda t: t.index_fill(0, torch.tensor([2]), value)))
    with pytest.raises(CheckpointError, match=rf"{NAME}' holds 40 NaN or infinite values"):
        GPT2LMHeadModel.from_pretrained(saved, quantization=form)
    with pytest.raises(CheckpointError, match=rf"{NAME}' cannot be quantised: 40 of 2560 weights are NaN or infinite"):
        GPT2LMHeadModel.from_pretrained(saved, quantization=form, check_finite=False)


def test_weights_beyond_a_format_are_refused(saved):
    edit(saved, changed(NAME, lambda t: t * 1e9))
    with pytest.raises(CheckpointError, match=rf"{NAME}' cannot be quantised: .*beyond float16"):
        GPT2LMHeadModel.from_pretrained(saved, quantization="int4")
    edit(saved, changed(WTE, lambda t: t * 1e9))
    form = {"scheme": "int8", "embeddings": "float16"}
    with pytest.raises(CheckpointError, match=rf"{WTE}' holds values beyond 65504"):
        GPT2LMHeadModel.from_pretrained(saved, quantization=form)


@pytest.mark.proves("fault:F16")
@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
def test_f16_codes_without_a_config_that_says_so(quantized, form):
    folder = quantized(form)
    said = json.loads((folder / "config.json").read_text())
    del said["quantization_config"]
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(
        CheckpointError, match=r"has dtype torch.u?int8, .*says so by quantization_config in its config.json"
    ):
        GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.proves("fault:F17")
@pytest.mark.parametrize(
    ("form", "fields", "message"),
    [
        ("int8", {"scheme": "int4"}, r"has dtype torch.int8, expected torch.uint8: config.json says int4 for it"),
        ("int4", {"scheme": "int8", "group_size": None}, r"has dtype torch.uint8, expected torch.int8"),
        ("int4", {"group_size": 32}, r"has shape \[\d+, 1\], expected \[\d+, 2\]: .* group_size = 32"),
        (
            "int4",
            {"scheme": "nf4", "activations": "float32"},
            r"_scales' has dtype torch.float16, expected torch.float32",
        ),
        ("nf4", {"scheme": "int4"}, r"_scales' has dtype torch.float32, expected torch.float16"),
        (
            "int8",
            {"embeddings": "none"},
            r"wte.weight' holds codes, but quantization_config says that it is not quantised",
        ),
        ("int8", {"embeddings": "int4"}, r"wte.weight' has dtype torch.int8, expected torch.uint8"),
        ("int8", {"embeddings": "float16"}, r"wte.weight' holds codes, but quantization_config says float16 for it"),
        (
            "int8",
            {"skip_modules": ["h.1"]},
            r"h.1.attn.c_attn.weight' holds codes, but .* says that it is not quantised",
        ),
        ("int8", {"scheme": "int3"}, r"quantization_config: scheme = 'int3', but it must be one of"),
        ("int8", {"group_size": 7}, r"quantization_config: group_size = 7"),
        ("int8", {"colour": "red"}, r"quantization_config: 'colour' is no field"),
        (
            "int8",
            {"quant_method": "awq"},
            r"quantization_config: quant_method = 'awq' is not read; gpt2rt reads its own",
        ),
        ("int8", {"skip_modules": 5}, r"quantization_config: skip_modules = 5"),
    ],
)
def test_f17_a_config_that_does_not_tell_the_truth(quantized, form, fields, message):
    folder = quantized(form)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**said, **fields})
    with pytest.raises(CheckpointError, match=message):
        GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.proves("fault:F17")
@pytest.mark.parametrize("value", [5, "int8", [], ["int8"], {"a": 1}, {"quant_method": ["x"]}, {"load_in_4bit": True}])
def test_f17_a_config_of_floats_that_claims_to_be_quantised(saved, value):
    edit_config(saved, quantization_config=value)
    with pytest.raises(CheckpointError, match=r"quantization_config"):
        GPT2LMHeadModel.from_pretrained(saved)


@pytest.mark.proves("fault:F17")
def test_f17_a_file_that_is_cut_off(quantized):
    path = quantized("int4") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"the file is cut off"):
        GPT2LMHeadModel.from_pretrained(path.parent)


@pytest.mark.proves("fault:F17")
@pytest.mark.parametrize("part", ["", "_scales", "_zeros"])
def test_f17_every_tensor_of_a_layer_is_needed(quantized, part):
    folder = edit(quantized(INT4), without(NAME + part))
    with pytest.raises(CheckpointError, match=r"lacks 1 weights" if not part else r"is missing"):
        GPT2LMHeadModel.from_pretrained(folder)
    assert NAME + part not in load_file(folder / "model.safetensors")
