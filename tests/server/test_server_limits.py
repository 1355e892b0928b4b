"""The most that anybody may ask: sizes, counts, times; and whoever asks for more does not harm the others."""

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time

import httpx
import pytest
from live_server import Api, LiveServer, events, read_all, read_answer, wait_until
from scripted_engine import ScriptedEngine

from gpt2rt.engine.async_llm import AsyncLLM
from gpt2rt.errors import QueueFullError
from gpt2rt.server.settings import ServerSettings
from gpt2rt.server.sockets import listen

BODY = {"prompt": "a", "max_tokens": 2}


def error_of(data):
    """Status and error of an answer's bytes."""
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.fixture
def scripted():
    return ScriptedEngine()


# ---- bodies -------------------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F47")
def test_a_body_of_exactly_the_limit_is_taken(scripted):
    empty = len(json.dumps({"prompt": "", "max_tokens": 2}))
    api = Api(scripted, max_body_bytes=empty + 100)
    fits = json.dumps({"prompt": "a" * 100, "max_tokens": 2}).encode()
    assert api.raw("/v1/completions", fits).status_code == 200
    response = api.raw("/v1/completions", fits + b" ")
    assert response.status_code == 413
    assert str(empty + 100) in response.json()["error"]["message"]


@pytest.mark.proves("fault:F47")
@pytest.mark.parametrize("told", ["true", "less", "more", "not"])
def test_bodies_are_measured_by_what_arrives(scripted, told):
    """Whatever ``content-length`` says: chunks that add up to too much are refused as they come."""
    with LiveServer(scripted, max_body_bytes=10_000) as server, server.connect() as raw:
        chunk = b"x" * 5000
        if told == "true":
            head = f"Content-Length: {10**9}"
            parts = [chunk]
        elif told == "less":
            # what follows is the next request, and no valid one
            head, parts = "Content-Length: 5000", [chunk, chunk, chunk]
        else:
            head = "Transfer-Encoding: chunked" + ("\r\nContent-Length: 10" if told == "more" else "")
            parts = [b"%x\r\n%s\r\n" % (len(chunk), chunk)] * 3
        lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", head, "", ""]
        raw.sendall("\r\n".join(lines).encode())
        raw.sendall(b"".join(parts))
        # HTTP forbids both headers together: then the body cannot be trusted at all
        expected = {"true": (413,), "not": (413,), "less": (400,), "more": (400, 413)}
        assert read_answer(raw)[0] in expected[told]
        assert server.client().get("/health").status_code == 200


@pytest.mark.proves("fault:F47")
def test_a_huge_body_is_refused_while_it_comes(scripted):
    with LiveServer(scripted) as server, server.connect() as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        piece = b"x" * 65536
        sent = 0
        raw.settimeout(0.2)
        try:
            while sent < 200 * 2**20:
                raw.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent += len(piece)
                if sent > 3 * 2**20:
                    break
        except (TimeoutError, ConnectionError):
            pass
        raw.settimeout(10)
        status, answer = read_answer(raw)
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        # the rest is thrown away for some seconds, then the connection ends
        assert server.client().post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.proves("fault:F47")
def test_a_body_that_comes_too_slowly_is_given_up(scripted):
    with LiveServer(scripted, body_timeout=0.5) as server, server.connect() as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Content-Length: 100\r\n\r\n")
        begun = time.monotonic()
        raw.settimeout(0.1)
        # one byte after the other
        while time.monotonic() < begun + 10:
            try:
                raw.sendall(b" ")
                raw.recv(1, socket.MSG_PEEK)
                break
            except TimeoutError:
                # /health is answered all the while
                assert server.client().get("/health").status_code == 200
        status, answer = read_answer(raw)
        assert (status, answer["error"]["code"]) == (408, "body_timeout")
        assert scripted.seen == []


# ---- heads and connections ------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F47")
def test_heads_that_are_too_large(scripted):
    with LiveServer(scripted) as server:
        sizes = (5_000_000, 70_000)
        heads = ["X-Big: " + "x" * size for size in sizes] + ["\r\n".join(f"X-{i}: {'y' * 100}" for i in range(1000))]
        for header in heads:
            with server.connect() as raw:
                request = f"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n\r\n"
                try:
                    raw.sendall(request.encode())
                    data, reset = read_all(raw)
                except (BrokenPipeError, ConnectionResetError):
                    data, reset = b"", True
                assert reset or error_of(data)[0] == 431
        many = {f"x-{i}": "y" for i in range(200)}
        response = server.client().get("/health", headers=many)
        assert response.status_code == 431
        assert "expected at most 128" in response.json()["error"]["message"]
        assert server.client().get("/health").status_code == 200


@pytest.mark.proves("fault:F46")
@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["bytes", "short", "version", "tls", "no host"],
)
def test_what_is_not_http(scripted, data):
    with LiveServer(scripted, keep_alive_timeout=0.5) as server, server.connect() as raw:
        raw.sendall(data)
        answer, _ = read_all(raw)
        # or the connection ends because nothing more came
        assert not answer or error_of(answer)[0] in (400, 404)
        assert server.client().get("/health").status_code == 200


@pytest.mark.proves("fault:F47")
def test_idle_connections_give_way(scripted):
    """Far more connections than the server holds: the oldest idle ones go, and ``/health`` is answered at once."""
    with LiveServer(scripted, max_connections=20, keep_alive_timeout=30) as server:
        opened = [server.connect() for _ in range(100)]
        half = [server.connect() for _ in range(30)]
        for raw in half:
            # heads that never end
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        assert server.client(timeout=1).get("/health").status_code == 200
        wait_until(lambda: len(server.server.server_state.connections) <= 21)
        # those that went were told so by their end
        assert read_all(opened[0])[0] == b""
        for raw in [*opened, *half]:
            raw.close()


@pytest.mark.proves("fault:F47")
def test_a_head_that_comes_too_slowly_is_given_up(scripted):
    """One byte a tenth of a second buys no time, before the first request or between two."""
    with LiveServer(scripted, keep_alive_timeout=0.4) as server, server.connect() as raw:
        for _ in range(2):
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert raw.recv(65536).startswith(b"HTTP/1.1 200")
        begun = time.monotonic()
        raw.settimeout(0.1)
        ended = False
        while not ended:
            assert time.monotonic() < begun + 10
            try:
                raw.sendall(b"G")
                ended = raw.recv(100) == b""
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                ended = True


def test_requests_in_one_go_are_answered_in_order(scripted):
    with LiveServer(scripted) as server, server.connect() as raw:
        one = server.post_bytes("/v1/completions", BODY)
        raw.sendall(one + one + b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data, _ = read_all(raw)
        assert data.count(b"HTTP/1.1 200 OK") == 3
        assert data.count(b'"text":"ab ab "') == 2


# ---- too many ---------------------------------------------------------------------------------------------------


def test_more_requests_than_are_taken(scripted):
    scripted.gate.clear()
    with LiveServer(scripted, max_in_flight=3) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(server.client().post("/v1/completions", json=BODY)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(scripted.live) == 3)
        refused = client.post("/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "in_flight"
        # who looks after the server is not counted
        assert client.get("/health").status_code == 200
        assert 'admission_rejections_total{model_name="scripted",reason="in_flight"} 1.0' in client.get("/metrics").text
        server.call(scripted.gate.set)
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert client.post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(scripted, stream):
    scripted.refusal = QueueFullError("256 requests wait already", retry_after=2.2)
    api = Api(scripted)
    response = api.post("/v1/completions", {**BODY, "stream": stream})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "queue_full"
    assert 'reason="queue_full"} 1.0' in api.get("/metrics").text


def test_the_real_queue_is_bounded(engine):
    """One request more than may run and wait, all at once: as many are served as there is room, the rest gets 503."""
    small = AsyncLLM(engine.model, tokenizer=engine.tokenizer, max_num_seqs=2, max_num_queued_reqs=3, num_blocks=64)
    try:
        api = Api(small, max_in_flight=100)

        async def ask():
            async with api.client() as client:
                body = {"prompt": [5] * 8, "max_tokens": 50, "ignore_eos": True, "temperature": 0}
                return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(20)))

        answers = asyncio.run(ask())
        served = [answer for answer in answers if answer.status_code == 200]
        assert {answer.status_code for answer in answers} == {200, 503}
        assert len(served) >= 5
        assert len({answer.json()["choices"][0]["text"] for answer in served}) == 1
        assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 503)
    finally:
        small.shutdown()


def test_the_whole_time_of_a_request(scripted):
    scripted.gate.clear()
    api = Api(scripted, request_timeout=0.2)
    response = api.post("/v1/completions", BODY)
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["code"] == "timeout"
    assert list(scripted.ended.values()) == ["closed"]
    # a stream that has begun ends with an error event
    scripted.gate.set()
    scripted.delay = 0.05
    response = api.post("/v1/completions", {**BODY, "max_tokens": 100, "stream": True})
    assert response.status_code == 200
    found = events(response.text)
    assert found[-1]["error"]["code"] == "timeout"
    assert all("choices" in event for event in found[:-1])
    assert list(scripted.ended.values()) == ["closed"] * 2


# ---- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F49")
@pytest.mark.parametrize(
    "header",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Basic c2VjcmV0"},
        {"authorization": "secret"},
        {"authorization": "Bearer secre"},
        {"authorization": "Bearer secret2"},
        {"authorization": "Bearer " + "x" * 60_000},
        {"authorization": b"Bearer \xff\xfe"},
    ],
    ids=lambda header: str(header)[:40],
)
def test_without_the_right_key(scripted, header):
    api = Api(scripted, api_key=("secret", "another"))
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nothing")):
        response = api.request(method, path, headers=header)
        assert response.status_code == 401, path
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert "secret" not in response.text
    assert api.get("/health").status_code == 200


@pytest.mark.proves("fault:F49")
def test_with_the_right_key(scripted, caplog):
    api = Api(scripted, api_key=("secret", "another"))
    with caplog.at_level("DEBUG"):
        for key in ("secret", "another"):
            response = api.post("/v1/completions", BODY, headers={"authorization": f"bearer {key}"})
            assert response.status_code == 200
        api.post("/v1/completions", BODY, headers={"authorization": "Bearer hunter2"})
    assert "secret" not in caplog.text
    assert "hunter2" not in caplog.text


# ---- other manners -------------------------------------------------------------------------------------------------


def test_request_ids_are_answered(scripted):
    api = Api(scripted)
    assert api.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for odd in ("a b", "<script>", "x" * 500, ""):
        name = api.get("/health", headers={"x-request-id": odd}).headers["x-request-id"]
        assert name != odd
        assert len(name) == 32
    response = api.post("/v1/completions", {**BODY, "request_id": "mine"})
    assert response.json()["id"] == "cmpl-mine"
    # refusals bear one, too
    assert api.raw("/v1/completions", b"{").headers["x-request-id"]


def test_other_sites_may_not_use_it_unless_told(scripted):
    origin = {"origin": "https://example.com", "access-control-request-method": "POST"}
    plain = Api(scripted)
    assert "access-control-allow-origin" not in plain.get("/version", headers=origin).headers
    assert plain.request("OPTIONS", "/v1/completions", headers=origin).status_code == 405
    open_to = Api(scripted, allowed_origins=("https://example.com",), api_key=("k",))
    answer = open_to.request("OPTIONS", "/v1/completions", headers=origin)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://example.com"
    other = {**origin, "origin": "https://evil.example"}
    assert "access-control-allow-origin" not in open_to.request("OPTIONS", "/v1/completions", headers=other).headers


def test_a_unix_socket(scripted, tmp_path):
    path = tmp_path / "server.sock"
    transport = httpx.HTTPTransport(uds=str(path))
    with LiveServer(scripted, uds=str(path)), httpx.Client(transport=transport, base_url="http://x") as client:
        assert client.post("/v1/completions", json=BODY).status_code == 200


def test_tls(scripted, tmp_path):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl command to make a certificate with")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    make = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    names = ["-subj", "/CN=localhost", "-keyout", key, "-out", certificate]
    subprocess.run([openssl, *make, *names], check=True, capture_output=True)
    with LiveServer(scripted, ssl_keyfile=key, ssl_certfile=certificate) as server, server.client() as client:
        assert server.url.startswith("https://127.0.0.1:")
        # who speaks plain HTTP gets nothing, and harms nobody
        with server.connect() as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" not in read_all(raw)[0]
        assert client.post("/v1/completions", json=BODY).status_code == 200
        client.close()
    # a server that wants to see certificates of clients
    with LiveServer(scripted, ssl_keyfile=key, ssl_certfile=certificate, ssl_ca_certs=certificate) as server:
        with pytest.raises(httpx.TransportError):
            server.client().get("/health")
        context = ssl.create_default_context(cafile=certificate)
        context.check_hostname = False
        context.load_cert_chain(certificate, key)
        with httpx.Client(base_url=server.url, verify=context, trust_env=False) as trusted:
            assert trusted.get("/health").status_code == 200


def test_a_prefix_that_a_proxy_takes_away(scripted):
    with LiveServer(scripted, root_path="/gpt", api_key=("k",)) as server:
        client = server.client(headers={"authorization": "Bearer k"})
        assert client.get("/v1/models").status_code == 200
        assert server.client().get("/health").status_code == 200
        assert server.client().get("/v1/models").status_code == 401


# ---- settings -----------------------------------------------------------------------------------------------------


def test_every_limit_is_finite():
    settings = ServerSettings()
    assert settings.host == "127.0.0.1"
    assert settings.allowed_origins == ()
    expected = {
        "max_body_bytes": 2 * 2**20,
        "max_header_bytes": 64 * 1024,
        "max_headers": 128,
        "max_prompts": 128,
        "keep_alive_timeout": 5.0,
        "body_timeout": 30.0,
        "request_timeout": 600.0,
        "ping_interval": 15.0,
        "template_timeout": 1.0,
        "shutdown_timeout": 30.0,
    }
    assert {name: getattr(settings, name) for name in expected} == expected
    assert Api(ScriptedEngine()).service.max_in_flight == 64 + 256


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"max_headers": 1.5}, "max_headers"),
        ({"port": 70000}, "port"),
        ({"ping_interval": 0}, "ping_interval"),
        ({"request_timeout": float("inf")}, "request_timeout"),
        ({"api_key": ("",)}, "api_key"),
        ({"api_key": ("a b",)}, "api_key"),
        ({"ssl_certfile": "x"}, "ssl_keyfile"),
        ({"root_path": "x/"}, "root_path"),
        ({"host": "0.0.0.0"}, "--insecure"),
        ({"host": "::"}, "--insecure"),
        ({"host": "10.0.0.1"}, "--insecure"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(values, known):
    with pytest.raises(ValueError, match=known):
        ServerSettings(**values)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    assert ServerSettings(host=host).host == host
    ServerSettings(host="0.0.0.0", api_key=("k",))
    ServerSettings(host="0.0.0.0", insecure=True)


def test_a_port_in_use_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1 port"):
            listen(ServerSettings(port=taken.getsockname()[1]))
