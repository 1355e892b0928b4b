"""Measure an OpenAI-compatible server under load: the client side of ``gpt2rt bench serve``."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from .http import HttpClient, HttpError
from .metrics import Answer, details, summarize
from .workload import Sample, arrival_times

RETRY_S = 0.5
Notice = Callable[[str], None]


def _silent(_: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Target:
    """A server and what to send it with each prompt.

    Attributes:
        base_url: such as ``http://127.0.0.1:8000``.
        endpoint: ``/v1/completions``, or one that ends with ``/chat/completions`` (prompts are one user message then).
        model: the name that requests carry.
        headers: of every request, an API key for example.
        body: further fields of every request: sampling parameters, ``logprobs``.
        ignore_eos: send ``ignore_eos``, so that every answer has the length asked for.
        timeout: seconds to wait for the next bytes.
    """

    base_url: str
    model: str
    endpoint: str = "/v1/completions"
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: dict[str, Any] = dataclasses.field(default_factory=dict)
    ignore_eos: bool = False
    timeout: float = 600.0

    @property
    def is_chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")

    def request(self, sample: Sample) -> dict[str, Any]:
        """The JSON of one request."""
        length: dict[str, Any] = {"max_tokens": sample.output_len}
        if self.is_chat:
            length = {"max_completion_tokens": sample.output_len}
            prompt: dict[str, Any] = {"messages": [{"role": "user", "content": sample.prompt}]}
        else:
            prompt = {"prompt": sample.prompt}
        ignore = {"ignore_eos": True} if self.ignore_eos else {}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, **prompt, **length, "temperature": 0.0, **stream, **ignore, **self.body}


async def ask(client: HttpClient, target: Target, sample: Sample) -> Answer:
    """Make one request and note when its chunks arrive; a failure is noted in the answer."""
    body = target.request(sample)
    answer = Answer(prompt_len=sample.prompt_len, start=time.perf_counter())
    last = answer.start
    texts = []
    chunks = 0
    try:
        async with client.events(target.endpoint, body) as (status, events):
            async for data in events:
                now = time.perf_counter()
                if status != 200:
                    answer.error = f"status {status}: {data[:500].decode(errors='replace')}"
                    break
                if data == b"[DONE]":
                    # the rest of the body is its end
                    continue
                event = json.loads(data)
                if event.get("error"):
                    answer.error = f"error in the stream: {json.dumps(event['error'])[:500]}"
                    break
                if choices := event.get("choices"):
                    if chunks:
                        answer.itl.append(now - last)
                    else:
                        answer.ttft = now - answer.start
                    chunks, last = chunks + 1, now
                    texts.append((choices[0].get("delta", {}).get("content") or "") + (choices[0].get("text") or ""))
                if usage := event.get("usage"):
                    answer.output_len = usage["completion_tokens"]
                    answer.prompt_len = usage.get("prompt_tokens") or answer.prompt_len
    except HttpError as error:
        answer.error = str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        answer.error = f"not an answer of the OpenAI API: {type(error).__name__}: {error}"
    if not chunks and not answer.error:
        answer.error = "the stream held no choice"
    answer.latency = last - answer.start
    answer.text = "".join(texts)
    # a server that gives no usage: a chunk a token, as vLLM's servers send them
    answer.output_len = answer.output_len or chunks
    return answer


async def first_model(
    base_url: str, headers: dict[str, str], timeout: float, *, patience: float = 0.0, notice: Notice = _silent
) -> str:
    """The first name that ``/v1/models`` lists.

    Args:
        patience: seconds to wait for the server to be there.
        notice: is told once that it is waited for.

    Raises:
        HttpError: the server is not there, or lists none.
    """
    client = HttpClient(base_url, headers=headers, timeout=timeout)
    deadline = time.monotonic() + patience
    try:
        while True:
            try:
                status, data = await client.request("GET", "/v1/models")
                break
            except HttpError as error:
                if time.monotonic() > deadline:
                    raise
                notice(f"waiting for the server: {error}")
                notice = _silent
                await asyncio.sleep(RETRY_S)
    finally:
        await client.close()
    try:
        return str(json.loads(data)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        answer = data[:200].decode(errors="replace")
        raise HttpError(f"{base_url}/v1/models lists no model (status {status}: {answer}); pass --model") from None


async def wait_until_ready(
    client: HttpClient, target: Target, sample: Sample, patience: float, notice: Notice = _silent
) -> None:
    """Ask again and again, for ``patience`` seconds, until one request succeeds.

    Raises:
        HttpError: none did, or one was refused for good (4xx); with what the last one said.
    """
    deadline = time.monotonic() + patience
    while (answer := await ask(client, target, sample)).error:
        if time.monotonic() > deadline or answer.error.startswith("status 4"):
            raise HttpError(f"the first request failed: {answer.error}")
        notice(f"waiting for the server: {answer.error}")
        notice = _silent
        await asyncio.sleep(RETRY_S)


async def run(
    target: Target,
    samples: Sequence[Sample],
    *,
    warmups: Sequence[Sample] = (),
    request_rate: float = math.inf,
    burstiness: float = 1.0,
    max_concurrency: int | None = None,
    ready_timeout: float = 600.0,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
    notice: Notice = _silent,
) -> tuple[list[Answer], float]:
    """Send every prompt when it is due, at most ``max_concurrency`` at a time.

    Args:
        warmups: sent before, not measured; the first of them is repeated until the server answers.
        request_rate: requests a second; see :func:`workload.arrival_times` for it and ``burstiness``.
        max_concurrency: a request that is due while so many are under way waits; its times count from its sending.
        ready_timeout: seconds to wait for the server; 0 for no such check.
        progress: called whenever a request is answered.
        notice: is told once that the server is waited for.

    Returns:
        The answers in the order of ``samples``, and the duration in seconds.

    Raises:
        HttpError: the server did not get ready.
    """
    client = HttpClient(target.base_url, headers=target.headers, timeout=target.timeout)
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()

    async def limited(sample: Sample) -> Answer:
        async with slots:
            answer = await ask(client, target, sample)
        progress()
        return answer

    try:
        first, *rest = warmups or (samples[0],)
        if ready_timeout > 0:
            await wait_until_ready(client, target, first, ready_timeout, notice)
        if rest:
            await asyncio.gather(*(ask(client, target, sample) for sample in rest))
        start = time.perf_counter()
        tasks = []
        for sample, due in zip(samples, arrival_times(len(samples), request_rate, burstiness, seed), strict=True):
            if (wait := start + due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(limited(sample)))
        answers = await asyncio.gather(*tasks)
        return answers, time.perf_counter() - start
    finally:
        await client.close()


def report(
    target: Target,
    answers: Sequence[Answer],
    duration: float,
    *,
    backend: str,
    label: str | None,
    tokenizer: str | None,
    request_rate: float,
    burstiness: float,
    max_concurrency: int | None,
    num_warmups: int,
    seed: int,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    goodput: dict[str, float] | None,
    detailed: bool,
) -> dict[str, Any]:
    """Everything about a run, under the keys that vLLM gives it."""
    return {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,
        "backend": backend,
        "label": label,
        "model_id": target.model,
        "tokenizer_id": tokenizer,
        "num_prompts": len(answers),
        "request_rate": "inf" if math.isinf(request_rate) else request_rate,
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
        "num_warmups": num_warmups,
        "seed": seed,
        **summarize(answers, duration, metrics=metrics, percentiles=percentiles, goodput=goodput),
        **(details(answers) if detailed else {}),
    }
