"""What the OpenAPI page says of answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


_TOLD = {
    400: "The request is wrong: the message says where, and what was expected.",
    401: "No API key, or a wrong one.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    431: "Too many headers.",
    500: "The request failed inside the server.",
    503: "Too many requests wait, or the server stops; Retry-After says when to come again.",
    504: "The request took too long.",
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": told} for status, told in _TOLD.items()
}
STREAMS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream=true as server-sent events that end with `data: [DONE]`.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}
OBJECT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer.", "content": {"application/json": {"schema": {"type": "object"}}}}
}
