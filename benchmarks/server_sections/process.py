"""A ``gpt2rt serve`` process for a load: started, watched from outside, ended with SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import pathlib
import random
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
from typing import Any

from .clients import call

PATIENCE_S = 120.0
# what a server may take to be idle once its last client has gone, on a machine that others use too
IDLE_PATIENCE_S = 60.0
_SAMPLE = re.compile(r"^gpt2rt:(\w+)\{([^}]*)\} (\S+)$")
_REASON = re.compile(r'(?:finished_reason|reason)="(\w+)"')


def unused_port() -> int:
    """A port that nobody has, below those that the kernel gives to clients: none can take it between two servers."""
    while True:
        port = random.randrange(20000, 30000)
        if is_free(port):
            return port


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            # with this option a bind succeeds beside somebody who is bound but does not listen
            probe.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


class ServeProcess:
    """One server; ``async with`` starts it and, if it still runs then, kills it.

    Args:
        options: of ``gpt2rt serve``.
        port: where it listens; 0 takes a free one.

    Attributes:
        facts: what its first line says.
        log: what it wrote to stderr, once it has ended.

    Raises:
        RuntimeError: it ended before it was ready.
    """

    def __init__(self, options: list[str], port: int = 0) -> None:
        self._options = [*options, "--port", str(port), "--disable-uvicorn-access-log", "--json"]
        self.facts: dict[str, Any] = {}
        self.log = ""

    async def __aenter__(self) -> ServeProcess:
        self._file = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (closed in __aexit__)
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gpt2rt.cli", "serve", *self._options),
            stdout=asyncio.subprocess.PIPE,
            stderr=self._file,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            # so that what it might leave behind can be told from everything else
            start_new_session=True,
        )
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), PATIENCE_S)
        if not line:
            code = await self.process.wait()
            await self.__aexit__()
            raise RuntimeError(f"the server ended with exit code {code}: {self.log}")
        self.facts = json.loads(line)
        self.host, port = self.facts["url"].removeprefix("http://").split(":")
        self.port = int(port)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        if not self._file.closed:
            self._read_log()
            self._file.close()

    def _read_log(self) -> None:
        self._file.seek(0)
        self.log = self._file.read().decode(errors="replace")

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    async def wait(self) -> int | None:
        """The exit code, when it has ended; None: it did not, and was killed."""
        try:
            code: int | None = await asyncio.wait_for(self.process.wait(), PATIENCE_S)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
            code = None
        self._read_log()
        return code

    def leaves_processes(self) -> bool:
        """Whether one that it started is there after its end."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    # ---- from outside ------------------------------------------------------------------------------------------------

    async def metrics(self) -> dict[str, float]:
        """``/metrics`` without the prefix and histograms' buckets; a counter by reason also as ``name/reason``.

        Raises:
            RuntimeError: it was not answered.
        """
        reply = await call(self.host, self.port, "GET", "/metrics")
        if reply.status != 200:
            raise RuntimeError(f"/metrics answered {reply.status}: {reply.error}")
        found: dict[str, float] = {}
        for line in reply.body.decode().splitlines():
            sample = _SAMPLE.match(line)
            if sample is None or sample[1].endswith("_bucket"):
                continue
            name, value = sample[1], float(sample[3])
            found[name] = found.get(name, 0.0) + value
            if reason := _REASON.search(sample[2]):
                found[f"{name}/{reason[1]}"] = value
        return found

    async def idle(self, ended: float | None = None) -> dict[str, float]:
        """``/metrics`` once nothing runs or waits, and so many requests have ended; or what it says after a minute.

        Args:
            ended: the sum of ``request_success_total``; None: any.
        """
        deadline = time.monotonic() + IDLE_PATIENCE_S
        while True:
            now = await self.metrics()
            early = ended is not None and now["request_success_total"] < ended
            busy = now["num_requests_running"] or now["num_requests_waiting"] or now["kv_cache_usage_perc"]
            if time.monotonic() > deadline or not (busy or early):
                return now
            await asyncio.sleep(0.01)

    def resources(self) -> dict[str, int]:
        """Bytes of memory, threads and file descriptors."""
        folder = pathlib.Path("/proc") / str(self.process.pid)
        fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
        return {
            "rss": int(fields["VmRSS"].split()[0]) * 1024,
            "threads": int(fields["Threads"]),
            "fds": len(os.listdir(folder / "fd")),
        }

    async def settled_resources(self) -> dict[str, int]:
        """Resources once connections are closed: once descriptors have been the same for a quarter of a second."""
        found, same = self.resources(), 0
        for _ in range(200):
            await asyncio.sleep(0.05)
            before, found = found, self.resources()
            same = same + 1 if found["fds"] == before["fds"] else 0
            if same == 5:
                break
        return found


class Watch:
    """Resources of a server, each second, while ``async with`` lasts."""

    def __init__(self, server: ServeProcess) -> None:
        self._server = server
        self.samples: list[dict[str, int]] = []

    async def __aenter__(self) -> Watch:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self.samples.append(self._server.resources())

    async def _run(self) -> None:
        while True:
            self.samples.append(self._server.resources())
            await asyncio.sleep(1.0)

    def growth(self, warm: float = 0.2) -> int:
        """Bytes of memory from the first samples, after this share of them, to the last, by medians of up to ten."""
        rss = [sample["rss"] for sample in self.samples[int(warm * len(self.samples)) :]]
        count = min(10, len(rss) // 2)
        return int(statistics.median(rss[-count:]) - statistics.median(rss[:count])) if count else 0
