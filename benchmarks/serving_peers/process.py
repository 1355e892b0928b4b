"""Starting, asking and ending the process of one program."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from cpu_peers import PeerProcess

from .registry import SERVERS

WORKER = pathlib.Path(__file__).with_name("worker.py")


class ServerProcess(PeerProcess):
    """One program in a process of its own, in the environment of ``python``.

    Args:
        name: a key of SERVERS.
        python: its interpreter.
        checkpoint: folder of the float32 checkpoint.
        converted: folder of the files that its ``model`` converts for itself.
        threads: processors it may use.
        settings: further options of its Runner: ``capacity``, the most requests at once, ``longest``, the most tokens
            of one of them, ``llama_server``, where that program is.
    """

    def __init__(
        self,
        name: str,
        *,
        python: str = sys.executable,
        checkpoint: str,
        converted: pathlib.Path,
        threads: int,
        settings: dict[str, Any],
    ) -> None:
        super().__init__(
            SERVERS[name].model, python=python, checkpoint=checkpoint, converted=converted, threads=threads
        )
        self._convert_command = self._command
        options = json.dumps({**settings, "threads": threads})
        self._serve_command = [python, str(WORKER), name, checkpoint, str(converted), options]

    def convert(self) -> None:
        """Write the model in the program's own format.

        Raises:
            NotInstalledError, PeerFailedError: it could not.
        """
        self._command = self._convert_command
        super().convert()

    def start(self) -> dict:
        """Load the model: what the worker says about it, ``load_s`` and ``versions``.

        Raises:
            NotInstalledError, PeerFailedError: it could not.
        """
        self._command = self._serve_command
        return super().start()

    def serve(self, prompts: list[list[int]], new_tokens: list[int]) -> dict:
        """Answer all prompts: ``tokens`` and ``times_ms`` of each, ``total_ms``, ``peak_megabytes``.

        Raises:
            PeerFailedError: it died.
        """
        return self.request({"prompts": prompts, "new_tokens": new_tokens})
