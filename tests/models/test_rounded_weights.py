"""Quantising while loading, twice: the second start takes the codes that the first one found."""

import os

import pytest
import torch

from gpt2rt import GPT2Config, GPT2LMHeadModel, ops
from gpt2rt.graph import packed_cache
from gpt2rt.models import quantized_loading, rounded_weights

pytestmark = pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")

IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache as users have it, in a folder of this test, for models of any size."""
    monkeypatch.setenv("GPT2RT_PACKED_CACHE", "1")
    monkeypatch.setenv("GPT2RT_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(packed_cache, "MIN_BYTES", 0)
    return tmp_path / "home" / "packed"


@pytest.fixture
def roundings(monkeypatch):
    """How many matrices were quantised."""
    counts = [0]
    plain = quantized_loading.quantize_rtn

    def counting(*args, **kwargs):
        counts[0] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(quantized_loading, "quantize_rtn", counting)
    return counts


def save(folder, seed=0, **fields):
    torch.manual_seed(seed)
    config = {"vocab_size": 61, "n_positions": 32, "n_embd": 64, "n_head": 4, "n_layer": 2, "eos_token_id": None}
    GPT2LMHeadModel(GPT2Config(**config, **fields)).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return save(tmp_path / "model")


def load(checkpoint, quantization="int4", **kwargs):
    model = GPT2LMHeadModel.from_pretrained(checkpoint, quantization=quantization, **kwargs)
    packed_cache.wait_for_writes()
    return model


def entries(folder):
    packed_cache.wait_for_writes()
    return sorted(folder.glob("*.pack")) if folder.exists() else []


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


SCHEMES = {
    "int8": "int8",
    "int4": "int4",
    "zero points": {"scheme": "int4", "symmetric": False, "group_size": 32, "embeddings": "int4"},
    "nf4": "nf4",
    "exact": {"scheme": "int4", "activations": "float32", "embeddings": "none"},
    "narrow table": {"scheme": "fp4", "embeddings": "bfloat16"},
    "skipping": {"scheme": "int8", "skip_modules": ["mlp"]},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_second_start_rounds_nothing_and_has_the_same_weights(tmp_path, roundings, scheme, tied):
    checkpoint = save(tmp_path / "model", tie_word_embeddings=tied)
    first = load(checkpoint, SCHEMES[scheme])
    assert roundings[0] > 0
    roundings[0] = 0
    second = load(checkpoint, SCHEMES[scheme])
    assert roundings[0] == 0
    assert same(first, second)
    assert second.config.to_dict() == first.config.to_dict()
    assert torch.equal(second(IDS).logits, first(IDS).logits)
    assert torch.equal(second.generate(IDS, max_new_tokens=4), first.generate(IDS, max_new_tokens=4))


def test_nested_scales_are_rounded_again(checkpoint, roundings, folder):
    nested = {"scheme": "nf4", "double_quant": True, "embeddings": "none"}
    first = load(checkpoint, nested)
    assert entries(folder) == []
    assert same(load(checkpoint, nested), first)


def test_other_floats_configs_and_quantisers_are_other_entries(checkpoint, tmp_path, roundings, folder, monkeypatch):
    load(checkpoint)
    load(save(tmp_path / "other", seed=1))
    load(checkpoint, {"scheme": "int4", "group_size": 32})
    load(checkpoint, {"scheme": "int4", "skip_modules": ["lm_head", "wte"]})
    monkeypatch.setattr(rounded_weights, "_quantisers", lambda: b"changed")
    load(checkpoint)
    assert len(entries(folder)) == 5
    monkeypatch.undo()


def test_a_changed_checkpoint_with_the_old_size_and_date(checkpoint):
    first = load(checkpoint)
    path = checkpoint / "model.safetensors"
    status = path.stat()
    other = save(checkpoint.parent / "other", seed=1) / "model.safetensors"
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = load(checkpoint)
    assert not same(changed, first)
    assert same(changed, load(other.parent))


def test_a_damaged_entry_is_made_again(checkpoint, folder, roundings):
    first = load(checkpoint)
    (path,) = entries(folder)
    good = path.read_bytes()
    path.write_bytes(good[:700] + bytes([good[700] ^ 1]) + good[701:])
    roundings[0] = 0
    assert same(load(checkpoint), first)
    assert roundings[0] > 0
    assert path.read_bytes() == good


def test_weights_from_the_cache_belong_to_the_model_alone(checkpoint, roundings):
    first = load(checkpoint)
    second = load(checkpoint)
    layer = second.transformer.h[0].mlp.c_fc
    codes = next(buffer for buffer in layer.buffers() if buffer.dtype == torch.uint8)
    assert codes.untyped_storage().nbytes() == codes.nbytes
    codes.zero_()
    assert not same(second, first)
    assert same(load(checkpoint), first)


def test_tensors_in_memory_leave_no_entry(checkpoint, folder):
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    quantised = GPT2LMHeadModel.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), quantization="int4"
    )
    assert quantised.is_quantized
    assert entries(folder) == []


def test_off_means_off(checkpoint, folder, monkeypatch):
    monkeypatch.setenv("GPT2RT_PACKED_CACHE", "0")
    load(checkpoint)
    assert not folder.exists()
