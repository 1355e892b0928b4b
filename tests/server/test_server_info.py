"""Tokens, models, health, version and metrics."""

import pytest
from live_server import Api
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine

from gpt2rt.env import version


def test_tokenize_and_detokenize(api):
    tokenizer = api.engine.tokenizer
    for text in ("ROMEO:\nI am", "Où est 🌶", "", "<|endoftext|>", "a\x00b", "שלום ‏", "x" * 20_000):
        answer = api.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
        ids = tokenizer.encode(text)
        assert answer == {
            "count": len(ids),
            "max_model_len": api.engine.max_model_len,
            "tokens": ids,
            "token_strs": tokenizer.convert_ids_to_tokens(ids),
        }
        assert api.post("/detokenize", {"tokens": ids}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "x" * 300_000}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {"tokens": [5000]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**70]}),
    ],
    ids=str,
)
def test_bad_tokens(api, path, body):
    assert api.post(path, body).status_code == 400


def test_tokenizer_info(api):
    answer = api.get("/tokenizer_info").json()
    assert answer["eos_token"] == answer["bos_token"] == "<|endoftext|>"
    assert answer["chat_template"] is None
    assert answer["vocab_size"] == 2048


def test_models(engine):
    api = Api(engine, served_model_name=("shakespeare", "tiny"))
    listed = api.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["shakespeare", "tiny"]
    assert {card["max_model_len"] for card in listed["data"]} == {512}
    assert api.get("/v1/models/tiny").json()["id"] == "tiny"
    for name in ("shakespeare", "tiny", None):
        answer = api.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "model": name}).json()
        assert answer["model"] == (name or "shakespeare")


@pytest.mark.proves("fault:F48")
@pytest.mark.parametrize("name", ["gpt2", "../../etc/passwd", "http://example.com/model", "", "x" * 5000, "a\x00b"])
def test_unknown_models(api, name):
    bodies = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/embeddings": {"input": "a"},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [5]},
    }
    for path, body in bodies.items():
        response = api.post(path, {**body, "model": name})
        assert response.status_code == 404, (path, response.text)
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert len(error["message"]) < 400


def test_a_folder_is_served_under_its_own_name(tmp_path):
    folder = tmp_path / "secret-place" / "my-gpt2"
    folder.mkdir(parents=True)
    engine = ScriptedEngine()
    engine.model_name = str(folder)
    api = Api(engine)
    assert [card["id"] for card in api.get("/v1/models").json()["data"]] == ["my-gpt2"]
    for path in ("/v1/models", "/metrics", "/tokenizer_info", "/openapi.json", "/v1/models/other"):
        assert "secret-place" not in api.get(path).text


def test_version_and_health_and_unknown_paths(api):
    assert api.get("/version").json() == {"version": version()}
    assert api.get("/health").status_code == 200
    response = api.get("/v1/nothing")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
    response = api.get("/v1/completions")
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"


def numbers(api):
    """Name and labels -> value, of all that ``/metrics`` shows."""
    text = api.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def change(api, work):
    """By how much ``work`` changes each number."""
    before = numbers(api)
    work()
    after = numbers(api)
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def test_metrics_have_vllms_names(api):
    text = api.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    kinds = {
        "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info kernel_backend_info",
        "counter": "prompt_tokens generation_tokens prefix_cache_queries prefix_cache_hits num_preemptions "
        "request_success admission_rejections corrupted_requests",
        "histogram": "time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds "
        "e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds "
        "request_decode_time_seconds request_prompt_tokens request_generation_tokens iteration_tokens_total",
    }
    for kind, names in kinds.items():
        for name in names.split():
            assert families["gpt2rt:" + name].type == kind
            assert families["gpt2rt:" + name].samples[0].labels["model_name"] == "gpt2rt/tiny-gpt2"
    (info,) = families["gpt2rt:cache_config_info"].samples
    assert (info.labels["block_size"], info.labels["num_blocks"]) == ("16", "512")


def test_metrics_count(engine):
    api = Api(engine)
    label = ("model_name", "gpt2rt/tiny-gpt2")

    def work():
        body = {"prompt": ["ROMEO:", "JULIET:"], "max_tokens": 5, "n": 2, "ignore_eos": True}
        assert api.post("/v1/completions", body).status_code == 200

    changed = change(api, work)
    tokens = sum(len(engine.tokenizer.encode(text)) for text in ("ROMEO:", "JULIET:"))
    assert changed["gpt2rt:prompt_tokens_total", (label,)] == tokens
    assert changed["gpt2rt:generation_tokens_total", (label,)] == 20
    assert changed["gpt2rt:request_success_total", (("finished_reason", "length"), label)] == 2
    assert changed["gpt2rt:time_to_first_token_seconds_count", (label,)] == 2
    assert changed["gpt2rt:inter_token_latency_seconds_count", (label,)] == 16
    assert changed["gpt2rt:request_generation_tokens_sum", (label,)] == 20
    assert changed["gpt2rt:e2e_request_latency_seconds_count", (label,)] == 2
    # a value on a bound of a histogram belongs below it
    assert changed["gpt2rt:request_generation_tokens_bucket", (("le", "10.0"), label)] == 2
    assert changed["gpt2rt:request_generation_tokens_bucket", (("le", "5.0"), label)] == 0
