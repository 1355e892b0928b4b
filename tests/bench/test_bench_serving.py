"""The load generator against a stub server: what it sends, when, and what it counts."""

import asyncio
import json
import math

import pytest
from stub_server import StubServer

from gpt2rt.bench import serve
from gpt2rt.bench.http import HttpError
from gpt2rt.bench.serve import Target, first_model, report, run
from gpt2rt.bench.workload import Sample

SAMPLES = [Sample([1, 2, number], 3, 2 + number) for number in range(4)]


def measure(server, samples=SAMPLES, *, endpoint="/v1/completions", body=None, **options):
    target = Target(server.url, "stub", endpoint, body=body or {}, ignore_eos=True, timeout=5.0)
    return asyncio.run(run(target, samples, **{"ready_timeout": 0, **options}))


def test_every_request_is_sent_and_counted():
    with StubServer() as server:
        answers, duration = measure(server, body={"top_k": 3})
        sent = [body for *_, body in server.requests]
    assert duration > 0
    assert sorted(body["prompt"] for body in sent) == [sample.prompt for sample in SAMPLES]
    assert {body["max_tokens"] for body in sent} == {2, 3, 4, 5}
    for body in sent:
        expected = {"model": "stub", "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        assert body.items() >= {**expected, "temperature": 0.0, "top_k": 3}.items()
    for answer, sample in zip(answers, SAMPLES, strict=True):
        assert answer.error == ""
        # the server's own count
        assert (answer.prompt_len, answer.output_len) == (7, sample.output_len)
        assert len(answer.itl) == sample.output_len - 1
        assert answer.text == "".join(f" {number}" for number in range(sample.output_len))
        assert 0 < answer.ttft <= answer.latency
        assert math.isclose(answer.ttft + sum(answer.itl), answer.latency)


def test_times_are_at_least_the_servers_own():
    with StubServer(gap=0.02) as server:
        ((answer,), duration) = measure(server, [Sample([1], 1, 4)])
    # each chunk waits once for each of its two pieces, the second of which completes it
    assert answer.ttft >= 0.02
    assert all(gap >= 0.015 for gap in answer.itl)
    assert answer.latency <= duration


def test_no_more_than_max_concurrency_are_under_way():
    with StubServer(gap=0.005) as server:
        samples = [Sample([1], 1, 3)] * 9
        answers, _ = measure(server, samples, max_concurrency=3)
        assert server.peak == 3
        # connections are kept
        assert server.connections == 3
    assert not any(answer.error for answer in answers)


def test_requests_wait_for_their_time():
    with StubServer() as server:
        answers, duration = measure(server, [Sample([1], 1, 1)] * 6, request_rate=60.0, seed=1)
    starts = [answer.start for answer in answers]
    assert starts == sorted(starts)
    # the last one is due after 6 / 60 s
    assert duration >= 0.1


def test_warm_ups_are_sent_before_and_not_counted():
    warmups = [Sample([50], 1, 1), Sample([51], 1, 1), Sample([52], 1, 1)]
    with StubServer() as server:
        answers, _ = measure(server, warmups=warmups, ready_timeout=5.0)
        prompts = [body["prompt"] for *_, body in server.requests]
    assert len(answers) == len(SAMPLES)
    assert prompts[0] == [50]
    assert sorted(prompts[1:3]) == [[51], [52]]
    assert sorted(prompts[3:]) == [sample.prompt for sample in SAMPLES]


def test_chats_have_messages():
    with StubServer() as server:
        (answer,), _ = measure(server, [Sample("hello", 1, 2)], endpoint="/v1/chat/completions")
        ((_, path, _, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert "prompt" not in body
    assert answer.text == " 0 1"


def test_without_usage_chunks_are_counted():
    with StubServer(usage=False) as server:
        (answer,), _ = measure(server, [Sample([1, 2], 2, 5)])
    assert (answer.prompt_len, answer.output_len) == (2, 5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refuse", "status 503: .*too many requests wait"),
        ("break", "broke off|closed the connection"),
        ("event", "error in the stream: .*numbers went wrong"),
        ("silent", "the stream held no choice"),
        ("nonsense", "not an answer of the OpenAI API: JSONDecodeError"),
        ("garbage", "expected an HTTP/1.1 status line"),
    ],
)
def test_a_failed_request_fails_alone(fault, message):
    with StubServer(fault=lambda body: fault if body["prompt"] == [1, 2, 2] else None) as server:
        answers, _ = measure(server)
    assert [bool(answer.error) for answer in answers] == [False, False, True, False]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(answers[2].error)


def test_a_server_that_never_gets_ready(monkeypatch):
    monkeypatch.setattr(serve, "RETRY_S", 0.01)
    said = []
    with StubServer(fault="refuse") as server, pytest.raises(HttpError, match="first request failed: status 503"):
        measure(server, ready_timeout=0.1, notice=said.append)
    # more than one attempt, one notice
    assert len(server.requests) > 1
    assert len(said) == 1
    assert "waiting for the server: status 503" in said[0]


def test_a_server_that_gets_ready_is_waited_for(monkeypatch):
    monkeypatch.setattr(serve, "RETRY_S", 0.01)
    attempts = iter(["refuse", "refuse"])
    with StubServer(fault=lambda body: next(attempts, None)) as server:
        answers, _ = measure(server, ready_timeout=30.0)
    assert not any(answer.error for answer in answers)


def test_the_model_is_asked_for(monkeypatch):
    monkeypatch.setattr(serve, "RETRY_S", 0.01)
    with StubServer() as server:
        assert asyncio.run(first_model(server.url, {}, 5.0)) == "stub"
    said = []
    with pytest.raises(HttpError, match="cannot be reached"):
        asyncio.run(first_model(server.url, {}, 5.0, patience=0.1, notice=said.append))
    assert len(said) == 1


def test_the_report_has_vllms_keys():
    with StubServer() as server:
        answers, duration = measure(server)
    target = Target(server.url, "stub")
    options = dict(
        backend="openai",
        label=None,
        tokenizer="stub",
        request_rate=math.inf,
        burstiness=1.0,
        max_concurrency=3,
        num_warmups=0,
        seed=0,
        metrics=["ttft", "tpot", "itl"],
        percentiles=[99.0],
        goodput={"ttft": 1e6},
    )
    result = report(target, answers, duration, detailed=False, **options)
    keys = """date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency
        duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
        output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests
        mean_ttft_ms median_ttft_ms std_ttft_ms p99_ttft_ms mean_tpot_ms median_tpot_ms std_tpot_ms p99_tpot_ms
        mean_itl_ms median_itl_ms std_itl_ms p99_itl_ms"""
    assert set(result) == {*keys.split(), "num_warmups", "seed"}
    assert result["request_rate"] == "inf"
    assert result["request_goodput"] == result["request_throughput"]
    more = report(target, answers, duration, detailed=True, **options)
    detailed = "input_lens output_lens ttfts itls start_times generated_texts errors"
    assert set(more) - set(result) == set(detailed.split())
    json.dumps(more)
