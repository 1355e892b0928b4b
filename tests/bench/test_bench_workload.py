"""Prompts and arrival times: functions of the seed, with the lengths and gaps that were asked for."""

import json
import math

import numpy as np
import pytest

from gpt2rt.bench.workload import Sample, Workload, arrival_times, ordinary_ids, random_samples


class Words:
    """A tokenizer of words, with one special token."""

    all_special_ids = (3,)

    def __len__(self):
        return 50

    def encode(self, text):
        return text.split()


def test_random_prompts_have_the_lengths_asked_for():
    samples = Workload(num_prompts=20, input_len=30, output_len=9).samples(Words())
    assert {(len(s.prompt), s.prompt_len, s.output_len) for s in samples} == {(30, 30, 9)}
    assert len({tuple(s.prompt) for s in samples}) == 20
    assert {token for s in samples for token in s.prompt} <= set(range(50)) - {3}


def test_random_lengths_vary_within_their_range():
    samples = random_samples(list(range(9)), 400, input_len=10, output_len=20, range_ratio=0.5)
    assert {s.prompt_len for s in samples} == set(range(5, 16))
    assert {s.output_len for s in samples} == set(range(10, 31))
    assert all(len(s.prompt) == s.prompt_len for s in samples)
    shortest = random_samples([1], 50, input_len=1, output_len=1, range_ratio=0.9)
    assert min(s.prompt_len for s in shortest) == 1


def test_a_common_prefix_comes_before_the_prompt():
    samples = random_samples(list(range(100)), 8, input_len=4, output_len=1, prefix_len=16)
    assert {tuple(s.prompt[:16]) for s in samples} == {tuple(samples[0].prompt[:16])}
    assert {s.prompt_len for s in samples} == {20}
    assert len({tuple(s.prompt[16:]) for s in samples}) == 8


def test_the_seed_is_all_that_prompts_depend_on():
    def prompts(seed):
        return Workload(num_prompts=5, input_len=8, seed=seed).samples(Words())

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


def test_prompts_to_warm_up_with_are_others():
    found = Workload(num_prompts=5, input_len=8).samples(Words(), extra=3)
    assert len(found) == 8
    assert len({tuple(s.prompt) for s in found}) == 8


def test_special_tokens_are_not_drawn():
    assert ordinary_ids(Words()) == [*range(3), *range(4, 50)]


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "one two three", "output_tokens": 4}, {"prompt": "four"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    own = Workload("custom", num_prompts=5, output_len=None, path=path).samples(Words())
    assert sorted(set(map(repr, own))) == sorted(map(repr, [Sample("one two three", 3, 4), Sample("four", 1, 128)]))
    assert len(own) == 5
    told = Workload("custom", num_prompts=2, output_len=6, path=path).samples(Words())
    assert {s.output_len for s in told} == {6}


def test_sharegpt_asks_for_as_much_as_was_answered(tmp_path):
    path = tmp_path / "sharegpt.json"
    turns = [["how are you", "fine thanks"], ["alone"], ["hello", ""]]
    data = [{"conversations": [{"from": "x", "value": text} for text in turn]} for turn in turns]
    path.write_text(json.dumps(data), encoding="utf-8")
    samples = Workload("sharegpt", num_prompts=1, output_len=None, path=path).samples(Words())
    # one has no answer, another an empty one
    assert samples == [Sample("how are you", 3, 2)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("custom", "[]\n", "line 1: expected"),
        ("custom", '{"prompt": "a"}\n{"prompt": 3}\n', "line 2: expected"),
        ("custom", "\n", "holds no prompt"),
        ("sharegpt", "{", "expected a list"),
        ("sharegpt", "[{}]", "expected a list"),
        ("sharegpt", "[]", "holds no prompt"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, name, text, message):
    path = tmp_path / "data"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Workload(name, num_prompts=1, output_len=None, path=path).samples(Words())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "c4"}, "no data set 'c4'"),
        ({"num_prompts": 0}, "at least one prompt"),
        ({"output_len": 0}, "at least one prompt, input and output token"),
        ({"range_ratio": 1.0}, "below 1"),
        ({"prefix_len": -1}, "at least 0"),
        ({"name": "custom"}, "needs a file"),
        ({"path": "x"}, "takes no file"),
    ],
)
def test_impossible_workloads_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Workload(**values)


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 5.0])
def test_requests_arrive_at_the_rate_asked_for(burstiness):
    moments = arrival_times(2000, 50.0, burstiness, seed=3)
    assert moments[-1] == pytest.approx(2000 / 50.0)
    gaps = np.diff([0.0, *moments])
    assert (gaps >= 0).all()
    # a gamma distribution's variance is mean^2 / shape
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.15)
    assert arrival_times(2000, 50.0, burstiness, seed=3) == moments
    assert arrival_times(2000, 50.0, burstiness, seed=4) != moments


def test_an_infinite_rate_sends_all_at_once():
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("values", [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0), (1.0, math.inf)])
def test_rates_must_be_positive(values):
    with pytest.raises(ValueError, match="must be positive"):
        arrival_times(3, *values)
