"""A client for loads on a server: reads an answer to its end, or goes away at any moment before. Standard library only.

Each request is a connection of its own. What came is kept as it came and read when the answer is over, so that the
client costs little of the time that it measures.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import socket
import struct
import time
from typing import Any

#: where a client leaves: after connecting, inside the head, inside the body, after the request, inside the stream,
#: after the last token, after [DONE]
MOMENTS = ("connect", "head", "body", "sent", "stream", "last", "done")
TIMEOUT_S = 60.0
# the kernel forgets what is buffered, and tells the other side with a reset
_NO_LINGER = struct.pack("ii", 1, 0)


@dataclasses.dataclass
class Leave:
    """When and how a client goes.

    Attributes:
        moment: one of MOMENTS.
        share: of the head or the body that is sent before, or of a moment's pause; 0 to 1.
        events: of a stream that are read before.
        reset: the connection is reset, not closed.
    """

    moment: str
    share: float = 0.5
    events: int = 1
    reset: bool = False

    @classmethod
    def drawn(cls, chance: random.Random, most_events: int, moments: tuple[str, ...] = MOMENTS) -> Leave:
        """One at random."""
        return cls(chance.choice(moments), chance.random(), chance.randint(1, most_events), chance.random() < 0.5)


@dataclasses.dataclass
class Reply:
    """What came back.

    Attributes:
        status: of HTTP; 0: none came.
        headers: their names in lower case.
        body: of an answer that is no stream.
        events: the data of each event of a stream.
        complete: the answer was read to its end.
        ttft: seconds from before connecting to the first event.
        seconds: to the end, or until the client left.
        error: why it is not complete, unless the client left.
    """

    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    events: list[bytes] = dataclasses.field(default_factory=list)
    complete: bool = False
    ttft: float = 0.0
    seconds: float = 0.0
    error: str = ""

    @property
    def done(self) -> bool:
        """Whether a stream ended with [DONE]."""
        return self.complete and self.events[-1:] == [b"[DONE]"]

    def values(self) -> list[dict[str, Any]]:
        """What the events, or the body, hold."""
        if self.status != 200:
            return []
        parts = self.events if self.events else [self.body] if self.body else []
        return [json.loads(part) for part in parts if part != b"[DONE]"]

    def num_tokens(self) -> int:
        """Ids of tokens that came; the request must ask for them with ``return_token_ids``."""
        return sum(len(choice["token_ids"]) for value in self.values() for choice in value["choices"])

    def usage_tokens(self) -> int | None:
        """New tokens as the answer itself counts them; None: it does not say."""
        if self.status != 200 or not (self.events or self.body):
            return None
        # the last event before [DONE] has it
        last = next((part for part in reversed(self.events) if part != b"[DONE]"), self.body)
        usage = json.loads(last).get("usage")
        return None if usage is None else int(usage["completion_tokens"])

    def fault(self, tokens: int) -> str:
        """What is wrong with an answer of so many tokens that was to be read to its end; empty if nothing is."""
        if self.error or self.status != 200 or not self.complete:
            return f"status {self.status}, {self.error or self.body[:200].decode(errors='replace') or 'not complete'}"
        if self.events and not self.done:
            return f"the stream ended with {self.events[-1][:200]!r}, not with [DONE]"
        if self.usage_tokens() != tokens:
            return f"{self.usage_tokens()} tokens by its usage, {tokens} were asked for"
        return ""


async def call(host: str, port: int, method: str, path: str, body: Any = None, *, leave: Leave | None = None) -> Reply:
    """One request.

    Args:
        body: JSON, as a value or as bytes.
        leave: go away then; None: read the answer to its end.

    Returns:
        What came; a failure is noted in it.
    """
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "Content-Type: application/json\r\n" if data else ""
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n{kind}"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    reply = Reply()
    began = time.perf_counter()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port, limit=1 << 24)
            try:
                await _exchange(reader, writer, head.encode(), data, leave, reply, began)
            finally:
                _go(writer, leave is not None and leave.reset)
    except (OSError, EOFError, ValueError, TimeoutError) as error:
        # EOFError is that of an answer which breaks off
        reply.error = f"{type(error).__name__}: {error}"
    reply.seconds = time.perf_counter() - began
    return reply


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    head: bytes,
    data: bytes,
    leave: Leave | None,
    reply: Reply,
    began: float,
) -> None:
    if leave is not None and leave.moment in ("connect", "head", "body", "sent"):
        sent = {
            "connect": b"",
            "head": head[: 1 + int(leave.share * (len(head) - 2))],
            "body": head + data[: int(leave.share * (len(data) - 1))],
            "sent": head + data,
        }
        writer.write(sent[leave.moment])
        await writer.drain()
        # up to 10 ms: the server has read it, or has not
        await asyncio.sleep(0.01 * leave.share)
        return
    writer.write(head + data)
    await writer.drain()
    status, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
    reply.status = int(status.split(" ", 2)[1])
    for line in lines:
        name, _, value = line.partition(":")
        reply.headers[name.strip().lower()] = value.strip()
    if reply.headers.get("transfer-encoding") != "chunked":
        reply.body = await reader.readexactly(int(reply.headers["content-length"]))
        reply.complete = True
        return
    rest = b""
    while size := int(await reader.readline(), 16):
        piece = (await reader.readexactly(size + 2))[:-2]
        *found, rest = (rest + piece).split(b"\n\n")
        if found and not reply.events:
            reply.ttft = time.perf_counter() - began
        # a comment keeps a silent stream open
        reply.events += [event.removeprefix(b"data: ") for event in found if not event.startswith(b":")]
        if leave is not None and _is_enough(leave, reply.events):
            return
    await reader.readline()
    reply.complete = True


def _is_enough(leave: Leave, events: list[bytes]) -> bool:
    if leave.moment == "stream":
        return len(events) >= leave.events
    if leave.moment == "last":
        return any(b'"finish_reason":"' in event for event in events[-3:])
    return events[-1:] == [b"[DONE]"]


def _go(writer: asyncio.StreamWriter, reset: bool) -> None:
    if reset:
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        writer.transport.abort()
    else:
        writer.close()
