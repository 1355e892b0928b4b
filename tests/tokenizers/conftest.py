"""Tokenizers to test: the real GPT-2 vocabulary, and a small trained one for everything that needs no real one."""

import pytest

from gpt2rt import GPT2Tokenizer

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer 😀 été 東京\n\tthe slings"


@pytest.fixture(scope="session")
def small():
    """A vocabulary of 300 tokens trained on one sentence, as constructor arguments."""
    tokenizer = GPT2Tokenizer.train_from_iterator([TEXT] * 4, 300)
    return tokenizer._vocab, tokenizer._merges


@pytest.fixture
def tokenizer(small):
    vocab, merges = small
    return GPT2Tokenizer(dict(vocab), list(merges))


@pytest.fixture(scope="session")
def gpt2_files(test_data):
    return test_data / "gpt2" / "vocab.json", test_data / "gpt2" / "merges.txt"


@pytest.fixture
def gpt2(gpt2_files):
    return GPT2Tokenizer(*gpt2_files)


@pytest.fixture
def theirs(gpt2_files, hf):
    """transformers' tokenizer on the same files."""
    return hf.module.GPT2Tokenizer(*map(str, gpt2_files))
