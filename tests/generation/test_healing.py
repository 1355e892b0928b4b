"""Token healing."""

import pytest
import torch

from gpt2rt import GPT2Tokenizer
from gpt2rt.errors import RequestError
from gpt2rt.generation.healing import heal_prompts

TEXTS = [
    'The link is <a href="http:',
    "I read a book about",
    "Once upon a ti",
    "  white space at both ends \n",
    "numbers 12",
    "end.",
    "naïve café",
]


@pytest.fixture(scope="module")
def real(make_model, test_data):
    """A tokenizer with the real vocabulary, and a model over it."""
    model = make_model(
        vocab_size=50257, n_embd=12, n_layer=1, eos_token_id=50256, bos_token_id=50256, pad_token_id=None
    )
    return GPT2Tokenizer.from_pretrained(test_data / "gpt2"), model


@pytest.mark.proves("G13")
@pytest.mark.parametrize("text", TEXTS)
def test_matches_transformers(text, real, hf, test_data, monkeypatch):
    tokenizer, model = real
    theirs = hf.module.GPT2Tokenizer.from_pretrained(test_data / "gpt2")
    theirs.pad_token = theirs.eos_token
    # transformers looks up " " to learn how tokens write a space, but no token is named so: it gets <|endoftext|>, and
    # then heals no token that begins with a space; give it what it looks for
    lookup = theirs.convert_tokens_to_ids
    monkeypatch.setattr(theirs, "convert_tokens_to_ids", lambda piece: lookup("Ġ" if piece == " " else piece))
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    settings = {"max_new_tokens": 3, "token_healing": True, "pad_token_id": 50256}
    copy = hf.copy_of(model)
    # it goes on with the mask of the prompt as it was, which does not fit when white space is taken off
    same = torch.tensor([tokenizer(text.strip())["input_ids"]])
    expected = copy.generate(same, attention_mask=torch.ones_like(same), tokenizer=theirs, **settings)
    assert torch.equal(model.generate(ids, tokenizer=tokenizer, **settings), expected)
    # transformers' tokenizer serves too
    assert torch.equal(model.generate(ids, tokenizer=theirs, **settings), expected)


def test_the_last_token_is_chosen_among_its_extensions(real):
    tokenizer, model = real
    executor = model.generation_executor()
    for text in TEXTS:
        ids = tokenizer(text.strip())["input_ids"]
        healed = heal_prompts(executor, [tokenizer(text)["input_ids"]], tokenizer)[0]
        assert healed[:-1] == ids[:-1]
        last, new = tokenizer.convert_ids_to_tokens([ids[-1], healed[-1]])
        assert new.startswith(last)
        # by the definition: 10 for every extension, 1 more for the token itself
        with torch.no_grad():
            scores = model(torch.tensor([ids[:-1]])).logits[0, -1]
        for piece, token in tokenizer.get_vocab().items():
            if piece.startswith(last) and token != tokenizer.eos_token_id:
                scores[token] += 11.0 if token == ids[-1] else 10.0
        assert healed[-1] == int(scores.argmax())


def test_prompts_of_a_batch_are_healed_as_if_alone(real):
    tokenizer, model = real
    executor = model.generation_executor()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    together = heal_prompts(executor, prompts, tokenizer)
    assert together == [heal_prompts(executor, [prompt], tokenizer)[0] for prompt in prompts]
    settings = {"max_new_tokens": 2, "tokenizer": tokenizer}
    result = model.generate(prompts, token_healing=True, **settings)
    assert torch.equal(result, model.generate(together, **settings))


def test_what_stays_as_it_is(tokenizer, byte_model):
    executor = byte_model.generation_executor()
    end = tokenizer.eos_token_id
    for prompt in [[end], tokenizer("t")["input_ids"], [5, 6, end], tokenizer("  \n")["input_ids"]]:
        assert heal_prompts(executor, [prompt], tokenizer) == [prompt]
    # what stands before the last special token is kept
    prompt = [*tokenizer(" x ")["input_ids"], end, *tokenizer("on s")["input_ids"]]
    healed = heal_prompts(executor, [prompt], tokenizer)[0]
    assert healed[:-1] == prompt[:-1]
    assert tokenizer.convert_ids_to_tokens(healed[-1]) in ("s", "st", "stop")


def test_refusals(tokenizer, byte_model):
    with pytest.raises(RequestError, match="needs the tokenizer"):
        byte_model.generate([[5, 6]], token_healing=True)
    text = tokenizer.convert_tokens_to_ids(list("abc" * 20 + "s"))
    with pytest.raises(RequestError, match="n_positions"):
        heal_prompts(byte_model.generation_executor(), [text], tokenizer)
