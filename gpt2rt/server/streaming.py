"""Server-sent events to one reader, who may be slow, or gone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.types import Send

from .json_io import dumps

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # proxies of the nginx family hold back what comes otherwise
    (b"x-accel-buffering", b"no"),
]
_PING = b": ping\n\n"


class EventStream:
    """A response of ``data:`` lines that ends with ``data: [DONE]``.

    ``put`` waits while the connection's buffer is full, so that no more than the buffer and one event is held for a
    slow reader; the engine joins what comes meanwhile into one bigger event.

    Args:
        send: of ASGI.
        ping_interval: seconds of silence before a comment is sent.
        stall_timeout: seconds that one ``put`` may wait.
    """

    def __init__(self, send: Send, ping_interval: float, stall_timeout: float) -> None:
        self._send = send
        self._ping_interval = ping_interval
        self._stall_timeout = stall_timeout
        self._clock = asyncio.get_running_loop().time
        self._sending_since: float | None = None
        self._last = self._clock()
        self.started = False
        self.ended = False

    async def start(self) -> None:
        """Send the status, 200, and the headers."""
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        # an empty part, so that the headers leave now
        await self._put(b"")

    async def put(self, value: Mapping[str, Any]) -> None:
        """Send an event."""
        await self._put(b"data: " + dumps(value) + b"\n\n")

    async def end(self) -> None:
        """Send the last event and end the response."""
        self.ended = True
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _put(self, data: bytes) -> None:
        self._sending_since = self._clock()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending_since = None
        self._last = self._clock()

    async def look_after(self) -> bool:
        """Send a comment if nothing was sent for long; False: the reader takes nothing."""
        now = self._clock()
        if self._sending_since is not None:
            return now - self._sending_since < self._stall_timeout
        if self.started and not self.ended and now - self._last >= self._ping_interval:
            try:
                await asyncio.wait_for(self._put(_PING), self._stall_timeout)
            except TimeoutError:
                return False
        return True
