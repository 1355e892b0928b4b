"""Checkpoints of bitsandbytes: loaded bit for bit, written again byte for byte, damaged ones refused.

The files in ``tests/quantization/golden`` were made by transformers with bitsandbytes (``make.py`` beside them); that
bitsandbytes reads what gpt2rt writes is shown by ``check_written.py`` there, which needs bitsandbytes.
"""

import json
import pathlib
import shutil

import pytest
import torch
from checkpoints import edit, edit_config, same_weights
from quantized_models import greedy
from safetensors.torch import load_file

from gpt2rt import BitsAndBytesConfig, GPT2ForSequenceClassification, GPT2LMHeadModel, QuantizationConfig
from gpt2rt.errors import CheckpointError
from gpt2rt.models import Conv1D
from gpt2rt.models.quantized import QuantizedConv1D

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "quantization" / "golden"
FOLDERS = ("nf4", "nf4-double", "nf4-bfloat16-storage", "fp4", "int8")
NAME = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture
def folder(tmp_path):
    """``folder(name)``: a copy of a golden folder, to change at will."""

    def copy(name):
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / "copy"))

    return copy


def as_bytes(tensors):
    return {name: (t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).tolist()) for name, t in tensors.items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_weights_and_logits_are_those_of_bitsandbytes(name):
    model = GPT2LMHeadModel.from_pretrained(GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    scheme = name.partition("-")[0]
    assert model.quantization_scheme == scheme
    weights = [key for key in expected if key.endswith(".weight")]
    assert len(weights) == 2
    for key in weights:
        layer = model.get_submodule(key.removesuffix(".weight"))
        assert isinstance(layer, QuantizedConv1D)
        if scheme == "int8":
            # bitsandbytes multiplies code and scale before it divides by 127
            torch.testing.assert_close(layer.dequantize(), expected[key], rtol=2e-7, atol=0)
        else:
            assert torch.equal(layer.dequantize(), expected[key])
    ids = expected["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    # int8 has 8-bit activations here, and there too, but with other scales; its floats are compared
    with torch.no_grad():
        floats = GPT2LMHeadModel.from_pretrained(GOLDEN / name).dequantize()(ids).logits
    torch.testing.assert_close(floats, expected["logits"], rtol=0, atol=2e-5)
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=0.1 if scheme == "int8" else 2e-5)
    found = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(found, greedy(model, ids[:1], 6))


@pytest.mark.parametrize("name", FOLDERS)
def test_files_are_written_again_byte_for_byte(name, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(GOLDEN / name)
    assert model.quantization_method == "bitsandbytes"
    model.save_pretrained(tmp_path)
    assert as_bytes(load_file(tmp_path / "model.safetensors")) == as_bytes(
        load_file(GOLDEN / name / "model.safetensors")
    )
    ours, theirs = (
        json.loads((where / "config.json").read_text())["quantization_config"] for where in (tmp_path, GOLDEN / name)
    )
    # transformers also writes the fields behind two properties
    assert ours == {key: value for key, value in theirs.items() if not key.startswith("_")}
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_same_model_in_our_own_layout(name, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(GOLDEN / name)
    model.save_pretrained(tmp_path, quantization_format="gpt2rt")
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert same_weights(again, model)
    assert again.quantization_method == "gpt2rt"
    # and back: only the scales of scales are not known any more
    again.save_pretrained(tmp_path / "back", quantization_format="bitsandbytes")
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    assert same_weights(back, model)
    assert back.config.quantization_config.bnb_4bit_use_double_quant is False


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("nf4-double", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        (
            "nf4-bfloat16-storage",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
        ),
        ("fp4", {"load_in_4bit": True}),
    ],
)
def test_what_we_quantise_is_what_bitsandbytes_quantises(name, options, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(
        GOLDEN / "float", quantization_config=BitsAndBytesConfig(**options), dtype="float32"
    )
    assert model.config.quantization_config == BitsAndBytesConfig(**options)
    model.save_pretrained(tmp_path)
    ours, theirs = (load_file(where / "model.safetensors") for where in (tmp_path, GOLDEN / name))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        # the mean of the scales is summed in another order there
        close = key.endswith(("nested_absmax", "__nf4")) and name == "nf4-double"
        if not close:
            assert as_bytes({key: ours[key]}) == as_bytes({key: theirs[key]}), key


def test_int8_on_the_fly_gives_the_codes_of_bitsandbytes(tmp_path):
    model = GPT2LMHeadModel.from_pretrained(GOLDEN / "float", load_in_8bit=True)
    theirs = load_file(GOLDEN / "int8" / "model.safetensors")
    model.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    different = [
        (ours[key].int() - theirs[key].int()).abs().max().item() for key in ours if ours[key].dtype == torch.int8
    ]
    assert max(different) <= 1
    for key in ours:
        if key.endswith("SCB"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=2e-7, atol=0)


@pytest.mark.parametrize("block", [32, 64, 128, 4096])
@pytest.mark.parametrize("n_embd", [44, 45, 48])
def test_blocks_that_straddle_rows(tmp_path, block, n_embd):
    """The layout restated: flat codes, the first in the high bits, one scale for each block of the flat matrix."""
    from checkpoints import small_config

    heads = 3 if n_embd % 3 == 0 else 2
    floats = GPT2LMHeadModel(small_config(n_embd=n_embd, n_head=heads, n_inner=37)).eval()
    floats.save_pretrained(tmp_path / "f")
    form = QuantizationConfig("nf4", block, embeddings="none")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "f", quantization=form)
    model.save_pretrained(tmp_path / "q", quantization_format="bitsandbytes")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedConv1D):
            continue
        data, absmax = tensors[f"{name}.weight"].flatten(), tensors[f"{name}.weight.absmax"]
        count = layer.nf * layer.nx
        assert absmax.numel() == -(-count // block)
        codes = torch.stack([data >> 4, data & 15], dim=1).flatten()[:count].long()
        values = tensors[f"{name}.weight.quant_map"][codes] * absmax[torch.arange(count) // block]
        assert torch.equal(layer.dequantize(), values.view(layer.nf, layer.nx))
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "q")
    assert same_weights(again, model)
    assert again._quantization.group_size == block


def test_a_quantised_head_and_one_that_is_not(tmp_path):
    from checkpoints import small_config

    floats = GPT2ForSequenceClassification(small_config(num_labels=6, pad_token_id=0)).eval()
    floats.save_pretrained(tmp_path / "f")
    model = GPT2ForSequenceClassification.from_pretrained(tmp_path / "f", load_in_4bit=True)
    assert type(model.score) is torch.nn.Linear
    model.save_pretrained(tmp_path / "q")
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert said["llm_int8_skip_modules"] == ["score"]
    assert same_weights(GPT2ForSequenceClassification.from_pretrained(tmp_path / "q"), model)
    # transformers quantises heads that are not the last layer
    from gpt2rt.models import replace_with_quantized
    from gpt2rt.quantization import quantize_rtn

    config = QuantizationConfig("fp4", embeddings="none")
    replace_with_quantized(model, {"score": quantize_rtn(model.score.weight.detach(), config)})
    for layout in ("bitsandbytes", "gpt2rt"):
        model.save_pretrained(tmp_path / layout, quantization_format=layout)
        assert same_weights(GPT2ForSequenceClassification.from_pretrained(tmp_path / layout), model)


def test_layers_that_the_config_skips_may_be_floats(tmp_path):
    asked = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["mlp"])
    model = GPT2LMHeadModel.from_pretrained(GOLDEN / "float", quantization_config=asked)
    assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    # names that transformers understands, and the output layer, which it would quantise otherwise
    assert said["llm_int8_skip_modules"] == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj", "lm_head"]
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("int4", r"embedding and output layer are int8, but bitsandbytes keeps them as floats"),
        ({"scheme": "int4", "embeddings": "none"}, r"bitsandbytes has nf4, fp4 and int8|bitsandbytes has no int4"),
    ],
)
def test_what_bitsandbytes_cannot_hold(tmp_path, form, message):
    model = GPT2LMHeadModel.from_pretrained(GOLDEN / "float", quantization=form)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "q", quantization_format="bitsandbytes")
    assert not (tmp_path / "q").exists()


def test_names_of_layouts(tmp_path):
    floats = GPT2LMHeadModel.from_pretrained(GOLDEN / "float")
    with pytest.raises(ValueError, match=r"quantization_format = 'bitsandbytes', but no layer is quantised"):
        floats.save_pretrained(tmp_path / "q", quantization_format="bitsandbytes")
    model = GPT2LMHeadModel.from_pretrained(GOLDEN / "nf4")
    with pytest.raises(ValueError, match=r"quantization_format = 'gguf', but it must be one of gpt2rt, bitsandbytes"):
        model.save_pretrained(tmp_path / "q", quantization_format="gguf")


# ---- damage ----------------------------------------------------------------------------------------------------------


def state_of(tensors, **fields):
    key = next(key for key in tensors if key.startswith(f"{NAME}.quant_state"))
    state = {**json.loads(bytes(tensors[key].tolist())), **fields}
    return {**tensors, key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def without(part):
    return lambda tensors: {key: value for key, value in tensors.items() if key != f"{NAME}{part}"}


def changed(part, change):
    return lambda tensors: {**tensors, f"{NAME}{part}": change(tensors[f"{NAME}{part}"])}


STATE = ".quant_state.bitsandbytes__nf4"
DAMAGE = {
    "no absmax": ("nf4", without(".absmax"), r"has no absmax: '.*c_fc.weight.absmax' is missing"),
    "no quant_map": ("nf4", without(".quant_map"), r"has no quant_map"),
    "no quant_state": ("nf4", without(STATE), r"has no quant_state: '.*bitsandbytes__nf4' \(or fp4\) is missing"),
    "no nested_absmax": ("nf4-double", without(".nested_absmax"), r"has no nested_absmax"),
    "another type": ("nf4", lambda t: state_of(t, quant_type="fp4"), r"says 'fp4', but config.json says 'nf4'"),
    "another shape": (
        "nf4",
        lambda t: state_of(t, shape=[44, 40]),
        r"says shape \[44, 40\], the model needs \[128, 44\]",
    ),
    "another block size": ("nf4", lambda t: state_of(t, blocksize=128), r"absmax' has shape \[88\], expected \[44\]"),
    "no block size": ("nf4", lambda t: state_of(t, blocksize=0), r"says blocksize 0, expected one of"),
    "a block size that is no number": ("nf4", lambda t: state_of(t, blocksize=True), r"says blocksize True"),
    "nested blocks of 128": ("nf4-double", lambda t: state_of(t, nested_blocksize=128), r"says nested_blocksize 128"),
    "an infinite offset": ("nf4-double", lambda t: state_of(t, nested_offset=torch.inf), r"says nested_offset inf"),
    "an offset of text": ("nf4-double", lambda t: state_of(t, nested_offset="0"), r"says nested_offset '0'"),
    "no JSON": ("nf4", changed(STATE, lambda t: t[:-1]), r"is not valid JSON"),
    "no object": ("nf4", changed(STATE, lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8)), r"is a JSON list"),
    "a state of floats": ("nf4", changed(STATE, torch.Tensor.float), r"is torch.float32 of \d+ bytes, expected uint8"),
    "codes cut off": ("nf4", changed("", lambda t: t[:-1]), r"has 2815 bytes, expected 2816: 5632 codes of 4 bits"),
    "absmax of float16": ("nf4", changed(".absmax", torch.Tensor.half), r"absmax' has dtype torch.float16, expected"),
    "other values of codes": ("nf4", changed(".quant_map", lambda t: t.flip(0)), r"holds other values than nf4's"),
    "an absmax that is nan": ("nf4", changed(".absmax", lambda t: t * torch.nan), r"scales are not finite"),
    "nested scales that are nan": (
        "nf4-double",
        changed(".nested_absmax", lambda t: t * torch.nan),
        r"scales are not fin",
    ),
    "floats": ("nf4", lambda t: plain(t), r"holds torch.float32, but quantization_config says nf4 for it"),
    "int8 without SCB": (
        "int8",
        lambda t: drop(t, NAME.replace("weight", "SCB")),
        r"has no scales: '.*c_fc.SCB' is missing",
    ),
    "int8 of another shape": ("int8", changed("", lambda t: t.t()), r"has shape \[44, 128\], expected \[128, 44\]"),
    "int8 in another order": ("int8", changed("_format", lambda t: t + 1), r"weight_format' is 1, expected 0"),
    "-128": ("int8", changed("", lambda t: torch.full_like(t, -128)), r"int8 codes are -127 to 127"),
}


def drop(tensors, *names):
    return {key: value for key, value in tensors.items() if key not in names}


def plain(tensors):
    kept = {key: value for key, value in tensors.items() if not key.startswith(NAME)}
    return {**kept, NAME: torch.zeros(44, 128)}


@pytest.mark.proves("fault:F17")
@pytest.mark.parametrize("case", DAMAGE)
def test_f17_damaged_files_are_refused(folder, case):
    name, change, message = DAMAGE[case]
    copy = edit(folder(name), change)
    with pytest.raises(CheckpointError, match=message) as caught:
        GPT2LMHeadModel.from_pretrained(copy)
    assert str(copy / "model.safetensors") in str(caught.value)
    assert "transformer.h.0.mlp.c_fc" in str(caught.value)


@pytest.mark.proves("fault:F17")
@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, r"says 'nf4', but config.json says 'fp4'"),
        (
            "nf4",
            {"load_in_4bit": False, "load_in_8bit": True},
            r"has dtype torch.uint8, expected torch.int8|says 'nf4'",
        ),
        (
            "int8",
            {"load_in_8bit": False, "load_in_4bit": True},
            r"c_attn.weight' holds int8 without a quant_state, but config.json says fp4",
        ),
        ("nf4", {"load_in_4bit": False}, r"neither load_in_4bit nor load_in_8bit is true"),
        ("nf4", {"load_in_8bit": True}, r"both True"),
        ("nf4", {"llm_int8_skip_modules": 7}, r"quantization_config: "),
        ("nf4", {"bnb_4bit_quant_storage": "int3"}, r"quantization_config: bnb_4bit_quant_storage must be"),
        ("nf4", {"bnb_4bit_quant_type": "int4"}, r"bnb_4bit_quant_type must be 'fp4' or 'nf4'"),
    ],
)
def test_f17_a_config_that_does_not_fit(folder, name, fields, message):
    copy = folder(name)
    said = json.loads((copy / "config.json").read_text())["quantization_config"]
    edit_config(copy, quantization_config={**said, **fields})
    with pytest.raises(CheckpointError, match=message):
        GPT2LMHeadModel.from_pretrained(copy)


def test_fields_that_newer_versions_add_are_passed_over(folder):
    copy = folder("nf4")
    said = json.loads((copy / "config.json").read_text())["quantization_config"]
    edit_config(copy, quantization_config={**said, "bnb_4bit_something_new": 3})
    assert GPT2LMHeadModel.from_pretrained(copy).quantization_scheme == "nf4"
