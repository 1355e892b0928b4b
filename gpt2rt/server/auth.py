"""API keys: compared in constant time, needed for everything but ``/health``, and never written anywhere."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError

#: what a supervisor asks, who has no key
OPEN_PATHS = frozenset({"/health"})


class Authentication:
    """ASGI middleware that answers 401 to requests without one of the keys.

    Args:
        app: what it guards.
        keys: those that open it; none: everybody may come in.
        prefix: of all paths.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], prefix: str = "") -> None:
        self.app = app
        self._keys = [key.encode("ascii") for key in keys]
        self._open = {prefix + path for path in OPEN_PATHS} | OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and self._keys and scope["path"] not in self._open and not self._knows(scope):
            error = ApiError(
                401,
                "no API key, or a wrong one; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, given = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        # all of them, so that the time tells nothing
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return kind.lower() == b"bearer" and any(found)
