"""``disable_mmap=False``: weights that are views of their files."""

import copy
import json
import os
import pickle

import pytest
import torch
from torch import nn

from gpt2rt import CheckpointError, GPT2Config, GPT2LMHeadModel

IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=32, n_embd=48, n_head=3, n_layer=2, eos_token_id=None)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def mapped_files():
    """The files that this process maps, without those it executes."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        return {line.split(maxsplit=5)[5].strip() for line in file if len(line.split(maxsplit=5)) == 6}


def load(folder, **kwargs):
    return GPT2LMHeadModel.from_pretrained(folder, disable_mmap=False, **kwargs)


def test_the_weights_are_those_that_are_read(saved):
    model, plain = load(saved), GPT2LMHeadModel.from_pretrained(saved)
    expected = plain.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert torch.equal(model.generate(IDS, max_new_tokens=4), plain.generate(IDS, max_new_tokens=4))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_only_who_asks_gets_a_mapping(saved):
    path = str(saved / "model.safetensors")
    for value in (None, True):
        model = GPT2LMHeadModel.from_pretrained(saved, disable_mmap=value)
        assert path not in mapped_files()
    model = load(saved)
    assert path in mapped_files()
    del model
    assert path not in mapped_files()


def test_one_tensor_keeps_the_mapping_and_a_storage_of_its_own(saved):
    weight = load(saved).transformer.h[0].mlp.c_fc.weight
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert weight.float().isfinite().all()
    assert len(pickle.dumps(weight)) < 2 * weight.nbytes


def test_training_changes_the_model_and_not_the_file(saved):
    before = (saved / "model.safetensors").read_bytes()
    model = load(saved).train()
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)
    plain = GPT2LMHeadModel.from_pretrained(saved)
    assert not torch.equal(model.transformer.wte.weight, plain.transformer.wte.weight)
    assert (saved / "model.safetensors").read_bytes() == before


def test_saving_over_the_mapped_files_leaves_the_model_alone(saved):
    model = load(saved)
    expected = model(IDS).logits
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.transformer.wte.weight.add_(1.0)
    changed.save_pretrained(saved)
    assert torch.equal(model(IDS).logits, expected)
    model.save_pretrained(saved)
    assert torch.equal(GPT2LMHeadModel.from_pretrained(saved)(IDS).logits, expected)


def test_other_dtypes_shards_and_names(saved, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(saved)
    assert torch.equal(load(saved, dtype=torch.bfloat16).lm_head.weight, model.lm_head.weight.bfloat16())
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(load(tmp_path / "shards")(IDS).logits, model(IDS).logits)
    renamed = load(saved, key_mapping={"^nothing": "else"})
    assert torch.equal(renamed(IDS).logits, model(IDS).logits)


def test_an_odd_address_is_read(saved):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length])).encode()
    # data that begins at 8 n + 1: no float32 can lie there
    header += b" " * ((1 - len(header)) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    expected = nn.Embedding.from_pretrained(load(saved).transformer.wte.weight)(IDS)
    assert str(path) not in mapped_files()
    assert expected.isfinite().all()


def test_a_file_that_shrinks_while_it_is_loaded_is_an_error(saved, monkeypatch):
    from gpt2rt.checkpoint import weights

    plain = weights.open_file

    def shrink(path):
        os.truncate(path, path.stat().st_size // 2)
        return plain(path)

    monkeypatch.setattr(weights, "open_file", shrink)
    with pytest.raises(CheckpointError, match="became shorter while it was being read"):
        load(saved)


def test_nan_is_still_found(saved):
    model = GPT2LMHeadModel.from_pretrained(saved)
    with torch.no_grad():
        model.transformer.wpe.weight[3, 4] = float("nan")
    model.save_pretrained(saved)
    with pytest.raises(CheckpointError, match="1 NaN or infinite"):
        load(saved)
