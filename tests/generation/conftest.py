"""Small models and a tokenizer for generation."""

import pytest
import torch

from gpt2rt import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from gpt2rt.tokenizers.bytelevel import byte_to_char

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("s", "t"), ("o", "p"), ("st", "op"), ("o", "n"), ("Ã", "©")]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose time with more threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE: 256 bytes, a few merges, and <|endoftext|>; vocabulary of 265."""
    vocab = {char: byte for byte, char in byte_to_char().items()}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    return GPT2Tokenizer(vocab, MERGES, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=64)


@pytest.fixture(scope="session")
def make_model():
    """Builds a model with weights large enough that it says more than one word."""

    def make(seed=0, **fields):
        torch.manual_seed(seed)
        fields = {
            "vocab_size": 97,
            "n_positions": 48,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": 0.3,
            **fields,
        }
        return GPT2LMHeadModel(GPT2Config(**fields)).eval()

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """A small model; not to be changed."""
    return make_model()


@pytest.fixture(scope="session")
def byte_model(make_model, tokenizer):
    """A model over the vocabulary of ``tokenizer``; not to be changed."""
    end = tokenizer.eos_token_id
    return make_model(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=None)


@pytest.fixture
def pools(monkeypatch):
    """The block pools of all caches that generation makes during a test."""
    from gpt2rt.generation import reserve

    made = []

    class Watched(reserve.PagedKVCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self.pool)

    monkeypatch.setattr(reserve, "PagedKVCache", Watched)
    return made
