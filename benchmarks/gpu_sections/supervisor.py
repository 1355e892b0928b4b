"""Runs sections in processes of their own: one that hangs or breaks its device is ended, and another goes on after it.

A kernel that waits for ever cannot be stopped from inside its process, and after an illegal address a process can
launch nothing any more. So the process of ``gpu.py`` touches no device: it starts workers and watches the file that
they write row by row. When a worker is lost its part has a row that says so, and the next worker leaves that part out.

What does not measure time is spread over several workers: correctness, and before timed sections a run that calls
everything once, so that the kernels and the peers' graphs are compiled by many cores and kept on disk (in Triton's
cache and TorchInductor's), where the worker that measures finds them.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .session import PATIENCE_S, write_whole

#: exit status of a worker whose device is lost
LOST = 3
#: seconds beyond its time after which a worker is ended
GRACE_S = 15.0
POLL_S = 0.2
#: what several processes may do at once, and what they compile beforehand
IN_LANES = ("correctness",)
COMPILED = ("decode", "throughput", "prefill", "kernels")
#: share of the time that compiling may take
COMPILE_SHARE = 0.35

_children: set[subprocess.Popen[bytes]] = set()
_ending = threading.Event()


def supervise(command: list[str], shares: dict[str, float], out: pathlib.Path, minutes: float, lanes: int) -> None:
    """Run sections, the results in ``out``.

    Args:
        command: of a worker, without what it shall do.
        shares: section -> its share of the time, in the order in which they run.
        out: the file; one that is there is replaced.
        minutes: of all together.
        lanes: workers that share what is not timed.
    """
    deadline = time.monotonic() + 60.0 * minutes
    out.unlink(missing_ok=True)
    names = list(shares)
    with _signals():
        if lanes > 1 and names[0] in IN_LANES:
            share = shares[names[0]] / sum(shares.values())
            end = deadline if len(names) == 1 else time.monotonic() + share * (deadline - time.monotonic())
            _merge(_in_lanes(command, [names[0]], out, end, lanes), names[0], out)
        compiled = [name for name in names if name in COMPILED]
        if lanes > 1 and compiled:
            end = time.monotonic() + COMPILE_SHARE * (deadline - time.monotonic())
            print(f"== compiling for {', '.join(compiled)} in {lanes} processes", flush=True)
            # compilers of the peers, which each process has by itself, must not be as many again
            threads = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
            for path in _in_lanes([*command, "--compile"], compiled, out, end, lanes, threads):
                path.unlink(missing_ok=True)
        watch(command, names, out, deadline)


def watch(
    command: list[str],
    names: list[str],
    out: pathlib.Path,
    deadline: float,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run sections one after another by workers that take over from each other.

    Args:
        command: of a worker, without what it shall do.
        names: of the sections.
        out: the file that the workers write.
        deadline: by ``time.monotonic()``.
        variables: of their environment, besides this process's.
    """
    while not _ending.is_set():
        before = read(out)
        left = [name for name in names if before["sections"].get(name, {}).get("state", "running") == "running"]
        if not left:
            return
        minutes = (deadline - time.monotonic()) / 60.0
        if minutes <= 0:
            _close(out, before, left, "stopped", "the time of --minutes was spent")
            return
        status, why = _attend(
            [*worker(command, left, out), "--minutes", f"{minutes:.3f}"],
            out,
            deadline,
            variables or {},
        )
        if _ending.is_set():
            return
        after = read(out)
        running = [name for name in left if after["sections"].get(name, {}).get("state") == "running"]
        if running and status != LOST:
            section = after["sections"][running[0]]
            part = section["parts"][-1] if section["parts"] else running[0]
            error = why or f"its process ended with status {status}"
            section["rows"].append({"kind": "failed", "name": f"{part}: process", "ok": False, "error": error})
            print(f"{part}: {error}", flush=True)
            write_whole(out, after)
        if _progress(after) == _progress(before) and time.monotonic() < deadline:
            _close(out, after, left, "failed", why or f"its process ended with status {status} and left no results")
            return


def worker(command: list[str], names: list[str], out: pathlib.Path) -> list[str]:
    """The command of a worker that runs these sections and leaves with this process."""
    return [*command, "--worker", str(os.getpid()), "--sections", ",".join(names), "--out", str(out)]


def _attend(
    command: list[str], out: pathlib.Path, deadline: float, variables: Mapping[str, str]
) -> tuple[int | None, str]:
    """Wait for a worker, or end it with all that it started; (exit status, why it was ended)."""
    # a group of its own: compilers that it has started go with it
    child = subprocess.Popen(command, env={**os.environ, **variables}, start_new_session=True)
    _children.add(child)
    seen, stamp, patience = time.monotonic(), 0.0, PATIENCE_S
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=POLL_S), ""
            now = time.monotonic()
            written = out.stat().st_mtime if out.exists() else 0.0
            if written != stamp:
                seen, stamp, patience = now, written, read(out).get("patience_s", PATIENCE_S)
            if now > deadline + GRACE_S:
                return None, "it did not end when the time of --minutes was spent"
            if now - seen > patience:
                return None, f"no row for {patience:.0f} s: it was taken for hung and ended"
    finally:
        end(child)


def end(child: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a group, and its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    _children.discard(child)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends the workers too: they are in groups of their own, where it does not reach them."""

    def leave(number: int, frame: object) -> None:
        _ending.set()
        for child in list(_children):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_lanes(
    command: list[str],
    names: list[str],
    out: pathlib.Path,
    deadline: float,
    lanes: int,
    variables: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
    """Run sections by workers that share their parts, each with a file beside ``out``."""
    files = [out.with_name(f"{out.stem}.{names[0]}-{number}.json") for number in range(lanes)]

    def one(number: int) -> None:
        files[number].unlink(missing_ok=True)
        watch([*command, "--lane", f"{number}/{lanes}"], names, files[number], deadline, variables)

    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(one, range(lanes)))
    return files


def _merge(files: list[pathlib.Path], name: str, out: pathlib.Path) -> None:
    """One section out of those of its lanes, which are removed."""
    results = [read(path) for path in files]
    found = [result["sections"][name] for result in results if name in result["sections"]]
    if not found:
        return
    first = next(result for result in results if "machine" in result)
    section = {
        # what a lane has left undone is for the worker behind them
        "state": "running",
        "seconds": max(section["seconds"] for section in found),
        "error": None,
        "parts": [part for section in found for part in section["parts"]],
        "rows": [row for section in found for row in section["rows"]],
    }
    write_whole(out, {**first, "sections": {name: section}})
    for path in files:
        path.unlink(missing_ok=True)


def read(out: pathlib.Path) -> dict[str, Any]:
    """What workers have written so far."""
    return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"sections": {}}


def _close(out: pathlib.Path, result: dict[str, Any], names: list[str], state: str, error: str) -> None:
    for name in names:
        empty: dict[str, Any] = {"seconds": 0.0, "parts": [], "rows": []}
        result["sections"].setdefault(name, empty).update(state=state, error=error)
    write_whole(out, result)


def _progress(result: dict[str, Any]) -> int:
    """Grows with every part that is begun and every section that ends."""
    sections = result["sections"].values()
    return sum(1 + len(section["parts"]) + (section["state"] != "running") for section in sections)
