"""push_to_hub and save_pretrained(push_to_hub=True), through huggingface_hub to a hub on 127.0.0.1."""

import types

import pytest
from checkpoints import same_weights
from hub import Hub
from safetensors.torch import load

from gpt2rt import GPT2LMHeadModel, GPT2Tokenizer
from gpt2rt.errors import CheckpointError

FILES = {"config.json", "generation_config.json", "model.safetensors"}


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    with Hub({}) as running:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running


@pytest.mark.proves("L3")
def test_what_is_pushed_loads_again(hub, model, tmp_path):
    url = model.push_to_hub("mine", private=True, token="hf_t", commit_message="first", commit_description="why")
    assert url == f"{hub.endpoint}/me/mine/commit/1"
    made, commit = hub.commits
    assert made == {"made": "me/mine", "private": True, "token": "hf_t"}
    assert set(commit["files"]) == FILES
    assert (commit["summary"], commit["description"], commit["token"]) == ("first", "why", "hf_t")
    assert commit["revision"] == "main"
    assert same_weights(GPT2LMHeadModel.from_pretrained("me/mine", cache_dir=tmp_path), model)


@pytest.mark.proves("L3")
def test_saving_with_push_to_hub(hub, model, tmp_path):
    hub.repositories["me/folder"] = {"main": {"README.md": b"# mine"}, "v2": {}}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "optimizer.pt").write_bytes(b"not part of the model")
    model.save_pretrained(tmp_path / "folder", push_to_hub=True, token="hf_t", max_shard_size="20KB", revision="v2")
    assert "model.safetensors.index.json" in hub.repositories["me/folder"]["v2"]
    assert "optimizer.pt" not in hub.repositories["me/folder"]["v2"]
    assert (tmp_path / "folder" / "model.safetensors.index.json").is_file()
    model.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="me/folder", token="hf_t")
    assert set(hub.repositories["me/folder"]["main"]) == FILES | {"README.md"}
    # a branch that does not exist is made
    model.save_pretrained(tmp_path / "folder", push_to_hub=True, token="hf_t", revision="v3")
    assert set(hub.repositories["me/folder"]["v3"]) == FILES
    state = load(hub.commits[-1]["files"]["model.safetensors"])
    assert same_weights(GPT2LMHeadModel.from_pretrained(None, config=model.config, state_dict=state), model)


def test_saving_a_tokenizer_with_push_to_hub(hub, tmp_path):
    tokenizer = GPT2Tokenizer.train_from_iterator(["to be or not to be"] * 3, 300)
    (tmp_path / "notes.txt").write_text("not part of the tokenizer")
    tokenizer.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/words", token="hf_t")
    written = {"merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
    assert set(hub.repositories["me/words"]["main"]) == written
    tokenizer.save_pretrained(tmp_path, push_to_hub=False)
    with pytest.raises(TypeError, match="unknown keywords: repo_id; they need push_to_hub=True"):
        tokenizer.save_pretrained(tmp_path, repo_id="me/words")
    with pytest.raises(ValueError, match="use_auth_token is not supported: pass token instead"):
        tokenizer.save_pretrained(tmp_path, use_auth_token="hf_t")


def test_a_pull_request_is_asked_for_and_its_address_returned(hub, model, monkeypatch):
    import huggingface_hub

    asked = {}

    def upload_folder(self, **keywords):
        asked.update(keywords)
        return types.SimpleNamespace(pr_url="https://hub/me/mine/discussions/1", commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert model.push_to_hub("mine", token="hf_t", create_pr=True) == "https://hub/me/mine/discussions/1"
    assert asked["create_pr"] is True
    assert asked["repo_id"] == "me/mine"


def test_uploads_that_fail_or_make_no_sense(hub, model, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"(?s)uploading to 'me/mine' failed: .*Invalid rev id"):
        model.push_to_hub("mine", token="hf_t", revision="refs/pr/7")
    with pytest.raises(CheckpointError, match=r"uploading to 'mine' failed: .*401"):
        model.push_to_hub("mine", token=False)
    for keywords, kind, match in (
        ({"tags": ["x"]}, ValueError, "push_to_hub: tags is not supported: gpt2rt writes no model card"),
        ({"use_temp_dir": False}, ValueError, "always uploads from a temporary folder"),
        ({"privat": True}, TypeError, "push_to_hub got unknown keywords: privat$"),
    ):
        with pytest.raises(kind, match=match):
            model.push_to_hub("mine", **keywords)
    with pytest.raises(TypeError, match=r"unknown keywords: revision; they need push_to_hub=True"):
        model.save_pretrained(tmp_path / "x", revision="v2")
    with pytest.raises(ValueError, match=r"save_pretrained: distributed_checkpoint is not supported"):
        model.save_pretrained(tmp_path / "x", distributed_checkpoint=True)
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", token="hf_t", save_original_format=False, save_peft_format=False)
    assert {path.name for path in (tmp_path / "x").iterdir()} == FILES


@pytest.mark.proves("L3")
def test_a_tokenizer_can_be_pushed_too(hub, tmp_path):
    tokenizer = GPT2Tokenizer.train_from_iterator(["to be or not to be"] * 3, 300)
    hub.repositories["me/mine"] = {"main": {"README.md": b"# mine"}}
    tokenizer.push_to_hub("me/mine", token="hf_t", commit_message="words")
    commit = hub.commits[-1]
    assert (commit["summary"], commit["name"]) == ("words", "me/mine")
    assert set(commit["files"]) == {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    again = GPT2Tokenizer.from_pretrained("me/mine", cache_dir=tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(TypeError, match="push_to_hub got unknown keywords: max_shard_size"):
        tokenizer.push_to_hub("me/mine", max_shard_size="1GB")
