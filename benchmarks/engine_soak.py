"""Does the engine hold under load for a long time?

    python benchmarks/engine_soak.py soak                       # 64 clients, a quarter of the blocks, 10 minutes
    python benchmarks/engine_soak.py overload --seconds 300     # twice the requests that it can serve
    python benchmarks/engine_soak.py drops                      # 1000 clients that leave, 200 engines one after another
    python benchmarks/engine_soak.py soak --dry                 # half a second, to see that it runs

soak: clients in a closed loop, each asks as soon as it is answered, some leave, some err. The pool has a quarter of the
blocks that the same clients use when there are enough. Every token is compared with the model's answer alone.
overload: requests come at random times, twice as many as are served in a closed loop; a request is answered or refused
with QueueFullError. drops: clients leave at once, then engines are made and ended.

All end with a JSON file and exit status 1 if something was wrong: a token lost, doubled, changed or misplaced, a block
or request left, memory that grew by 20 MB, other file descriptors or threads than before.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import pathlib
import random
import statistics
import sys
import time
from typing import Any

from common import RESULTS, describe, percentile, write_json
from engine_load import Books, Client, Mix, Question, closed_loop, make_questions

LOADS = ("soak", "overload", "drops")
MODEL = "gpt2rt/tiny-gpt2"
# seconds of each load, of the closed loop before it, and in a dry run
SECONDS = {"soak": 600.0, "overload": 300.0, "drops": 30.0}
PILOT_SECONDS, DRY_SECONDS = 10.0, 0.5
# bytes that memory may grow by once it is warm
GROWTH = 20 * 2**20
LEAST_PREEMPTIONS = 1000


class Watch:
    """Memory, file descriptors and threads of this process, each second."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []
        self._began = time.monotonic()

    def sample(self) -> dict[str, float]:
        """What it has now."""
        status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        found = {
            "seconds": round(time.monotonic() - self._began, 1),
            "rss": int(fields["VmRSS"].split()[0]) * 1024,
            "threads": int(fields["Threads"]),
            "fds": len(os.listdir("/proc/self/fd")),
        }
        self.samples.append(found)
        return found

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(1.0)

    def growth(self, warm_seconds: float) -> int:
        """Bytes from the first ten samples after so many seconds to the last ten, by their medians."""
        rss = [sample["rss"] for sample in self.samples if sample["seconds"] >= warm_seconds]
        if len(rss) < 2:
            return 0
        count = min(10, len(rss) // 2)
        return int(statistics.median(rss[-count:]) - statistics.median(rss[:count]))

    def wrong(self, warm_seconds: float) -> list[str]:
        """What grew or changed."""
        growth = self.growth(warm_seconds)
        wrong = [f"memory grew by {growth} bytes"] if growth > GROWTH else []
        warm = [sample for sample in self.samples if sample["seconds"] >= warm_seconds] or self.samples
        for name in ("threads", "fds"):
            if warm[0][name] != warm[-1][name]:
                wrong.append(f"{name}: {warm[0][name]} at first, {warm[-1][name]} at the end")
        return wrong


def new_engine(arguments: argparse.Namespace, **options: Any) -> Any:
    from gpt2rt.engine import AsyncLLM

    settings = {"max_num_queued_reqs": None, "num_threads": arguments.threads, **options}
    if arguments.quantization:
        settings["quantization"] = arguments.quantization
    return AsyncLLM(arguments.model, **settings)


def ask_beforehand(arguments: argparse.Namespace, mix: Mix) -> list[Question]:
    """Questions, and the model's answers alone."""
    from gpt2rt.engine import LLM

    loading = {"quantization": arguments.quantization} if arguments.quantization else {}
    with LLM(arguments.model, num_blocks=512, num_threads=arguments.threads, **loading) as llm:
        return make_questions(llm, arguments.questions, mix)


async def pilot(arguments: argparse.Namespace, questions: list[Question], mix: Mix) -> dict[str, Any]:
    """The same clients with all the blocks that they can use: the most that were in use, and requests a second."""
    engine = new_engine(arguments)
    books = Books(engine)
    seconds = DRY_SECONDS if arguments.dry else PILOT_SECONDS
    taken = await closed_loop(books, questions, mix, streams=arguments.streams, seconds=seconds, seed=1)
    engine.shutdown()
    rate = len(books.generated) / taken
    return {"blocks": books.most_blocks, "requests_per_second": rate, "wrong": books.wrong()}


async def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    # short questions with long answers: what is let in grows, until it does not fit any more
    mix = Mix(prompt=60, answer=400)
    questions = ask_beforehand(arguments, mix)
    before = await pilot(arguments, questions, mix)
    gc.collect()
    # the largest request must fit alone
    least = -(-(mix.prompt + mix.answer) // 16)
    num_blocks = max(least, round(0.25 * before["blocks"]))
    engine = new_engine(arguments, num_blocks=num_blocks)
    books, watch = Books(engine), Watch()
    watching = asyncio.ensure_future(watch.run())
    taken = await closed_loop(books, questions, mix, streams=arguments.streams, seconds=arguments.seconds, seed=2)
    watching.cancel()
    gc.collect()
    watch.sample()
    wrong = before["wrong"] + books.wrong() + watch.wrong(min(120.0, arguments.seconds / 5))
    if not arguments.dry and books.observed["preemptions"] < LEAST_PREEMPTIONS:
        wrong.append(f"only {books.observed['preemptions']} preemptions")
    stats = engine.stats()
    engine.shutdown()
    return {
        "wrong": wrong,
        "seconds": taken,
        "peak_blocks_with_enough": before["blocks"],
        "num_blocks": num_blocks,
        "streams": arguments.streams,
        "requests": dict(books.counts),
        "tokens": stats.generation_tokens,
        "tokens_delivered": sum(books.delivered.values()),
        "tokens_discarded": books.discarded,
        "preemptions": stats.num_preemptions,
        "prefix_cache_hits": stats.prefix_cache_hits,
        "steps": stats.num_steps,
        "mistakes": len(books.mistakes),
        "rss_growth": watch.growth(min(120.0, arguments.seconds / 5)),
        "first": watch.samples[0],
        "last": watch.samples[-1],
        "samples": watch.samples[:: max(1, len(watch.samples) // 60)],
    }


async def overload(arguments: argparse.Namespace) -> dict[str, Any]:
    from gpt2rt.errors import QueueFullError

    mix = Mix(leave=0.0, invalid=0.0)
    questions = ask_beforehand(arguments, mix)
    before = await pilot(arguments, questions, mix)
    engine = new_engine(arguments, max_num_queued_reqs=arguments.queued)
    books = Books(engine)
    alone = Client(books, questions, mix, 9000)
    for _ in range(5 if arguments.dry else 100):
        await alone.ask()
    unloaded, books.first_token_seconds = books.first_token_seconds, []
    books.counts.clear()
    refused = 0

    async def arrive(number: int) -> None:
        nonlocal refused
        try:
            await Client(books, questions, mix, 10_000 + number).ask()
        except QueueFullError as error:
            if error.retry_after <= 0:
                books.mistakes.append(f"refused with retry_after={error.retry_after}")
            refused += 1

    chance = random.Random(3)
    began = time.perf_counter()
    tasks: list[asyncio.Task[None]] = []
    due = began
    while due - began < arguments.seconds:
        due += chance.expovariate(2.0 * before["requests_per_second"])
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(arrive(len(tasks))))
    await asyncio.gather(*tasks)
    await books.settle()
    wrong = before["wrong"] + books.wrong()
    if not arguments.dry and not refused:
        wrong.append("nothing was refused: this was no overload")
    engine.shutdown()
    loaded = books.first_token_seconds
    return {
        "wrong": wrong,
        "seconds": time.perf_counter() - began,
        "offered_per_second": 2.0 * before["requests_per_second"],
        "arrived": len(tasks),
        "answered": books.counts["finished"],
        "refused": refused,
        "queued": arguments.queued,
        "ttft_ms": {
            name: {"p50": 1e3 * percentile(values, 50), "p99": 1e3 * percentile(values, 99)}
            for name, values in (("unloaded", unloaded), ("loaded", loaded))
        },
    }


async def drops(arguments: argparse.Namespace) -> dict[str, Any]:
    mix = Mix(leave=1.0, invalid=0.0)
    questions = ask_beforehand(arguments, mix)
    clients, engines = (20, 3) if arguments.dry else (1000, 200)
    engine = new_engine(arguments)
    books, watch = Books(engine), Watch()
    pause = 0.0 if arguments.dry else arguments.seconds / clients
    tasks = []
    for number in range(clients):
        tasks.append(asyncio.ensure_future(Client(books, questions, mix, number).ask()))
        await asyncio.sleep(pause)
    await asyncio.gather(*tasks)
    await books.settle()
    wrong = books.wrong()
    model, tokenizer = engine._served.model, engine.tokenizer
    engine.shutdown()
    from gpt2rt.engine import AsyncLLM, SamplingParams

    for number in range(engines):
        fresh = AsyncLLM(model, tokenizer=tokenizer, num_blocks=64, num_threads=arguments.threads)
        stream = fresh.generate([1 + number % 100], SamplingParams(max_tokens=100))
        await anext(stream)
        # half of them end with a request under way
        if number % 2:
            await stream.aclose()
        fresh.shutdown()
        ends = [output.outputs[0].finish_reason async for output in stream]
        if not number % 2 and ends[-1:] != ["abort"] and ends[-1:] != ["length"] and ends[-1:] != ["stop"]:
            wrong.append(f"engine {number}: a stream ended with {ends[-1:]}")
        del fresh, stream
        if number == engines // 5:
            gc.collect()
            watch = Watch()
            watch.sample()
    gc.collect()
    watch.sample()
    wrong += watch.wrong(0.0)
    return {
        "wrong": wrong,
        "clients": clients,
        "engines": engines,
        "requests": dict(books.counts),
        "tokens_discarded": books.discarded,
        "rss_growth": watch.growth(0.0),
        "first": watch.samples[0],
        "last": watch.samples[-1],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load", choices=LOADS)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--quantization", help="int8, int4, nf4")
    parser.add_argument("--seconds", type=float, help="for how long (default: 600, 300 and 30)")
    parser.add_argument("--streams", type=int, default=64, help="clients in a closed loop (default: 64)")
    parser.add_argument("--queued", type=int, default=32, help="overload: requests that may wait (default: 32)")
    parser.add_argument("--questions", type=int, default=128, help="different requests (default: 128)")
    parser.add_argument("--threads", type=int, default=0, help="of the executor (default: its own choice)")
    parser.add_argument("--dry", action="store_true", help="half a second, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file (default: results/engine-LOAD.json)")
    arguments = parser.parse_args(argv)
    if arguments.seconds is None:
        arguments.seconds = SECONDS[arguments.load]
    if arguments.dry:
        arguments.seconds, arguments.questions, arguments.streams = DRY_SECONDS, 8, min(8, arguments.streams)
    run = {"soak": soak, "overload": overload, "drops": drops}[arguments.load]
    result = {"load": arguments.load, "dry": arguments.dry, "model": arguments.model, **asyncio.run(run(arguments))}
    result["quantization"] = arguments.quantization
    result["machine"] = describe()
    out = arguments.out or RESULTS / f"engine-{arguments.load}{'-dry' if arguments.dry else ''}.json"
    write_json(out, result)
    for name, value in result.items():
        if name not in ("machine", "samples"):
            print(f"{name}: {value}")
    print(out)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
