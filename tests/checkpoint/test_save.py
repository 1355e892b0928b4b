"""save_pretrained: files that transformers reads back bit for bit, and saves that fail half-way (L3, fault F30)."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import WithScore, same_weights, small_config
from safetensors import safe_open
from safetensors.torch import load_file

import gpt2rt.checkpoint.atomic as atomic
from gpt2rt import GPT2LMHeadModel
from gpt2rt.checkpoint.write import parse_size, plan_shards
from gpt2rt.errors import CheckpointError, ConfigError


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


@pytest.mark.proves("L3")
def test_the_files_are_those_of_transformers(model, saved, tmp_path, hf):
    theirs = tmp_path / "theirs"
    hf.copy_of(model).save_pretrained(theirs)
    assert {path.name for path in saved.iterdir()} == {path.name for path in theirs.iterdir()}
    with safe_open(saved / "model.safetensors", "pt") as ours, safe_open(theirs / "model.safetensors", "pt") as other:
        assert set(ours.keys()) == set(other.keys())
        assert ours.metadata() == other.metadata() == {"format": "pt"}
    config = json.loads((saved / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["GPT2LMHeadModel"], "float32")


@pytest.mark.proves("L3")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}, {"add_cross_attention": True}], ids=str)
def test_round_trips_with_transformers_are_bit_equal(tmp_path, hf, dtype, fields):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(small_config(**fields)).to(dtype)
    model.save_pretrained(tmp_path / "ours")
    theirs = hf.module.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", dtype="auto")
    assert theirs.dtype == dtype
    assert same_weights(model, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "theirs", dtype="auto"), model)


@pytest.mark.proves("L3")
def test_a_task_head_round_trip_with_transformers(tmp_path, hf):
    WithScore(small_config(num_labels=3)).save_pretrained(tmp_path)
    theirs, info = hf.module.GPT2ForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    theirs.save_pretrained(tmp_path / "theirs")
    assert same_weights(WithScore.from_pretrained(tmp_path / "theirs"), theirs)


def test_tied_weights_are_written_once_and_others_twice(model, saved, tmp_path):
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "apart")
    assert "lm_head.weight" in load_file(tmp_path / "apart" / "model.safetensors")


@pytest.mark.parametrize(
    ("size", "expected"),
    [(5, 5), ("5GB", 5 * 10**9), ("200KB", 200_000), ("1.5 mb", 1_500_000), ("2GiB", 2**31), ("7", 7), ("7B", 7)],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "5 parsecs", "-5GB", 0, -1, 2.5, None, True, "0KB"], ids=repr)
def test_sizes_that_are_none(model, tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        model.save_pretrained(tmp_path / "never", max_shard_size=size)
    assert not (tmp_path / "never").exists()


def test_shards_are_filled_in_order():
    tensors = {name: torch.zeros(n, dtype=torch.uint8) for name, n in zip("abcde", (4, 4, 9, 1, 7), strict=True)}
    assert plan_shards(tensors, 8) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(tensors, 100) == [list("abcde")]


def test_files_of_older_saves_disappear(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="15KB")
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "model.safetensors.index.json").exists(), "another variant is another checkpoint"
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.fp16.safetensors",
        "notes.txt",
    }
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), model)


def test_other_arguments(model, tmp_path):
    model.save_pretrained(tmp_path / "never", is_main_process=False)
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(TypeError, match="unknown keywords: shard"):
        model.save_pretrained(tmp_path, shard=3)
    with pytest.raises(ValueError, match=r"variant = '\.\./x'"):
        model.save_pretrained(tmp_path, variant="../x")
    state = {name: tensor + 1 for name, tensor in model.transformer.state_dict().items()}
    model.transformer.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["wpe.weight"], state["wpe.weight"])
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file, expected a folder"):
        model.save_pretrained(tmp_path / "file")


def test_a_broken_config_is_not_saved(model, saved):
    before = contents(saved)
    model.config.n_head = 0
    with pytest.raises(ConfigError, match="n_head = 0"):
        model.save_pretrained(saved)
    assert contents(saved) == before


# ---- failed saves (F30) ----------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F30")
@pytest.mark.parametrize("at", ["config.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("step", ["write", "fsync"])
def test_f30_a_full_disk_leaves_the_old_files(model, saved, monkeypatch, at, step):
    before = contents(saved)
    add, fsync = atomic.AtomicFiles.add, os.fsync
    full = False

    def fill(path):
        raise OSError(28, "No space left on device")

    def failing_add(self, path, write):
        nonlocal full
        full = path.name == at
        add(self, path, fill if full and step == "write" else write)

    def failing_fsync(descriptor):
        if full:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(atomic.AtomicFiles, "add", failing_add)
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", failing_fsync)
    with torch.no_grad():
        model.transformer.wpe.weight.add_(1)
    with pytest.raises(CheckpointError, match=rf"cannot write .*{at}: .*No space left.* older file, if any, is unch"):
        model.save_pretrained(saved)
    assert contents(saved) == before, "nothing replaced, nothing left over"


@pytest.mark.proves("fault:F30")
def test_f30_a_really_full_disk(model, saved):
    """A limit on file sizes fails writes of the safetensors library too, which has exceptions of its own."""
    from gpt2rt.checkpoint.write import save_checkpoint

    before = contents(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # python ignores the signal that the limit would send
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*model.safetensors"):
            save_checkpoint(saved, {"a": torch.zeros(10**6)}, {"config.json": "{}"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(saved) == before
    save_checkpoint(saved, {"a": torch.zeros(3)}, {"config.json": "{}"})
    assert contents(saved).keys() == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.proves("fault:F30")
def test_f30_a_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        model.save_pretrained(tmp_path / "file" / "deep")


@pytest.mark.proves("fault:F30")
def test_f30_a_rename_that_fails(model, saved, monkeypatch):
    before = contents(saved)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match=r"cannot put the new files into place.*Read-only"):
        model.save_pretrained(saved)
    assert contents(saved) == before


@pytest.mark.proves("fault:F30")
def test_f30_killed_while_saving(saved):
    """A process that dies after writing all files and before the first rename changes nothing."""
    before = contents(saved)
    code = (
        "import os, signal, sys, torch\n"
        "from gpt2rt.checkpoint import atomic\n"
        "from gpt2rt.checkpoint.write import save_checkpoint\n"
        "atomic.AtomicFiles._publish = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_checkpoint(sys.argv[1], {'a': torch.zeros(9)}, {'config.json': '{}'})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, saved], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    after = contents(saved)
    assert {name: after[name] for name in before} == before
    assert all(name.endswith(".tmp") for name in after.keys() - before.keys())
    loaded = GPT2LMHeadModel.from_pretrained(saved)
    for name in after.keys() - before.keys():
        os.utime(saved / name, (0, 0))
    loaded.save_pretrained(saved)
    assert contents(saved).keys() == before.keys(), "a later save cleans up"


def test_saved_files_get_the_permissions_that_the_umask_gives(model, tmp_path):
    old = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o640}, modes
