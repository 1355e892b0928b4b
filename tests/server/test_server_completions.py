"""``/v1/completions``: every field, and what lm_eval and guidellm rely on."""

import asyncio

import pytest
from live_server import Api, events

from gpt2rt.engine.params import SamplingParams

GREEDY = {"prompt": "ROMEO:", "max_tokens": 8, "temperature": 0}


def complete(api, **body):
    response = api.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(api, **body):
    """The message of a 400, and its field."""
    response = api.post("/v1/completions", {"prompt": "a", **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["message"], error["param"]


def test_the_shape_of_an_answer(api):
    answer = complete(api, **GREEDY, user="somebody")
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "gpt2rt/tiny-gpt2"
    assert answer["system_fingerprint"].startswith("gpt2rt-")
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "length", None)
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}


def test_prompts_as_text_or_ids_or_lists_of_either(api):
    tokenizer = api.engine.tokenizer
    texts = ["ROMEO:", "JULIET:"]
    ids = [tokenizer.encode(text) for text in texts]
    options = {"max_tokens": 6, "temperature": 0}
    alone = [complete(api, prompt=text, **options)["choices"][0]["text"] for text in texts]
    assert [complete(api, prompt=one, **options)["choices"][0]["text"] for one in ids] == alone
    for many in (texts, ids):
        choices = complete(api, prompt=many, **options)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert [choice["text"] for choice in choices] == alone


@pytest.mark.proves("fault:F34")
def test_empty_prompts(api):
    # a text from nothing begins with the bos token, as generate() does
    bos = api.engine.tokenizer.bos_token_id
    answer = complete(api, **{**GREEDY, "prompt": "", "return_token_ids": True})
    assert answer["choices"][0]["prompt_token_ids"] == [bos]
    assert "empty list" in refused(api, prompt=[])[0]
    assert "prompt[0]" in refused(api, prompt=[[]])[0]
    assert "prompt[1]" in refused(api, prompt=[[5], []])[0]
    response = api.post("/v1/completions", {"max_tokens": 3})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "prompt is missing"


@pytest.mark.proves("fault:F35")
@pytest.mark.parametrize(
    "prompt",
    [[-1], [2048], [2**31], [2**63], [1.5], [True], ["a", 5], [5, "a"], [[5], 5], [["a"]], [[5, None]], {"a": 1}, 5],
    ids=str,
)
def test_token_ids_that_are_none(api, prompt):
    message, _ = refused(api, prompt=prompt)
    assert "prompt" in message


@pytest.mark.proves("fault:F36")
def test_prompts_that_are_too_long(api):
    longest = api.engine.max_model_len
    for body in ({"prompt": [5] * (longest + 1)}, {"prompt": [5] * longest}, {"prompt": "a" * 200_000}):
        assert str(longest) in refused(api, **body)[0]
    message, _ = refused(api, prompt=[5] * 500, max_tokens=13)
    assert "lower max_tokens to 12" in message
    # as many of the last tokens as fit
    answer = complete(api, prompt=[5] * 600 + [6, 7], max_tokens=4, truncate_prompt_tokens=-1)
    assert answer["usage"]["prompt_tokens"] == longest - 4
    answer = complete(api, prompt=[5] * 600 + [6, 7], max_tokens=4, truncate_prompt_tokens=3, return_token_ids=True)
    assert answer["choices"][0]["prompt_token_ids"] == [5, 6, 7]


@pytest.mark.proves("fault:F37")
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"top_k": 10**12},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"frequency_penalty": -2.5},
        {"temperature": 10**400},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": 1.5},
    ],
    ids=str,
)
def test_sampling_values_out_of_range(api, values):
    message, param = refused(api, **values)
    (name,) = values
    assert name in message
    assert param == name


@pytest.mark.proves("fault:F37")
def test_a_tiny_temperature_is_greedy(api):
    options = {"prompt": "ROMEO:", "max_tokens": 8, "top_k": 10**6}
    assert complete(api, **options, temperature=1e-30)["choices"] == complete(api, **options, temperature=0)["choices"]


@pytest.mark.proves("fault:F38")
@pytest.mark.parametrize(
    "values",
    [
        {"n": 10**9},
        {"n": 0},
        {"n": 17},
        {"n": 2, "best_of": 1},
        {"best_of": 2},
        {"prompt": ["a"] * 129},
        {"prompt": ["a"] * 100, "n": 3},
        {"logprobs": -1},
        {"logprobs": 10**6},
        {"prompt_logprobs": 21},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 10**12},
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
        {"priority": 2**31},
        {"min_tokens": 17},
    ],
    ids=lambda values: str(values)[:40],
)
def test_numbers_out_of_range(api, values):
    message, _ = refused(api, **values)
    assert any(name in message for name in (*values, "continuations"))


@pytest.mark.proves("fault:F38")
@pytest.mark.parametrize(
    ("values", "number"),
    [
        ({"n": 16, "logprobs": 20, "max_tokens": 100}, 16 * 100 * 21),
        ({"prompt": [[5] * 100] * 16, "echo": True, "logprobs": 9, "max_tokens": 0}, 16 * 101 * 10),
        ({"prompt": [[5] * 100] * 8, "prompt_logprobs": 19, "max_tokens": 1}, 8 * 100 * 20),
    ],
    ids=["output", "echo", "prompt"],
)
def test_more_log_probabilities_than_an_answer_may_hold(engine, values, number):
    api = Api(engine, max_answer_logprobs=number - 1)
    message, _ = refused(api, **values)
    assert f"{number} log-probabilities, expected at most {number - 1}" in message
    # an answer with many of them is written beside the event loop, and is the same as one with few
    api = Api(engine, max_answer_logprobs=number)
    body = {"prompt": [[5] * 100], "seed": 1, **values}
    many = complete(api, **body)["choices"]
    few = complete(api, **(body | {"prompt": body["prompt"][0], "n": 1}))["choices"]
    assert len(many) in (8, 16)
    assert few[0] == many[0]


def test_as_many_choices_as_are_allowed(api):
    answer = complete(api, prompt="a", n=16, best_of=16, max_tokens=2, seed=-(2**63))
    assert [choice["index"] for choice in answer["choices"]] == list(range(16))


@pytest.mark.proves("fault:F39")
def test_stop_strings(api):
    text = complete(api, **{**GREEDY, "max_tokens": 24})["choices"][0]["text"]
    for stop in (text[3:6], [text[10:11], "never"], ["zzz", text[5:9], text[5:7]]):
        (choice,) = complete(api, **{**GREEDY, "max_tokens": 24}, stop=stop)["choices"]
        places = [(text.find(one), one) for one in ([stop] if isinstance(stop, str) else stop) if one in text]
        assert choice["finish_reason"] == "stop"
        assert choice["text"] == text[: min(places)[0]]
        assert choice["stop_reason"] in [one for place, one in places if place == min(places)[0]]
    (choice,) = complete(api, **{**GREEDY, "max_tokens": 24}, stop=text[3:6], include_stop_str_in_output=True)[
        "choices"
    ]
    assert choice["text"] == text[:6]
    for stop in (["a"] * 5, "", ["a", ""], "x" * 257, [1]):
        assert "stop" in refused(api, stop=stop)[0]


@pytest.mark.proves("fault:F40")
@pytest.mark.parametrize(
    "values",
    [
        {"stop_token_ids": [2048]},
        {"stop_token_ids": [-1]},
        {"logit_bias": {"2048": 1.0}},
        {"logit_bias": {"-1": 1.0}},
        {"logit_bias": {"five": 1.0}},
        {"logit_bias": {"5": 1e38}},
        {"logit_bias": {"5": None}},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [5, 2048]},
        {"bad_words": [""]},
        {"bad_words": ["a"] * 129},
    ],
    ids=str,
)
def test_lists_of_tokens_that_are_none(api, values):
    (name,) = values
    assert name in refused(api, **values)[0]


@pytest.mark.proves("fault:F41")
def test_what_may_be_chosen(api):
    newline = api.engine.tokenizer.encode("\n")[0]
    assert complete(api, **GREEDY, allowed_token_ids=[newline])["choices"][0]["text"] == "\n" * 8
    assert complete(api, **GREEDY, logit_bias={str(newline): 100})["choices"][0]["text"] == "\n" * 8
    # the only token that may be chosen may not be chosen either: an answer, never a draw from nothing
    eos = api.engine.tokenizer.eos_token_id
    response = api.post("/v1/completions", {**GREEDY, "allowed_token_ids": [eos], "min_tokens": 4})
    assert response.status_code in (200, 400)
    if response.status_code == 200:
        assert response.json()["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.proves("fault:F44")
@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"suffix": "x"}, "suffix"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"guided_regex": "(a+)+b" * 1000}, "guided_regex"),
        ({"structured_outputs": {"regex": "((("}}, "structured_outputs"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"logits_processors": ["os.system"]}, "logits_processors"),
        ({"tools": []}, "tools"),
        ({"images": ["x"]}, "images"),
        ({"inputs_embeds": [[0.0]]}, "inputs_embeds"),
        ({"surprise": 1}, "surprise"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"surprise": True}}, "surprise"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_there_is_refused_by_name(api, values, known):
    message, param = refused(api, **values)
    assert known in message
    assert known in param


def test_values_that_change_nothing_are_taken(api):
    neutral = {
        "structured_outputs": None,
        "response_format": {"type": "text"},
        "suffix": None,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "spaces_between_special_tokens": True,
        "guided_json": None,
        "best_of": 1,
        "logit_bias": None,
        "stop": None,
        "seed": None,
        "top_k": -1,
        "stream_options": None,
        "n": None,
        "stop_token_ids": [],
        "bad_words": [],
        "user": "",
    }
    known = complete(api, **GREEDY)["choices"]
    assert complete(api, **GREEDY, **neutral)["choices"] == known
    assert complete(api, **GREEDY, stop=[], logit_bias={}, frequency_penalty=0, presence_penalty=0)["choices"] == known


def test_lm_evals_requests(api):
    """``list[list[int]]`` with echo and logprobs; it reads the log-probabilities of the prompt's tokens."""
    tokenizer = api.engine.tokenizer
    prompts = [tokenizer.encode(text) for text in ("ROMEO:\nI am", "JULIET:", "First Citizen:\nWe")]
    body = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    answer = complete(api, model="gpt2rt/tiny-gpt2", **body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    model = api.engine.model
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        kept = choice["logprobs"]
        assert len(kept["token_logprobs"]) == len(kept["tokens"]) == len(kept["top_logprobs"]) == len(ids) + 1
        assert kept["token_logprobs"][0] is None
        known = list(model.score([ids]).token_logprobs[0])
        assert kept["token_logprobs"][1:-1] == pytest.approx(known[-(len(ids) - 1) :], abs=1e-4)
        for token, value, top in list(zip(kept["tokens"], kept["token_logprobs"], kept["top_logprobs"], strict=True))[
            1:
        ]:
            assert top[token] == value
            assert max(top.values()) >= value
        # each offset is where the token begins in the text
        assert choice["text"] == "".join(kept["tokens"])
        ends = [*kept["text_offset"][1:], len(choice["text"])]
        spans = zip(kept["text_offset"], ends, kept["tokens"], strict=True)
        assert [choice["text"][start:end] for start, end, _ in spans] == kept["tokens"]


def test_echo_without_new_tokens(api):
    answer = complete(api, prompt="ROMEO:\nI am", echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ROMEO:\nI am", "length")
    assert choice["logprobs"]["tokens"] == ["ROMEO", ":", "\n", "I", " am"]
    assert answer["usage"]["completion_tokens"] == 0
    assert complete(api, prompt=[5, 6], echo=True, max_tokens=0)["choices"][0]["text"] == "&'"


def test_echo_of_a_prompt_that_fills_the_context(api):
    ids = [5 + number % 1000 for number in range(512)]
    answer = complete(api, prompt=ids, echo=True, logprobs=0, max_tokens=0)
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 512
    assert answer["usage"] == {"prompt_tokens": 512, "total_tokens": 512, "completion_tokens": 0} | {
        name: value for name, value in answer["usage"].items() if name.endswith("details")
    }


def test_guidellms_requests(api):
    """A stream that goes on for exactly so many tokens, with running counts."""
    body = {"prompt": "ROMEO:", "max_tokens": 20, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    response = api.post("/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert found[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 20, "total_tokens": 22}
    assert found[-1]["choices"] == []
    # without the option there is no usage, and with it alone it is null until the end
    del body["stream_options"]
    assert not any("usage" in event for event in events(api.post("/v1/completions", body).text))
    body["stream_options"] = {"include_usage": True}
    found = events(api.post("/v1/completions", body).text)
    assert [event["usage"] for event in found[:-1]] == [None] * (len(found) - 1)


def test_prompt_logprobs_and_token_ids(api):
    body = {"prompt": "ROMEO:", "max_tokens": 3, "temperature": 0, "prompt_logprobs": 2, "return_token_ids": True}
    (choice,) = complete(api, **body)["choices"]
    ids = api.engine.tokenizer.encode("ROMEO:")
    assert choice["prompt_token_ids"] == ids
    assert api.engine.tokenizer.decode(choice["token_ids"]) == choice["text"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second[str(ids[1])]["decoded_token"] == ":"
    assert second[str(ids[1])]["rank"] == 1
    streamed = events(api.post("/v1/completions", {**body, "stream": True}).text)
    parts = [event["choices"][0] for event in streamed]
    assert parts[0]["prompt_logprobs"] == choice["prompt_logprobs"]
    assert all("prompt_logprobs" not in part for part in parts[1:])
    assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
    # names of tokens as numbers
    kept = complete(api, **GREEDY, logprobs=1, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    assert all(token.startswith("token_id:") for token in kept["tokens"])
    assert all(token in top for token, top in zip(kept["tokens"], kept["top_logprobs"], strict=True))


def test_pieces_of_characters_have_names_of_their_own(api):
    tokenizer = api.engine.tokenizer
    ids = tokenizer.encode("🌶")
    assert len(ids) > 1
    (choice,) = complete(api, prompt=ids, echo=True, logprobs=0, max_tokens=0)["choices"]
    assert choice["text"] == "🌶"
    names = choice["logprobs"]["tokens"]
    assert all(name.startswith("bytes:\\x") for name in names)
    joined = bytes(int(byte, 16) for name in names for byte in name.removeprefix("bytes:\\x").split("\\x"))
    assert joined.decode() == "🌶"
    assert choice["logprobs"]["text_offset"] == [0] * len(ids)


def test_a_seed_gives_the_text_of_generate(api):
    """Through the server, through the engine and from the model: the same draws."""
    ids = api.engine.tokenizer.encode("ROMEO:")
    answer = complete(api, prompt=ids, max_tokens=12, seed=5, return_token_ids=True, ignore_eos=True)

    async def ask():
        params = SamplingParams(max_tokens=12, seed=5, ignore_eos=True)
        async for output in api.engine.generate(ids, params):
            last = output
        return last.outputs[0].token_ids

    assert answer["choices"][0]["token_ids"] == asyncio.run(ask())


def test_cached_prompt_tokens_are_told_if_wanted(engine):
    api = Api(engine, enable_prompt_tokens_details=True)
    body = {"prompt": [7] * 40, "max_tokens": 1, "cache_salt": "of this test"}
    assert complete(api, **body)["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert complete(api, **body)["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
    body["cache_salt"] = "of another one"
    assert complete(api, **body)["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_special_tokens_in_prompts(engine):
    body = {"prompt": "<|endoftext|>", "max_tokens": 1, "return_token_ids": True}
    ids = complete(Api(engine), **body)["choices"][0]["prompt_token_ids"]
    assert ids == [engine.tokenizer.eos_token_id]
    plain = complete(Api(engine, split_special_tokens=True), **body)["choices"][0]["prompt_token_ids"]
    assert engine.tokenizer.eos_token_id not in plain
    assert engine.tokenizer.decode(plain) == "<|endoftext|>"
