"""Where the server listens. Nothing of the extra is needed for this."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from .settings import ServerSettings


def listen(settings: ServerSettings) -> socket.socket:
    """A socket that is bound but does not listen yet: clients are turned away until the model is there.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    if settings.uds is not None:
        with contextlib.suppress(FileNotFoundError):
            if _is_stale(settings.uds):
                os.unlink(settings.uds)
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        where: Any = settings.uds
    else:
        family, kind, number, _, where = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(where)
    except OSError as error:
        bound.close()
        place = settings.uds or f"{settings.host} port {settings.port}"
        raise OSError(error.errno, f"cannot listen on {place}: {os.strerror(error.errno or 0)}") from None
    return bound


def _is_stale(path: str) -> bool:
    """Whether nobody listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


def address(settings: ServerSettings, bound: socket.socket) -> str:
    """The URL of a bound socket."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host, port = bound.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
