"""ASGI middlewares that bound what a request may be, before anything reads it."""

from __future__ import annotations

import asyncio
import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, overloaded, shutting_down
from .service import Service

_REQUEST_ID = re.compile(rb"^[A-Za-z0-9._:-]{1,128}$")


class Admission:
    """Numbers each request, and refuses those that are too many or have too many headers.

    An answer bears ``x-request-id``: the caller's own, if it is a plain word. Requests that ask for work count, for as
    long as their answer lasts; looking at the server's state is always possible.

    Args:
        app: what it guards.
        service: whose limits hold.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        name = given if _REQUEST_ID.match(given) else secrets.token_hex(16).encode()
        scope.setdefault("state", {})["request_id"] = name.decode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        service = self._service
        error = self._refusal(scope)
        if error is not None:
            await error.response()(scope, receive, send_named)
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, send_named)
            return
        service.in_flight += 1
        try:
            await self.app(scope, receive, send_named)
        finally:
            service.in_flight -= 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        service, settings = self._service, self._service.settings
        count, most = len(scope["headers"]), settings.max_headers
        if count > most:
            return ApiError(431, f"the request has {count} headers, expected at most {most}", code="too_many_headers")
        # uvicorn's own limit lets pass what arrives in one piece
        if sum(len(name) + len(value) for name, value in scope["headers"]) > settings.max_header_bytes:
            told = f"the headers have more than {settings.max_header_bytes} bytes, the most that is taken"
            return ApiError(431, told, code="headers_too_large")
        if scope["method"] != "POST":
            return None
        if service.draining:
            service.metrics.reject("shutting_down")
            return shutting_down()
        if service.in_flight >= service.max_in_flight:
            service.metrics.reject("in_flight")
            return overloaded(f"{service.in_flight} requests are in work, the most that this server takes", "in_flight")
        return None


class BodyLimit:
    """Refuses bodies that are too large, by what arrives and not by what they say of themselves, or come too slowly.

    Args:
        app: what it guards.
        max_bytes: of a body.
        seconds: that it may take to arrive.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self.app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body of a request and pass it on in one piece, or refuse it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            error = ApiError(
                408,
                f"the body did not arrive within {self._seconds:g} s",
                code="body_timeout",
                # the rest of it may come at any time
                headers={"connection": "close"},
            )
            await error.response()(scope, receive, send)
            return
        except ApiError as too_large:
            await too_large.response()(scope, receive, send)
            return
        if body is None:
            return
        first: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal first
            message, first = first, None
            return await receive() if message is None else message

        await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None: the client has gone."""
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        self._check(int(told) if told.isdigit() and len(told) < 20 else 0)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._check(size)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise ApiError(
                413,
                f"the body has more than {self._max_bytes} bytes, the most that is taken",
                code="body_too_large",
            )
