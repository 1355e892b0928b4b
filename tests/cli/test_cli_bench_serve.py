"""``gpt2rt bench serve`` against a stub server: what it sends, prints, writes and refuses."""

import json

import pytest
from stub_server import StubServer

MODEL = ("--tokenizer", "gpt2rt/tiny-gpt2")


@pytest.fixture
def server():
    with StubServer() as server:
        yield server


def test_a_table(run, server):
    code, out, err = run("bench", "serve", "--base-url", server.url, *MODEL, "--num-prompts", 5, "--output-len", 3)
    assert (code, err) == (0, "")
    assert "stub, 5 requests" in out
    for text in ("completed requests", "Time to first token", "Inter-token latency", "p99", "Time per output token"):
        assert text in out
    assert "End-to-end" not in out
    assert "good requests" not in out


def test_vllms_flags_and_keys(run, server, tmp_path):
    command = f"""bench serve --base-url {server.url} --backend vllm --model other --tokenizer gpt2rt/tiny-gpt2
        --dataset-name random --random-input-len 9 --random-output-len 4 --num-prompts 6 --num-warmups 2
        --max-concurrency 2 --request-rate 500 --burstiness 0.5 --goodput ttft:1000000 tpot:1000000
        --percentile-metrics ttft,tpot,itl,e2el --metric-percentiles 50,99.9 --seed 7 --label night
        --save-result --result-dir {tmp_path} --output-json {tmp_path / "out.json"} --json"""
    code, out, err = run(*command.split())
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["completed"] == 6
    assert result["total_output_tokens"] == 24
    assert result["request_goodput"] == result["request_throughput"]
    assert result["p99.9_e2el_ms"] >= result["p50_e2el_ms"] > 0
    assert (result["model_id"], result["tokenizer_id"]) == ("other", "gpt2rt/tiny-gpt2")
    assert result["max_concurrent_requests"] <= 2
    assert server.peak <= 2
    bodies = [body for _, path, _, body in server.requests if path == "/v1/completions"]
    # one shows the server ready
    assert len(bodies) == 6 + 2 + 1
    assert all(len(body["prompt"]) == 9 and body["ignore_eos"] for body in bodies)
    assert len({str(body["prompt"]) for body in bodies}) == 9
    (named,) = tmp_path.glob("night-500.0qps-concurrency2-other-*.json")
    assert json.loads(named.read_text()) == json.loads((tmp_path / "out.json").read_text()) == result


def test_a_seed_makes_the_same_prompts(run):
    def prompts(seed):
        with StubServer() as server:
            run(
                "bench",
                "serve",
                "--base-url",
                server.url,
                *MODEL,
                "--num-prompts",
                3,
                "--output-len",
                1,
                "--seed",
                seed,
            )
            return sorted(str(body["prompt"]) for *_, body in server.requests if body)

    assert prompts(1) == prompts(1) != prompts(2)


def test_chats_and_keys(run, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    code, _, err = run(
        *("bench", "serve", "--base-url", server.url, *MODEL, "--backend", "openai-chat", "--num-prompts", 2),
        *("--output-len", 2, "--header", "X-Who=me", "--extra-body", '{"top_k": 1}', "--keep-eos"),
    )
    assert (code, err) == (0, "")
    *_, (_, path, headers, body) = server.requests
    assert path == "/v1/chat/completions"
    assert isinstance(body["messages"][0]["content"], str)
    assert (headers["authorization"], headers["x-who"]) == ("Bearer secret", "me")
    assert body["top_k"] == 1
    assert "ignore_eos" not in body


def test_failed_requests_are_told(run):
    with StubServer(fault=lambda body: "refuse" if body["max_tokens"] > 3 else None) as server:
        arguments = (
            "bench",
            "serve",
            "--base-url",
            server.url,
            *MODEL,
            "--num-prompts",
            12,
            "--ready-check-timeout-sec",
            0,
        )
        code, out, err = run(*arguments, "--output-len", 3, "--random-range-ratio", 0.9, "--json")
        result = json.loads(out)
        assert code == 0
        assert 0 < result["failed"] < 12
        assert f"{result['failed']} of 12 requests failed; the first: status 503" in err
        code, out, err = run(*arguments, "--output-len", 9, "--json")
    assert code == 1
    assert json.loads(out)["mean_ttft_ms"] is None


def test_a_server_that_is_not_there(run, one_sentence):
    with StubServer() as server:
        url = server.url
    for more in ((), ("--model", "gpt2rt/tiny-gpt2")):
        code, _, err = run(
            "bench", "serve", "--base-url", url, "--ready-check-timeout-sec", 0, "--num-prompts", 1, *more
        )
        assert code == 1
        assert "cannot be reached" in err
    code, _, err = run("bench", "serve", "--base-url", url, "--ready-check-timeout-sec", 0)
    assert "cannot be reached" in one_sentence(err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "triton"), "--backend must be one of openai, vllm, openai-chat, got 'triton'"),
        (("--num-prompts", "0"), "at least one prompt"),
        (("--max-concurrency", "0"), "--max-concurrency at least 1, got 0 and 0"),
        (("--goodput", "itl:3"), "--goodput: expected METRIC:MILLISECONDS"),
        (("ttft:3",), "unexpected argument 'ttft:3'"),
        (("--percentile-metrics", "x"), "--percentile-metrics: there is no metric 'x'"),
        (("--metric-percentiles", "x"), "--metric-percentiles: expected numbers"),
        (("--request-rate", "0"), "--request-rate, --burstiness: request rate and burstiness must be positive"),
        (("--extra-body", "[]"), "--extra-body must be a JSON object"),
        (("--header", "x"), "--header takes KEY=VALUE"),
        (("--dataset-name", "custom"), "data set 'custom' needs a file"),
        (("--model", "x"), "--tokenizer is needed: 'x' was tried"),
        (("--base-url", "localhost:80"), "--base-url: the base URL must be like http://127.0.0.1:8000"),
    ],
)
def test_wrong_usage(run, one_sentence, arguments, message):
    code, _, err = run("bench", "serve", "--base-url", "http://127.0.0.1:1", *arguments)
    assert code == 2
    assert message in one_sentence(err)
