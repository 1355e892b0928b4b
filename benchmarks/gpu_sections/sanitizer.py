"""(h) compute-sanitizer over the smallest shapes, in processes of their own.

Memory errors, races, reads of memory that nobody wrote and misused barriers, kernels launched one by one; memory errors
once more with graphs, whose launches take another way.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

from .session import Session
from .supervisor import end, read, worker


class Call(NamedTuple):
    """One run of the tool.

    Attributes:
        name: of its row.
        check: the tool's tool.
        graphs: steps are replayed as graphs.
        limit_s: the longest that it may take, less where less is left.
    """

    name: str
    check: str
    graphs: bool
    limit_s: float


#: most wanted first
CALLS = (
    Call("memcheck", "memcheck", False, 150.0),
    Call("racecheck", "racecheck", False, 150.0),
    Call("memcheck, graphs", "memcheck", True, 120.0),
    Call("synccheck", "synccheck", False, 90.0),
    Call("initcheck", "initcheck", False, 90.0),
)
#: exit status of the sanitizer when it found something
FOUND = 86
#: a child that could not start in less would tell nothing
LEAST_S = 20.0


def find() -> str | None:
    """The tool on PATH, or where the CUDA toolkit puts it."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def run(session: Session) -> None:
    tool = find()
    if session.dry or tool is None:
        why = "a dry run has no device" if session.dry else "compute-sanitizer is not on PATH"
        session.note("compute-sanitizer", f"not run: {why}")
        return
    for number, call in enumerate(CALLS):
        if session.over(call.name):
            continue
        session.need(LEAST_S)
        # what one leaves goes to the others, but none takes the last of it
        fair = session.seconds_left() / (len(CALLS) - number)
        limit = min(call.limit_s, max(LEAST_S, 1.5 * fair), session.seconds_left())
        with session.attempt(call.name, limit + 60.0), tempfile.TemporaryDirectory() as folder:
            _one(session, tool, call, limit, pathlib.Path(folder))


def _one(session: Session, tool: str, call: Call, limit: float, folder: pathlib.Path) -> None:
    program = pathlib.Path(__file__).resolve().parent.parent / "gpu.py"
    environment = dict(os.environ)
    if not call.graphs:
        # one allocation a tensor, or an access beyond one would hit the next; without torch's allocator nothing is
        # captured
        environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "GPT2RT_CUDA_GRAPHS": "0"}
    out = folder / "child.json"
    # a worker by itself: nothing between it and the tool; it ends in time for the tool to say what it found
    child = worker([sys.executable, str(program), "--smallest"], ["correctness"], out)
    child += ["--minutes", f"{max(limit - 10.0, 0.5 * limit) / 60:.3f}"]
    command = [tool, "--tool", call.check, "--error-exitcode", str(FOUND), "--target-processes", "all", *child]
    code, text = _call(command, environment, limit, folder / "said")
    summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    ran = read(out)["sections"].get("correctness", {"state": "not begun", "parts": []})
    session.check(
        call.name,
        code == 0,
        status=code,
        limit_s=limit,
        # how far it came: "stopped" is a check of fewer kernels
        state=ran["state"],
        parts=len(ran["parts"]),
        summary="; ".join(summary),
        tail=text[-2000:] if code else "",
    )


def _call(command: list[str], environment: dict[str, str], limit: float, said: pathlib.Path) -> tuple[int, str]:
    """(exit status, output) of a command; -1 if it took longer than ``limit`` seconds and was killed."""
    # into a file, not a pipe: a child that is left over could hold a pipe open; a group: such a child goes with it
    with said.open("wb") as stream:
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code, more = process.wait(timeout=limit), ""
        except subprocess.TimeoutExpired:
            code, more = -1, f"\nstopped: it took longer than {limit:.0f} s"
        finally:
            end(process)
    return code, said.read_text(encoding="utf-8", errors="replace") + more
