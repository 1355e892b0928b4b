"""A small HTTP/1.1 client for measuring: JSON out, whole answers or server-sent events in; standard library only.

It follows RFC 9112 as far as servers of this kind use it: a body ends by ``Content-Length``, by the last chunk of
``Transfer-Encoding: chunked``, or with the connection. Events are the ``data:`` lines of a ``text/event-stream`` (the
WHATWG's "Server-sent events"); an OpenAI-compatible server puts one JSON object on each. Connections are used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from typing import Any

# of one line: headers, and the JSON of one event
LINE_LIMIT = 1 << 24


class HttpError(OSError):
    """The server could not be reached, closed the connection, or answered what is no HTTP."""


@dataclasses.dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: bool = False


class HttpClient:
    """Requests to one server.

    Args:
        base_url: such as ``http://127.0.0.1:8000``; a path in it is put before that of each request.
        headers: sent with every request.
        timeout: seconds that connecting, and each wait for the next bytes, may take.
    """

    def __init__(self, base_url: str, *, headers: dict[str, str] | None = None, timeout: float = 600.0) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the base URL must be like http://127.0.0.1:8000, got {base_url!r}")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        self._timeout = timeout
        self._head = "".join(
            f"{name}: {value}\r\n"
            for name, value in {"Host": parts.netloc.rpartition("@")[2], "Accept": "*/*", **(headers or {})}.items()
        )
        self._idle: list[_Connection] = []

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of an answer.

        Raises:
            HttpError: there was none.
        """
        async with self._exchange(method, path, body) as (status, pieces):
            return status, b"".join([piece async for piece in pieces])

    @contextlib.asynccontextmanager
    async def events(self, path: str, body: Any) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Status of an answer to POST, and the data of each of its events as it arrives.

        With a status other than 200 there is one piece of data, the body.

        Raises:
            HttpError: there was no answer, or it broke off.
        """
        async with self._exchange("POST", path, body) as (status, pieces):
            yield status, event_data(pieces) if status == 200 else _joined(pieces)

    async def close(self) -> None:
        """Close the connections that are open."""
        while self._idle:
            await self._drop(self._idle.pop())

    @contextlib.asynccontextmanager
    async def _exchange(self, method: str, path: str, body: Any) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        data = b"" if body is None else json.dumps(body).encode()
        kind = "Content-Type: application/json\r\n" if data else ""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}{kind}Content-Length: {len(data)}\r\n\r\n"
        connection = await self._connection()
        answer = None
        try:
            try:
                status, headers = await self._send(connection, head.encode() + data)
            except HttpError:
                if not connection.used:
                    raise
                # the server closed it while it was idle
                await self._drop(connection)
                connection = await self._open()
                status, headers = await self._send(connection, head.encode() + data)
            answer = _Body(connection.reader, headers, self._timeout)
            yield status, answer.pieces()
        finally:
            if answer is not None and answer.complete and headers.get("connection", "").lower() != "close":
                connection.used = True
                self._idle.append(connection)
            else:
                await self._drop(connection)

    async def _connection(self) -> _Connection:
        return self._idle.pop() if self._idle else await self._open()

    async def _open(self) -> _Connection:
        try:
            async with asyncio.timeout(self._timeout):
                opened = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=LINE_LIMIT)
        except (OSError, TimeoutError) as error:
            where = f"{self._host}:{self._port}"
            raise HttpError(f"{where} cannot be reached: {error or type(error).__name__}") from error
        return _Connection(*opened)

    async def _drop(self, connection: _Connection) -> None:
        connection.writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await connection.writer.wait_closed()

    async def _send(self, connection: _Connection, data: bytes) -> tuple[int, dict[str, str]]:
        try:
            connection.writer.write(data)
            await connection.writer.drain()
        except OSError as error:
            raise HttpError(f"the connection was closed: {error}") from error
        status = await _line(connection.reader, self._timeout)
        parts = status.split(b" ", 2)
        if not parts[0].startswith(b"HTTP/1.") or len(parts) < 2 or not parts[1].isdigit():
            raise HttpError(f"expected an HTTP/1.1 status line, got {status[:80]!r}")
        headers = {}
        while line := (await _line(connection.reader, self._timeout)).decode("latin-1"):
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return int(parts[1]), headers


class _Body:
    """The body of one answer; ``complete`` once it was read to its end and the connection may be used again."""

    def __init__(self, reader: asyncio.StreamReader, headers: dict[str, str], timeout: float) -> None:
        self._reader, self._headers, self._timeout = reader, headers, timeout
        self.complete = False

    async def pieces(self) -> AsyncIterator[bytes]:
        if "chunked" in self._headers.get("transfer-encoding", "").lower():
            while size := int((await _line(self._reader, self._timeout)).split(b";")[0], 16):
                data = await _bytes(self._reader, size + 2, self._timeout)
                yield data[:-2]
            while await _line(self._reader, self._timeout):
                # trailers say nothing that is wanted here
                pass
            self.complete = True
        elif "content-length" in self._headers:
            if length := int(self._headers["content-length"]):
                yield await _bytes(self._reader, length, self._timeout)
            self.complete = True
        else:
            while data := await _some(self._reader, self._timeout):
                yield data


async def _line(reader: asyncio.StreamReader, timeout: float) -> bytes:
    with _said_why():
        # not wait_for: that makes a task of every line
        async with asyncio.timeout(timeout):
            line = await reader.readline()
    if not line.endswith(b"\n"):
        raise HttpError("the server closed the connection")
    return line.rstrip(b"\r\n")


async def _bytes(reader: asyncio.StreamReader, count: int, timeout: float) -> bytes:
    with _said_why():
        async with asyncio.timeout(timeout):
            return await reader.readexactly(count)


async def _some(reader: asyncio.StreamReader, timeout: float) -> bytes:
    with _said_why():
        async with asyncio.timeout(timeout):
            return await reader.read(1 << 16)


@contextlib.contextmanager
def _said_why() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise HttpError("the server sent nothing for too long") from error
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        raise HttpError(f"the answer broke off: {error or type(error).__name__}") from error


async def event_data(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event, as soon as its line is complete; comments and other fields are passed over."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def _joined(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield b"".join([piece async for piece in pieces])
