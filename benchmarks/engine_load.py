"""A crowd of clients for an engine: what they ask, what must come back, and the books that are kept of both.

Every question was answered before by the same model alone, one question at a time. Each piece that a stream hands out
is compared with that answer at once, so a lost, doubled, changed or misplaced token is found where it happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from collections import Counter
from typing import Any

from gpt2rt.engine import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from gpt2rt.errors import RequestError

#: ways in which a client leaves: the stream is closed, its task is cancelled, the request is aborted by its name
WAYS_TO_LEAVE = ("close", "cancel", "abort")


@dataclasses.dataclass(frozen=True)
class Mix:
    """What the clients are like; shares of all requests.

    Attributes:
        prompt, answer: the most tokens of each; every length from 1 on is as likely.
        leave: clients that go away before the end.
        several: questions with two to four choices.
        invalid: requests that are refused.
    """

    prompt: int = 200
    answer: int = 200
    leave: float = 0.25
    several: float = 0.10
    invalid: float = 0.05


@dataclasses.dataclass
class Question:
    """A request, and what the model says to it alone: for each choice its tokens, text and end."""

    prompt: list[int]
    settings: dict[str, Any]
    answer: list[tuple[list[int], str, str | None]] = dataclasses.field(default_factory=list)

    def params(self) -> SamplingParams:
        return SamplingParams(**self.settings, output_kind=RequestOutputKind.DELTA)


def make_questions(llm: LLM, count: int, mix: Mix, seed: int = 0) -> list[Question]:
    """Questions of all kinds, answered one at a time.

    Args:
        llm: the model; its other settings do not matter.
        count: how many.
        mix: lengths, and the share with several choices.
        seed: of what is asked.
    """
    chance = random.Random(seed)
    # some begin alike, so that the prefix cache has something to find
    stems = [[chance.randrange(1000) for _ in range(mix.prompt)] for _ in range(4)]
    questions = []
    for index in range(count):
        length = chance.randint(1, mix.prompt)
        shared = chance.choice(stems)[: chance.randint(0, length)] if chance.random() < 0.5 else []
        prompt = shared + [chance.randrange(1000) for _ in range(length - len(shared))]
        settings: dict[str, Any] = {"max_tokens": chance.randint(1, mix.answer), "seed": index}
        settings |= chance.choice(
            [{}, {"top_p": 0.9}, {"top_k": 30}, {"temperature": 0.0}, {"repetition_penalty": 1.2}, {"stop": ["the "]}]
        )
        if chance.random() < mix.several and "temperature" not in settings:
            settings["n"] = chance.randint(2, 4)
        (output,) = llm.generate([prompt], SamplingParams(**settings))
        choices = sorted(output.outputs, key=lambda choice: choice.index)
        answer = [(list(choice.token_ids), choice.text, choice.finish_reason) for choice in choices]
        questions.append(Question(prompt, settings, answer))
    return questions


def invalid_requests(engine: AsyncLLM) -> list[tuple[Any, dict[str, Any]]]:
    """Prompts and settings that are refused."""
    return [
        ([], {}),
        ([engine.vocab_size], {}),
        ([-1], {}),
        ([1] * (engine.max_model_len + 1), {}),
        ([1], {"max_tokens": engine.max_model_len}),
        ([1], {"n": 10**9}),
        ([1], {"logprobs": 10**6}),
        ([1], {"temperature": -1.0}),
        ([1], {"stop_token_ids": [2**31]}),
        ([1], {"top_p": float("nan")}),
        ("half a pair: \ud800", {}),
    ]


class Books:
    """What clients got, and what the engine says that it made.

    Attributes:
        counts: of requests: "finished", "left" and "refused".
        delivered: request -> tokens that its client was given.
        generated: request -> tokens that the engine made, written down when it ended.
        observed: sums over all steps, by the observer.
        mistakes: what differed from the answers; all streams go on.
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self.engine = engine
        self.counts: Counter[str] = Counter()
        self.delivered: dict[str, int] = {}
        self.generated: dict[str, int] = {}
        self.observed: Counter[str] = Counter()
        self.most_blocks = 0.0
        self.first_token_seconds: list[float] = []
        self.mistakes: list[str] = []
        self.unread: set[str] = set()
        core = engine._core
        finish = core._finish

        def note(request: Any) -> None:
            if request.request_id in core.requests:
                self.generated[request.request_id] = request.num_output_tokens
            finish(request)

        core._finish = note
        engine.observer = self._observe

    def _observe(self, step: Any) -> None:
        self.observed["generation_tokens"] += step.num_generation_tokens
        self.observed["prompt_tokens"] += step.num_prompt_tokens
        self.observed["preemptions"] += step.num_preemptions
        self.observed["steps"] += 1
        for request in step.finished:
            self.observed["finished_tokens"] += request.num_generation_tokens
            self.observed[f"finished {request.finish_reason}"] += 1
        self.most_blocks = max(self.most_blocks, step.kv_cache_usage * self.engine.num_blocks)

    async def settle(self) -> None:
        """Wait until nothing runs any more, and the engine has told so."""
        if not await self.engine.drain(60.0):
            self.mistakes.append("requests were left a minute after the last client had gone")
        # the observer is told in the engine's thread
        for _ in range(200):
            if self.observed["finished_tokens"] == sum(self.generated.values()):
                return
            await asyncio.sleep(0.01)

    def wrong(self) -> list[str]:
        """What does not add up, once nothing runs any more; empty if all does."""
        wrong = self.mistakes[:20]
        stats, observed = self.engine.stats(), self.observed
        total = sum(self.generated.values())
        # tokens that nobody was given belong to requests whose clients had left
        discarded = {name: count - self.delivered.get(name, 0) for name, count in self.generated.items()}
        lost = [name for name, count in discarded.items() if count and name not in self.unread]
        checks = {
            "requests are left": self.engine._core.requests,
            "sequences run": stats.num_requests_running,
            "sequences wait": stats.num_requests_waiting,
            "blocks are not free": stats.num_blocks - stats.num_free_blocks,
            "requests with lost tokens": lost,
            "tokens delivered that were not generated": [n for n, c in discarded.items() if c < 0],
            "tokens counted by steps and by requests differ": observed["generation_tokens"] - total,
            "tokens in the totals and by requests differ": stats.generation_tokens - total,
            "tokens of finished requests differ": observed["finished_tokens"] - total,
            "delivered and discarded tokens are not all": sum(self.delivered.values())
            + sum(discarded.values())
            - stats.generation_tokens,
            "preemptions differ": observed["preemptions"] - stats.num_preemptions,
            "ends by reason differ": sum(stats.finished.values()) - len(self.generated),
            "requests failed": stats.finished.get("error", 0),
            "prompt tokens differ": observed["prompt_tokens"] - stats.prompt_tokens,
        }
        return wrong + [f"{what}: {value}" for what, value in checks.items() if value]

    @property
    def discarded(self) -> int:
        """Tokens that were made for clients who had left."""
        return sum(self.generated.values()) - sum(self.delivered.values())


class Client:
    """Asks one question after the other.

    Args:
        books: where it writes down what it gets.
        questions: to choose from.
        mix: how it behaves.
        seed: of its choices.
    """

    def __init__(self, books: Books, questions: list[Question], mix: Mix, seed: int) -> None:
        self._books = books
        self._engine = books.engine
        self._questions = questions
        self._mix = mix
        self._chance = random.Random(seed)
        self._name = f"client-{seed}"
        self._asked = 0

    async def ask(self) -> None:
        """One request."""
        chance, mix = self._chance, self._mix
        if chance.random() < mix.invalid:
            await self._ask_nonsense()
            return
        question = chance.choice(self._questions)
        self._asked += 1
        name = f"{self._name}-{self._asked}"
        self._books.delivered[name] = 0
        if chance.random() >= mix.leave:
            await self._read(question, name, None)
            self._books.counts["finished"] += 1
            return
        self._books.counts["left"] += 1
        total = sum(len(ids) for ids, *_ in question.answer)
        way = chance.choice(WAYS_TO_LEAVE)
        enough = chance.randrange(total)
        if way != "cancel":
            await self._read(question, name, enough, by_name=way == "abort")
            return
        self._books.unread.add(name)
        task = asyncio.ensure_future(self._read(question, name, None))
        while self._books.delivered[name] < enough and not task.done():
            await asyncio.sleep(0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _ask_nonsense(self) -> None:
        prompt, settings = self._chance.choice(invalid_requests(self._engine))
        self._books.counts["refused"] += 1
        try:
            async for _ in self._engine.generate(prompt, SamplingParams(**settings)):
                self._books.mistakes.append(f"{prompt!r:.40} with {settings} was not refused")
        except RequestError:
            pass

    async def _read(self, question: Question, name: str, enough: int | None, *, by_name: bool = False) -> None:
        """Read a stream to its end, or until so many tokens came; then close it, or abort it by its name."""
        books = self._books
        got: list[list[int]] = [[] for _ in question.answer]
        texts = [""] * len(got)
        ends: list[str | None] = [None] * len(got)
        aborted = False
        stream = self._engine.generate(question.prompt, question.params(), name)
        began = time.perf_counter()
        async with contextlib.aclosing(stream):
            async for output in stream:
                for choice in output.outputs:
                    if not books.delivered[name] and choice.token_ids:
                        books.first_token_seconds.append(time.perf_counter() - began)
                    index = choice.index
                    if ends[index] is not None:
                        books.mistakes.append(f"{name}: choice {index} goes on after its end")
                    before = len(got[index])
                    got[index] += choice.token_ids
                    texts[index] += choice.text
                    ends[index] = choice.finish_reason
                    books.delivered[name] += len(choice.token_ids)
                    if got[index][before:] != question.answer[index][0][before : len(got[index])]:
                        books.mistakes.append(f"{name}: choice {index} differs after token {before}")
                if enough is not None and books.delivered[name] >= enough and not aborted:
                    if not by_name:
                        books.unread.add(name)
                        return
                    aborted = True
                    await self._engine.abort(name)
        # a stream that was read to its end has everything that was made
        for index, (ids, text, end) in enumerate(question.answer):
            if ends[index] == "abort" and aborted:
                # what was held back as a part of a stop string, or of a character, is shown at the end
                longest = text + "".join(question.settings.get("stop", ()))
                fine = ids[: len(got[index])] == got[index] and longest.startswith(texts[index].rstrip("\ufffd"))
            elif ends[index] is None and aborted:
                # further choices that had not begun
                fine = not got[index]
            else:
                fine = (got[index], texts[index], ends[index]) == (ids, text, end)
            if not fine:
                books.mistakes.append(f"{name}: choice {index} is not the answer; it ended with {ends[index]!r}")


async def closed_loop(
    books: Books, questions: list[Question], mix: Mix, *, streams: int, seconds: float, least: int = 0, seed: int = 0
) -> float:
    """Clients each of which asks its next question when the last is answered.

    Args:
        streams: how many clients.
        seconds: for how long new questions are asked.
        least: and until so many were answered to the end, and something was preempted.
        seed: of the clients.

    Returns:
        Seconds until all was answered.
    """
    began = time.perf_counter()

    def goes_on() -> bool:
        if time.perf_counter() - began < seconds:
            return True
        return bool(least) and (books.counts["finished"] < least or not books.observed["preemptions"])

    async def work(number: int) -> None:
        client = Client(books, questions, mix, seed * 1000 + number)
        while goes_on():
            await client.ask()
            # a refusal takes no time: the others want their turn
            await asyncio.sleep(0)

    await asyncio.gather(*map(work, range(streams)))
    taken = time.perf_counter() - began
    await books.settle()
    return taken
