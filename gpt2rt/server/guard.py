"""What ends a request before its time: the client goes, the time is over, the reader stalls, the server stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from starlette.types import Receive

from .streaming import EventStream

if TYPE_CHECKING:
    from .service import Service

# streams are looked after at least so often, in seconds
_TICK = 1.0


class Interrupted(Exception):
    """The work was ended from outside.

    Attributes:
        reason: "disconnected", "timeout", "stalled" or "shutdown".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Guard:
    """``async with Guard(...)``: the work inside is cancelled, and :class:`Interrupted` raised, when it has to end.

    A cancelled ``AsyncLLM.generate`` aborts its request. Nothing is paid for each token: one task waits for the
    client's end, and looks after the stream once a second.

    Args:
        service: whose ``guards`` it joins.
        receive: of ASGI; the body has been read.
        request_ids: what the engine calls the work.
        stream: where events go, if the answer is a stream.
    """

    def __init__(
        self, service: Service, receive: Receive, request_ids: Sequence[str] = (), stream: EventStream | None = None
    ) -> None:
        self.request_ids = request_ids
        self.stream = stream
        self._service = service
        self._receive = receive
        self._reason: str | None = None

    async def __aenter__(self) -> Guard:
        self._scope = asyncio.timeout(self._service.settings.request_timeout)
        await self._scope.__aenter__()
        self._service.guards.add(self)
        self._watcher = asyncio.create_task(self._watch())
        if self._service.aborting:
            self.end("shutdown")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service.guards.discard(self)
        self._watcher.cancel()
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError:
            raise Interrupted(self._reason or "timeout") from None

    def end(self, reason: str) -> None:
        """Cancel the work."""
        if self._reason is None:
            self._reason = reason
            with contextlib.suppress(RuntimeError):
                # it ended by itself in the meantime
                self._scope.reschedule(asyncio.get_running_loop().time())

    async def _watch(self) -> None:
        settings = self._service.settings
        tick = min(_TICK, settings.ping_interval / 4, settings.stall_timeout / 4)
        gone = asyncio.ensure_future(self._disconnected())
        try:
            while not gone.done():
                await asyncio.wait({gone}, timeout=tick if self.stream is not None else None)
                if self.stream is not None and not gone.done() and not await self.stream.look_after():
                    return self.end("stalled")
            self.end("disconnected")
        finally:
            gone.cancel()

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
