"""Candidates from a model with another vocabulary."""

import pytest
import torch

from gpt2rt import GPT2Tokenizer
from gpt2rt.generation.prepare import prepare
from gpt2rt.tokenizers.bytelevel import byte_to_char

TEXTS = ["to stop the other on the top", "é", "the then there the then there the"]


@pytest.fixture(scope="module")
def letters():
    """A tokenizer without merges: a token is a byte."""
    vocab = {char: byte for byte, char in byte_to_char().items()}
    vocab["<|endoftext|>"] = len(vocab)
    return GPT2Tokenizer(vocab, [], eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=64)


@pytest.fixture(scope="module")
def spelling(make_model, letters):
    """A model over single letters."""
    end = letters.eos_token_id
    return make_model(seed=2, vocab_size=len(letters), bos_token_id=end, eos_token_id=end, pad_token_id=None)


def settings_of(tokenizer, assistant, assistant_tokenizer):
    return {"tokenizer": tokenizer, "assistant_model": assistant, "assistant_tokenizer": assistant_tokenizer}


@pytest.mark.proves("G2")
@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "seed": 2, "num_return_sequences": 2}], ids=["greedy", "sampled"]
)
def test_nothing_changes(byte_model, tokenizer, spelling, letters, pools, settings):
    prompts = [tokenizer.encode(text) for text in TEXTS]
    settings = {"max_new_tokens": 14, "pad_token_id": 0, **settings}
    expected = byte_model.generate(prompts, **settings)
    result = byte_model.generate(prompts, **settings_of(tokenizer, spelling, letters), **settings)
    assert torch.equal(result, expected)
    back = [letters.encode(text) for text in TEXTS]
    expected = spelling.generate(back, **settings)
    result = spelling.generate(back, **settings_of(letters, byte_model, tokenizer), **settings)
    assert torch.equal(result, expected)
    assert all(pool.num_free == pool.num_blocks for pool in pools)


def test_right_text_is_accepted(make_model, byte_model, tokenizer, letters, monkeypatch):
    """A draft that knows the text saves steps although its tokens are others."""
    prompt = tokenizer.encode("to stop")
    known = "to stop the other on the top"
    spoken = tokenizer.encode(known)
    script = letters.encode(known)
    spelling = make_model(seed=2, vocab_size=len(letters), bos_token_id=None, eos_token_id=None)
    executors = {byte_model.generation_executor(): spoken, spelling.generation_executor(): script}
    for executor, ids in executors.items():

        def recite(batch, cache, *, step=executor.step, ids=ids):
            # the next token of the text, whatever the weights say
            output = step(batch, cache)
            output.logits.zero_()
            for row, place in enumerate(batch.position_ids[batch.logits_indices].tolist()):
                output.logits[row, ids[(place + 1) % len(ids)]] = 9.0
            return output

        monkeypatch.setattr(executor, "step", recite)
    count = len(spoken) - len(prompt)
    rounds = []
    for tokens in (2, 6):
        decoder, _, _ = prepare(
            byte_model,
            [prompt],
            None,
            None,
            None,
            {
                "max_new_tokens": count,
                "num_assistant_tokens": tokens,
                "eos_token_id": None,
                **settings_of(tokenizer, spelling, letters),
            },
        )
        with torch.no_grad():
            steps = [step[0] for step in decoder.steps()]
        assert steps == spoken[len(prompt) :]
        assert decoder.statistics.accepted > 0
        rounds.append(decoder.statistics.steps)
    # six letters hold more tokens than two
    assert count - 1 > rounds[0] > rounds[1]


def test_tokens_that_a_model_does_not_have_end_the_candidates(make_model, tokenizer, spelling, letters):
    """A tokenizer can know more tokens than its model has rows."""
    small = make_model(vocab_size=258, eos_token_id=None, pad_token_id=0)
    prompt = [letters.encode("to stop")]
    settings = {"max_new_tokens": 14, "tokenizer": tokenizer}
    expected = small.generate(prompt, max_new_tokens=14)
    for assistant, its in ((spelling, letters), (make_model(vocab_size=200), letters)):
        result = small.generate(prompt, assistant_model=assistant, assistant_tokenizer=its, **settings)
        assert torch.equal(result, expected)
