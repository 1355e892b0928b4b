"""Starting, asking and ending the process of one peer."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from .registry import PEERS, family_module

WORKER = pathlib.Path(__file__).with_name("worker.py")


class NotInstalledError(Exception):
    """The environment of a peer lacks packages; the message names them."""


class PeerFailedError(Exception):
    """A peer died; the message is the end of what it wrote to stderr."""


class PeerProcess:
    """One peer in a process of its own, in the environment of ``python``.

    Args:
        name: a key of PEERS.
        python: its interpreter.
        checkpoint: folder of the float32 checkpoint.
        converted: folder for files of the peer's own format; written once, reused if complete.
        threads: processors it may use.
    """

    def __init__(
        self, name: str, *, python: str = sys.executable, checkpoint: str, converted: pathlib.Path, threads: int
    ) -> None:
        self.name, self.threads = name, threads
        self._command = [python, str(WORKER), name, checkpoint, str(converted), str(threads)]
        self._converted = converted
        self._process: subprocess.Popen[str] | None = None
        # a file: a pipe that nobody empties would stop a peer that says much
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 it lives as long as this object

    def convert(self) -> None:
        """Write the peer's own files, in a process of their own so that its peak memory is not counted.

        Raises:
            NotInstalledError, PeerFailedError: it could not.
        """
        done = self._converted / ".complete"
        if done.exists():
            return
        self._converted.mkdir(parents=True, exist_ok=True)
        if hasattr(family_module(PEERS[self.name]), "convert"):
            self._open("--convert")
            try:
                self._read()
            finally:
                self.close()
        done.touch()

    def start(self) -> dict:
        """Load the model: what the worker says about it, ``load_s`` and ``versions``.

        Raises:
            NotInstalledError, PeerFailedError: it could not.
        """
        self._open()
        return self._read()

    def ask(self, prompts: list[list[int]], new_tokens: int) -> dict:
        """Generate: ``tokens`` of each row, ``times_ms`` from the start to each step's tokens, ``peak_megabytes``.

        Raises:
            PeerFailedError: it died.
        """
        return self.request({"prompts": prompts, "new_tokens": new_tokens})

    def request(self, content: dict) -> dict:
        """What the worker answers to a line of JSON.

        Raises:
            PeerFailedError: it died.
        """
        assert self._process is not None
        # if it is dead, the reason is read below
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(content), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End the process, if it runs."""
        if self._process is None:
            return
        # closes its standard input, which ends it, and waits
        self._process.communicate()
        self._process = None

    def _open(self, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        # where gpt2rt and Inductor keep what they made of the weights: not among the user's own
        environment["GPT2RT_CACHE"] = environment["TORCHINDUCTOR_CACHE_DIR"] = str(self._converted / "cache")
        self._process = subprocess.Popen(
            [*self._command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def _read(self) -> dict:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            said = [text.strip() for text in self._log.read().splitlines() if text.strip()]
            self.close()
            raise PeerFailedError(f"exit code {code}: {said[-1] if said else 'it said nothing'}")
        answer = json.loads(line)
        if "missing" in answer:
            self.close()
            raise NotInstalledError("pip install " + " ".join(answer["missing"]))
        return answer
