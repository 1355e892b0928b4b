"""Files and arguments that are no checkpoint at all: pipes, links to nothing, absurd JSON, names of wrong types."""

import json
import os

import pytest
import torch
from checkpoints import edit_config, safetensors_bytes

from gpt2rt import AutoConfig, AutoModelForCausalLM, GenerationConfig, GPT2LMHeadModel
from gpt2rt.checkpoint.msgpack_file import read_msgpack
from gpt2rt.checkpoint.resolve import Source
from gpt2rt.checkpoint.safetensors_file import read_header
from gpt2rt.checkpoint.stored import MAX_TENSORS
from gpt2rt.errors import CheckpointError, ConfigError

LOADERS = [GPT2LMHeadModel.from_pretrained, AutoModelForCausalLM.from_pretrained]
IDS = ["class", "auto"]


def pipe(path):
    os.mkfifo(path)


def link_to_nothing(path):
    path.symlink_to(path.parent / "gone")


def link_to_itself(path):
    path.symlink_to(path.name)


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("load", LOADERS, ids=IDS)
@pytest.mark.parametrize("make", [pipe, link_to_nothing, link_to_itself, device, os.mkdir])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_what_is_no_regular_file_is_refused_and_nothing_is_taken_instead(model, saved, load, make, name):
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    (saved / name).unlink()
    make(saved / name)
    with pytest.raises(CheckpointError, match=rf"{name} is a link to nothing, .* expected a regular file"):
        load(saved)


@pytest.mark.parametrize("load", [*LOADERS, AutoConfig.from_pretrained, Source], ids=[*IDS, "config", "source"])
def test_names_that_are_none(load):
    for name in ("", "a" * 300, "/a" * 3000, "a\0b"):
        with pytest.raises(CheckpointError, match="is no name of a folder or hub id") as raised:
            load(name)
        assert len(str(raised.value)) < 200
    for name in (5, b"gpt2", ["gpt2"], {"n_embd": 8}):
        with pytest.raises(TypeError, match=f"given as a {type(name).__name__}, expected a folder"):
            load(name)


@pytest.mark.parametrize("load", LOADERS, ids=IDS)
def test_arguments_of_wrong_types(saved, load):
    with pytest.raises(CheckpointError, match="tiny-gpt2 has no subfolder 'zz'"):
        load("gpt2rt/tiny-gpt2", subfolder="zz")
    with pytest.raises(ValueError, match=r"variant = '/../x', expected the middle of a file name"):
        load(saved, variant="/../x")
    for given in ({"top_k": 3}, "sample"):
        with pytest.raises(TypeError, match=r"generation_config is a .*, expected a GenerationConfig"):
            load(saved, generation_config=given)
    with pytest.raises(TypeError, match="key_mapping is a list, expected a dictionary"):
        load(saved, key_mapping=["x"])
    with pytest.raises(TypeError, match="state_dict is a list, expected a dictionary"):
        load(saved, state_dict=[1])


def test_generation_configs_of_transformers_are_converted(saved):
    transformers = pytest.importorskip("transformers")
    model = GPT2LMHeadModel.from_pretrained(saved, generation_config=transformers.GenerationConfig(top_k=7))
    assert type(model.generation_config) is GenerationConfig
    assert model.generation_config.top_k == 7


def test_a_bad_generation_setting_is_refused_with_its_file(saved):
    (saved / "generation_config.json").write_text('{"top_k": "many"}')
    with pytest.raises(ConfigError, match=r"generation_config.json: top_k must be an integer .* got 'many'"):
        GPT2LMHeadModel.from_pretrained(saved)
    (saved / "generation_config.json").unlink()
    edit_config(saved, temperature=-1)
    with pytest.raises(ConfigError, match=r"checkpoint: config.json: temperature must be .* got -1"):
        GPT2LMHeadModel.from_pretrained(saved)


@pytest.mark.proves("fault:F18")
@pytest.mark.parametrize("load", [*LOADERS, AutoConfig.from_pretrained], ids=[*IDS, "config"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validate": 1}, "cannot be called 'validate'"),
        ({"__class__": "x"}, "cannot be called '__class__'"),
        ({"use_return_dict": True}, "cannot be called 'use_return_dict'"),
        ({"self": 1}, "cannot be called 'self'"),
        ({"id2label": {"0": []}}, "must map label numbers to names"),
        ({"label2id": 5}, "must map names of labels to numbers"),
    ],
)
def test_config_fields_that_would_break_the_class(saved, load, fields, message):
    edit_config(saved, **fields)
    with pytest.raises(ConfigError, match=message):
        load(saved)


@pytest.mark.proves("fault:F20")
def test_absurd_numbers_of_labels_take_no_memory(saved):
    edit_config(saved, num_labels=10**10)
    with pytest.raises(ConfigError, match="num_labels = 10000000000, but it must be an integer from 1 to 1000000"):
        AutoConfig.from_pretrained(saved)


@pytest.mark.proves("fault:F20", "fault:F21")
def test_json_that_is_too_large_or_says_a_thing_twice(saved):
    path = saved / "config.json"
    text = path.read_text()
    path.write_text(text.rstrip()[:-1] + ', "n_head": 1}')
    with pytest.raises(CheckpointError, match="the name 'n_head' occurs twice"):
        GPT2LMHeadModel.from_pretrained(saved)
    path.write_text('{"a": [' + "[]," * 3_000_000 + "[]]}")
    with pytest.raises(CheckpointError, match="has 9000011 bytes, expected at most 8388608"):
        GPT2LMHeadModel.from_pretrained(saved)


def test_a_name_that_comes_twice_is_found_in_linear_time(tmp_path):
    path = tmp_path / "model.safetensors"
    names = ",".join(f'"{i}":0' for i in range(300_000))
    path.write_bytes(safetensors_bytes(f'{{{names},"z":1,"z":2}}'.encode()))
    # comparing each name with each other would take minutes
    with pytest.raises(CheckpointError, match="the name 'z' occurs twice"):
        read_header(path)


@pytest.mark.parametrize("name", ["h." + "9" * 5000 + ".x", "x" * 100_000])
def test_names_of_tensors_without_end(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        safetensors_bytes(json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode())
    )
    with pytest.raises(
        CheckpointError, match=f"the name of a tensor has {len(name)} characters, expected at most 1024"
    ):
        read_header(path)
    path.write_bytes(safetensors_bytes(json.dumps({"w": name}).encode()))
    with pytest.raises(CheckpointError, match="tensor 'w' is described by") as raised:
        read_header(path)
    assert len(str(raised.value)) < 400


def test_numbers_of_blocks_without_end(model, saved):
    state = {**model.state_dict(), "h." + "9" * 5000 + ".x": torch.zeros(1)}
    with pytest.warns(UserWarning, match="does not use"):
        GPT2LMHeadModel.from_pretrained(saved, state_dict=state)


@pytest.mark.proves("fault:F20")
def test_empty_maps_without_end_in_a_flax_file(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    count = MAX_TENSORS + 1
    # a map of names that all hold empty maps
    path.write_bytes(b"\xdf" + count.to_bytes(4, "big") + b"".join(b"\xa6%06d\x80" % i for i in range(count)))
    with pytest.raises(CheckpointError, match=f"holds more than {MAX_TENSORS} names"):
        read_msgpack(path)


@pytest.mark.proves("fault:F30")
def test_a_folder_in_the_place_of_a_file_is_seen_before_anything_is_replaced(model, saved):
    before = (saved / "model.safetensors").read_bytes()
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    with torch.no_grad():
        model.transformer.wte.weight.add_(1)
    with pytest.raises(CheckpointError, match=r"config.json: it is a folder; move it away"):
        model.save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert not list(saved.glob(".*.tmp"))
