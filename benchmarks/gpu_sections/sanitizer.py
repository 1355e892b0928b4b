"""(h) compute-sanitizer over the smallest shapes: memory errors and races, in processes of their own."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from .session import Session

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: exit status of the sanitizer when it found something
FOUND = 86
TIMEOUT_S = 240


def find() -> str | None:
    """The tool on PATH, or where the CUDA toolkit puts it."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def run(session: Session) -> None:
    tool = find()
    if session.dry or tool is None:
        why = "a dry run has no device" if session.dry else "compute-sanitizer is not on PATH"
        session.note("compute-sanitizer", f"not run: {why}")
        return
    program = pathlib.Path(__file__).resolve().parent.parent / "gpu.py"
    # one allocation a tensor, or an access beyond one would hit the next; without torch's allocator nothing is captured
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "GPT2RT_CUDA_GRAPHS": "0"}
    for check in TOOLS[:2]:
        session.need(60)
        with session.attempt(check), tempfile.TemporaryDirectory() as folder:
            child = [sys.executable, str(program), "--sections", "a", "--smallest", "--out", f"{folder}/child.json"]
            command = [tool, "--tool", check, "--error-exitcode", str(FOUND), "--target-processes", "all", *child]
            code, text = _call(command, environment)
            summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
            session.check(check, code == 0, status=code, summary="; ".join(summary), tail=text[-2000:] if code else "")


def _call(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        return -1, (said.decode(errors="replace") if isinstance(said, bytes) else said) + "\nstopped: it took too long"
    return done.returncode, done.stdout
