"""How much does a GPT-2 on this CPU answer when many ask at once, beside every other program for that?

    python benchmarks/cpu_serving.py                        # throughput, 124M, 16 and 64 requests, who is installed
    python benchmarks/cpu_serving.py --section throughput,itl,loop --output-json result.json --output-png result.png
    python benchmarks/cpu_serving.py --peer-python transformers=/path/to/venv/bin/python --llama-server /path/to/it
    python benchmarks/cpu_serving.py --dry                  # toy sizes: does it run at all?

Sections:

    throughput  All requests are there at once: random prompts of 64 to 128 tokens, each to get 64 to 128 more, greedily
                and whatever they are, so that everybody does the same work. Every program is a process of its own with
                the same random checkpoint (serving_peers/ holds a file for each family). In each round every program
                runs every number of requests once, in an order that rotates, with new prompts; none computes while
                another is measured. Reported: output tokens a second; ratios to the fastest other program, to
                transformers' continuous batching and to CTranslate2, each time the fastest whose weights are as wide or
                wider; times to the first token and between tokens; how many requests got the tokens that gpt2rt made.
    itl         The time between tokens of streams that are running, alone and while prompts of 900 tokens are computed
                beside them, one after another (serving_itl.py).
    loop        What the engine's Python costs a step (serving_loop.py).

serving_report.py prints the tables of a result again, or draws it.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import itertools
import os
import pathlib
import random
import sys
import tempfile
import time
from typing import Any

from common import describe, percentile, summary, write_json
from cpu_decode import SETTLE_S, available_bytes, interpreters, numbers, rotated, say
from cpu_peers import NotInstalledError, PeerFailedError
from serving_itl import measure_itl
from serving_loop import measure_loop
from serving_peers import SERVERS, ServerProcess
from serving_report import plot, tables
from shapes import SHAPES, random_checkpoint, step_bytes

SECTIONS = ("throughput", "itl", "loop")
# where things lie on the machine that measured says nothing
PLACES = ("peer_python", "llama_server", "models", "output_json", "output_png")
DRY = {
    "shape": "tiny",
    "rounds": 1,
    "concurrency": [2, 5],
    "prompt_tokens": (4, 8),
    "new_tokens": (3, 6),
    "streams": [1, 2],
    "stream_tokens": 40,
    "long_prompts": 2,
    "long_prompt": 100,
    "steps": 30,
}


class Workload:
    """The requests of one round: prompts, and how many tokens each is to get."""

    def __init__(
        self, count: int, prompt_tokens: tuple[int, int], new_tokens: tuple[int, int], vocab_size: int, seed: str
    ) -> None:
        numbers = random.Random(seed)
        self.prompts = [
            [numbers.randrange(vocab_size) for _ in range(numbers.randint(*prompt_tokens))] for _ in range(count)
        ]
        self.new_tokens = [numbers.randint(*new_tokens) for _ in range(count)]


class Row:
    """One program and what was measured of it, by number of requests."""

    def __init__(self, name: str, process: ServerProcess) -> None:
        self.name, self.process = name, process
        self.stays_loaded = True
        self.about: dict[str, Any] = {}
        self.peak_megabytes = 0.0
        self.tokens_per_s: dict[int, list[float]] = {}
        self.first_ms: dict[int, list[float]] = {}
        self.gaps_ms: dict[int, list[float]] = {}
        self.tokens: dict[tuple[int, int], list[list[int]]] = {}

    def warm_up(self, workload: Workload) -> None:
        self.process.serve(workload.prompts, [4] * len(workload.prompts))

    def run(self, workload: Workload, number: int) -> None:
        time.sleep(SETTLE_S)
        answer = self.process.serve(workload.prompts, workload.new_tokens)
        got = [len(tokens) for tokens in answer["tokens"]]
        if got != workload.new_tokens:
            # who does less work is not measured
            raise PeerFailedError(f"made {got} tokens, asked for {workload.new_tokens}")
        count = len(workload.prompts)
        say(f"{self.name}, {count} requests: {1e3 * sum(got) / answer['total_ms']:.0f} tokens/s")
        self.peak_megabytes = max(self.peak_megabytes, answer["peak_megabytes"])
        self.tokens[count, number] = answer["tokens"]
        self.tokens_per_s.setdefault(count, []).append(1e3 * sum(got) / answer["total_ms"])
        # a program that hands everything out at its end has no such times
        if all(answer["times_ms"]):
            self.first_ms.setdefault(count, []).extend(moments[0] for moments in answer["times_ms"])
            self.gaps_ms.setdefault(count, []).extend(
                later - earlier for moments in answer["times_ms"] for earlier, later in itertools.pairwise(moments)
            )


def choose(patterns: str, llama_server: str | None) -> list[str]:
    """Names of programs that match one of the comma-separated patterns; without any, all."""
    wanted = [pattern.strip() for pattern in (patterns or "*").split(",")]
    for pattern in wanted:
        if not fnmatch.filter(SERVERS, pattern):
            raise SystemExit(f"no program is named {pattern!r}; there are {', '.join(SERVERS)}")
    return [
        name
        for name, server in SERVERS.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)
        and (llama_server or server.family != "llama_server")
    ]


class Throughput:
    """The programs of one run; ``left_out`` and ``failed`` say why the others are not among them."""

    def __init__(self, arguments: argparse.Namespace, folder: pathlib.Path, checkpoint: pathlib.Path) -> None:
        self.arguments, self.shape = arguments, SHAPES[arguments.shape]
        self.left_out: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        pythons = interpreters(arguments.peer_python)
        settings = {
            "capacity": max(arguments.concurrency),
            "longest": arguments.prompt_tokens[1] + arguments.new_tokens[1],
            "llama_server": arguments.llama_server,
        }
        self.rows = [
            Row(
                name,
                ServerProcess(
                    name,
                    python=pythons.get(SERVERS[name].environment, sys.executable),
                    checkpoint=str(checkpoint),
                    converted=folder / f"{arguments.shape}-{SERVERS[name].model}",
                    threads=arguments.threads,
                    settings=settings,
                ),
            )
            for name in choose(arguments.peers, arguments.llama_server)
        ]

    @contextlib.contextmanager
    def _guard(self, row: Row):
        """Leave a program out from here on if it cannot go on."""
        try:
            yield
        except NotInstalledError as error:
            self.left_out[row.name] = f"not installed: {error}"
        except PeerFailedError as error:
            self.failed[row.name] = str(error)
            row.process.close()

    @property
    def alive(self) -> list[Row]:
        return [row for row in self.rows if row.name not in self.left_out and row.name not in self.failed]

    def workload(self, count: int, number: int) -> Workload:
        arguments = self.arguments
        seed = f"{arguments.seed} {count} {number}"
        return Workload(count, arguments.prompt_tokens, arguments.new_tokens, self.shape["vocab_size"], seed)

    def start(self) -> None:
        """Convert for all, then load and warm up as many as memory holds."""
        for row in self.rows:
            say(f"preparing {row.name}")
            with self._guard(row):
                row.process.convert()
        # float32 weights, a copy in another order, a cache, a runtime
        need = 3 * step_bytes(self.shape, (32, 32)) + (2 << 30)
        for row in self.alive:
            row.stays_loaded = available_bytes() > need
            if row.stays_loaded:
                self._load(row)

    def _load(self, row: Row) -> None:
        say(f"loading {row.name}")
        with self._guard(row):
            row.about = row.process.start()
            for count in self.arguments.concurrency:
                row.warm_up(self.workload(count, 0))

    def round(self, number: int) -> None:
        """Every program runs every number of requests once."""
        for count in self.arguments.concurrency:
            workload = self.workload(count, number)
            for row in rotated([row for row in self.alive if row.stays_loaded], number):
                with self._guard(row):
                    row.run(workload, number)
        for row in rotated([row for row in self.alive if not row.stays_loaded], number):
            self._load(row)
            for count in self.arguments.concurrency:
                if row in self.alive:
                    with self._guard(row):
                        row.run(self.workload(count, number), number)
            row.process.close()

    def result(self) -> dict[str, Any]:
        """Programs by name, each with its figures by number of requests."""
        reference = next((row for row in self.alive if row.name.startswith("gpt2rt")), None)
        programs = {}
        for row in self.alive:
            measured = {}
            for count in self.arguments.concurrency:
                measured[str(count)] = {
                    "output_tokens_per_s": summary(row.tokens_per_s[count]),
                    "ttft_ms": spread(row.first_ms.get(count)),
                    "itl_ms": spread(row.gaps_ms.get(count)),
                    "same_tokens": None if reference is None else agreement(row, reference, count),
                }
            programs[row.name] = {
                "family": SERVERS[row.name].family,
                "width": SERVERS[row.name].width,
                "requests": measured,
                "peak_megabytes": row.peak_megabytes,
                "load_s": row.about["load_s"],
                "versions": row.about["versions"],
                "stayed_loaded": row.stays_loaded,
            }
        return {"left_out": self.left_out, "failed": self.failed, "programs": programs}

    def close(self) -> None:
        for row in self.rows:
            row.process.close()


def spread(values: list[float] | None) -> dict[str, float] | None:
    """Mean and percentiles of samples; None if there are none."""
    if not values:
        return None
    found = {f"p{percent}": percentile(values, percent) for percent in (50, 90, 99)}
    return {"mean": sum(values) / len(values), **found, "samples": len(values)}


def agreement(row: Row, reference: Row, count: int) -> float:
    """The share of requests whose tokens are those that the reference made."""
    pairs = [
        (mine, theirs)
        for (size, number), rows in row.tokens.items()
        if size == count
        for mine, theirs in zip(rows, reference.tokens[size, number], strict=True)
    ]
    return sum(mine == theirs for mine, theirs in pairs) / len(pairs)


def measure_throughput(arguments: argparse.Namespace, folder: pathlib.Path, checkpoint: pathlib.Path) -> dict[str, Any]:
    benchmark = Throughput(arguments, folder, checkpoint)
    try:
        benchmark.start()
        for number in range(1, arguments.rounds + 1):
            say(f"round {number} of {arguments.rounds}, {len(benchmark.alive)} programs")
            benchmark.round(number)
        if not benchmark.alive:
            raise SystemExit(f"no program ran: {benchmark.left_out | benchmark.failed}")
        return benchmark.result()
    finally:
        benchmark.close()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the sections that are asked for."""
    result: dict[str, Any] = {
        "machine": describe(),
        "arguments": {name: value for name, value in vars(arguments).items() if name not in PLACES},
        "shape": SHAPES[arguments.shape],
    }
    with contextlib.ExitStack() as stack:
        folder = arguments.models or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / f"checkpoint-{arguments.shape}"
        if not checkpoint.is_dir():
            random_checkpoint(SHAPES[arguments.shape], str(checkpoint))
        if "throughput" in arguments.section:
            result["throughput"] = measure_throughput(arguments, folder, checkpoint)
        if "itl" in arguments.section:
            result["itl"] = measure_itl(arguments, str(checkpoint))
        if "loop" in arguments.section:
            result["loop"] = measure_loop(arguments, str(checkpoint))
    return result


def pair(text: str) -> tuple[int, int]:
    """``64-128`` as the least and the most."""
    low, _, high = text.partition("-")
    found = int(low), int(high or low)
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, or two like 64-128")
    return found


def slowdowns(text: str) -> list[float | None]:
    """``none,2`` as a list."""
    return [None if part == "none" else float(part) for part in text.split(",")]


def parse_arguments(texts: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", default="throughput", help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--peers", default="", help=f"names or patterns for throughput; there are {', '.join(SERVERS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=numbers, default=[16, 64], help="requests at once, such as 16,64")
    parser.add_argument("--prompt-tokens", type=pair, default=(64, 128), metavar="LEAST-MOST")
    parser.add_argument("--new-tokens", type=pair, default=(64, 128), metavar="LEAST-MOST")
    parser.add_argument("--formats", default="fp32,bf16,int8", help="of gpt2rt in the sections itl and loop")
    parser.add_argument("--streams", type=numbers, default=[1, 4, 16], help="of the section itl")
    parser.add_argument("--stream-tokens", type=int, default=300, help="that each of them makes alone, in a round")
    parser.add_argument("--long-prompts", type=int, default=4, help="that are computed beside them, in a round")
    parser.add_argument("--long-prompt", type=int, default=900, help="tokens of the prompts computed beside them")
    parser.add_argument("--prefill-slowdown", type=slowdowns, default=[None, 2.0], help="of the engine, such as none,2")
    parser.add_argument("--steps", type=int, default=400, help="of the section loop, for each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer-python", action="append", default=[], metavar="FAMILY=PYTHON")
    parser.add_argument("--llama-server", metavar="PATH", help="llama.cpp's server; without it, it is not measured")
    parser.add_argument("--models", type=pathlib.Path, help="keep checkpoints and converted models in this folder")
    parser.add_argument("--output-json", type=pathlib.Path)
    parser.add_argument("--output-png", type=pathlib.Path)
    parser.add_argument("--dry", action="store_true", help="toy sizes")
    arguments = parser.parse_args(texts)
    arguments.section = arguments.section.split(",")
    if unknown := set(arguments.section) - set(SECTIONS):
        parser.error(f"--section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    if arguments.rounds < 1 or not arguments.concurrency:
        parser.error("at least 1 round and one number of requests are needed")
    if arguments.dry:
        for name, value in DRY.items():
            setattr(arguments, name, value)
    return arguments


def main(texts: list[str] | None = None) -> None:
    arguments = parse_arguments(texts)
    result = measure(arguments)
    print(tables(result))
    if arguments.output_json:
        write_json(arguments.output_json, result)
    if arguments.output_png and "throughput" in result:
        plot(result, arguments.output_png)
    failed = result.get("throughput", {}).get("failed", {})
    if any(name.startswith("gpt2rt") for name in failed):
        raise SystemExit("gpt2rt itself failed, see above")


if __name__ == "__main__":
    main()
