"""Requests that no engine can do: refused by a sentence before any work, in the middle of others that go on."""

import math

import pytest
import torch
from engine_cases import TEXT, prompt_ids, said
from engine_faults import assert_clean, begin, requests, run, small_llm

from gpt2rt.engine import PoolingParams, SamplingParams
from gpt2rt.errors import RequestError


@pytest.fixture(scope="module")
def engine():
    with small_llm(max_model_len=256) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(engine):
    results = run(engine, begin(engine, requests(2)))
    engine.reset_prefix_cache()
    return results


def refused(engine, expected, prompt, make_params, match):
    """A request in a list of good ones ends the call before any of them; requests on their way do not notice."""
    steps = engine.stats().num_steps
    begun = begin(engine, requests(2))
    with torch.inference_mode():
        engine.core.step()
    with pytest.raises(RequestError, match=match):
        engine.generate([prompt_ids(8), prompt, prompt_ids(9)], make_params())
    with pytest.raises(RequestError, match=match):
        next(engine.stream(prompt, make_params()))
    # nothing was computed, and nothing waits
    assert engine.stats().num_steps == steps + 1
    assert list(engine.core.requests.values()) == begun
    assert run(engine, begun) == expected
    assert_clean(engine.core)
    engine.reset_prefix_cache()


@pytest.mark.proves("fault:F34")
@pytest.mark.parametrize(
    "prompt", ["", [], {"prompt": ""}, {"prompt_token_ids": []}, torch.zeros(0, dtype=torch.int64)]
)
def test_an_empty_prompt(engine, expected, prompt):
    refused(engine, expected, prompt, SamplingParams, "empty")


@pytest.mark.proves("fault:F34")
def test_no_prompts(engine):
    assert engine.generate([], SamplingParams()) == []
    assert engine.encode([]) == []


@pytest.mark.proves("fault:F35")
@pytest.mark.parametrize(
    "ids",
    [[-1], [5, 10**4], [2**31], [2**63], [2**64], [1.0], [1, 2.5], [True], [1, [2]], [None], ["1"], [[[1]]], b"abc", 7],
    ids=repr,
)
def test_ids_that_are_none(engine, expected, ids):
    refused(engine, expected, {"prompt_token_ids": ids}, SamplingParams, "prompt")


@pytest.mark.proves("fault:F36")
@pytest.mark.parametrize(
    ("length", "max_tokens"), [(257, 1), (256, 1), (250, 7), (10**5, 1), (1, 256), (1, 10**12), (257, None)]
)
def test_more_than_the_positions(engine, expected, length, max_tokens):
    assert engine.max_model_len == 256
    refused(engine, expected, prompt_ids(length), lambda: SamplingParams(max_tokens=max_tokens), "tokens")


@pytest.mark.proves("fault:F36")
@pytest.mark.parametrize("length", [1, 250, 255])
def test_up_to_the_positions(engine, length):
    params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    (output,) = engine.generate([prompt_ids(length)], params)
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 256 - length


@pytest.mark.proves("fault:F37")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-1, math.nan, math.inf, "hot", True)),
        *(("top_p", value) for value in (0, 1.5, math.nan)),
        *(("top_k", value) for value in (-2, 1.5, 10**30)),
        *(("min_p", value) for value in (2, -0.1)),
        *(("repetition_penalty", value) for value in (0, math.nan, -1)),
        *(("frequency_penalty", value) for value in (3, math.inf)),
        ("presence_penalty", -3),
    ],
)
def test_settings_out_of_range(engine, expected, field, value):
    def late():
        # set after the check of the constructor
        params = SamplingParams()
        setattr(params, field, value)
        return params

    refused(engine, expected, prompt_ids(5), lambda: SamplingParams(**{field: value}), field)
    refused(engine, expected, prompt_ids(5), late, field)


@pytest.mark.proves("fault:F37")
def test_next_to_no_temperature_is_greedy(engine):
    cold, greedy = (SamplingParams(max_tokens=8, temperature=temperature) for temperature in (1e-30, 0.0))
    assert said(engine.generate(TEXT[:40], cold)[0]) == said(engine.generate(TEXT[:40], greedy)[0])


@pytest.mark.proves("fault:F38")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n", value) for value in (0, -1, 17, 10**9)),
        *(("logprobs", value) for value in (-1, 21, 10**6)),
        *(("prompt_logprobs", value) for value in (-1, 10**6)),
        *(("max_tokens", value) for value in (0, -1, 10**12)),
        *(("seed", value) for value in (2**63, -(2**63) - 1, 0.5)),
        ("min_tokens", 17),
        ("truncate_prompt_tokens", 0),
    ],
)
def test_absurd_counts(engine, expected, field, value):
    refused(engine, expected, prompt_ids(5), lambda: SamplingParams(**{field: value}), field)


@pytest.mark.proves("fault:F40")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("stop_token_ids", value) for value in ([-1], [10**4], [2**63], [1.0])),
        *(("logit_bias", value) for value in ({-1: 1.0}, {10**4: 1.0}, {5: math.nan}, {5: 1e38}, {"x": 1.0})),
        *(("allowed_token_ids", value) for value in ([], [10**4], [-5])),
        *(("bad_words", value) for value in ([""], ["a"] * 200, ["a" * 10**6])),
    ],
)
def test_lists_of_ids(engine, expected, field, value):
    refused(engine, expected, prompt_ids(5), lambda: SamplingParams(**{field: value}), field)


@pytest.mark.proves("fault:F41")
def test_no_token_is_left(engine, expected):
    # the only allowed token is a bad word, and the end is not due
    (word,) = engine.tokenizer.encode(" the")
    params = SamplingParams(max_tokens=3, allowed_token_ids=[word], bad_words=["the"])
    begun = begin(engine, [*requests(2), (prompt_ids(6), params)])
    *others, got = run(engine, begun)
    assert others == expected
    assert isinstance(got, RequestError)
    assert "no token is left" in str(got)
    assert begun[-1].outputs[-1].outputs[0].token_ids == []
    assert_clean(engine.core)
    engine.reset_prefix_cache()


@pytest.mark.proves("fault:F42")
@pytest.mark.parametrize("text", ["\ud800", "ab\udfffcd", "x" * 10**6, "x " * 10**6])
def test_texts_that_are_refused(engine, expected, text):
    refused(engine, expected, text, SamplingParams, "prompt")


@pytest.mark.proves("fault:F42")
@pytest.mark.parametrize("text", ["\0", "a\0b", "\u202eabc\u202c", "\ufeff", "🌶" * 5, "\r\n\t ", "é" * 20])
def test_texts_that_come_back(engine, text):
    (output,) = engine.generate(text, SamplingParams(max_tokens=1, temperature=0.0))
    assert engine.tokenizer.decode(output.prompt_token_ids) == text
    assert output.prompt == text


@pytest.mark.proves("fault:F42")
def test_a_long_word_that_is_cut(engine):
    params = SamplingParams(max_tokens=2, temperature=0.0, truncate_prompt_tokens=5)
    (output,) = engine.generate("x" * 10**5, params)
    assert len(output.prompt_token_ids) == 5


@pytest.mark.parametrize(
    ("prompts", "params", "match"),
    [
        (7, SamplingParams(), "texts or lists"),
        ([{"text": "a"}], SamplingParams(), "only 'prompt'"),
        ([{}], SamplingParams(), "needs 'prompt'"),
        (["a", "b"], [SamplingParams()], "1 parameters for 2 prompts"),
        (["a"], PoolingParams(), "sampling_params are SamplingParams"),
        (["a"], {"max_tokens": 3}, "sampling_params are SamplingParams"),
    ],
)
def test_calls_that_make_no_sense(engine, prompts, params, match):
    with pytest.raises(RequestError, match=match):
        engine.generate(prompts, params)
    assert not engine.core.has_unfinished


@pytest.mark.parametrize("keyword", [{"priority": 2**31}, {"priority": "1"}, {"cache_salt": ""}, {"cache_salt": 3}])
def test_keywords_that_make_no_sense(engine, keyword):
    with pytest.raises(RequestError, match=next(iter(keyword))):
        engine.generate("a", SamplingParams(), **keyword)


@pytest.mark.parametrize("task", ["classify", "token_classify"])
def test_a_task_that_the_model_has_not(engine, task):
    with pytest.raises(RequestError, match=f"no task '{task}'"):
        engine.encode("a", PoolingParams(task=task))
    assert not engine.core.has_unfinished
