"""tf_model.h5 and flax_model.msgpack: what the removed classes of transformers wrote loads here, bit for bit."""

import builtins
import json
import pathlib
import warnings

import foreign_files as files
import h5py
import pytest
import torch
from checkpoints import same_weights, small_config
from safetensors.torch import save_file

import gpt2rt
from gpt2rt.errors import CheckpointError

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
# the classes that TensorFlow had; Flax had GPT2Model and GPT2LMHeadModel only
GPT2_CLASSES = {
    "GPT2Model": {},
    "GPT2LMHeadModel": {},
    "GPT2DoubleHeadsModel": {},
    "GPT2ForSequenceClassification": {"num_labels": 3},
}
GPT_CLASSES = {
    "OpenAIGPTModel": {},
    "OpenAIGPTLMHeadModel": {},
    "OpenAIGPTDoubleHeadsModel": {},
    "OpenAIGPTForSequenceClassification": {"num_labels": 3},
}


def make(name, **fields):
    torch.manual_seed(0)
    if name.startswith("GPT2"):
        config = small_config(**fields)
    else:
        config = gpt2rt.OpenAIGPTConfig(n_layer=2, n_embd=24, n_head=3, vocab_size=61, n_positions=16, **fields)
    model = getattr(gpt2rt, name)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def folder_of(model, folder):
    """The folder with the model's config.json and no weights."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return folder


def load(cls, folder, **keywords):
    """Load without a warning, with nothing missing or left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = cls.from_pretrained(folder, output_loading_info=True, **keywords)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == set()
    return model


# ---- files that the frameworks wrote ---------------------------------------------------------------------------------


@pytest.mark.proves("I39")
@pytest.mark.proves("L1")
@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/expected.json")))
def test_files_written_by_tensorflow_and_flax_give_their_numbers(name):
    """The numbers in expected.json were computed by transformers 4.57.6 on TensorFlow and Flax (golden/make.py)."""
    folder = GOLDEN / name
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0].removeprefix("Flax")
    model = load(getattr(gpt2rt, architecture), folder)
    expected = json.loads((folder / "expected.json").read_text())
    ids = torch.tensor(expected.pop("input_ids"))
    with torch.no_grad():
        output = model(ids[None] if "Double" in architecture else ids)
    assert expected
    for key, values in expected.items():
        torch.testing.assert_close(getattr(output, key), torch.tensor(values), rtol=0, atol=2e-5)


def test_all_frameworks_are_among_the_files():
    assert {path.name for path in GOLDEN.glob("*/*.*") if path.suffix in (".h5", ".msgpack")} == {
        "tf_model.h5",
        "flax_model.msgpack",
    }


# ---- every class -----------------------------------------------------------------------------------------------------


@pytest.mark.proves("L1")
@pytest.mark.parametrize(("name", "fields"), [*GPT2_CLASSES.items(), *GPT_CLASSES.items()], ids=str)
@pytest.mark.parametrize("shards", [False, True], ids=["one", "shards"])
def test_tensorflow_files_of_every_class(tmp_path, name, fields, shards):
    model = make(name, **fields)
    folder = folder_of(model, tmp_path / "tf")
    if shards:
        files.write_h5_shards(folder, model)
    else:
        files.write_h5(folder / "tf_model.h5", model)
    for keywords in ({}, {"from_tf": True}, {"use_safetensors": False}):
        assert same_weights(load(type(model), folder, **keywords), model)


@pytest.mark.proves("L1")
@pytest.mark.parametrize(("name", "fields"), [("GPT2Model", {}), ("GPT2LMHeadModel", {})])
@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": False}, {"add_cross_attention": True}], ids=str)
@pytest.mark.parametrize("shards", [False, True], ids=["one", "shards"])
def test_flax_files_of_every_class(tmp_path, name, fields, more, shards):
    model = make(name, **fields, **more)
    folder = folder_of(model, tmp_path / "flax")
    if shards:
        files.write_msgpack_shards(folder, model)
    else:
        files.write_msgpack(folder / "flax_model.msgpack", model)
    for keywords in ({}, {"from_flax": True}, {"use_safetensors": False}):
        assert same_weights(load(type(model), folder, **keywords), model)


def test_flax_keeps_bfloat16_and_large_arrays_in_pieces(tmp_path):
    model = make("GPT2LMHeadModel").to(torch.bfloat16)
    folder = folder_of(model, tmp_path / "flax")
    path = folder / "flax_model.msgpack"
    files.write_msgpack(path, model, lambda t: files.flax_chunks(t, 100) if t.numel() > 500 else files.flax_array(t))
    loaded = load(type(model), folder)
    assert loaded.dtype == torch.bfloat16
    assert same_weights(loaded, model)


@pytest.mark.proves("L1")
def test_a_file_of_2019(tmp_path):
    """transformers 2 called the model tfgp_t2lm_head_model, and wte was a TFSharedEmbeddings, with a ``weight``."""
    model = make("GPT2LMHeadModel")
    folder = folder_of(model, tmp_path / "old")
    files.write_h5(folder / "tf_model.h5", model, name="tfgp_t2lm_head_model")
    with h5py.File(folder / "tf_model.h5", "r+") as file:
        wte = file["transformer/tfgp_t2lm_head_model/transformer/wte"]
        wte.move("embeddings:0", "weight:0")
    assert same_weights(load(type(model), folder), model)


@pytest.mark.parametrize("framework", ["tf", "flax"])
def test_safetensors_written_by_the_other_frameworks(tmp_path, framework):
    """TensorFlow's and Flax's save_pretrained(safe_serialization=True): their names in a safetensors file."""
    model = make("GPT2LMHeadModel")
    folder = folder_of(model, tmp_path / "safe")
    if framework == "tf":
        pairs = [files.tensorflow_variable(key, value) for key, value in files.own_tensors(model).items()]
        tensors = {name: torch.from_numpy(value) for name, value in pairs}
    else:
        pairs = [files.flax_parameter(key, value) for key, value in files.flax_state(model).items()]
        tensors = {".".join(levels): tensor for levels, tensor in pairs}
    save_file(tensors, folder / "model.safetensors", metadata={"format": framework})
    assert same_weights(load(type(model), folder), model)
    # in shards, names in TensorFlow's index begin with the model's own
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": framework})
        weight_map |= {f"tfgpt2lm_head_model/{n}" if framework == "tf" else n: shard for n in part}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_weights(load(type(model), folder), model)


def test_bare_models_and_heads_are_interchangeable(tmp_path):
    model = make("GPT2LMHeadModel")
    folder = folder_of(model, tmp_path / "tf")
    files.write_h5(folder / "tf_model.h5", model)
    assert same_weights(load(gpt2rt.GPT2Model, folder), model.transformer)
    files.write_msgpack(folder / "flax_model.msgpack", model.transformer)
    assert same_weights(load(type(model), folder, from_flax=True), model)
    with pytest.warns(UserWarning, match=r"does not provide score.weight: newly initialised"):
        gpt2rt.GPT2ForSequenceClassification.from_pretrained(folder)


@pytest.mark.proves("I39")
@pytest.mark.proves("L3")
def test_loading_and_saving_is_a_conversion(tmp_path, hf):
    model = make("GPT2DoubleHeadsModel")
    folder = folder_of(model, tmp_path / "tf")
    files.write_h5(folder / "tf_model.h5", model)
    load(type(model), folder).save_pretrained(tmp_path / "converted")
    assert same_weights(hf.module.GPT2DoubleHeadsModel.from_pretrained(tmp_path / "converted"), model)


def test_safetensors_come_first_and_the_arguments_choose(tmp_path):
    ours, tf, flax = make("GPT2LMHeadModel"), make("GPT2LMHeadModel"), make("GPT2LMHeadModel")
    for number, model in enumerate((tf, flax), start=1):
        torch.nn.init.constant_(model.transformer.wpe.weight, float(number))
    ours.save_pretrained(tmp_path)
    files.write_h5(tmp_path / "tf_model.h5", tf)
    files.write_msgpack(tmp_path / "flax_model.msgpack", flax)
    cls = type(ours)
    assert same_weights(load(cls, tmp_path), ours)
    assert same_weights(load(cls, tmp_path, from_tf=True), tf)
    assert same_weights(load(cls, tmp_path, from_flax=True), flax)
    assert same_weights(load(cls, tmp_path, use_safetensors=False), tf)
    for keywords in (
        {"from_tf": True, "from_flax": True},
        {"from_tf": True, "use_safetensors": True},
        {"from_flax": True, "variant": "fp16"},
    ):
        with pytest.raises(ValueError, match="exclude each other"):
            cls.from_pretrained(tmp_path, **keywords)
    (tmp_path / "tf_model.h5").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: expected tf_model.h5 or tf_model.h5.index.json$"):
        cls.from_pretrained(tmp_path, from_tf=True)


# ---- checked like any checkpoint -------------------------------------------------------------------------------------


@pytest.fixture(params=["tf", "flax"])
def writer(request, tmp_path):
    """(folder, function that writes a model's weights into it)."""
    folder = folder_of(make("GPT2LMHeadModel"), tmp_path / request.param)
    write = files.write_h5 if request.param == "tf" else files.write_msgpack
    name = "tf_model.h5" if request.param == "tf" else "flax_model.msgpack"
    return folder, lambda model: write(folder / name, model), name


@pytest.mark.proves("fault:F11", "fault:F12", "fault:F13", "fault:F14", "fault:F19")
def test_shapes_names_and_numbers_are_checked(writer):
    folder, write, filename = writer
    cls = gpt2rt.GPT2LMHeadModel

    def refused(change, match):
        model = make("GPT2LMHeadModel")
        change(model)
        write(model)
        with pytest.raises(CheckpointError, match=match) as caught:
            cls.from_pretrained(folder)
        assert filename in str(caught.value)

    key = "transformer.h.1.mlp.c_proj.weight"
    refused(lambda m: m.get_parameter(key).data[3].fill_(float("nan")), rf"{'c_proj'}.* holds 24 NaN or infinite")
    refused(
        lambda m: setattr(
            m.transformer.h[1].mlp.c_proj, "weight", torch.nn.Parameter(m.get_parameter(key).t().contiguous())
        ),
        r"has shape \[24, 40\], the model expects \[40, 24\]; it is stored transposed",
    )
    refused(lambda m: delattr(m.transformer, "wpe"), r"lacks 1 weights of GPT2LMHeadModel: transformer.wpe.weight")
    refused(lambda m: m.transformer.h.append(m.transformer.h[0]), r"holds weights of 3 blocks, .* n_layer = 2")
    model = make("GPT2LMHeadModel")
    model.transformer.value = torch.nn.LayerNorm(3)
    write(model)
    with pytest.warns(UserWarning, match=r"does not use: transformer.value.bias, transformer.value.weight"):
        cls.from_pretrained(folder)


@pytest.mark.proves("fault:F29")
def test_a_file_that_shrinks_while_it_is_read(writer, monkeypatch):
    folder, write, filename = writer
    write(make("GPT2LMHeadModel"))
    path = folder / filename
    original = gpt2rt.checkpoint.weights.ForeignWeights.read

    def shrink_then_read(self, name):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        return original(self, name)

    monkeypatch.setattr(gpt2rt.checkpoint.weights.ForeignWeights, "read", shrink_then_read)
    with pytest.raises(CheckpointError, match=rf"{filename}: tensor '.*' ended after \d+ of \d+ bytes"):
        gpt2rt.GPT2LMHeadModel.from_pretrained(folder)


def test_an_index_that_disagrees_with_its_shards(tmp_path):
    model = make("GPT2LMHeadModel")
    folder = folder_of(model, tmp_path / "tf")
    files.write_h5_shards(folder, model)
    index = folder / "tf_model.h5.index.json"
    good = json.loads(index.read_text())
    some = next(iter(good["weight_map"]))
    for change, match in (
        ({"weight_map": {**good["weight_map"], some: "../tf_model.h5"}}, r"expected the plain name of a .h5 file"),
        ({"weight_map": {**good["weight_map"], some: "tf_model-00009-of-00003.h5"}}, r"missing: tf_model-00009-of"),
        ({"metadata": {"total_size": 1}}, r"total_size is 1 bytes, but the shards .* hold"),
        ({"weight_map": {k: v for k, v in good["weight_map"].items() if k != some}}, r"1 tensors are not listed"),
    ):
        index.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=match):
            type(model).from_pretrained(folder)


def test_without_h5py_one_sentence_tells_what_to_install(tmp_path, monkeypatch):
    model = make("GPT2LMHeadModel")
    folder = folder_of(model, tmp_path / "tf")
    files.write_h5(folder / "tf_model.h5", model)
    real = builtins.__import__

    def without(name, *rest, **keywords):
        if name == "h5py":
            raise ImportError("No module named 'h5py'")
        return real(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"tf_model.h5 needs the package h5py .*pip install 'gpt2rt\[importers\]'$"):
        type(model).from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.ckpt.index", "the TensorFlow checkpoint of OpenAI's GPT-2 release"),
        ("params_0.npy", "the numpy files of OpenAI's GPT release"),
        ("model.onnx", "an ONNX graph"),
        ("adapter_model.safetensors", "an adapter without its base model"),
        ("weights.gguf", "GGUF"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path, name, words):
    folder = folder_of(make("GPT2LMHeadModel"), tmp_path / "foreign")
    (folder / name).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=rf"has no weights: .*found {name} \({words}\), which gpt2rt does not read"
    ):
        gpt2rt.GPT2LMHeadModel.from_pretrained(folder)
    # the original releases have no config.json either
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=rf"has no config.json; found {name} \({words}\)"):
        gpt2rt.GPT2LMHeadModel.from_pretrained(folder)
