"""What a request may ask for: every value is checked, and a refusal names the field, the value and the range."""

import math

import numpy as np
import pytest

from gpt2rt.engine.params import PoolingParams, RequestLimits, RequestOutputKind, SamplingParams
from gpt2rt.errors import RequestError
from gpt2rt.tokenizers import AutoTokenizer

VOCAB = 512
LIMITS = RequestLimits()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("gpt2rt/tiny-gpt2")


def check(tokenizer, limits=LIMITS, vocab_size=None, **settings):
    params = SamplingParams(**settings)
    params.check(vocab_size=len(tokenizer) if vocab_size is None else vocab_size, limits=limits, tokenizer=tokenizer)
    return params


SETTINGS = [
    ("temperature", [-1, math.nan, math.inf, -math.inf, 1e31, "hot", True, None, 10**400], "from 0 to 1e+30"),
    ("top_p", [0, 0.0, 1.5, -0.1, math.nan, "x", None], "above 0 and at most 1"),
    ("top_k", [-2, 2.5, 2**40, True, "5", None], "from -1 to 2147483647"),
    ("min_p", [2, -0.1, math.nan, None], "from 0 to 1"),
    ("repetition_penalty", [0, -1, math.nan, math.inf, 1e7, None], "from 1e-06 to 1e+06"),
    ("frequency_penalty", [-2.1, 2.1, math.nan, "1"], "from -2 to 2"),
    ("presence_penalty", [-3, 3, -math.inf, None], "from -2 to 2"),
]


@pytest.mark.proves("fault:F37")
@pytest.mark.parametrize(("field", "values", "rule"), SETTINGS, ids=[row[0] for row in SETTINGS])
def test_sampling_settings_out_of_range_are_refused_with_the_range(field, values, rule):
    for value in values:
        with pytest.raises(RequestError) as error:
            SamplingParams(**{field: value})
        message = str(error.value)
        assert message.startswith(f"{field} must be a"), message
        assert rule in message, message
        assert "got" in message
        assert len(message) < 300


@pytest.mark.proves("fault:F37")
def test_a_tiny_temperature_is_greedy():
    assert SamplingParams(temperature=1e-30).greedy
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-5).greedy
    assert not SamplingParams().greedy


COUNTS = [
    ("n", [0, -1, 10**9, 10**4300, True, 1.0, "2", None]),
    ("max_tokens", [0, -1, 10**12, 1.5, True]),
    ("min_tokens", [-1, 0.5, 2**31, None]),
    ("logprobs", [-1, 10**6, 21, True, 1.0]),
    ("prompt_logprobs", [-1, 10**6, 21, False]),
    ("seed", [2**63, -(2**63) - 1, 1.5, True, "7"]),
    ("truncate_prompt_tokens", [0, -2, 2**31, 1.5, True]),
]


@pytest.mark.proves("fault:F38")
@pytest.mark.parametrize(("field", "values"), COUNTS, ids=[row[0] for row in COUNTS])
def test_absurd_counts_are_refused(tokenizer, field, values):
    for value in values:
        with pytest.raises(RequestError, match=f"^{field} must be") as error:
            check(tokenizer, **{field: value})
        assert len(str(error.value)) < 300


@pytest.mark.proves("fault:F38")
def test_counts_that_do_not_go_together_are_refused():
    with pytest.raises(RequestError, match="min_tokens must be at most max_tokens, 3, got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)
    with pytest.raises(RequestError, match=r"n is 2 with temperature 0\.0, expected n=1"):
        SamplingParams(n=2, temperature=0.0)
    assert SamplingParams(max_tokens=None, min_tokens=4).max_tokens is None


LISTS = [
    ({"stop_token_ids": [-1]}, "each id in stop_token_ids must be an integer from 0 to 2147483647, got -1"),
    ({"stop_token_ids": [1.0]}, "each id in stop_token_ids must be"),
    ({"stop_token_ids": [True]}, "each id in stop_token_ids must be"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, got 5"),
    ({"stop_token_ids": [VOCAB]}, "stop_token_ids: 512 is no token of the model, expected integers from 0 to 511"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids must have at most 128 tokens, got 129"),
    ({"allowed_token_ids": []}, r"allowed_token_ids must be .* with at least one, or None, got \[\]"),
    ({"allowed_token_ids": [3, VOCAB]}, "allowed_token_ids: 512 is no token"),
    ({"allowed_token_ids": [3] * (VOCAB + 1)}, "allowed_token_ids must have at most 512 tokens, got 513"),
    ({"logit_bias": {VOCAB: 1.0}}, "logit_bias: 512 is no token"),
    ({"logit_bias": {"-1": 1.0}}, "each key of logit_bias must be a token id, .* got '-1'"),
    ({"logit_bias": {"²": 1.0}}, "each key of logit_bias must be a token id"),
    ({"logit_bias": {True: 1.0}}, "each key of logit_bias must be a token id"),
    ({"logit_bias": {"9" * 5000: 1.0}}, "each key of logit_bias must be a token id"),
    ({"logit_bias": {3: math.nan}}, r"logit_bias\[3\] must be a number from -100 to 100, got nan"),
    ({"logit_bias": {3: 1e38}}, r"logit_bias\[3\] must be a number from -100 to 100, got 1e\+38"),
    ({"logit_bias": {3: -math.inf}}, r"logit_bias\[3\] must be"),
    ({"logit_bias": [3]}, "logit_bias must be a mapping"),
    ({"logit_bias": dict.fromkeys(range(11), 1.0)}, "logit_bias must have at most 10 tokens, got 11"),
    ({"bad_words": [""]}, "bad_words must be a text or a list of texts, none of them empty, got ''"),
    ({"bad_words": [" "]}, "bad_words: ' ' has no tokens"),
    ({"bad_words": ["x"] * 129}, "bad_words must have at most 128 words, got 129"),
    ({"bad_words": ["word " * 1200]}, "bad_words must be at most 1024 tokens in all"),
    ({"bad_words": ["w" * 10**6]}, "bad_words must have at most 65536 characters in all, got 1000000"),
]


@pytest.mark.proves("fault:F40")
@pytest.mark.parametrize(("settings", "message"), LISTS)
def test_lists_of_tokens_are_checked(tokenizer, settings, message):
    with pytest.raises(RequestError, match=message) as error:
        check(tokenizer, RequestLimits(logit_bias=10), VOCAB, **settings)
    assert len(str(error.value)) < 300


@pytest.mark.proves("fault:F40")
def test_bad_words_outside_the_models_vocabulary_are_refused(tokenizer):
    # a tokenizer with more tokens than the model
    high = max(range(len(tokenizer)), key=lambda token: token if tokenizer.decode([token]).isalpha() else -1)
    word = tokenizer.decode([high])
    ids = tokenizer.encode(word, add_special_tokens=False)
    with pytest.raises(RequestError, match=f"bad_words: {max(ids)} is no token of the model"):
        check(tokenizer, vocab_size=max(ids), bad_words=[word])


@pytest.mark.proves("fault:F39")
def test_stop_strings_are_checked(tokenizer):
    for stop, message in (
        ("", "stop must be a text or a list of texts, none of them empty, got ''"),
        (["a", ""], "none of them empty"),
        ([b"a"], "none of them empty, got b'a'"),
        (7, "stop must be a text or a list of texts"),
        ("\ud800", "in valid Unicode"),
        ([str(i) for i in range(1000)], "stop must have at most 4 texts, got 1000"),
        ("é" * 129, "stop: each text has at most 256 bytes, got 258"),
    ):
        with pytest.raises(RequestError, match=message):
            check(tokenizer, stop=stop)
    assert check(tokenizer, stop="é" * 128).stop == ["é" * 128]
    assert check(tokenizer, RequestLimits(stop_strings=9), stop=list("abcdefghi")).stop == list("abcdefghi")


def test_types_are_checked():
    for field, value in (
        ("ignore_eos", 1),
        ("detokenize", "yes"),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", 0),
        ("output_kind", 1),
        ("logits_processors", [3]),
        ("logits_processors", len),
    ):
        with pytest.raises(RequestError, match=f"^{field} must be"):
            SamplingParams(**{field: value})


def test_what_needs_a_tokenizer_is_refused_without_one():
    with pytest.raises(RequestError, match="detokenize=True needs a tokenizer"):
        SamplingParams().check(vocab_size=VOCAB, limits=LIMITS, tokenizer=None)
    with pytest.raises(RequestError, match=r"bad_words=\['x'\] need a tokenizer"):
        SamplingParams(detokenize=False, bad_words=["x"]).check(vocab_size=VOCAB, limits=LIMITS, tokenizer=None)
    with pytest.raises(RequestError, match=r"stop=\['x'\] needs text"):
        SamplingParams(detokenize=False, stop="x")
    SamplingParams(detokenize=False).check(vocab_size=VOCAB, limits=LIMITS, tokenizer=None)


def test_values_become_plain():
    params = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        top_k=np.int32(4),
        stop="end",
        stop_token_ids=(np.int64(3), 4),
        logit_bias={"5": 1, 6: np.float64(2.5)},
        seed=-1,
        max_tokens=np.int16(9),
    )
    assert type(params.n) is int
    assert type(params.temperature) is float
    assert (params.top_k, params.stop, params.stop_token_ids) == (4, ["end"], [3, 4])
    assert params.logit_bias == {5: 1.0, 6: 2.5}
    # as in vLLM
    assert params.seed is None
    empty = SamplingParams(logit_bias={}, stop=[], stop_token_ids=None, logits_processors=[])
    assert (empty.logit_bias, empty.stop, empty.stop_token_ids, empty.logits_processors) == (None, [], [], None)
    assert empty == SamplingParams()


def test_fields_set_later_are_checked_too(tokenizer):
    params = SamplingParams()
    params.top_p = 3.0
    with pytest.raises(RequestError, match="top_p must be"):
        params.check(vocab_size=VOCAB, limits=LIMITS, tokenizer=tokenizer)
    params.top_p, params.stop = 1.0, "x"
    params.check(vocab_size=VOCAB, limits=LIMITS, tokenizer=tokenizer)
    assert params.stop == ["x"]


def test_bad_words_in_tokens(tokenizer):
    params = check(tokenizer, bad_words=["the", " cat"])
    spellings = {tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("the", " the", "cat", " cat")}
    found = params.bad_words_token_ids
    assert {tuple(ids) for ids in found} <= spellings
    assert list(tokenizer.encode("the", add_special_tokens=False)) in found
    assert list(tokenizer.encode(" the", add_special_tokens=False)) in found
    params.bad_words = None
    params.check(vocab_size=VOCAB, limits=LIMITS, tokenizer=tokenizer)
    assert params.bad_words_token_ids is None


def test_clone_has_lists_of_its_own():
    params = SamplingParams(stop=["a"], logit_bias={1: 1.0}, stop_token_ids=[4], output_kind=RequestOutputKind.DELTA)
    twin = params.clone()
    assert twin == params
    twin.stop.append("b")
    twin.logit_bias[2] = 2.0
    twin.stop_token_ids.append(5)
    assert (params.stop, params.logit_bias, params.stop_token_ids) == (["a"], {1: 1.0}, [4])


def test_limits_are_checked():
    for field, value in (("n", 0), ("n", True), ("logprobs", 129), ("stop_strings", -1), ("bad_words", 1.5)):
        with pytest.raises(ValueError, match=f"limit {field} must be an integer"):
            RequestLimits(**{field: value})
    assert RequestLimits(logprobs=128).logprobs == 128


def test_logprobs_of_a_small_vocabulary(tokenizer):
    with pytest.raises(RequestError, match="logprobs must be at most 5, got 6"):
        check(tokenizer, vocab_size=5, logprobs=6)


def test_pooling_params():
    for field, value in (
        ("task", "generate"),
        ("task", None),
        ("pooling", "cls"),
        ("normalize", 1),
        ("use_activation", None),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", True),
    ):
        with pytest.raises(RequestError, match=f"^{field} must be"):
            PoolingParams(**{field: value})
    params = PoolingParams(task="classify", truncate_prompt_tokens=-1)
    assert params.clone() == params
    params.task = "sing"
    with pytest.raises(RequestError, match="task must be one of 'embed', 'classify'"):
        params.check()
