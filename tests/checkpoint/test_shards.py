"""Sharded checkpoints whose index lies or points elsewhere (faults F24-F27)."""

import json
import os
import shutil

import pytest
import torch
from checkpoints import same_weights
from safetensors.torch import load_file, save_file

from gpt2rt import GPT2LMHeadModel
from gpt2rt.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(model, tmp_path):
    """A folder with at least three shards and their index."""
    folder = tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size="15KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


def edit_index(folder, change):
    path = folder / INDEX
    index = json.loads(path.read_text())
    index = change(index) or index
    path.write_text(json.dumps(index))
    return index


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        GPT2LMHeadModel.from_pretrained(folder)
    return str(caught.value)


def redirect(folder, target):
    """Let the index say that the first shard is ``target``."""

    def change(index):
        first = min(index["weight_map"].values())
        index["weight_map"] = {k: target if v == first else v for k, v in index["weight_map"].items()}

    edit_index(folder, change)


@pytest.mark.proves("L1")
def test_shards_load_bit_for_bit(model, sharded, hf):
    assert same_weights(GPT2LMHeadModel.from_pretrained(sharded), model)
    assert same_weights(hf.module.GPT2LMHeadModel.from_pretrained(sharded), model)


@pytest.mark.proves("L1")
def test_shards_written_by_transformers_load_here(model, tmp_path, hf):
    hf.copy_of(model).save_pretrained(tmp_path, max_shard_size="15KB")
    assert (tmp_path / INDEX).is_file()
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), model)


@pytest.mark.proves("fault:F24")
@pytest.mark.parametrize(
    "target",
    [
        "../outside.safetensors",
        "deep/model.safetensors",
        "..",
        "",
        ".",
        "a\\b.safetensors",
        "x\0.safetensors",
        7,
        None,
        "model.bin",
        ["model.safetensors"],
    ],
    ids=repr,
)
def test_f24_shard_names_that_are_no_plain_file_names(sharded, tmp_path, target):
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    shutil.copy(first, tmp_path / "outside.safetensors")

    def change(index):
        index["weight_map"] = {k: target if v == first.name else v for k, v in index["weight_map"].items()}

    edit_index(sharded, change)
    refused(sharded, r"is said to be in .*, expected the plain name of a .safetensors file")


@pytest.mark.proves("fault:F24")
def test_f24_an_absolute_path_is_never_opened(sharded, tmp_path):
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    outside = tmp_path / "outside.safetensors"
    shutil.move(first, outside)
    # a pipe without a writer: opening it would hang
    outside.unlink()
    os.mkfifo(outside)
    redirect(sharded, str(outside))
    refused(sharded, r"expected the plain name")


@pytest.mark.proves("fault:F25")
def test_f25_a_link_out_of_the_folder(sharded, tmp_path):
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    shutil.move(first, tmp_path / "outside.safetensors")
    first.symlink_to(tmp_path / "outside.safetensors")
    refused(sharded, r"is a link to .*outside.safetensors, outside the checkpoint's folder")
    first.unlink()
    shutil.move(tmp_path / "outside.safetensors", sharded / "inside.safetensors")
    first.symlink_to("inside.safetensors")
    GPT2LMHeadModel.from_pretrained(sharded)


def test_f25_the_links_of_the_hub_cache_are_followed(model, sharded, tmp_path):
    repository = tmp_path / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0" / "deep"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../../blobs/{number}")
    assert same_weights(GPT2LMHeadModel.from_pretrained(snapshot), model)
    assert same_weights(GPT2LMHeadModel.from_pretrained(snapshot.parent, subfolder="deep"), model)


@pytest.mark.proves("fault:F26")
@pytest.mark.parametrize("weight_map", [[], {}, ["a"], "model.safetensors", None], ids=repr)
def test_f26_weight_map_is_no_object(sharded, weight_map):
    edit_index(sharded, lambda index: {**index, "weight_map": weight_map})
    refused(sharded, r"weight_map is .*, expected a non-empty object")


@pytest.mark.proves("fault:F26")
def test_f26_a_missing_shard_is_named(sharded):
    names = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    (sharded / names[1]).unlink()
    text = refused(sharded, rf"lists {len(names)} shards, missing: {names[1]}; present: {names[0]}")
    assert names[2] in text


@pytest.mark.proves("fault:F27")
def test_f27_a_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second)
    refused(sharded, rf"tensor '{name}' is in two shards, {first.name} and {second.name}")


@pytest.mark.proves("fault:F27")
def test_f27_index_and_shards_disagree(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    edit_index(sharded, lambda index: index["weight_map"].update({name: second.name}))
    refused(sharded, rf"disagree: 1 tensors are not in the shard listed, such as '{name}'")
    edit_index(sharded, lambda index: index["weight_map"].pop(name) and None)
    refused(sharded, rf"disagree: 1 tensors are not listed, such as '{name}'")
    edit_index(sharded, lambda index: index["weight_map"].update({name: first.name, "ghost": first.name}))
    refused(sharded, r"disagree: 1 tensors are not in the shard listed, such as 'ghost'")


@pytest.mark.proves("fault:F27")
def test_f27_total_size(model, sharded):
    edit_index(sharded, lambda index: index["metadata"].update(total_size=5))
    text = refused(sharded, r"total_size is 5 bytes, but the shards .* hold \d+")
    assert "model-00002" in text
    edit_index(sharded, lambda index: {"weight_map": index["weight_map"]})
    assert same_weights(GPT2LMHeadModel.from_pretrained(sharded), model)


def test_a_damaged_shard_is_named(sharded):
    second = sorted(sharded.glob("model-*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:-1])
    refused(sharded, rf"{second.name} has \d+ bytes, expected \d+: the file is cut off")


@pytest.mark.proves("L1")
def test_bin_shards(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    names = list(state)
    files = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for file, held in files.items():
        torch.save({name: state[name].clone() for name in held}, tmp_path / file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, held in files.items() for name in held},
    }
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), model)
    index["weight_map"][names[0]] = "model.safetensors"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(tmp_path, r"expected the plain name of a .bin file")
