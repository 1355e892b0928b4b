"""Tokenizers to test: the real GPT-2 vocabulary, and a small trained one for everything that needs no real one."""

import random

import pytest

from gpt2rt import GPT2Tokenizer, OpenAIGPTTokenizer

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


@pytest.fixture(scope="session")
def openai_files(test_data):
    return test_data / "openai-gpt" / "vocab.json", test_data / "openai-gpt" / "merges.txt"


@pytest.fixture(scope="session")
def openai_gpt(openai_files):
    """OpenAI GPT's tokenizer on the published vocabulary; not to be changed."""
    return OpenAIGPTTokenizer(*openai_files)


@pytest.fixture(scope="session")
def their_openai_gpt(openai_files, hf):
    """transformers' tokenizer on the same files; not to be changed."""
    return hf.module.OpenAIGPTTokenizer(*map(str, openai_files))


@pytest.fixture(scope="session")
def texts():
    """3000 texts: scripts, emoji, white space of every kind and control characters, mixed."""
    rng = random.Random(0)
    return [random_text(rng) for _ in range(3000)]


RANGES = [(0x20, 0x7F), (0xA0, 0x250), (0x400, 0x500), (0x600, 0x6FF), (0x4E00, 0x5000), (0x1F300, 0x1F6FF)]
SINGLES = "\n\r\t\0 \u00a0\u200b\u200d\ufe0f\u3000'’\ufffd\u2028   "


def random_text(rng):
    """Half of the texts are mostly English letters, so that words with several merges occur."""
    plain = rng.random() < 0.5
    parts = []
    for _ in range(rng.randrange(30)):
        if rng.random() < 0.4:
            parts.append(rng.choice(SINGLES))
        elif plain:
            parts.append(rng.choice(("the", "wörd", "A", "ing", "n't", " of", "e", "S", ".", ",", "12")))
        else:
            parts.append(chr(rng.randrange(*rng.choice(RANGES))))
    return "".join(parts)
