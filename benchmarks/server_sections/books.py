"""l5: every token accounted for."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from typing import Any

from .clients import Leave
from .process import ServeProcess
from .shared import (
    ANSWER,
    Question,
    Verdicts,
    ask,
    check_books,
    check_idle,
    closed_loop,
    counts,
    end,
    less,
    options,
    questions,
    quiet,
)


async def run(arguments: argparse.Namespace, verdicts: Verdicts) -> dict[str, Any]:
    asked = questions(6, 200, ids=True, n=3)
    single = [question for question in asked if question.n == 1]
    chance = random.Random(6)
    async with ServeProcess(options(arguments)) as server:
        totals = Counter[str]()
        faults: list[str] = []

        async def whole(_: int) -> None:
            question = chance.choice(asked)
            reply = await ask(server, question)
            fault = reply.fault(question.tokens)
            if not fault and reply.num_tokens() != question.tokens:
                fault = f"{reply.num_tokens()} ids of tokens, {question.tokens} were asked for"
            if fault:
                faults.append(fault)
            totals["whole"] += 1
            totals["delivered"] += reply.num_tokens()
            totals["untimed"] += question.n - 1

        async def part(_: int) -> None:
            leave = Leave.drawn(chance, ANSWER, ("sent", "stream", "last", "done"))
            reply = await ask(server, chance.choice(single), leave)
            if reply.error:
                faults.append(f"{leave.moment}: {reply.error}")
            totals["left"] += 1
            totals["delivered"] += reply.num_tokens()

        async def mixed(number: int) -> None:
            await (part if chance.random() < 0.5 else whole)(number)

        phases: dict[str, Any] = {}
        untimed = 0
        before = counts(await quiet(server))
        for name, work in (("all read to the end: ", whole), ("half leave: ", mixed)):
            totals.clear()
            await closed_loop(16, arguments.book_seconds, work)
            now = counts(await quiet(server))
            made = less(now, before)
            before = now
            untimed += totals["untimed"]
            discarded = made["by_requests"] - totals["delivered"]
            check_books(verdicts, name, made, totals["delivered"] if work is whole else None, totals["untimed"])
            if work is mixed:
                verdicts.equal(f"{name}discarded >= 0", discarded >= 0, True)
                verdicts.some(f"{name}tokens discarded", discarded)
                sums = totals["delivered"] + discarded - made["by_steps"]
                verdicts.equal(f"{name}delivered + discarded - generated", sums, 0)
                verdicts.equal(f"{name}more aborted than left", max(0, made["aborted"] - totals["left"]), 0)
            else:
                verdicts.equal(f"{name}aborted", made["aborted"], 0)
                verdicts.equal(f"{name}requests that ended", made["ended"], totals["whole"])
            phases[name.removesuffix(": ")] = {**made, **totals, "discarded": discarded}
        phases["one at a time"] = await one_at_a_time(arguments, verdicts, server, single)
        verdicts.equal("faults of answers", faults[:20], [])
        after = await quiet(server)
        check_idle(verdicts, after)
        check_books(verdicts, "in all: ", counts(after), None, untimed)
        await end(server, verdicts)
    return phases


async def one_at_a_time(
    arguments: argparse.Namespace, verdicts: Verdicts, server: ServeProcess, asked: list[Question]
) -> dict[str, Any]:
    """Clients that leave while nobody else is there: what their one request had made, and what they had read of it."""
    chance = random.Random(7)
    # long, so that few are over before the server learns that nobody reads
    long = questions(7, 32, ids=True, least=200, most=400)
    wrong: list[str] = []
    made_all, read_all = [], []
    before = counts(await quiet(server))
    for number in range(arguments.single_drops):
        leave = Leave("stream", events=chance.randint(1, 40), reset=chance.random() < 0.5)
        question = chance.choice(long if number % 4 else asked)
        reply = await ask(server, question, leave)
        now = counts(await server.idle(before["ended"] + 1))
        made, read = less(now, before), reply.num_tokens()
        before = now
        one = made["ended"] == 1 and made["by_steps"] == made["by_requests"] == made["timed"]
        if reply.error or not one or not read <= made["by_steps"] <= question.tokens:
            wrong.append(f"{leave}: read {read} of {question.tokens}, {made}, {reply.error}")
        made_all.append(made["by_steps"])
        read_all.append(read)
    verdicts.equal("one at a time: requests whose counts differ", wrong[:20], [])
    discarded = [made - read for made, read in zip(made_all, read_all, strict=True)]
    return {
        "requests": len(made_all),
        "by_steps": sum(made_all),
        "delivered": sum(read_all),
        "discarded": sum(discarded),
        "most_discarded_of_one": max(discarded),
    }
