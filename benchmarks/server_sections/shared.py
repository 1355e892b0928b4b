"""What the sections share: targets and verdicts, what is asked, and what a server must look like afterwards."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from common import percentile

from .clients import Leave, Reply, call
from .process import ServeProcess

PATH = "/v1/completions"
# of a prompt and of an answer, at most; tokens
PROMPT, ANSWER = 32, 64
# bytes that memory may grow by once it is warm
MOST_GROWTH = 20 * 2**20


class Verdicts:
    """What was found for each target, and whether that is good enough.

    Args:
        dry: targets of time and memory decide nothing.
    """

    def __init__(self, dry: bool) -> None:
        self._dry = dry
        self.targets: dict[str, dict[str, Any]] = {}

    def at_most(self, name: str, value: float | None, most: float) -> None:
        """A time, a ratio or memory; None: there was nothing to measure."""
        self.targets[name] = {
            "value": value,
            "target": f"<= {most:g}",
            "pass": value is not None and value <= most,
            "decides": not self._dry,
        }

    def equal(self, name: str, value: Any, wanted: Any) -> None:
        """A count, exactly."""
        self.targets[name] = {"value": value, "target": f"== {wanted!r}", "pass": value == wanted, "decides": True}

    def some(self, name: str, value: int) -> None:
        """A count of what must have happened for the others to mean anything; a dry run may be too short for it."""
        self.targets[name] = {"value": value, "target": ">= 1", "pass": value >= 1, "decides": not self._dry}

    @property
    def failed(self) -> list[str]:
        """Names of targets that were missed."""
        return [name for name, target in self.targets.items() if target["decides"] and not target["pass"]]


@dataclasses.dataclass
class Question:
    """A body, and how many tokens its answer has in all."""

    body: bytes
    tokens: int
    n: int = 1


def questions(seed: int, count: int, *, ids: bool, least: int = 1, most: int = ANSWER, n: int = 1) -> list[Question]:
    """Streams of random prompts whose answers have exactly as many tokens as asked for.

    Args:
        ids: answers show the ids of their tokens.
        least, most: tokens of a choice.
        n: choices of one in five.
    """
    chance = random.Random(seed)
    found = []
    for number in range(count):
        tokens = chance.randint(least, most)
        choices = n if number % 5 == 0 else 1
        body = {
            "prompt": [chance.randrange(1000) for _ in range(chance.randint(1, PROMPT))],
            "max_tokens": tokens,
            "ignore_eos": True,
            "seed": number,
            "n": choices,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": ids,
        }
        found.append(Question(json.dumps(body).encode(), tokens * choices, choices))
    return found


async def ask(server: ServeProcess, question: Question, leave: Leave | None = None) -> Reply:
    return await call(server.host, server.port, "POST", PATH, question.body, leave=leave)


async def fill_cache(server: ServeProcess) -> None:
    """Prompts until every block of the KV cache was written once: from then on its memory does not grow any more."""
    chance = random.Random(8)
    length = server.facts["max_model_len"] // 2
    tokens = server.facts["num_blocks"] * server.facts["block_size"]
    # what has ended stays in the prefix cache, so each takes blocks that no other has
    for _ in range(-(-tokens // length) + 1):
        body = {"prompt": [chance.randrange(1000) for _ in range(length)], "max_tokens": 1}
        reply = await call(server.host, server.port, "POST", PATH, body)
        if fault := reply.fault(1):
            raise RuntimeError(f"the server cannot be warmed up: {fault}")


async def closed_loop(clients: int, seconds: float, work: Callable[[int], Awaitable[None]]) -> float:
    """Clients each of which begins anew when it is done; the seconds until the last was."""
    began = time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() - began < seconds:
            await work(number)

    await asyncio.gather(*map(client, range(clients)))
    return time.perf_counter() - began


def check_idle(verdicts: Verdicts, metrics: dict[str, float]) -> None:
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        verdicts.equal(f"{name} afterwards", metrics[name], 0.0)


async def end(server: ServeProcess, verdicts: Verdicts) -> None:
    server.terminate()
    verdicts.equal("exit code", await server.wait(), 0)
    verdicts.equal("tracebacks in the log", server.log.count("Traceback"), 0)


def check_resources(verdicts: Verdicts, before: dict[str, int], after: dict[str, int], growth: int) -> dict[str, Any]:
    verdicts.equal("file descriptors afterwards", after["fds"], before["fds"])
    verdicts.at_most("threads more than before", after["threads"] - before["threads"], 0)
    verdicts.at_most("growth of memory, bytes", growth, MOST_GROWTH)
    return {"before": before, "after": after, "rss_growth": growth}


def options(arguments: argparse.Namespace, *more: str) -> list[str]:
    return [arguments.model, "--num-threads", str(arguments.threads), *more]


def milliseconds(seconds: list[float]) -> dict[str, float | int | None]:
    """Median, 99th percentile, most and number."""
    named: dict[str, float | int | None] = {"samples": len(seconds)}
    for name, percent in (("p50", 50), ("p99", 99), ("max", 100)):
        named[name] = 1e3 * percentile(seconds, percent) if seconds else None
    return named


def counts(metrics: dict[str, float]) -> dict[str, int]:
    """New tokens as the server counts them in three places, and requests by their ends."""
    timed = metrics["time_to_first_token_seconds_count"] + metrics["inter_token_latency_seconds_count"]
    return {
        "by_steps": int(metrics["generation_tokens_total"]),
        "by_requests": int(metrics["request_generation_tokens_sum"]),
        "timed": int(timed),
        "ended": int(metrics["request_success_total"]),
        "aborted": int(metrics["request_success_total/abort"]),
        "failed": int(metrics["request_success_total/error"]),
    }


def less(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


def check_books(verdicts: Verdicts, phase: str, made: dict[str, int], delivered: int | None, untimed: int = 0) -> None:
    """The server's own counts agree, and with what was delivered, if nothing was discarded.

    Args:
        phase: put before the targets' names.
        made: of :func:`counts`.
        delivered: tokens; None: clients left.
        untimed: further choices of requests, whose first tokens are not timed.
    """
    verdicts.equal(f"{phase}tokens by requests - by steps", made["by_requests"] - made["by_steps"], 0)
    verdicts.equal(f"{phase}tokens timed - by steps", made["timed"] + untimed - made["by_steps"], 0)
    verdicts.equal(f"{phase}requests that failed", made["failed"], 0)
    if delivered is not None:
        verdicts.equal(f"{phase}tokens delivered - by steps", delivered - made["by_steps"], 0)


async def quiet(server: ServeProcess) -> dict[str, float]:
    """``/metrics`` once nothing runs, and nothing that was sent before can still come."""
    await server.idle()
    await asyncio.sleep(0.1)
    return await server.idle()
