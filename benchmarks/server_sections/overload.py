"""l3: more requests than the server can serve."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import pathlib
import random
import sys
import time
from collections import Counter
from typing import Any

from common import percentile

from .clients import Reply
from .process import ServeProcess, Watch
from .shared import (
    Question,
    Verdicts,
    ask,
    check_idle,
    check_resources,
    closed_loop,
    end,
    fill_cache,
    milliseconds,
    options,
    questions,
)

HEALTH_PROBE = pathlib.Path(__file__).resolve().parent / "health_probe.py"
HEALTH_PAUSE_S = 0.1
MOST_TTFT_RATIO = 5.0
MOST_HEALTH_S = 0.100


async def run(arguments: argparse.Namespace, verdicts: Verdicts) -> dict[str, Any]:
    asked = questions(3, 256, ids=False)
    queue = str(arguments.max_num_queued_reqs)
    limits = ["--max-num-seqs", str(arguments.max_num_seqs), "--max-num-queued-reqs", queue]
    if arguments.prefill_slowdown is not None:
        limits += ["--prefill-slowdown", str(arguments.prefill_slowdown)]
    async with ServeProcess(options(arguments, *limits)) as server:
        faults: list[str] = []
        chance = random.Random(1)

        async def whole(_: int = 0) -> Reply:
            question = chance.choice(asked)
            reply = await ask(server, question)
            if fault := reply.fault(question.tokens):
                faults.append(fault)
            return reply

        await fill_cache(server)
        # the first steps of a process are slow
        await closed_loop(arguments.max_num_seqs, arguments.pilot_seconds / 4, whole)
        unloaded = [(await whole()).ttft for _ in range(arguments.alone)]
        served = Counter[str]()

        async def count(number: int) -> None:
            await whole(number)
            served["requests"] += 1

        clients = arguments.max_num_seqs + arguments.max_num_queued_reqs
        taken = await closed_loop(clients, arguments.pilot_seconds, count)
        capacity = served["requests"] / taken
        verdicts.equal("faults before the overload", faults[:20], [])
        before = await server.idle()
        resources = await server.settled_resources()
        rate = arguments.factor * capacity
        async with Watch(server) as watch:
            probe = await asyncio.create_subprocess_exec(
                *(sys.executable, str(HEALTH_PROBE), server.host, str(server.port)),
                *(str(arguments.seconds), str(HEALTH_PAUSE_S)),
                stdout=asyncio.subprocess.PIPE,
                limit=1 << 24,
            )
            arrivals = await open_loop(server, asked, rate, arguments.seconds)
            probed, _ = await probe.communicate()
        after = await server.idle()
        settled = await server.settled_resources()
        health = [json.loads(line) for line in probed.splitlines()]
        found = judge_overload(verdicts, arrivals, unloaded, health)
        check_idle(verdicts, after)
        rejections = {name: after[name] - before[name] for name in after if name.startswith("admission_rejections")}
        verdicts.equal("refusals in /metrics", rejections["admission_rejections_total"], found["refused"])
        used = check_resources(verdicts, resources, settled, watch.growth())
        await end(server, verdicts)
    lags = [arrival.lag for arrival in arrivals]
    return {
        "server": server.facts,
        "capacity_per_second": capacity,
        "capacity_clients": clients,
        "factor": arguments.factor,
        "offered_per_second": len(arrivals) / arguments.seconds,
        "rejections": rejections,
        # what the client itself was late by; of no use if it is as large as what it measures
        "client_lag_ms": milliseconds(lags),
        "resources": used,
        **found,
    }


@dataclasses.dataclass
class Arrival:
    """A request of the open loop: what was asked, what came, and by how many seconds it was sent too late."""

    question: Question
    lag: float
    reply: Reply


async def open_loop(server: ServeProcess, asked: list[Question], rate: float, seconds: float) -> list[Arrival]:
    """Requests at random times, so many a second in the mean, each sent whatever became of those before."""
    chance = random.Random(2)

    async def arrive(question: Question, lag: float) -> Arrival:
        return Arrival(question, lag, await ask(server, question))

    tasks = []
    began = time.perf_counter()
    due = began + chance.expovariate(rate)
    while due - began < seconds:
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        elif len(tasks) % 20 == 0:
            # late: those that were sent have to go on, too
            await asyncio.sleep(0)
        tasks.append(asyncio.create_task(arrive(chance.choice(asked), time.perf_counter() - due)))
        due += chance.expovariate(rate)
    return await asyncio.gather(*tasks)


def judge_overload(
    verdicts: Verdicts, arrivals: list[Arrival], unloaded: list[float], health: list[tuple[int, float]]
) -> dict[str, Any]:
    """Counts and times of an overload; its targets go to ``verdicts``."""
    statuses, other, ttft = Counter[int](), [], []
    for arrival in arrivals:
        reply = arrival.reply
        statuses[reply.status] += 1
        if reply.status == 503 and reply.complete:
            again = reply.headers.get("retry-after", "")
            if not (again.isdigit() and int(again) > 0):
                other.append(f"503 with Retry-After {again!r}")
        elif fault := reply.fault(arrival.question.tokens):
            other.append(fault)
        else:
            ttft.append(reply.ttft)
    verdicts.equal("neither whole nor 503 with Retry-After", other[:20], [])
    # else it was no overload
    verdicts.some("refused", statuses[503])
    loaded_ms, unloaded_ms = milliseconds(ttft), milliseconds(unloaded)
    ratio = percentile(ttft, 99) / percentile(unloaded, 99) if ttft and unloaded else None
    verdicts.at_most("p99 TTFT, loaded / unloaded", ratio, MOST_TTFT_RATIO)
    verdicts.equal("other answers than 200 of /health", [status for status, _ in health if status != 200][:20], [])
    seconds = [seconds for _, seconds in health]
    verdicts.at_most("/health p99, s", percentile(seconds, 99) if seconds else None, MOST_HEALTH_S)
    return {
        "arrived": len(arrivals),
        "admitted": statuses[200],
        "refused": statuses[503],
        "statuses": dict(statuses),
        "not_as_expected": len(other),
        "ttft_ms": {"unloaded": unloaded_ms, "loaded": loaded_ms, "p99_ratio": ratio},
        "refusal_ms": milliseconds([a.reply.seconds for a in arrivals if a.reply.status == 503]),
        "health_ms": milliseconds(seconds),
    }
