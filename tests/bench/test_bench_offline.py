"""Measuring an engine in this process: how often it runs, what it is asked, what is counted."""

import asyncio
import math

import numpy as np
import pytest

from gpt2rt.bench.offline import latency, stream_all, throughput, throughput_result
from gpt2rt.bench.workload import Sample
from gpt2rt.engine import LLM, AsyncLLM

SAMPLES = [Sample([5, 6, 7], 3, 4), Sample("To be", 2, 6), Sample([8] * 20, 20, 1)]


@pytest.fixture(scope="module")
def llm():
    with LLM("gpt2rt/tiny-gpt2", num_threads=1, num_blocks=64, enable_prefix_caching=False) as llm:
        yield llm


def calls(monkeypatch, llm):
    """What ``llm.generate`` is called with from here on."""
    seen = []
    plain = llm.generate

    def generate(prompts, parameters):
        seen.append((prompts, parameters))
        return plain(prompts, parameters)

    monkeypatch.setattr(llm, "generate", generate)
    return seen


def test_latency_is_that_of_the_whole_batch(llm, monkeypatch):
    seen = calls(monkeypatch, llm)
    steps = []
    result = latency(
        llm,
        input_len=5,
        output_len=3,
        batch_size=4,
        num_iters=6,
        num_iters_warmup=2,
        progress=lambda: steps.append(1),
    )
    assert len(seen) == len(steps) == 8
    prompts, parameters = seen[0]
    assert {len(prompt["prompt_token_ids"]) for prompt in prompts} == {5}
    assert len({tuple(prompt["prompt_token_ids"]) for prompt in prompts}) == 4
    assert (parameters.max_tokens, parameters.ignore_eos, parameters.temperature) == (3, True, 1.0)
    assert all(call[0] == prompts for call in seen)
    # the ones to warm up do not count
    assert len(result["latencies"]) == 6
    assert result["avg_latency"] == pytest.approx(np.mean(result["latencies"]))
    assert result["std_latency"] == pytest.approx(np.std(result["latencies"]))
    assert list(result["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert result["percentiles"]["50"] == pytest.approx(np.median(result["latencies"]))


def test_the_seed_chooses_the_prompts(llm, monkeypatch):
    seen = calls(monkeypatch, llm)
    for seed in (1, 1, 2):
        latency(llm, input_len=4, output_len=1, batch_size=2, num_iters=1, num_iters_warmup=0, seed=seed)
    assert seen[0][0] == seen[1][0] != seen[2][0]


def test_throughput_counts_the_tokens_of_all_requests(llm, monkeypatch):
    seen = calls(monkeypatch, llm)
    result = throughput(llm, SAMPLES, warmups=SAMPLES[:1], temperature=0.0)
    assert [len(prompts) for prompts, _ in seen] == [1, 3]
    assert [parameters.max_tokens for parameters in seen[1][1]] == [4, 6, 1]
    words = len(llm.tokenizer.encode("To be"))
    assert result["total_output_tokens"] == 11
    assert result["total_num_tokens"] == 11 + 3 + 20 + words
    assert result["num_requests"] == 3


def test_every_answer_to_a_prompt_counts(llm):
    result = throughput(llm, SAMPLES[:1], n=3)
    assert (result["num_requests"], result["total_output_tokens"]) == (1, 12)


def test_rates():
    result = throughput_result(2.0, 10, 300, 100)
    assert result == {
        "elapsed_time": 2.0,
        "num_requests": 10,
        "total_num_tokens": 400,
        "requests_per_second": 5.0,
        "tokens_per_second": 200.0,
        "total_output_tokens": 100,
        "output_tokens_per_second": 50.0,
    }


def test_streams_are_timed_from_their_beginning():
    async def main():
        engine = AsyncLLM("gpt2rt/tiny-gpt2", num_threads=1, num_blocks=64)
        try:
            return await stream_all(engine, SAMPLES, temperature=0.0)
        finally:
            engine.shutdown()

    answers, elapsed = asyncio.run(main())
    assert [answer.output_len for answer in answers] == [4, 6, 1]
    for answer in answers:
        assert 0 < answer.ttft <= answer.latency <= elapsed
        assert math.isclose(answer.ttft + sum(answer.itl), answer.latency)
        assert len(answer.itl) < answer.output_len
        assert answer.text
