"""What clients are told when something is wrong: OpenAI's error shape, and nothing about the inside of the server.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gpt2rt.errors import (
    EngineDeadError,
    NumericsError,
    QueueFullError,
    RequestError,
    RequestFailedError,
    TokenizerError,
)

from .json_io import dumps

logger = logging.getLogger("gpt2rt.server")

#: messages may quote what a client sent, but not all of it
MAX_MESSAGE_CHARACTERS = 1000


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        message: for the client's developer: what was wrong, what was expected.
        kind: OpenAI's ``type``.
        param: the field that is wrong.
        code: a word for programs.
        headers: further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE_CHARACTERS else message[:MAX_MESSAGE_CHARACTERS] + "..."
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        return Response(dumps(self.body()), self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param)


def overloaded(message: str, code: str, retry_after: float = 1.0) -> ApiError:
    """A 503 for a client that may try again after some seconds."""
    seconds = str(max(1, math.ceil(retry_after)))
    return ApiError(503, message, kind="overloaded_error", code=code, headers={"retry-after": seconds})


def shutting_down() -> ApiError:
    """The answer to those who come, or are still here, when the server stops."""
    error = overloaded("the server is shutting down; try again in a moment", "shutting_down")
    error.headers["connection"] = "close"
    return error


def api_error(error: Exception, request_id: str = "") -> ApiError:
    """What a client is told about an exception; those that are nobody's fault but ours are logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | TokenizerError):
        return bad_request(str(error))
    if isinstance(error, QueueFullError):
        return overloaded(str(error), "queue_full", error.retry_after)
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine has stopped; the server restarts", kind="server_error", code="engine_dead")
    # the same request would fail again
    stop = {"x-should-retry": "false"}
    if isinstance(error, NumericsError):
        message = "the model's numbers for this request were not finite (NaN or infinity)"
        return ApiError(500, message, kind="server_error", code="not_finite", headers=stop)
    logger.error("request %s failed", request_id or "-", exc_info=error)
    if isinstance(error, RequestFailedError):
        message = f"this request failed inside the server, which goes on with the others; its log names {request_id}"
        return ApiError(500, message, kind="server_error", code="request_failed", headers=stop)
    message = f"an unexpected fault of the server; its log names request {request_id}"
    return ApiError(500, message, kind="server_error", code="internal_error", headers=stop)


def _validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body; what was sent is not repeated, it may be anything."""
    errors = error.errors()
    first = errors[0]
    where = [str(part)[:60] for part in first.get("loc", ())[1:]]
    param = ".".join(where) or None
    kind = first.get("type")
    if kind == "extra_forbidden":
        message = f"{param} is no field of this request that gpt2rt knows; leave it out"
    elif kind == "missing":
        message = f"{param or 'the body'} is missing"
    elif param is None:
        message = "the body must be a JSON object"
    else:
        message = str(first.get("msg", "invalid"))
        message = message if param is None or param.split(".")[0] in message else f"{param}: {message}"
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more)"
    return bad_request(message, param)


def install(app: FastAPI) -> None:
    """Give an app these answers."""

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _validation(error).response()

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        names = {404: "not_found", 405: "method_not_allowed"}
        told = {404: f"there is nothing at {request.url.path[:200]!r}", 405: f"{request.method} is not understood here"}
        message = told.get(error.status_code, str(error.detail))
        answer = ApiError(error.status_code, message, code=names.get(error.status_code), headers=error.headers)
        return answer.response()

    async def on_any(request: Request, error: Exception) -> Response:
        if isinstance(error, QueueFullError):
            request.app.state.service.metrics.reject("queue_full")
        return api_error(error, getattr(request.state, "request_id", "")).response()

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    for kind in (
        ApiError,
        RequestError,
        TokenizerError,
        QueueFullError,
        EngineDeadError,
        NumericsError,
        RequestFailedError,
    ):
        app.add_exception_handler(kind, on_any)
    app.add_exception_handler(Exception, on_any)
