"""What waits for the readers of requests: one merged output each, on the reader's event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from .outputs import RequestOutput
from .request import Output, Request

_LOG = logging.getLogger("gpt2rt.engine")


class Stream:
    """What one reader has not read yet, merged into one output; all but ``call`` run on the reader's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.request: Request | None = None
        self.aggregate = False
        self.accepted: asyncio.Future[None] = loop.create_future()
        self._output: Output | None = None
        self._news = asyncio.Event()

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run something on the reader's event loop."""
        call_on(self.loop, function, *arguments)

    def accept(self) -> None:
        """The engine has taken the request."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def refuse(self, error: Exception) -> None:
        """The engine does not take the request."""
        if not self.accepted.done():
            self.accepted.set_exception(error)

    def put(self, output: Output) -> None:
        """Something new; merged with what was not read yet."""
        before = self._output
        if isinstance(before, RequestOutput) and isinstance(output, RequestOutput):
            before.add(output, aggregate=self.aggregate)
        else:
            self._output = output
        self._news.set()

    async def next(self) -> Output:
        """What is new."""
        await self._news.wait()
        self._news.clear()
        output, self._output = self._output, None
        assert output is not None
        return output


def put_all(outputs: list[tuple[Stream, Output]]) -> None:
    for stream, output in outputs:
        stream.put(output)


def call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> bool:
    """Run something on an event loop; False: it is closed, nobody reads any more."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        _LOG.debug("an event loop was closed before its requests ended")
        return False
    return True
