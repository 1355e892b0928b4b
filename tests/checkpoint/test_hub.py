"""Loading through a hub, for real, from a small server on this machine (fault F31)."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest
from checkpoints import same_weights
from hub import Hub

from gpt2rt import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from gpt2rt.checkpoint.resolve import Source
from gpt2rt.errors import CheckpointError


def files_of(folder, prefix=""):
    return {f"{prefix}{path.name}": path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


def point_to(monkeypatch, endpoint):
    """Let huggingface_hub, which read its environment when it was imported, use another endpoint."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # whatever the person who runs the tests has set
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """A hub with a model in several forms."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    trained = GPT2Tokenizer.train_from_iterator(["to be or not to be"] * 3, 300)
    trained.save_pretrained(tmp_path / "plain")
    main = {**files_of(tmp_path / "plain"), "README.md": b"# model", "flax_model.msgpack": b"big"}
    other = {**main, "config.json": main["config.json"].replace(b'"n_positions": 16', b'"n_positions": 16,\n "tag": 2')}
    repositories = {
        "me/plain": {"main": main, "v2": other},
        "me/shards": {"main": files_of(tmp_path / "shards")},
        "me/deep": {"main": files_of(tmp_path / "plain", "en/small/")},
        "me/private": {"main": main},
        "me/empty": {"main": {"README.md": b"# nothing"}},
    }
    with Hub(repositories, tokens={"me/private": "hf_secret"}) as running:
        point_to(monkeypatch, running.endpoint)
        yield running


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_download_then_cache(hub, cache, model):
    loaded = GPT2LMHeadModel.from_pretrained("me/plain", cache_dir=cache)
    assert same_weights(loaded, model)
    assert loaded.config.name_or_path == "me/plain"
    fetched = sorted(path.rsplit("/", 1)[1] for path in hub.downloads())
    assert fetched == ["config.json", "generation_config.json", "model.safetensors"], "only what is needed"
    hub.requests.clear()
    assert same_weights(GPT2LMHeadModel.from_pretrained("me/plain", cache_dir=cache), model)
    assert hub.downloads() == []
    assert len(hub.requests) == 2, "does the hub answer, and is main still that commit"
    GPT2LMHeadModel.from_pretrained("me/plain", cache_dir=cache, force_download=True)
    assert len(hub.downloads()) == 3


def test_config_and_tokenizer(hub, cache):
    config = GPT2Config.from_pretrained("me/plain", cache_dir=cache)
    assert (config.n_layer, config.name_or_path) == (2, "me/plain")
    tokenizer = GPT2Tokenizer.from_pretrained("me/plain", cache_dir=cache)
    assert tokenizer.decode(tokenizer("to be or not")["input_ids"]) == "to be or not"
    assert not any(path.endswith(("model.safetensors", "README.md")) for path in hub.downloads())


@pytest.mark.proves("L2")
def test_revisions(hub, cache):
    assert not hasattr(GPT2Config.from_pretrained("me/plain", cache_dir=cache), "tag")
    assert GPT2Config.from_pretrained("me/plain", cache_dir=cache, revision="v2").tag == 2
    commit = Hub.commit("me/plain", "v2")
    assert GPT2Config.from_pretrained("me/plain", cache_dir=cache, revision=commit).tag == 2
    with pytest.raises(CheckpointError, match=r"me/plain has no revision 'v3'"):
        GPT2LMHeadModel.from_pretrained("me/plain", cache_dir=cache, revision="v3")


def test_all_files_come_from_one_commit(hub, cache, model):
    """The branch moves to damaged weights after config.json was read: the load goes on with the old commit."""
    source = Source("me/plain", cache_dir=cache)
    source.require("config.json")
    old = hub.repositories["me/plain"].pop("main")
    hub.repositories["me/plain"]["old"] = old
    moved = Hub.commit
    hub.commit = lambda name, revision: moved(name, "main" if revision == "old" else revision + "!")
    hub.repositories["me/plain"]["main"] = {**old, "model.safetensors": b"damaged"}
    assert source.require("model.safetensors").read_bytes() == old["model.safetensors"]
    assert source.require("model.safetensors").parent == source.require("config.json").parent


def test_shards_and_subfolders(hub, cache, model):
    assert same_weights(GPT2LMHeadModel.from_pretrained("me/shards", cache_dir=cache), model)
    assert same_weights(GPT2LMHeadModel.from_pretrained("me/deep", subfolder="en/small", cache_dir=cache), model)
    with pytest.raises(CheckpointError, match=r"me/deep \(revision 'main'\) has no config.json"):
        GPT2LMHeadModel.from_pretrained("me/deep", cache_dir=cache)


@pytest.mark.proves("L2", "fault:F31")
def test_private_repositories_need_the_token(hub, cache, model):
    for token in (None, False, "hf_wrong"):
        with pytest.raises(CheckpointError, match=r"me/private \(revision 'main'\).*token=.*hf auth login"):
            GPT2LMHeadModel.from_pretrained("me/private", cache_dir=cache, token=token)
    assert same_weights(GPT2LMHeadModel.from_pretrained("me/private", cache_dir=cache, token="hf_secret"), model)


@pytest.mark.proves("fault:F31")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/nothing", r"me/nothing \(revision 'main'\): the hub knows no such repository.*HF_HUB_OFFLINE=1"),
        ("me/empty", r"me/empty \(revision 'main'\) has no config.json"),
        ("not a/valid id!", r"'not a/valid id!' is neither an existing folder nor a valid hub id"),
    ],
)
def test_repositories_that_do_not_work(hub, cache, name, message):
    with pytest.raises(CheckpointError, match=message):
        GPT2LMHeadModel.from_pretrained(name, cache_dir=cache)


def test_a_repository_without_weights(hub, cache):
    del hub.repositories["me/plain"]["main"]["model.safetensors"]
    with pytest.raises(CheckpointError, match=r"flax_model.msgpack: it holds int, expected a map"):
        GPT2LMHeadModel.from_pretrained("me/plain", cache_dir=cache)
    del hub.repositories["me/plain"]["main"]["flax_model.msgpack"]
    with pytest.raises(CheckpointError, match=r"has no weights: expected model.safetensors.* or flax_model.msgpack"):
        GPT2LMHeadModel.from_pretrained("me/plain", cache_dir=cache / "new")


@pytest.mark.proves("fault:F31")
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline(hub, cache, model, monkeypatch, how):
    from huggingface_hub import constants

    GPT2LMHeadModel.from_pretrained("me/plain", cache_dir=cache)
    GPT2Tokenizer.from_pretrained("me/plain", cache_dir=cache)
    hub.requests.clear()
    keywords = {"cache_dir": cache}
    if how == "argument":
        keywords["local_files_only"] = True
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same_weights(GPT2LMHeadModel.from_pretrained("me/plain", **keywords), model)
    GPT2Tokenizer.from_pretrained("me/plain", **keywords)
    switch = "local_files_only=True" if how == "argument" else "HF_HUB_OFFLINE=1"
    with pytest.raises(
        CheckpointError, match=rf"me/shards \(revision 'main'\) has no config.json in the cache.*{switch}"
    ):
        GPT2LMHeadModel.from_pretrained("me/shards", **keywords)
    assert hub.requests == [], "nothing was asked"


@pytest.mark.proves("fault:F31")
def test_unreachable(hub, cache, model, monkeypatch):
    GPT2LMHeadModel.from_pretrained("me/plain", cache_dir=cache)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    point_to(monkeypatch, closed)
    with pytest.raises(CheckpointError, match=r"me/shards \(revision 'main'\) has no config.json .*HF_HUB_OFFLINE=1"):
        GPT2LMHeadModel.from_pretrained("me/shards", cache_dir=cache)
    assert same_weights(GPT2LMHeadModel.from_pretrained("me/plain", cache_dir=cache), model), "the cache still works"
    with pytest.raises(CheckpointError, match=r"has no weights.*in the cache, and the hub cannot be reached"):
        GPT2LMHeadModel.from_pretrained("me/plain", cache_dir=cache, variant="fp16")
    with pytest.raises(CheckpointError, match=r"has no tokenizer.*in the cache, and the hub cannot be reached"):
        GPT2Tokenizer.from_pretrained("me/shards", cache_dir=cache)


def test_a_server_that_is_no_hub(hub, cache, monkeypatch):
    point_to(monkeypatch, f"{hub.endpoint}/me/plain/x")
    with pytest.raises(CheckpointError, match=r"config.json"):
        GPT2LMHeadModel.from_pretrained("me/shards", cache_dir=cache)


def test_the_environment_in_a_fresh_process(hub, cache, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE as a user sets them."""
    code = (
        "import sys\n"
        "from gpt2rt import GPT2LMHeadModel\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        print('read', GPT2LMHeadModel.from_pretrained(name).config.n_layer)\n"
        "    except OSError as error:\n        print('OSError', error)\n"
        # building on the meta device must not pull in torch's compiler: seconds and 150 MB
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    environment.pop("HF_HUB_OFFLINE", None)

    def run(*names, **more):
        done = subprocess.run(
            [sys.executable, "-c", code, *names],
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )
        assert done.stderr == "", "no progress bar without a terminal, no warnings"
        return done.stdout.splitlines()

    assert run("me/plain") == ["read 2"]
    asked = len(hub.requests)
    assert asked > 0
    first, second = run("me/plain", "me/shards", HF_HUB_OFFLINE="1")
    assert first == "read 2"
    assert "me/shards (revision 'main') has no config.json in the cache, and HF_HUB_OFFLINE=1 forbids" in second
    assert len(hub.requests) == asked


def test_only_listed_files_of_a_hub_checkpoint_are_touched(hub, cache):
    """An index that points elsewhere is refused before the file is asked for."""
    files = hub.repositories["me/shards"]["main"]
    index = files["model.safetensors.index.json"]
    files["model.safetensors.index.json"] = index.replace(
        b"model-00001-of", b"../../me/plain/resolve/main/model-00001-of"
    )
    with pytest.raises(CheckpointError, match=r"expected the plain name"):
        GPT2LMHeadModel.from_pretrained("me/shards", cache_dir=cache)
    assert not any(".." in path for path in hub.downloads())


@pytest.mark.proves("fault:F31")
def test_a_hub_that_never_answers(cache, monkeypatch):
    from gpt2rt.checkpoint import resolve

    monkeypatch.setattr(resolve, "HUB_TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        point_to(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(CheckpointError, match=r"the hub cannot be reached \(ReadTimeout"):
            GPT2LMHeadModel.from_pretrained("me/plain", cache_dir=cache)
