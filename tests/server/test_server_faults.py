"""Faults at the level of HTTP: an answer that says what is wrong, and nothing lost for anybody else."""

import asyncio
import json
import logging
import socket
import struct
import threading
import time

import httpx
import pytest
from live_server import Api, LiveServer, events, read_all, wait_until
from scripted_engine import ScriptedEngine

from gpt2rt.engine.params import SamplingParams
from gpt2rt.errors import NumericsError, RequestFailedError

BODY = {"prompt": "a", "max_tokens": 3}


@pytest.fixture
def scripted():
    return ScriptedEngine()


def message_of(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


# ---- bodies that are no request --------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F46")
@pytest.mark.parametrize(
    ("data", "known"),
    [
        (b"", "the body is missing"),
        (b"{", "no JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity"),
        (b'{"prompt": "a", "temperature": 1e400}', "temperature"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 100_000 + b"}", "too many digits"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 4000 + b"}", "max_tokens"),
        (b'{"prompt": "a", "temperature": ' + b"9" * 4000 + b"}", "temperature"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "a", "logit_bias": {"5": 1, "5": 2}}', "twice"),
        (b'"prompt"', "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'{"prompt": "a", "max_tokens": "5"}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 5.5}', "max_tokens"),
        (b'{"prompt": "a", "stream": "yes"}', "stream"),
        (b"\xff\xfe{\x00", "not UTF-8"),
        (b'{"prompt": "\xc3("}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "\\udc00\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "user": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "\\ud800": 1}', "surrogate"),
        (b'{"prompt": "a", "stop": ["\\udfff"]}', "surrogate"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bodies_that_are_no_request(api, data, known):
    assert known in message_of(api.raw("/v1/completions", data))


@pytest.mark.proves("fault:F46")
@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/xml"],
)
def test_other_content_types(api, kind):
    response = api.raw("/v1/completions", json.dumps(BODY).encode(), kind)
    assert "application/json" in message_of(response, 415)


def test_json_by_other_names(api):
    for kind in ("application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"):
        assert api.raw("/v1/completions", json.dumps(BODY).encode(), kind).status_code == 200


@pytest.mark.proves("fault:F42")
@pytest.mark.parametrize(
    "text",
    [
        "a\x00b",
        "\u202eabc\u202c \u200f",
        "\ufffe\uffff",
        "e\u0301\u0301\u0301",
        "\U0001f336" * 50,
        "\r\n\t\x0b\x7f",
        "\ud83c\udf36",
    ],
    ids=ascii,
)
def test_odd_texts_come_back_as_they_are(api, text):
    body = {"prompt": text, "max_tokens": 1, "echo": True}
    if "\ud83c" in text:
        # a whole character written as a pair of escapes
        response = api.raw("/v1/completions", json.dumps(body).encode())
        text = "\U0001f336"
    else:
        response = api.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"].startswith(text)


@pytest.mark.proves("fault:F42")
def test_a_long_word_does_not_hold_up_the_others(engine):
    """1 MB without a space is not even tokenised; what is tokenised is bounded, and leaves the event loop alone."""
    api = Api(engine)
    longest = api.service.settings.max_text_bytes
    text = "x" * longest
    lags = []

    async def watch(done):
        while not done.is_set():
            begun = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - begun - 0.005)

    async def ask():
        done = asyncio.Event()
        watcher = asyncio.create_task(watch(done))
        async with api.client() as client:
            long = asyncio.create_task(client.post("/tokenize", json={"prompt": text}))
            huge = {"prompt": "x" * 1_000_000}
            refused = [await client.post(path, json=huge) for path in ("/tokenize", "/v1/completions")]
            refused.append(await client.post("/v1/completions", json={**huge, "truncate_prompt_tokens": 5}))
            cut = await client.post("/v1/completions", json={**BODY, "prompt": text, "truncate_prompt_tokens": 5})
            answer = await long
        done.set()
        await watcher
        return refused, cut, answer

    refused, cut, answer = asyncio.run(ask())
    for response in refused:
        assert f"1000000 bytes, and at most {longest} are tokenised" in message_of(response)
    assert cut.json()["usage"]["prompt_tokens"] == 5
    assert api.post("/detokenize", {"tokens": answer.json()["tokens"]}).json()["prompt"] == text
    # many chances to run while two long texts were tokenised beside; how long each took is for benchmarks
    assert len(lags) > 10


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F52")
def test_one_name_for_two_requests(engine):
    api = Api(engine)

    async def ask():
        async with api.client() as client:
            body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "request_id": "twin"}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(2)))

    statuses = sorted(response.status_code for response in asyncio.run(ask()))
    assert statuses == [200, 400]
    # it is free again afterwards
    assert api.post("/v1/completions", {**BODY, "request_id": "twin"}).status_code == 200
    for odd in ("", "a b", "x" * 129, "a\n"):
        assert "request_id" in message_of(api.post("/v1/completions", {**BODY, "request_id": odd}))


# ---- clients that go ---------------------------------------------------------------------------------------------


def aborted(engine):
    return engine.stats().finished.get("abort", 0)


@pytest.mark.proves("fault:F50")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["at once", "in the middle"])
def test_a_client_that_goes_frees_its_blocks(live, engine, stream, when):
    before = aborted(engine)
    body = {"prompt": "a " * 200, "max_tokens": 300, "ignore_eos": True, "n": 4, "stream": stream}
    with live.connect() as raw:
        raw.sendall(live.post_bytes("/v1/completions", body))
        if when == "in the middle":
            wait_until(lambda: engine.stats().num_requests_running > 0)
            if stream:
                assert raw.recv(1000)
    wait_until(lambda: aborted(engine) == before + 1)
    wait_until(lambda: engine.stats().num_free_blocks == engine.stats().num_blocks)


@pytest.mark.proves("fault:F50")
def test_a_client_that_goes_while_its_prompt_is_computed(scripted):
    """Nothing has come yet: the request waits at the gate."""
    scripted.gate.clear()
    with LiveServer(scripted) as server:
        for stream in (False, True):
            with server.connect() as raw:
                raw.sendall(server.post_bytes("/v1/completions", {**BODY, "stream": stream}))
                wait_until(lambda: len(scripted.live) == 1)
            wait_until(lambda: not scripted.live)
        raw = server.connect()
        raw.sendall(server.post_bytes("/v1/completions", BODY))
        wait_until(lambda: len(scripted.live) == 1)
        # a reset instead of an orderly end
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()
        wait_until(lambda: not scripted.live)
    assert set(scripted.ended.values()) == {"closed"}


@pytest.mark.proves("fault:F50")
def test_a_client_that_goes_after_the_last_token(live, engine):
    before = aborted(engine)
    with live.connect() as raw:
        raw.sendall(live.post_bytes("/v1/completions", {**BODY, "stream": True}))
        data = b""
        while b"[DONE]" not in data:
            data += raw.recv(65536)
    time.sleep(0.05)
    assert aborted(engine) == before


@pytest.mark.proves("fault:F51")
def test_a_reader_who_takes_nothing_is_cut(scripted):
    """A stream of megabytes to a reader who reads nothing: what waits is bounded, then the connection is cut."""
    scripted.piece = "x" * 10_000
    with LiveServer(scripted, stall_timeout=0.5) as server, server.connect(receive_buffer=4096) as raw:
        raw.sendall(server.post_bytes("/v1/completions", {**BODY, "max_tokens": 10_000, "stream": True}))
        wait_until(lambda: len(scripted.live) == 1)
        # meanwhile others are served
        scripted_piece, scripted.piece = scripted.piece, "ab "
        assert server.client().post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "ab ab ab "
        scripted.piece = scripted_piece
        wait_until(lambda: not scripted.live)
        wait_until(lambda: len(server.server.server_state.connections) <= 1)
        # of 100 MB only what the kernel and one buffer held was ever made
        received, _ = read_all(raw)
        assert len(received) < 5_000_000
        assert not received.endswith(b"[DONE]\n\n")
    assert "closed" in scripted.ended.values()


@pytest.mark.proves("fault:F51")
def test_a_reader_who_takes_a_byte_now_and_then_is_cut(scripted):
    scripted.piece = "x" * 10_000
    with LiveServer(scripted, stall_timeout=0.5) as server, server.connect(receive_buffer=4096) as raw:
        raw.sendall(server.post_bytes("/v1/completions", {**BODY, "max_tokens": 10_000, "stream": True}))
        wait_until(lambda: len(scripted.live) == 1)
        end = time.monotonic() + 15
        while scripted.live:
            assert time.monotonic() < end
            assert raw.recv(1)
            time.sleep(0.02)


def test_a_reader_who_takes_no_end_of_a_whole_answer_is_cut(scripted):
    scripted.piece = "x" * 10_000
    limits = {"stall_timeout": 0.3, "keep_alive_timeout": 0.2}
    with LiveServer(scripted, **limits) as server, server.connect(receive_buffer=4096) as raw:
        raw.sendall(server.post_bytes("/v1/completions", {**BODY, "max_tokens": 1000}))
        wait_until(lambda: scripted.ended and not scripted.live)
        wait_until(lambda: not server.server.server_state.connections)


def test_a_stream_of_silence_gets_comments(scripted):
    scripted.gate.clear()
    with LiveServer(scripted, ping_interval=0.3) as server, server.connect() as raw:
        raw.sendall(server.post_bytes("/v1/completions", {**BODY, "stream": True}))
        data = b""
        while data.count(b": ping\n\n") < 2:
            data += raw.recv(1000)
        server.call(scripted.gate.set)
        while b"[DONE]" not in data:
            data += raw.recv(1000)
    assert data.count(b"HTTP/1.1 200") == 1


def test_the_openai_client_reads_over_comments(scripted):
    import openai

    scripted.delay = 0.3
    with LiveServer(scripted, ping_interval=0.1) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        chunks = list(client.completions.create(model="scripted", prompt="a", max_tokens=3, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "ab ab ab "


# ---- faults of a request and of the engine -------------------------------------------------------------------------


@pytest.mark.proves("fault:F55")
@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (NumericsError("row 3 of /home/me/secret.py is NaN"), "not_finite"),
        (RequestFailedError("a step failed at 0x7f0011223344"), "request_failed"),
        (ZeroDivisionError("/home/me/secret.py"), "internal_error"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_request_that_fails_on_its_way(scripted, fault, code, caplog):
    scripted.fault, scripted.fault_at = fault, 2
    api = Api(scripted)
    with caplog.at_level(logging.ERROR):
        whole = api.post("/v1/completions", {**BODY, "max_tokens": 5})
        streamed = api.post("/v1/completions", {**BODY, "max_tokens": 5, "stream": True})
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == code
    assert streamed.status_code == 200
    found = events(streamed.text)
    assert [event["choices"][0]["text"] for event in found[:-1]] == ["ab ", "ab "]
    assert found[-1]["error"]["code"] == code
    for text in (whole.text, streamed.text):
        assert "secret" not in text
        assert "0x7f" not in text
        assert "Traceback" not in text
    # several prompts: one that fails ends its request, and the others are given back
    several = api.post("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 5})
    assert several.status_code == 500
    assert not scripted.live
    scripted.fault = None
    assert api.post("/v1/completions", BODY).status_code == 200


@pytest.mark.proves("fault:F58")
def test_numbers_that_are_not_finite(engine):
    """NaN in the logits of one request of two: that one fails, the other gets its own tokens."""
    api = Api(engine)
    body = {"prompt": "ROMEO:", "max_tokens": 12, "temperature": 0}
    known = api.post("/v1/completions", body).json()["choices"][0]["text"]
    before = engine.stats().corrupted_requests

    def spoil(output_ids, logits):
        return logits * float("nan") if len(output_ids) == 3 else logits

    async def ask():
        async def spoilt():
            params = SamplingParams(max_tokens=12, temperature=0, logits_processors=[spoil])
            async for _ in engine.generate("ROMEO:", params):
                pass

        async with api.client() as client:
            return await asyncio.gather(client.post("/v1/completions", json=body), spoilt(), return_exceptions=True)

    answer, error = asyncio.run(ask())
    assert isinstance(error, NumericsError)
    assert answer.json()["choices"][0]["text"] == known
    assert engine.stats().corrupted_requests == before + 1
    assert 'corrupted_requests_total{model_name="gpt2rt/tiny-gpt2"}' in api.get("/metrics").text


@pytest.mark.proves("fault:F56")
def test_an_engine_that_dies(scripted):
    """Streams end with an error event, whole answers with 503, ``/health`` says so, and the server ends by itself."""
    scripted.gate.clear()
    with LiveServer(scripted) as server:
        answers = {}

        def ask(name, body):
            answers[name] = server.client().post("/v1/completions", json=body)

        threads = [
            threading.Thread(target=ask, args=("whole", BODY)),
            threading.Thread(target=ask, args=("stream", {**BODY, "stream": True})),
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(scripted.live) == 2)
        begun = time.monotonic()
        server.call(scripted.die)
        for thread in threads:
            thread.join()
        assert answers["whole"].status_code == 503
        assert answers["whole"].json()["error"]["code"] == "engine_dead"
        assert answers["stream"].status_code == 503
        health = server.client().get("/health")
        assert health.status_code == 503
        assert health.json()["error"]["code"] == "engine_dead"
        assert server.client().post("/v1/completions", json=BODY).status_code == 503
        assert server.join() == 1
        assert time.monotonic() < begun + 5


@pytest.mark.proves("fault:F56")
def test_an_engine_that_dies_in_the_middle_of_streams(scripted):
    scripted.delay = 0.02
    with LiveServer(scripted) as server:
        with server.client().stream("POST", "/v1/completions", json={**BODY, "max_tokens": 1000, "stream": True}) as on:
            pieces = on.iter_text()
            text = next(pieces)
            server.call(scripted.die)
            text += "".join(pieces)
        found = events(text)
        assert found[-1]["error"]["code"] == "engine_dead"
        assert server.join() == 1


@pytest.mark.proves("fault:F56")
def test_the_real_engine_dies(engine):
    """Its thread ends by a fault that no guard of a request catches."""
    from gpt2rt.engine.async_llm import AsyncLLM

    mortal = AsyncLLM(engine.model, tokenizer=engine.tokenizer, num_blocks=64, num_threads=1)
    with LiveServer(mortal) as server:
        body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with server.client().stream("POST", "/v1/completions", json=body) as on:
            pieces = on.iter_text()
            text = next(pieces)
            mortal._core.step = None
            text += "".join(pieces)
        assert events(text)[-1]["error"]["code"] == "engine_dead"
        wait_until(lambda: mortal.errored)
        assert server.join() == 1


# ---- the end ------------------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F57")
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("signals", [1, 2])
def test_running_requests_are_aborted_when_their_time_is_over(scripted, signals, silent):
    """After ``shutdown_timeout``, or at the second signal, a stream ends with finish_reason "abort" and [DONE]."""
    scripted.gate.clear()
    scripted.silent_abort = silent
    with LiveServer(scripted, shutdown_timeout=0.3 if signals == 1 else 60) as server:
        answers = {}

        def ask(name, body):
            answers[name] = server.client().post("/v1/completions", json=body)

        stream = {**BODY, "max_tokens": 50, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
        threads = [
            threading.Thread(target=ask, args=("whole", BODY)),
            threading.Thread(target=ask, args=("several", {**BODY, "prompt": ["a", "b"]})),
            threading.Thread(target=ask, args=("stream", stream)),
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(scripted.live) == 4)
        for _ in range(signals):
            server.stop()
        for thread in threads:
            thread.join()
        found = events(answers["stream"].text)
        reasons = [choice["finish_reason"] for event in found for choice in event["choices"]]
        assert reasons == ["abort", "abort"]
        assert found[-1]["usage"]["completion_tokens"] == (0 if silent else 2)
        for name in ("whole", "several"):
            if silent:
                assert answers[name].status_code == 503
                assert answers[name].json()["error"]["code"] == "shutting_down"
            else:
                assert {choice["finish_reason"] for choice in answers[name].json()["choices"]} == {"abort"}
        assert server.join() == 0


@pytest.mark.proves("fault:F57")
def test_running_requests_may_end_in_their_time(scripted):
    """Nothing of a stream is lost when the server is told to stop; no further connection is taken."""
    scripted.delay = 0.02
    with LiveServer(scripted) as server:
        body = {**BODY, "max_tokens": 40, "stream": True}
        kept = httpx.Client(base_url=server.url)
        assert kept.get("/health").status_code == 200
        with server.client().stream("POST", "/v1/completions", json=body) as on:
            pieces = on.iter_text()
            text = next(pieces)
            server.stop()
            wait_until(lambda: server.service.draining)
            time.sleep(0.2)
            with pytest.raises(httpx.TransportError):
                server.client().get("/health")
            text += "".join(pieces)
        found = events(text)
        assert "".join(event["choices"][0]["text"] for event in found) == "ab " * 40
        assert found[-1]["choices"][0]["finish_reason"] == "length"
        assert server.join() == 0


@pytest.mark.proves("fault:F57")
def test_who_comes_while_the_server_stops_is_told(scripted):
    api = Api(scripted)
    api.service.draining = True
    response = api.post("/v1/completions", BODY)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.headers["connection"] == "close"
    assert message_of(api.get("/health"), 503) == "the server is shutting down"


def test_the_request_timeout_of_a_silent_stream_has_a_status(scripted):
    """Nothing was sent yet, so it is not too late for one."""
    scripted.gate.clear()
    api = Api(scripted, request_timeout=0.2)
    assert "0.2 s" in message_of(api.post("/v1/completions", {**BODY, "stream": True}), 504)
