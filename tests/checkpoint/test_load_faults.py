"""Pickled files, and files that change or fail while they are read (faults F28, F29)."""

import gc
import io
import os
import pathlib
import pickle
import weakref

import pytest
import torch
from checkpoints import edit, same_weights

import gpt2rt.checkpoint.weights as weights_module
from gpt2rt import GPT2LMHeadModel
from gpt2rt.errors import CheckpointError

# ---- .bin files ------------------------------------------------------------------------------------------------------


@pytest.mark.proves("L1")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_bin_files(model, saved, legacy):
    path = saved / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    edit(saved, lambda tensors: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert not same_weights(GPT2LMHeadModel.from_pretrained(saved), model)
    for loaded in (
        GPT2LMHeadModel.from_pretrained(saved, use_safetensors=False),
        (saved / "model.safetensors").unlink() or GPT2LMHeadModel.from_pretrained(saved),
    ):
        assert same_weights(loaded, model)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
    with pytest.raises(CheckpointError, match=r"expected model.safetensors or model.safetensors.index.json$"):
        GPT2LMHeadModel.from_pretrained(saved, use_safetensors=True)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path(self.marker),))


@pytest.mark.proves("fault:F28")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_f28_code_in_a_bin_file_does_not_run(model, saved, tmp_path, legacy):
    marker = tmp_path / "ran"
    evil = {**model.state_dict(), "x": Payload(marker)}
    (saved / "model.safetensors").unlink()
    torch.save(evil, saved / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin cannot be loaded as plain tensors"):
        GPT2LMHeadModel.from_pretrained(saved)
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(CheckpointError, match=r"cannot be loaded as plain tensors"):
        GPT2LMHeadModel.from_pretrained(saved)
    assert not marker.exists()
    # the payload does work where it is let loose, so its absence above means something
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


@pytest.mark.proves("fault:F28")
def test_bin_files_that_hold_something_else(model, saved):
    (saved / "model.safetensors").unlink()
    path = saved / "pytorch_model.bin"
    for content, message in (
        ([torch.ones(2)], r"holds a list, expected a state dict"),
        ({"model": model.state_dict()}, r"entry 'model' is OrderedDict, expected a tensor"),
        ({"wte.weight": torch.eye(3).to_sparse()}, r"is not a plain dense tensor"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            GPT2LMHeadModel.from_pretrained(saved)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot be loaded"):
        GPT2LMHeadModel.from_pretrained(saved)


# ---- files that change or fail (F29) ---------------------------------------------------------------------------------


class FaultyFile(io.FileIO):
    """A file whose reads go wrong after ``good`` calls to readinto."""

    good, fault, left = 0, None, 0

    def readinto(self, buffer):
        type(self).left -= 1
        if type(self).left < 0:
            return type(self).fault(self, buffer)
        return super().readinto(buffer)


def read_error(file, buffer):
    raise OSError(5, "Input/output error")


def early_end(file, buffer):
    return 0


@pytest.mark.proves("fault:F29")
@pytest.mark.parametrize("good", [0, 1, 7])
@pytest.mark.parametrize(
    ("fault", "message"),
    [(read_error, r"reading tensor '.*' failed: .*Input/output error"), (early_end, r"ended after 0 of \d+ bytes")],
    ids=["error", "end"],
)
def test_f29_reads_that_fail(saved, monkeypatch, good, fault, message):
    FaultyFile.left, FaultyFile.fault = good, fault
    monkeypatch.setattr(weights_module, "open_file", lambda path: FaultyFile(path))
    built = weakref.WeakSet()

    class Tracked(GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            built.add(self)

    with pytest.raises(CheckpointError, match=message) as caught:
        Tracked.from_pretrained(saved)
    assert "model.safetensors" in str(caught.value)
    assert len(built) == 1, "held by the traceback alone"
    del caught
    gc.collect()
    assert len(built) == 0


@pytest.mark.proves("fault:F29")
def test_f29_a_file_that_vanishes_or_changes_while_it_is_read(saved, monkeypatch):
    path = saved / "model.safetensors"
    data = path.read_bytes()

    def then(action):
        def opened(path):
            file = io.FileIO(path)
            action()
            return file

        return opened

    monkeypatch.setattr(weights_module, "open_file", then(path.unlink))
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        GPT2LMHeadModel.from_pretrained(saved)
    path.write_bytes(data)
    monkeypatch.setattr(weights_module, "open_file", then(lambda: os.truncate(path, len(data) // 2)))
    with pytest.raises(CheckpointError, match=r"tensor '.*' ended after \d+ of \d+ bytes"):
        GPT2LMHeadModel.from_pretrained(saved)


def test_f29_short_reads_are_continued(model, saved, monkeypatch):
    class Slow(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:97])

    monkeypatch.setattr(weights_module, "open_file", Slow)
    assert same_weights(GPT2LMHeadModel.from_pretrained(saved), model)
