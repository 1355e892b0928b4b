"""JSON in and out: what comes in is checked more strictly than Python does, what goes out is fast."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

#: bytes to JSON text; 0.3 us for an event of a stream, where the standard library takes 3.7 us (Zen 4)
dumps = orjson.dumps

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BadJson(ValueError):
    """A text is no JSON that means one thing; the message is for the client."""


def loads(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        BadJson: it is not UTF-8, not JSON, nested too deeply, repeats a key in an object, holds NaN, Infinity, a number
            of thousands of digits, or half of a surrogate pair.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadJson(f"the body is not UTF-8 text (byte {error.start} of {len(data)})") from None
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise BadJson("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BadJson(f"the body is no JSON: {error.msg} at character {error.pos}") from None
    except BadJson:
        raise
    except ValueError:
        # Python refuses to read integers of more than 4300 digits
        raise BadJson("the body holds a number with too many digits") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise BadJson("the body holds half of a surrogate pair, \\ud800 to \\udfff; send whole ones") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen = set()
        for twice, _ in pairs:
            if twice in seen:
                break
            seen.add(twice)
        raise BadJson(f"the body has {twice[:60]!r} twice in one object")
    return value


def _refuse_constant(name: str) -> Any:
    raise BadJson(f"the body holds {name}, which is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return loads(await self.body())
        except BadJson as error:
            raise HTTPException(400, str(error)) from None


class JsonRoute(APIRoute):
    """A route whose body is JSON, and strictly so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.method == "POST":
                # a page of another site can make a browser send text or forms to a loopback server, but not JSON
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
                    raise HTTPException(415, f"the content type is {kind[:60]!r}, expected application/json")
            return await handler(_StrictRequest(request.scope, request.receive))

        return handle
