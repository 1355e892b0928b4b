"""How fast does a GPT-2 run on this CPU, beside every other program for that, and how far from what memory allows?

    python benchmarks/cpu_decode.py                      # GPT-2 124M, all peers that are installed, 5 rounds
    python benchmarks/cpu_decode.py --shape tiny --rounds 1 --new-tokens 8
    python benchmarks/cpu_decode.py --peers 'gpt2rt-*,ort-int4' --peer-python onnx_genai=/path/to/venv/bin/python
    python benchmarks/cpu_decode.py --profile            # where the time of gpt2rt's own steps goes

Every peer is a process of its own which loads the same random checkpoint, in a format of its own where it has one
(cpu_peers/ holds a file for each family: how it is installed, converted and run). Peers whose packages are absent are
named and left out; their dependencies exclude each other, so a family may be given another interpreter. Measured are
decoding, batch 1 and 8, as the time between tokens, and prefill, as the time from a prompt to its first token, logits
of the last position. In each round every peer runs once, in an order that rotates, and none computes while another is
measured. Peers stay loaded while memory lasts; those for which it does not are started anew each round.

Reported: median and 10th percentile; speed as a ratio to the fastest other program whose weights are as wide; the share
of the floor, which is the bytes of weights that this peer's step reads over the read bandwidth measured in the same
run; peak resident memory. cpu_report.py prints the tables of a result again, or draws it.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import itertools
import os
import pathlib
import sys
import tempfile
import time

from bandwidth import read_bandwidth
from common import describe, summary, write_json
from cpu_peers import PEERS, NotInstalledError, PeerFailedError, PeerProcess
from cpu_report import details, overview, plot
from shapes import SHAPES, prefill_operations, random_checkpoint, step_bytes

# threads of some runtimes spin this long after their last work; so long nobody else is measured
SETTLE_S = 0.25


class Scenario:
    """What a peer is asked for: rows of a prompt, new tokens, and which of the times count."""

    def __init__(self, name: str, num_rows: int, prompt_tokens: int, new_tokens: int, vocab_size: int) -> None:
        self.name, self.prompt_tokens, self.new_tokens = name, prompt_tokens, new_tokens
        self.is_decode = name.startswith("decode")
        self.prompts = [
            [(7919 * i + 13 + 31 * row) % vocab_size for i in range(prompt_tokens)] for row in range(num_rows)
        ]

    def samples(self, times_ms: list[float]) -> list[float]:
        """Milliseconds between tokens; or, for prefill, to the first."""
        if not self.is_decode:
            return times_ms[:1]
        return [later - earlier for earlier, later in itertools.pairwise(times_ms)]


def scenarios(arguments: argparse.Namespace, shape: dict) -> list[Scenario]:
    vocab_size, room = shape["vocab_size"], shape["n_positions"]
    decodes = [
        Scenario(f"decode-{rows}", rows, arguments.prompt_tokens, arguments.new_tokens, vocab_size)
        for rows in arguments.batch_sizes
    ]
    lengths = [length for length in arguments.prefill if length < room]
    if arguments.prefill and not lengths:
        # a shape with few positions has a prefill too
        lengths = [room // 2]
    return decodes + [Scenario(f"prefill-{length}", 1, length, 1, vocab_size) for length in lengths]


class Row:
    """One peer and what was measured of it."""

    def __init__(self, name: str, process: PeerProcess) -> None:
        self.name, self.process = name, process
        self.stays_loaded = True
        self.about: dict = {}
        self.samples: dict[str, list[float]] = {}
        self.first_token_ms: dict[str, list[float]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.peak_megabytes = 0.0

    def run(self, scenario: Scenario, *, keep: bool) -> None:
        time.sleep(SETTLE_S)
        answer = self.process.ask(scenario.prompts, scenario.new_tokens)
        self.peak_megabytes = max(self.peak_megabytes, answer["peak_megabytes"])
        self.tokens[scenario.name] = answer["tokens"][0]
        if keep:
            self.samples.setdefault(scenario.name, []).extend(scenario.samples(answer["times_ms"]))
            self.first_token_ms.setdefault(scenario.name, []).append(answer["times_ms"][0])


def choose(patterns: str) -> list[str]:
    """Names of peers that match one of the comma-separated patterns; without any, all that start quickly."""
    if not patterns:
        return [name for name, peer in PEERS.items() if not peer.slow_start]
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not fnmatch.filter(PEERS, pattern):
            raise SystemExit(f"no peer is named {pattern!r}; there are {', '.join(PEERS)}")
    return [name for name in PEERS if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]


def interpreters(settings: list[str]) -> dict[str, str]:
    """``family=python`` settings as a dict; families may be named without ``_peer``."""
    families = {peer.family.removesuffix("_peer"): peer.family for peer in PEERS.values()}
    chosen = {}
    for setting in settings:
        family, _, python = setting.partition("=")
        family = family.removesuffix("_peer")
        if family not in families or not python:
            raise SystemExit(
                f"--peer-python {setting!r}: expected FAMILY=PYTHON with a family of {', '.join(families)}"
            )
        chosen[families[family]] = python
    return chosen


def available_bytes() -> int:
    for line in pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


class Benchmark:
    """The peers of one run; ``left_out`` says why the others are not among them."""

    def __init__(self, arguments: argparse.Namespace, folder: pathlib.Path) -> None:
        self.arguments, self.shape = arguments, SHAPES[arguments.shape]
        self.scenarios = scenarios(arguments, self.shape)
        self.left_out: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.rows: list[Row] = []
        self.bandwidth: dict[int, list[float]] = {}
        checkpoint = folder / f"checkpoint-{arguments.shape}"
        if not checkpoint.is_dir():
            random_checkpoint(self.shape, str(checkpoint))
        pythons = interpreters(arguments.peer_python)
        for name in choose(arguments.peers):
            process = PeerProcess(
                name,
                python=pythons.get(PEERS[name].family, sys.executable),
                checkpoint=str(checkpoint),
                converted=folder / f"{arguments.shape}-{name}",
                threads=arguments.threads,
            )
            self.rows.append(Row(name, process))

    @contextlib.contextmanager
    def _guard(self, row: Row):
        """Leave a peer out from here on if it cannot go on."""
        try:
            yield
        except NotInstalledError as error:
            self.left_out[row.name] = f"not installed: {error}"
        except PeerFailedError as error:
            self.failed[row.name] = str(error)

    @property
    def alive(self) -> list[Row]:
        return [row for row in self.rows if row.name not in self.left_out and row.name not in self.failed]

    def start(self) -> None:
        """Convert for all, then load as many as memory holds."""
        for row in self.rows:
            say(f"preparing {row.name}")
            with self._guard(row):
                row.process.convert()
        # float32 weights, a copy in another order, a cache, a runtime
        need = 3 * step_bytes(self.shape, (32, 32)) + (1 << 30)
        for row in self.alive:
            row.stays_loaded = available_bytes() > need
            if row.stays_loaded:
                say(f"loading {row.name}")
                with self._guard(row):
                    row.about = row.process.start()

    def round(self, number: int) -> None:
        """Every peer runs every scenario once; round 0 warms up."""
        for scenario in self.scenarios:
            for row in rotated([row for row in self.alive if row.stays_loaded], number):
                with self._guard(row):
                    row.run(scenario, keep=number > 0)
        for row in rotated([row for row in self.alive if not row.stays_loaded], number):
            with self._guard(row):
                row.about = row.process.start()
                for keep in (False, number > 0):
                    # the first time warms up
                    for scenario in self.scenarios:
                        row.run(scenario, keep=keep)
                row.process.close()
        for size in {step_bytes(self.shape, PEERS[row.name].bits) for row in self.alive}:
            self.bandwidth.setdefault(size, []).extend(read_bandwidth(size, self.arguments.threads))

    def result(self) -> dict:
        content = {
            "machine": describe(),
            "arguments": {
                key: str(value) if isinstance(value, pathlib.Path) else value
                for key, value in vars(self.arguments).items()
            },
            "shape": self.shape,
            "left_out": self.left_out,
            "failed": self.failed,
            "peers": {},
        }
        for row in self.alive:
            peer = PEERS[row.name]
            size = step_bytes(self.shape, peer.bits)
            bandwidth = summary(self.bandwidth[size])
            measured = {}
            for scenario in self.scenarios:
                times = summary(row.samples[scenario.name])
                entry = {"ms": times, "tokens": row.tokens[scenario.name]}
                if scenario.is_decode:
                    entry["tokens_per_s"] = len(scenario.prompts) * 1e3 / times["median"]
                    entry["first_token_ms"] = summary(row.first_token_ms[scenario.name])
                else:
                    operations = prefill_operations(self.shape, scenario.prompt_tokens)
                    entry["gflop_per_s"] = operations / times["median"] / 1e6
                measured[scenario.name] = entry
            content["peers"][row.name] = {
                "family": peer.family,
                "width": peer.width,
                "bits": list(peer.bits),
                "step_megabytes": size / 1e6,
                "bandwidth_gb_per_s": {key: bandwidth[key] / 1e9 for key in ("median", "p90")},
                # the bandwidth that the machine gave in most readings, not its best
                "floor_ms": size / bandwidth["median"] * 1e3,
                "scenarios": measured,
                "peak_megabytes": row.peak_megabytes,
                "load_s": row.about["load_s"],
                "versions": row.about["versions"],
                "stayed_loaded": row.stays_loaded,
            }
        return content

    def close(self) -> None:
        for row in self.rows:
            row.process.close()


def rotated(rows: list[Row], by: int) -> list[Row]:
    turn = by % max(len(rows), 1)
    return rows[turn:] + rows[:turn]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(arguments: argparse.Namespace) -> dict:
    with contextlib.ExitStack() as stack:
        folder = arguments.models or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        benchmark = Benchmark(arguments, folder)
        stack.callback(benchmark.close)
        benchmark.start()
        for number in range(arguments.rounds + 1):
            say(f"round {number} of {arguments.rounds}, {len(benchmark.alive)} peers" + " (warm-up)" * (number == 0))
            benchmark.round(number)
        if not benchmark.alive:
            raise SystemExit(f"no peer ran: {benchmark.left_out | benchmark.failed}")
        return benchmark.result()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--peers", default="", help=f"comma-separated names or patterns; there are {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of a prompt before decoding")
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--batch-sizes", type=numbers, default=[1, 8], help="of decoding, such as 1,8")
    parser.add_argument("--prefill", type=numbers, default=[512, 1000], help="lengths of prompts; '' for none")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer-python", action="append", default=[], metavar="FAMILY=PYTHON")
    parser.add_argument("--models", type=pathlib.Path, help="keep checkpoints and converted models in this folder")
    parser.add_argument("--output-json", type=pathlib.Path)
    parser.add_argument("--output-png", type=pathlib.Path)
    parser.add_argument("--profile", action="store_true", help="only gpt2rt: time and bytes of each node of a step")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.new_tokens < 3:
        parser.error("at least 1 round and 3 new tokens are needed: the first two give one time between tokens")
    if arguments.profile:
        from cpu_profile import profile_formats

        profiles = profile_formats(arguments.shape, choose(arguments.peers or "gpt2rt-*"), arguments)
        if arguments.output_json:
            write_json(arguments.output_json, {"machine": describe(), "shape": arguments.shape, "profiles": profiles})
        return
    result = measure(arguments)
    print(overview(result), details(result), sep="\n\n")
    if arguments.output_json:
        write_json(arguments.output_json, result)
    if arguments.output_png:
        plot(result, arguments.output_png)
    if any(name.startswith("gpt2rt") for name in result["failed"]):
        raise SystemExit("gpt2rt itself failed, see above")


if __name__ == "__main__":
    main()
