"""A tiny checkpoint, and commands run in this process."""

import sys
import warnings

import pytest
import torch

from gpt2rt import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, cli
from gpt2rt.tokenizers.bytelevel import byte_to_char


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose time with more threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model over bytes: its text is every kind of broken UTF-8."""
    folder = tmp_path_factory.mktemp("checkpoint")
    vocab = {char: byte for byte, char in byte_to_char().items()} | {"<|endoftext|>": 256}
    GPT2Tokenizer(vocab, [], eos_token="<|endoftext|>", model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=48, n_layer=2, n_head=3, bos_token_id=256)
    config.eos_token_id = 256
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    threads = torch.get_num_threads()

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def one_sentence():
    """``one_sentence(stderr)``: the message, if it holds exactly one error and no traceback."""

    def check(err):
        lines = err.strip().splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("gpt2rt: error: ")
        return lines[0]

    return check


@pytest.fixture
def stdin(monkeypatch, tmp_path):
    """``stdin(data)``: what the next command reads from stdin, as text or bytes."""

    def put(data):
        path = tmp_path / "stdin"
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        monkeypatch.setattr(sys, "stdin", path.open(encoding="utf-8"))

    return put
