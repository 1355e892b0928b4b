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


def filled_cache(columns=3, batch=2, layers=2, heads=3, width=16, dtype=torch.float32):
    return tuple((torch.zeros(batch, heads, columns, width, dtype=dtype),) * 2 for _ in range(layers))


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


@pytest.mark.proves("fault:F35", "fault:F36")
@pytest.mark.proves("G7", "fault:F34", "fault:F35", "fault:F36")
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


@pytest.mark.proves("fault:F43")
@pytest.mark.proves("G7", "G8", "fault:F43")
@pytest.mark.parametrize("name", MASK_FAULTS)
def test_masks(model, name):
    mask, message = MASK_FAULTS[name]
    with pytest.raises(RequestError, match=message):
        model.generate(IDS, attention_mask=torch.tensor(mask))


CALL_FAULTS = {
    "both prompts": ({"input_ids": IDS}, "the same argument, pass one"),
    "typing errors": ({"max_new_tokenz": 3, "temprature": 1.0}, r"\['max_new_tokenz', 'temprature'\]"),
    "types": ({"token_type_ids": IDS}, r"the prompts end with token types \[6, 8\]"),
    "types of another shape": ({"token_type_ids": IDS[:1]}, r"token_type_ids is torch.int64 of shape \[1, 2\]"),
    "types and a window": (
        {"token_type_ids": torch.zeros_like(IDS), "context_policy": "sliding"},
        "context_policy='sliding' does not go with token_type_ids",
    ),
    "types past the vocabulary": ({"token_type_ids": IDS + 90}, "token_type_ids holds 97, but types are looked up"),
    "heads": ({"head_mask": torch.ones(3)}, "does not support head_mask"),
    "encoder": ({"encoder_hidden_states": torch.ones(2, 3, 48)}, "models with cross attention run in forward only"),
    "contrastive": ({"penalty_alpha": 0.6}, "does not support penalty_alpha=0.6"),
    "groups": ({"num_beam_groups": 2}, "does not support num_beam_groups=2"),
    "assistant": (
        {"assistant_model": object()},
        "assistant_model is a builtins.object, expected a language model of gpt2rt",
    ),
    "synced": ({"synced_gpus": True}, "does not support synced_gpus: the model is not spread"),
    "hub code": ({"custom_generate": "someone/loop"}, "names code in a repository, which gpt2rt never runs"),
    "beams": ({"num_beams": 0}, "num_beams must be"),
    "more rows than beams": (
        {"num_beams": 2, "num_return_sequences": 3},
        r"`num_return_sequences` \(3\) has to be smaller or equal to `num_beams` \(2\)",
    ),
    "early_stopping": ({"num_beams": 2, "early_stopping": "sometimes"}, "early_stopping must be"),
    "streamed beams": ({"num_beams": 2, "streamer": object()}, "`streamer` cannot be used with beam search"),
    "offloaded": ({"cache_implementation": "offloaded"}, "does not support cache_implementation='offloaded': keys"),
    "offloaded static": ({"cache_implementation": "offloaded_static"}, "keys and values are not moved"),
    "quantized to 4 bits": (
        {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
        "nbits=4: a quantized cache has 8 bits",
    ),
    "no such cache": ({"cache_implementation": "tiny"}, "cache_implementation must be"),
    "short static cache": (
        {"cache_implementation": "static", "max_cache_len": 8, "max_new_tokens": 8},
        "max_cache_len=8, but a row may need 9 places",
    ),
    "two caches": (
        {"cache_implementation": "static", "past_key_values": filled_cache()},
        "cache_implementation and past_key_values were both given",
    ),
    "positions": ({"position_ids": torch.tensor([[3, 4]])}, "position_ids must number each row's tokens from 0"),
    "position shape": ({"position_ids": torch.tensor([0, 1])}, "position_ids must number"),
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


@pytest.mark.proves("fault:F37", "fault:F40")
@pytest.mark.proves("G7")
@pytest.mark.parametrize("name", CALL_FAULTS)
def test_calls(model, name):
    settings, message = CALL_FAULTS[name]
    with pytest.raises(RequestError, match=message):
        model.generate(IDS, **settings)


CACHE_FAULTS = {
    "no ids": ({"past_key_values": filled_cache()}, "past_key_values was given without input_ids"),
    "a number": ({"input_ids": IDS, "past_key_values": 5}, "past_key_values is a int; pass"),
    "layers": ({"input_ids": IDS, "past_key_values": filled_cache(layers=1)}, "has 1 layers, but the model has 2"),
    "batch": ({"input_ids": IDS, "past_key_values": filled_cache(batch=3)}, r"shape \[3, 3, 3, 16\] in layer 0"),
    "heads": ({"input_ids": IDS, "past_key_values": filled_cache(heads=2)}, r"expected \[2, 3, 'columns', 16\]"),
    "dtype": ({"input_ids": IDS, "past_key_values": filled_cache(dtype=torch.float16)}, "is torch.float16 on cpu"),
    "mask": (
        {"input_ids": IDS, "past_key_values": filled_cache(), "attention_mask": torch.ones(2, 4)},
        r"attention_mask has shape \[2, 4\], expected \[2, 2\] or \[2, 5\]",
    ),
    "too long": (
        {"input_ids": IDS, "past_key_values": filled_cache(columns=47)},
        "prompt 0 has 47 tokens in past_key_values besides 2 ids, together 49",
    ),
    "use_cache": (
        {"input_ids": IDS, "past_key_values": filled_cache(), "use_cache": False},
        "use_cache=False computes rows anew from their ids",
    ),
    "sliding": (
        {"input_ids": IDS, "past_key_values": filled_cache(), "context_policy": "sliding"},
        "context_policy='sliding' does not go with a filled past_key_values",
    ),
    "cut prompts": (
        {"input_ids": IDS, "past_key_values": (), "context_policy": "truncate_left"},
        "context_policy='truncate_left' does not go with past_key_values",
    ),
    "sliding attentions": (
        {"input_ids": IDS, "context_policy": "sliding", "output_attentions": True, "return_dict_in_generate": True},
        "output_attentions does not go with context_policy='sliding'",
    ),
    "lookup": (
        {"input_ids": IDS, "past_key_values": filled_cache(), "prompt_lookup_num_tokens": 3},
        "prompt_lookup_num_tokens needs the ids of the whole prompt, which a filled past_key_values does not have",
    ),
    "embeddings too": (
        {"inputs_embeds": torch.zeros(2, 2, 48), "past_key_values": filled_cache()},
        "inputs_embeds and a filled past_key_values were both given",
    ),
    "embeddings' width": ({"inputs_embeds": torch.zeros(2, 2, 40)}, r"of shape \[2, 2, 40\], expected"),
    "embeddings as a list": ({"inputs_embeds": [[0.0]]}, "inputs_embeds is a list"),
    "embeddings' dtype": ({"inputs_embeds": torch.zeros(2, 2, 48).double()}, "inputs_embeds is torch.float64"),
    "embeddings too long": ({"inputs_embeds": torch.zeros(1, 49, 48)}, "prompt 0 has 49 tokens in inputs_embeds"),
    "masked embeddings": (
        {"inputs_embeds": torch.zeros(1, 2, 48), "attention_mask": torch.zeros(1, 2)},
        "attention_mask is 0 in all of a row of inputs_embeds",
    ),
    "ids for embeddings": (
        {"inputs_embeds": torch.zeros(2, 1, 48), "input_ids": IDS},
        "input_ids has 2 tokens, inputs_embeds 1",
    ),
    "rows for embeddings": (
        {"inputs_embeds": torch.zeros(1, 2, 48), "input_ids": IDS},
        "input_ids has 2 rows, inputs_embeds 1",
    ),
}


@pytest.mark.proves("G7", "G9")
@pytest.mark.parametrize("name", CACHE_FAULTS)
def test_prompts_that_are_more_than_ids(model, name):
    settings, message = CACHE_FAULTS[name]
    with pytest.raises(RequestError, match=message):
        model.generate(**settings)


@pytest.mark.proves("G7")
def test_no_bos(model):
    with pytest.raises(RequestError, match="`bos_token_id` has to be defined"):
        model.generate(bos_token_id=None)
    with pytest.raises(RequestError, match="attention_mask was given without input_ids"):
        model.generate(attention_mask=torch.ones(1, 1))


@pytest.mark.proves("fault:F38")
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


@pytest.mark.proves("fault:F41")
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
