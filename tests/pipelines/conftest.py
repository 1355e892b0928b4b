"""Tiny models with heads, a tokenizer, and transformers' pipelines on the same files."""

import warnings

import pytest
import torch

import gpt2rt
from gpt2rt import GPT2Config, GPT2Tokenizer
from gpt2rt.tokenizers.bytelevel import byte_to_char

MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("i", "n"),
    ("Ġ", "a"),
    ("e", "r"),
    ("Ġ", "in"),
    ("o", "n"),
    ("Ã", "©"),
]

TEXTS = [
    "the rain in the inner town",
    "on a mountain",
    "Grüße, the café was on fire in 1912, then a thin man sang",
    "a",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose time with more threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokenizer(**options):
    """Byte-level BPE: 256 bytes, a few merges, <|endoftext|> and <pad>."""
    vocab = {char: byte for byte, char in byte_to_char().items()}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    vocab["<pad>"] = len(vocab)
    options = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "model_max_length": 96, **options}
    return GPT2Tokenizer(vocab, MERGES, **options)


@pytest.fixture(scope="session")
def tokenizer():
    """Without a pad token; not to be changed."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def padded_tokenizer():
    """With a pad token; not to be changed."""
    return make_tokenizer(pad_token="<pad>")


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """``make_model("ForTokenClassification", seed=0, **config)``: a model with weights that tell texts apart."""

    def make(kind, seed=0, **fields):
        torch.manual_seed(seed)
        end = tokenizer.eos_token_id
        shape = {"vocab_size": end + 2, "n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}
        special = {"bos_token_id": end, "eos_token_id": end, "initializer_range": 0.3}
        return getattr(gpt2rt, f"GPT2{kind}")(GPT2Config(**{**shape, **special, **fields})).eval()

    return make


@pytest.fixture(scope="session")
def save(tmp_path_factory):
    """``save(model, tokenizer)``: the folder of a checkpoint."""

    def save(model, tokenizer):
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def both(hf, save):
    """``both(task, model, tokenizer, **kwargs)``: our pipeline and transformers' on the same checkpoint, on the CPU."""

    def both(task, model, tokenizer, **kwargs):
        folder = str(save(model, tokenizer))
        ours = gpt2rt.pipeline(task, model=model, tokenizer=tokenizer, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = hf.module.pipeline(task, model=folder, tokenizer=folder, device="cpu", **kwargs)
        return ours, theirs

    return both


def assert_same(ours, theirs, tolerance=2e-5):
    """Nested results are equal; numbers within a tolerance."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key], tolerance)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other, tolerance)
    elif hasattr(theirs, "dtype") or isinstance(theirs, float):
        assert isinstance(ours, float | int)
        assert float(ours) == pytest.approx(float(theirs), abs=tolerance)
    else:
        assert ours == theirs


@pytest.fixture(scope="session")
def same():
    return assert_same
