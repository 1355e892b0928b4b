"""Does the server hold under load? Each section is a ``gpt2rt serve`` process of its own on a free port.

    python benchmarks/server_load.py                        # all three
    python benchmarks/server_load.py l3 --shape 124M --threads 2 --alone 200    # twice what it can serve, for 300 s
    python benchmarks/server_load.py l4 --cycles 200        # 1000 clients that leave in 30 s, then 200 servers in turn
    python benchmarks/server_load.py l5 --book-seconds 60   # every token accounted for
    python benchmarks/server_load.py --dry                  # seconds, to see that it runs

l3: a closed loop of as many clients as the server runs and queues finds how many requests a second it serves; then
requests come at random times (Poisson), ``--factor`` times as many, whether it keeps up or not. Each is answered with
200 and a whole stream, or at once with 503 and Retry-After. The time to the first token (TTFT) of those that were let
in is compared with that of requests one at a time, 99th percentile with 99th percentile; both count from before the
client connects. How long a request waits is decided by how many may wait: here 16 run and none waits (--max-num-seqs,
--max-num-queued-reqs). ``/health`` is asked ten times a second by a process of its own. With the embedded model, whose
steps take 2 ms, it is clients and the server's own Python that two cores are short of; ``--shape`` serves a model of a
real size, with random weights.

l4: clients leave at random moments, from "only connected" to "after [DONE]", half of them with a reset, while others
beside them read whole streams; memory counts once every block of the KV cache has been written. Then servers one after
the other on the same port: started, streams begun, SIGTERM, and every stream must end whole, with [DONE] and all its
tokens, the exit code be 0, no process and no port be left.

l5: three counts of new tokens inside the server must agree to the last one: those of steps (generation_tokens), those
that each request had when it ended (request_generation_tokens), and those that were timed (time_to_first_token and
inter_token_latency, one for each token). What clients were given is counted by the ids in their answers, and by the
``usage`` of those that were read to their end. Discarded are the tokens that requests had when they ended and that no
client had read: with clients that read all there are none, with clients that leave they are counted for the requests
together, and, one request at a time, for each alone. A server tells nobody what it discarded, so delivered + discarded
= generated compares the steps' count with the clients' and the requests'.

A JSON file holds what was measured and each target with its verdict; exit status 1 if one was missed. In a dry run the
targets that are times and memory are reported, but decide nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

from common import RESULTS, describe, write_json
from serve_start import save_tokenizer
from server_sections import books, leaving, overload
from server_sections.shared import Verdicts
from shapes import SHAPES, random_checkpoint

SECTIONS = {"l3": overload.run, "l4": leaving.run, "l5": books.run}
DRY = {
    # so short a pilot says little: enough that some are refused
    "factor": 8.0,
    "seconds": 0.6,
    "pilot_seconds": 0.3,
    "book_seconds": 0.3,
    "alone": 10,
    "drops": 30,
    "drop_seconds": 0.5,
    "cycles": 2,
    "single_drops": 5,
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="l3 l4 l5", help="default: all")
    parser.add_argument("--model", default="gpt2rt/tiny-gpt2")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="instead: a checkpoint of random weights, made now")
    parser.add_argument("--threads", type=int, default=1, help="of the server's executor (default: 1)")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="l3 (default: 16)")
    parser.add_argument("--max-num-queued-reqs", type=int, default=0, help="l3 (default: 0)")
    parser.add_argument("--prefill-slowdown", type=float, help="l3 (default: the server's)")
    parser.add_argument("--factor", type=float, default=2.0, help="l3: times the capacity (default: 2)")
    parser.add_argument("--seconds", type=float, default=300.0, help="l3: of overload (default: 300)")
    parser.add_argument("--pilot-seconds", type=float, default=10.0, help="l3: to find the capacity (default: 10)")
    parser.add_argument("--alone", type=int, default=500, help="l3: requests one at a time (default: 500)")
    parser.add_argument("--drops", type=int, default=1000, help="l4: clients that leave (default: 1000)")
    parser.add_argument("--drop-seconds", type=float, default=30.0, help="l4: in which they come (default: 30)")
    parser.add_argument("--cycles", type=int, default=200, help="l4: servers one after the other (default: 200)")
    parser.add_argument("--book-seconds", type=float, default=60.0, help="l5: of each crowd (default: 60)")
    parser.add_argument("--single-drops", type=int, default=200, help="l5: clients alone that leave (default: 200)")
    parser.add_argument("--dry", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file (default: results/server-load.json)")
    arguments = parser.parse_args(argv)
    if arguments.dry:
        # what is given goes before
        parser.set_defaults(**DRY)
        arguments = parser.parse_args(argv)
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: the sections are {', '.join(SECTIONS)}")
    arguments.sections = arguments.sections or list(SECTIONS)
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.shape:
            # the server calls itself by the folder's name
            arguments.model = os.path.join(folder, arguments.shape)
            random_checkpoint(SHAPES[arguments.shape], arguments.model)
            save_tokenizer(arguments.model, SHAPES[arguments.shape]["vocab_size"])
        return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    result: dict[str, Any] = {
        "machine": describe(),
        "packages": {name: importlib.metadata.version(name) for name in ("fastapi", "uvicorn", "pydantic", "h11")},
        "cores": len(os.sched_getaffinity(0)),
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("out", "model")},
        "sections": {},
    }
    name = "-".join(["server-load", *(arguments.sections if len(arguments.sections) < len(SECTIONS) else [])])
    out = arguments.out or RESULTS / f"{name}{'-dry' if arguments.dry else ''}.json"
    failed = []
    for section in arguments.sections:
        verdicts = Verdicts(arguments.dry)
        began = time.perf_counter()
        found = asyncio.run(SECTIONS[section](arguments, verdicts))
        seconds = round(time.perf_counter() - began, 1)
        result["sections"][section] = {"took_seconds": seconds, "targets": verdicts.targets, **found}
        # a later section may fail
        write_json(out, result)
        failed += [f"{section}: {target}" for target in verdicts.failed]
        for target, verdict in verdicts.targets.items():
            word = "pass" if verdict["pass"] else "FAIL" if verdict["decides"] else "fail (dry)"
            print(f"{section} {word}: {target}: {verdict['value']}, target {verdict['target']}", flush=True)
    print(out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
