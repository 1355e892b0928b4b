"""l4: clients that leave, and servers that end."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from typing import Any

from .clients import MOMENTS, Leave, Reply
from .process import ServeProcess, Watch, is_free, unused_port
from .shared import (
    ANSWER,
    Verdicts,
    ask,
    check_books,
    check_idle,
    check_resources,
    closed_loop,
    counts,
    end,
    fill_cache,
    milliseconds,
    options,
    questions,
    quiet,
)

# of the server that clients leave: enough for all who are there at a time, and soon all in use
NUM_BLOCKS = 512


async def run(arguments: argparse.Namespace, verdicts: Verdicts) -> dict[str, Any]:
    return {"leavers": await leavers(arguments, verdicts), "restarts": await cycles(arguments, verdicts)}


async def leavers(arguments: argparse.Namespace, verdicts: Verdicts) -> dict[str, Any]:
    asked = questions(4, 128, ids=True)
    chance = random.Random(4)
    moments, faults, broken, whole = Counter[str](), [], [], Counter[str]()

    async def go(server: ServeProcess, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        leave, question = Leave.drawn(chance, ANSWER), chance.choice(asked)
        moments[leave.moment] += 1
        reply = await ask(server, question, leave)
        if reply.error or reply.status not in (0, 200):
            broken.append(f"{leave.moment}: status {reply.status}, {reply.error or reply.body[:200]!r}")

    async def crowd(server: ServeProcess, count: int, seconds: float) -> None:
        began = time.perf_counter()
        await asyncio.gather(*(go(server, began + seconds * chance.random()) for _ in range(count)))

    async with ServeProcess(options(arguments, "--num-blocks", str(NUM_BLOCKS))) as server:

        async def stay(_: int) -> None:
            question = chance.choice(asked)
            fault = (await ask(server, question)).fault(question.tokens)
            whole["requests"] += 1
            if fault:
                faults.append(fault)

        await fill_cache(server)
        # as much beforehand as warms everything that a leaving client touches
        await crowd(server, max(len(MOMENTS), arguments.drops // 5), arguments.drop_seconds / 5)
        await server.idle()
        before = await server.settled_resources()
        moments.clear()
        async with Watch(server) as watch:
            await asyncio.gather(
                crowd(server, arguments.drops, arguments.drop_seconds), closed_loop(2, arguments.drop_seconds, stay)
            )
        after = await quiet(server)
        settled = await server.settled_resources()
        verdicts.equal("faults of those who stayed", faults[:20], [])
        verdicts.equal("answers that broke off before the client left", broken[:20], [])
        check_idle(verdicts, after)
        check_books(verdicts, "", counts(after), None)
        verdicts.some("aborted", counts(after)["aborted"])
        used = check_resources(verdicts, before, settled, watch.growth())
        await end(server, verdicts)
    return {
        "left": sum(moments.values()),
        "seconds": arguments.drop_seconds,
        "moments": dict(moments),
        "stayed": whole["requests"],
        "ended": {name: value for name, value in after.items() if name.startswith("request_success_total")},
        "resources": used,
    }


async def cycles(arguments: argparse.Namespace, verdicts: Verdicts) -> dict[str, Any]:
    """Servers one after the other on one port, each ended while streams run."""
    # long enough to be under way when the signal comes
    asked = questions(5, 8, ids=True, least=250, most=400)
    port = unused_port()
    faults: list[str] = []
    took, drained, ran = [], [], 0
    for cycle in range(arguments.cycles):
        began = time.perf_counter()
        async with ServeProcess(options(arguments), port) as server:
            mine = [asked[(cycle + place) % len(asked)] for place in range(1 + cycle % 3)]
            streams = [asyncio.create_task(ask(server, question)) for question in mine]
            # all of them run
            while (await server.metrics())["num_requests_running"] < len(mine) and not all(s.done() for s in streams):
                await asyncio.sleep(0.002)
            ran += sum(not stream.done() for stream in streams)
            signalled = time.perf_counter()
            server.terminate()
            replies = await asyncio.gather(*streams)
            code = await server.wait()
            drained.append(time.perf_counter() - signalled)
            for question, reply in zip(mine, replies, strict=True):
                if fault := reply.fault(question.tokens) or ends_otherwise(reply):
                    faults.append(f"cycle {cycle}: {fault}")
            if code != 0 or "Traceback" in server.log:
                faults.append(f"cycle {cycle}: exit code {code}: {server.log[-2000:]}")
            if server.leaves_processes():
                faults.append(f"cycle {cycle}: a process is left")
            if not is_free(port):
                faults.append(f"cycle {cycle}: port {port} is in use")
        took.append(time.perf_counter() - began)
    verdicts.equal("faults of cycles", faults[:20], [])
    verdicts.some("streams that ran when the signal came", ran)
    return {
        "cycles": arguments.cycles,
        "port": port,
        "streams_running_at_signal": ran,
        "cycle_ms": milliseconds(took),
        "signal_to_exit_ms": milliseconds(drained),
    }


def ends_otherwise(reply: Reply) -> str:
    """Ends of choices other than "length", inside the time that a server has to drain."""
    reasons = [choice["finish_reason"] for value in reply.values() for choice in value["choices"]]
    ends = [reason for reason in reasons if reason is not None]
    return "" if ends == ["length"] else f"it ended with {ends}"
