"""Log-probabilities of tokens, of the likeliest and of prompts, against the op that defines them."""

import math

import pytest
import torch
from sampling_rows import KINDS, make_row, random_logits, sampler_of

from gpt2rt import ops
from gpt2rt.engine import logprobs
from gpt2rt.errors import NumericsError


def check_entry(entry, logits, token, k):
    """An entry against ``ops.log_probabilities``."""
    value, rank, best, ids = ops.log_probabilities(logits[None], torch.tensor([token]), k)
    assert entry[token][1] == rank.item()
    assert entry[token][0] == pytest.approx(value.item(), abs=2e-6)
    assert next(iter(entry)) == token
    # the likeliest follow in their order, without the token
    assert [other for other in entry if other != token] == [other for other in ids[0].tolist() if other != token]
    for place, (other, expected) in enumerate(zip(ids[0].tolist(), best[0].tolist(), strict=True)):
        assert entry[other][0] == pytest.approx(expected, abs=2e-6)
        if other != token:
            assert entry[other][1] == place + 1


def test_logprobs_are_of_the_raw_logits():
    rows = [make_row(number, **{**KINDS[8 + number], "logprobs": k}) for number, k in enumerate((0, 1, 5, 20))]
    rows.append(make_row(9))
    logits = random_logits(5)
    sampled = sampler_of(rows).sample(logits.clone())
    assert sorted(sampled.logprobs) == [0, 1, 2, 3]
    for place, entry in sampled.logprobs.items():
        check_entry(entry, logits[place], sampled.tokens[place], rows[place].params.logprobs)


@pytest.mark.parametrize("vocab_size", [5, 97, 50257])
def test_entries_are_the_ops(vocab_size):
    logits = random_logits(4, vocab_size=vocab_size)
    # rows with many equal scores, with excluded ones, with huge ones
    logits[1] = logits[1].round()
    logits[2, ::2] = -math.inf
    logits[3] *= 1e30
    for k in (0, 1, min(20, vocab_size // 2), min(128, vocab_size // 2)):
        tokens = [1, 3, 1, int(logits[3].argmax())]
        # each row has as many as it asks for
        counts = [k, 0, k, k // 2]
        entries = logprobs.entries(logits, torch.tensor(tokens), counts)
        for row in range(4):
            check_entry(entries[row], logits[row], tokens[row], counts[row])
    logits[1, 2] = math.nan
    logits[2, 2] = math.inf
    assert logprobs.entries(logits, torch.tensor([1, 1, 1, -1]), [1, 1, 1, 1])[1:] == [None, None, None]


def test_logprobs_of_prompts():
    logits = random_logits(4)
    entries = logprobs.prompt_logprobs(logits, [3, 0, 96, 3], 2)
    for row, token in enumerate([3, 0, 96, 3]):
        check_entry(entries[row], logits[row], token, 2)
    # chunks change nothing
    chunks = logprobs.prompt_logprobs(logits[:1], [3], 2) + logprobs.prompt_logprobs(logits[1:], [0, 96, 3], 2)
    assert chunks == entries
    logits[2, 5] = math.nan
    with pytest.raises(NumericsError, match="the logits for token 96"):
        logprobs.prompt_logprobs(logits, [3, 0, 96, 3], 2)


def test_logprobs_with_texts():
    class Tokenizer:
        calls = 0

        def decode(self, ids):
            self.calls += 1
            return {1: "é", 2: "\ufffd"}[ids[0]]

    tokenizer = Tokenizer()
    texts = logprobs.TokenTexts(tokenizer)
    for _ in range(2):
        found = logprobs.as_logprobs({1: (-0.5, 1), 2: (-1.5, 2)}, texts)
    assert tokenizer.calls == 2
    assert [(token, item.logprob, item.rank, item.decoded_token) for token, item in found.items()] == [
        (1, -0.5, 1, "é"),
        (2, -1.5, 2, "\ufffd"),
    ]
    assert logprobs.as_logprobs({1: (-0.5, 1)}, logprobs.TokenTexts(None))[1].decoded_token is None
