"""Servers for tests: an app called directly, and a real one on a port of its own in a thread."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx

from gpt2rt.server.app import create_app
from gpt2rt.server.run import Server
from gpt2rt.server.settings import ServerSettings
from gpt2rt.server.sockets import address, listen


def settings_for_tests(**changes):
    """Settings with a free port."""
    return ServerSettings(**{"port": 0, "disable_uvicorn_access_log": True, **changes})


class Api:
    """An app without sockets: ``post`` and ``get`` return ``httpx.Response``."""

    def __init__(self, engine, **changes):
        self.engine = engine
        self.app = create_app(engine, settings_for_tests(**changes))
        self.service = self.app.state.service

    def client(self):
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60, trust_env=False)

    def request(self, method, path, **options):
        async def call():
            async with self.client() as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def post(self, path, body=None, **options):
        return self.request("POST", path, **({} if body is None else {"json": body}), **options)

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def raw(self, path, data, kind="application/json", **headers):
        """Post these bytes."""
        return self.request("POST", path, content=data, headers={"content-type": kind, **headers})


class LiveServer:
    """``with LiveServer(engine) as server``: listens on ``server.url`` until the block ends."""

    def __init__(self, engine, **changes):
        self.settings = settings_for_tests(**changes)
        self.engine = engine
        self.app = create_app(engine, self.settings)
        self.service = self.app.state.service
        self.bound = listen(self.settings)
        self.port = self.bound.getsockname()[1] if self.settings.uds is None else None
        self.url = address(self.settings, self.bound)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        asyncio.run(self._serve())

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        self.server = Server(self.app, self.settings, self._ready.set)
        await self.server.serve(sockets=[self.bound])

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_):
        self.stop()
        self.stop()
        self.join()

    def stop(self):
        """What a signal does."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.server.stop)

    def call(self, function, *arguments):
        """Run something on the server's event loop."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def join(self, seconds=20):
        self._thread.join(seconds)
        assert not self._thread.is_alive()
        return self.server.exit_code

    def connect(self, receive_buffer=None):
        """A socket to the server."""
        raw = socket.socket()
        raw.settimeout(20)
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.connect(("127.0.0.1", self.port))
        return raw

    def post_bytes(self, path, body):
        """The bytes of a POST."""
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    def client(self, **options):
        # reading the certificates of the world would take most of a test's time
        return httpx.Client(base_url=self.url, verify=False, trust_env=False, **{"timeout": 30, **options})


def events(text):
    """The ``data:`` lines of a stream, comments left out; the last must be ``[DONE]``."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", text[-500:]
    return [json.loads(line) for line in lines[:-1]]


def read_all(raw):
    """What a socket gives until it ends, and whether it ended by a reset."""
    data = bytearray()
    try:
        while piece := raw.recv(65536):
            data += piece
    except ConnectionResetError:
        return bytes(data), True
    return bytes(data), False


def read_answer(raw):
    """One answer from a socket that may stay open: its status and its JSON, if it has any."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = raw.recv(65536)
        assert piece, data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.lower().splitlines() if line.startswith(b"content-length"))
    while len(body) < length:
        body += raw.recv(65536)
    return int(head.split()[1]), json.loads(body) if body else None


def wait_until(condition, seconds=10):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
