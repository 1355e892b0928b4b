"""uvicorn's HTTP/1.1 connection with the limits that it has none for.

- A connection that sends nothing, or the headers of a request too slowly, is closed; so is one that goes on with a
  body that was refused, after a moment in which the client can read why.
- Of too many connections the one that has been idle longest gives way, so that ``/health`` always finds a place.
- What the kernel buffers for a reader is bounded, and a reader who does not take the end of an answer is dropped.
- Faults below HTTP are answered in the same shape as all others, a too large head with 431.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
from collections import OrderedDict
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError, overloaded
from .settings import ServerSettings

# files that the process has open beside its connections
_OTHER_FILES = 64
# what the kernel may hold of an answer that is not read yet; it doubles the number
_SEND_BUFFER_BYTES = 2**16


def limited_protocol(settings: ServerSettings) -> type[H11Protocol]:
    """The protocol class for a server with these limits."""
    # connections that are between requests, the longest idle one first
    idle: OrderedDict[LimitedProtocol, None] = OrderedDict()
    # uvicorn's own set also holds those that are being closed
    alive: set[LimitedProtocol] = set()
    # where files run out first, nobody could come in and make an idle one give way
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = (
        settings.max_connections
        if files == resource.RLIM_INFINITY
        else min(settings.max_connections, max(1, files - _OTHER_FILES))
    )

    class LimitedProtocol(H11Protocol):
        """A connection; ``scope["state"]["connection"]`` of its requests."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.app_state = {**self.app_state, "connection": self}
            raw = transport.get_extra_info("socket")
            if raw is not None:
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            alive.add(self)
            self._rest()
            if len(alive) > most:
                oldest = next(iter(idle))
                if oldest is self:
                    # all others are in use
                    self._answer(overloaded("too many connections are open", "connections"))
                else:
                    oldest.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            alive.discard(self)
            self._work()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            timer, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None
            super().data_received(data)
            if self.cycle is before and self in idle:
                # no whole head yet: what has come buys no more time
                self._unset_keepalive_if_required()
                self.timeout_keep_alive_task = timer
                return
            if timer is not None:
                timer.cancel()
            if self.cycle is not before and not self.cycle.response_complete:
                self._work()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.get_write_buffer_size():
                self.loop.call_later(settings.stall_timeout, self._drop_unwritten, self.cycle)
            if not self.transport.is_closing() and self.cycle.response_complete:
                self._rest()

        def send_400_response(self, msg: str) -> None:
            fault = sys.exc_info()[1]
            status = getattr(fault, "error_status_hint", 400)
            if status == 431:
                told = f"the headers have more than {settings.max_header_bytes} bytes, the most that is taken"
            else:
                told = "this is no valid HTTP request"
            with contextlib.suppress(h11.LocalProtocolError):
                # too late where an answer is under way
                self._answer(ApiError(status, told))
            self.transport.close()

        def abort(self) -> None:
            """Close the connection at once, without sending what waits."""
            alive.discard(self)
            self._work()
            self.transport.abort()

        def _rest(self) -> None:
            """It is idle from now on."""
            idle[self] = None
            idle.move_to_end(self)
            if self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = self.loop.call_later(
                    settings.keep_alive_timeout, self.timeout_keep_alive_handler
                )

        def _work(self) -> None:
            """It is not idle any more."""
            idle.pop(self, None)

        def _answer(self, error: ApiError) -> None:
            """Send an error without asking the app, and close."""
            body = error.response().body
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                *((name.encode(), value.encode()) for name, value in error.headers.items() if name != "connection"),
            ]
            parts = (
                h11.Response(
                    status_code=error.status, headers=headers, reason=HTTPStatus(error.status).phrase.encode()
                ),
                h11.Data(data=bytes(body)),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(part) or b"" for part in parts))
            self.transport.close()

        def _drop_unwritten(self, cycle: Any) -> None:
            if self.cycle is cycle and self.transport.get_write_buffer_size():
                self.abort()

    return LimitedProtocol
