"""The process of one program: ``worker.py SERVER CHECKPOINT CONVERTED_FOLDER OPTIONS``; options are a JSON object.

It may run in another environment than the benchmark's. It loads, then answers each line of standard input,
``{"prompts": [[id, ...], ...], "new_tokens": [n, ...]}``, with a line of JSON: tokens of each request, milliseconds
from the start to each moment at which some came, milliseconds in all, peak resident megabytes. The first line it writes
is ``{"load_s": ..., "versions": {...}}``, or ``{"missing": [names to install]}``.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time

if __name__ == "__main__":
    # libraries print what they like; the answers have a channel of their own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cpu_peers import PEERS
from cpu_peers.worker import installed, peak_megabytes, version

from serving_peers import SERVERS, family_module


def answer_request(runner, request: dict) -> dict:
    """What one line of input is answered with."""
    start = time.perf_counter()
    tokens, seconds = runner.serve(request["prompts"], request["new_tokens"])
    total = time.perf_counter() - start
    return {
        "tokens": tokens,
        "times_ms": [[1e3 * moment for moment in moments] for moments in seconds],
        "total_ms": 1e3 * total,
        "peak_megabytes": peak_megabytes(getattr(runner, "process_id", "self")),
    }


def main() -> None:
    name, checkpoint, converted, settings = sys.argv[1:]
    server = SERVERS[name]

    def answer(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    family = family_module(server)
    absent = [package for module, package in family.REQUIRES.items() if not installed(module)]
    if absent:
        answer({"missing": absent})
        return
    options = {**PEERS[server.model].options, **server.options, **json.loads(settings)}
    start = time.perf_counter()
    runner = family.Runner(checkpoint, pathlib.Path(converted), options)
    load_s = time.perf_counter() - start
    answer({"load_s": load_s, "versions": {package: version(package) for package in family.REQUIRES.values()}})
    for line in sys.stdin:
        answer(answer_request(runner, json.loads(line)))
    if hasattr(runner, "close"):
        # threads of its own, or another process
        runner.close()


if __name__ == "__main__":
    main()
