"""One server process: it listens, drains on SIGTERM or SIGINT, and ends when its engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from .app import create_app
from .connection import limited_protocol
from .service import Service
from .settings import ServerSettings

logger = logging.getLogger("gpt2rt.server")

# a dead engine's /health can be asked for so long, in seconds, before the process ends
_DEAD_SECONDS = 1.5
# what closing connections may take after their requests have ended
_CLOSE_SECONDS = 2.0
# what the engine's thread may take to end
_ENGINE_SECONDS = 5.0
_EXIT_DEAD = 1


class Server(uvicorn.Server):
    """uvicorn with an orderly end.

    The first SIGTERM or SIGINT: no connection is accepted any more, what runs may go on for ``shutdown_timeout``
    seconds, then it is aborted, and streams say so. The second: aborted at once. When the engine dies, ``/health`` says
    so for a moment, then the process ends with a code that is not 0.

    Args:
        app: of :func:`create_app`.
        settings: the same.
        ready: called once connections are accepted.

    Attributes:
        exit_code: of the process, when it has ended.
    """

    def __init__(self, app: Any, settings: ServerSettings, ready: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(
            app,
            http=limited_protocol(settings),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=not settings.disable_uvicorn_access_log,
            proxy_headers=False,
            server_header=False,
            root_path=settings.root_path,
            h11_max_incomplete_event_size=settings.max_header_bytes,
            timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]
            ssl_keyfile=settings.ssl_keyfile,
            ssl_certfile=settings.ssl_certfile,
            ssl_ca_certs=settings.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_REQUIRED if settings.ssl_ca_certs else ssl.CERT_NONE,
        )
        super().__init__(config)
        self.exit_code = 0
        self._settings = settings
        self._service: Service = app.state.service
        self._ready = ready
        self._signals = 0
        self._hurry = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and watch the engine."""
        await super().startup(sockets)
        self._watcher = asyncio.create_task(self._watch_engine())
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT while serving; afterwards they are not raised again, the exit code is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """What a signal does: end in order; the second time, at once."""
        self._signals += 1
        self._service.draining = True
        self.should_exit = True
        if self._signals > 1:
            self._hurry.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let requests end or end them, close connections."""
        self._service.draining = True
        self._watcher.cancel()
        drain = asyncio.create_task(self._drain())
        try:
            await super().shutdown(sockets)
        finally:
            drain.cancel()
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    async def _drain(self) -> None:
        service = self._service
        if self.exit_code == 0:
            deadline = time.monotonic() + self._settings.shutdown_timeout
            while self._busy() and time.monotonic() < deadline and not self._hurry.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), 0.05)
            if self._busy():
                logger.warning("shutting down: %d requests are aborted", len(service.guards))
                await service.abort_all()
        # what is left are readers that take nothing, and senders that do not finish
        await asyncio.sleep(0 if not self.server_state.connections else _CLOSE_SECONDS)
        self.force_exit = True
        for task in list(self.server_state.tasks):
            task.cancel()

    def _busy(self) -> bool:
        return bool(self.server_state.tasks)

    async def _watch_engine(self) -> None:
        while not self._service.engine.errored:
            await asyncio.sleep(0.1)
        logger.critical("the engine has stopped; the server ends")
        self.exit_code = _EXIT_DEAD
        await asyncio.sleep(_DEAD_SECONDS)
        self.should_exit = True


def run_server(
    engine: Any, settings: ServerSettings, bound: socket.socket, ready: Callable[[], None] = lambda: None
) -> int:
    """Serve an engine until a signal comes or the engine dies.

    Args:
        engine: an ``AsyncLLM``; it is shut down in the end.
        settings: of the server.
        bound: of :func:`listen`.
        ready: called once connections are accepted.

    Returns:
        the exit code: 0 after a signal, 1 when the engine has died.
    """
    _log_to_stderr()
    server = Server(create_app(engine, settings), settings, ready)
    try:
        asyncio.run(server.serve(sockets=[bound]))
    finally:
        if settings.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(settings.uds)
        _end_engine(engine)
    return server.exit_code


def _end_engine(engine: Any) -> None:
    """Shut the engine down; one that is stuck in a step is left behind, its thread ends with the process."""
    thread = threading.Thread(target=engine.shutdown, name="gpt2rt-shutdown", daemon=True)
    thread.start()
    thread.join(_ENGINE_SECONDS)
    if thread.is_alive():
        logger.error("the engine did not end within %g s", _ENGINE_SECONDS)


def _log_to_stderr() -> None:
    """Access log and faults, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("gpt2rt", "uvicorn.access"):
        log = logging.getLogger(name)
        if not log.handlers:
            log.addHandler(handler)
        log.propagate = False
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    # uvicorn's own messages about starting and stopping are ours, its complaints are not
    errors = logging.getLogger("uvicorn.error")
    errors.setLevel(logging.ERROR)
    if not errors.handlers:
        errors.addHandler(handler)
    errors.propagate = False
