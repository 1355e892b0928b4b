"""Bad calls: one clear sentence before any work."""

import math

import pytest
import torch

from gpt2rt.errors import NumericsError, RequestError


@pytest.fixture(autouse=True)
def no_work(model, monkeypatch):
    """A refused call must not reach the model."""

    def step(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(model.generation_executor(), "step", step)


IDS = torch.tensor([[5, 6], [7, 8]])

PROMPT_FAULTS = {
    "empty list": ([], "empty list"),
    "empty row": ([[]], "prompt 0 holds no token"),
    "one empty row": ([[5], []], "prompt 1 holds no token"),
    "flat list": ([5, 6], r"input_ids\[0\] is 5, expected a list of token ids"),
    "no rows": (torch.zeros((0, 3), dtype=torch.int64), r"shape \[0, 3\], expected at least one prompt"),
    "no columns": (torch.zeros((2, 0), dtype=torch.int64), r"shape \[2, 0\], expected at least one prompt"),
    "one dimension": (torch.tensor([5, 6]), r"shape \[2\], expected \[batch, length\]; use input_ids.unsqueeze"),
    "three dimensions": (torch.zeros((1, 1, 3), dtype=torch.int64), r"shape \[1, 1, 3\]"),
    "negative id": ([[5, -1]], "prompt 0 holds the token id -1, but the vocabulary has ids 0 to 96"),
    "id past the vocabulary": ([[5], [6, 97]], "prompt 1 holds the token id 97"),
    "id of 32 bits": (torch.tensor([[2**31]]), "token id 2147483648"),
    "id of 64 bits": ([[2**63]], "outside 64 bits"),
    "floats": (torch.tensor([[5.0]]), "tensor of torch.float32, expected token ids as torch.int64"),
    "bools": (torch.tensor([[True]]), "tensor of torch.bool"),
    "float in a list": ([[5, 6.0]], "prompt 0 holds 6.0, a float"),
    "bool in a list": ([[5], [True]], "prompt 1 holds True, a bool"),
    "nested": ([[5, [6]]], r"prompt 0 holds \[6\], a list"),
    "text": ("ROMEO", "not text"),
    "texts": (["ROMEO"], "not text"),
    "mapping": ({"input_ids": IDS}, r"unpack it: generate\(\*\*inputs\)"),
    "object": (object(), "input_ids is a object"),
    "too long": ([[5] * 49], "prompt 0 has 49 tokens, but the model has n_positions=48"),
    "second too long": ([[5], [5] * 500], "prompt 1 has 500 tokens"),
}


@pytest.mark.parametrize("name", PROMPT_FAULTS)
def test_prompts(model, name):
    prompts, message = PROMPT_FAULTS[name]
    with pytest.raises(RequestError, match=message):
        model.generate(prompts)


MASK_FAULTS = {
    "wrong length": ([[1, 1, 1], [1, 1, 1]], r"attention_mask has shape \[2, 3\], expected \[2, 2\]"),
    "one row": ([[1, 1]], "shape of input_ids"),
    "four dimensions": ([[[[1.0]]]], r"shape \[1, 1, 1, 1\]"),
    "all zero": ([[1, 1], [0, 0]], "0 in all of row 1"),
    "twos": ([[1, 2], [1, 1]], "1 for tokens and 0 for padding"),
    "negative": ([[1, -1], [1, 1]], "1 for tokens and 0 for padding"),
    "NaN": ([[1.0, math.nan], [1.0, 1.0]], "1 for tokens and 0 for padding"),
}


@pytest.mark.parametrize("name", MASK_FAULTS)
def test_masks(model, name):
    mask, message = MASK_FAULTS[name]
    with pytest.raises(RequestError, match=message):
        model.generate(IDS, attention_mask=torch.tensor(mask))


CALL_FAULTS = {
    "both prompts": ({"input_ids": IDS}, "the same argument, pass one"),
    "typing errors": ({"max_new_tokenz": 3, "temprature": 1.0}, r"\['max_new_tokenz', 'temprature'\]"),
    "not yet": ({"inputs_embeds": torch.zeros(1, 1, 48)}, "does not support inputs_embeds yet"),
    "beams": ({"num_beams": 4}, "does not support num_beams=4 yet"),
    "typical": ({"typical_p": 0.5}, "does not support typical_p=0.5 yet; leave it unset or 1.0"),
    "forced": ({"forced_eos_token_id": 3}, "does not support forced_eos_token_id=3 yet; leave it unset"),
    "assistant": ({"assistant_model": object()}, "does not support assistant_model yet"),
    "synced": ({"synced_gpus": True}, "does not support synced_gpus yet"),
    "several greedy": ({"num_return_sequences": 2}, "num_return_sequences=2 needs do_sample=True"),
    "temperature": ({"do_sample": True, "temperature": -1.0}, "temperature must be a number above 0"),
    "temperature NaN": ({"do_sample": True, "temperature": math.nan}, "got nan"),
    "max_length": ({"max_length": 2}, "`max_length` is set to 2"),
    "no tokenizer": ({"stop_strings": "x"}, "stop_strings need the tokenizer"),
    "end token": ({"eos_token_id": 97}, "eos_token_id holds 97, but the vocabulary has ids 0 to 96"),
    "suppressed token": ({"suppress_tokens": [5, 500]}, "suppress_tokens holds 500"),
    "bad word": ({"bad_words_ids": [[5, 500]]}, "bad_words_ids holds 500"),
    "no pad token": (
        {"eos_token_id": None, "pad_token_id": None, "max_time": None, "stopping_criteria": [bool]},
        "pad",
    ),
    "one processor": ({"logits_processor": max}, "logits_processor must be a list of callables"),
    "no callables": ({"stopping_criteria": [5]}, "stopping_criteria must be a list of callables"),
    "config": ({"generation_config": 5}, "generation_config must be a GenerationConfig, got int"),
}


@pytest.mark.parametrize("name", CALL_FAULTS)
def test_calls(model, name):
    settings, message = CALL_FAULTS[name]
    with pytest.raises(RequestError, match=message):
        model.generate(IDS, **settings)


def test_no_bos(model):
    with pytest.raises(RequestError, match="`bos_token_id` has to be defined"):
        model.generate(bos_token_id=None)
    with pytest.raises(RequestError, match="attention_mask was given without input_ids"):
        model.generate(attention_mask=torch.ones(1, 1))


@pytest.mark.parametrize("count", [10**9, 2**31 - 1])
def test_demands_beyond_the_machine_are_refused_at_once(model, count, monkeypatch):
    def make_rows(*args):
        raise AssertionError("a row for each sequence was made before looking at the number of them")

    monkeypatch.setattr("gpt2rt.generation.decode.make_rows", make_rows)
    with pytest.raises(RequestError, match=r"need up to .* GB of KV cache, but cpu has .* GB"):
        model.generate([[5]], do_sample=True, max_new_tokens=40, num_return_sequences=count)


def test_unpadded_eos_is_text_but_said(byte_model, tokenizer):
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end, 5], [6, 7]])
    with pytest.warns(UserWarning, match="pass the tokenizer's attention_mask"):
        result = byte_model.generate(ids, pad_token_id=end, max_new_tokens=2)
    mask = torch.ones_like(ids)
    assert torch.equal(byte_model.generate(ids, attention_mask=mask, pad_token_id=end, max_new_tokens=2), result)


def test_a_processor_that_makes_nan_in_place(byte_model):
    with pytest.raises(NumericsError, match="row 1: the scores hold nan"):
        byte_model.generate(
            [[5], [6]], logits_processor=[lambda ids, scores: scores.index_fill_(0, torch.tensor(1), math.nan)]
        )


def test_rows_without_a_token_left(byte_model):
    with pytest.raises(RequestError, match="row 1: every token is excluded"):
        byte_model.generate(
            [[5], [6]], logits_processor=[lambda ids, scores: scores.index_fill(0, torch.tensor(1), -math.inf)]
        )


def test_processors_must_keep_the_shape(byte_model):
    with pytest.raises(RequestError, match=r"the logits processor function returned \[1, 5\], expected"):
        byte_model.generate([[5]], logits_processor=[lambda ids, scores: scores[:, :5]])
    with pytest.raises(RequestError, match="returned NoneType"):
        byte_model.generate([[5]], logits_processor=[lambda ids, scores: None])
