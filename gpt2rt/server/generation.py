"""One HTTP request at the engine, whole or as a stream, for completions and chat completions alike."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gpt2rt.engine.outputs import RequestOutput
from gpt2rt.engine.params import RequestOutputKind, SamplingParams
from gpt2rt.errors import RequestError

from .errors import ApiError, api_error, bad_request, shutting_down
from .guard import Guard, Interrupted
from .json_io import dumps
from .service import Service
from .streaming import EventStream

logger = logging.getLogger("gpt2rt.server")

# answers with so many log-probabilities are written on the event loop: a thread costs more
_FEW_LOGPROBS = 2000
# what a cut stream's last events may take, in seconds
_LAST_EVENTS_SECONDS = 2.0


@dataclasses.dataclass
class Job:
    """What a request asks of the engine.

    Attributes:
        request_id: its name, and the ``id`` of the answer.
        prompts: token ids.
        params: of all prompts.
        priority, cache_salt: see ``AsyncLLM.generate``.
        echo: each continuation shows its prompt.
    """

    request_id: str
    prompts: list[list[int]]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    echo: bool = False

    @property
    def request_ids(self) -> list[str]:
        """The engine's names, one for each prompt."""
        if len(self.prompts) == 1:
            return [self.request_id]
        return [f"{self.request_id}-{place}" for place in range(len(self.prompts))]

    def num_logprobs(self, max_model_len: int) -> int:
        """How many log-probabilities the answer has at most."""
        params, found = self.params, 0
        for ids in self.prompts:
            if params.logprobs is not None:
                room = max_model_len - len(ids) if params.max_tokens is None else params.max_tokens
                found += params.n * max(room, 0) * (params.logprobs + 1)
            if params.prompt_logprobs is not None:
                found += (params.n if self.echo else 1) * len(ids) * (params.prompt_logprobs + 1)
        return found


class Form(Protocol):
    """How outputs look in an API."""

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer, from the final output of each prompt."""

    def events(self, place: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """The events of what is new of the prompt at this place."""

    def last_events(self) -> Iterator[dict[str, Any]]:
        """The events that end a stream; choices without an end get the finish_reason "abort"."""


class GenerationResponse(Response):
    """The answer to a job; it runs while it is sent.

    Args:
        service: whose engine computes it.
        job: what to compute.
        form: how to show it.
        stream: show it while it grows.

    Raises:
        ApiError: it would be too large.
    """

    def __init__(self, service: Service, job: Job, form: Form, stream: bool) -> None:
        super().__init__()
        found, most = job.num_logprobs(service.engine.max_model_len), service.settings.max_answer_logprobs
        if found > most:
            raise bad_request(
                f"the answer would have {found} log-probabilities, expected at most {most}; ask for fewer prompts, "
                "continuations, tokens or logprobs",
                "logprobs",
            )
        self.service = service
        self.job = job
        self.form = form
        self.stream = stream
        job.params.output_kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Compute and send.

        Raises:
            ApiError, RuntimeError: nothing has been sent yet, and this is why nothing but an error will be.
        """
        run = self._run_stream if self.stream else self._run_whole
        await run(scope, receive, send)

    def _begin(self) -> AsyncGenerator[tuple[int, RequestOutput]]:
        job, engine = self.job, self.service.engine
        return merged(
            [
                engine.generate(
                    {"prompt_token_ids": ids}, job.params, name, priority=job.priority, cache_salt=job.cache_salt
                )
                for name, ids in zip(job.request_ids, job.prompts, strict=True)
            ]
        )

    async def _run_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        outputs = await collect(self.service, receive, self.job.request_ids, self._begin())
        if outputs is None:
            return
        if self.job.num_logprobs(self.service.engine.max_model_len) <= _FEW_LOGPROBS:
            body = self._write(outputs)
        else:
            body = await asyncio.to_thread(self._write, outputs)
        await Response(body, media_type="application/json")(scope, receive, send)

    def _write(self, outputs: Sequence[RequestOutput]) -> bytes:
        return dumps(self.form.whole(outputs))

    async def _run_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self.service.settings
        stream = EventStream(send, settings.ping_interval, settings.stall_timeout)
        guard = Guard(self.service, receive, self.job.request_ids, stream)
        try:
            async with guard:
                await self._send_all(stream)
        except Interrupted as end:
            if end.reason == "stalled":
                logger.warning("%s: the reader took nothing for %g s", self.job.request_id, settings.stall_timeout)
                await _cut(scope)
            elif end.reason != "disconnected":
                error = too_slow(self.service) if end.reason == "timeout" else None
                await self._send_last(stream, scope, error)

    async def _send_all(self, stream: EventStream) -> None:
        async with contextlib.aclosing(self._begin()) as events:
            first = asyncio.ensure_future(_next(events))
            try:
                # what is wrong with a request shows at once, and is answered with a status; one that waits long has
                # to say that it is alive
                await asyncio.wait({first}, timeout=self.service.settings.ping_interval)
                if first.done():
                    first.result()
                await stream.start()
                event = await first
                while event is not None:
                    for value in self.form.events(*event):
                        await stream.put(value)
                    event = await _next(events)
            except Exception as error:
                if not stream.started:
                    raise
                await stream.put(api_error(error, self.job.request_id).body())
            else:
                for value in self.form.last_events():
                    await stream.put(value)
            finally:
                if not first.done():
                    first.cancel()
                    await asyncio.wait({first})
                elif not first.cancelled():
                    # seen, whatever it was: the client may have gone first
                    first.exception()
        await stream.end()

    async def _send_last(self, stream: EventStream, scope: Scope, error: ApiError | None) -> None:
        """End a stream that was cut while the reader is still there."""
        if not stream.started:
            raise shutting_down() if error is None else error
        if stream.ended:
            return

        async def send() -> None:
            if error is None:
                for value in self.form.last_events():
                    await stream.put(value)
            else:
                await stream.put(error.body())
            await stream.end()

        try:
            await asyncio.wait_for(send(), _LAST_EVENTS_SECONDS)
        except TimeoutError:
            await _cut(scope)


async def collect(
    service: Service, receive: Receive, request_ids: Sequence[str], events: AsyncGenerator[tuple[int, T]]
) -> list[T] | None:
    """The last output of each request.

    Args:
        service: whose engine computes them.
        receive: of ASGI, to see the client go.
        request_ids: of the requests.
        events: their outputs.

    Returns:
        None: the client has gone.

    Raises:
        ApiError: the request took too long, or the server stops and there is nothing to show.
        RuntimeError, ValueError: what ended one of the requests.
    """
    outputs: dict[int, T] = {}
    try:
        async with Guard(service, receive, request_ids), contextlib.aclosing(events):
            async for place, output in events:
                outputs[place] = output
    except Interrupted as end:
        if end.reason == "disconnected":
            return None
        raise (shutting_down() if end.reason == "shutdown" else too_slow(service)) from None
    if len(outputs) < len(request_ids):
        # an aborted request may have nothing to show
        raise shutting_down()
    return [outputs[place] for place in range(len(request_ids))]


async def _next(events: AsyncGenerator[Any]) -> Any:
    return await anext(events, None)


T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """The outputs of several generators as they come, each with the place of its generator.

    Each generator runs ahead by at most one output, and all are closed with this one.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as stream:
            async for output in stream:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, T | Exception | None]] = asyncio.Queue(maxsize=1)

    async def pump(place: int, stream: AsyncGenerator[T]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for output in stream:
                    await queue.put((place, output))
            await queue.put((place, None))
        except Exception as error:
            await queue.put((place, error))

    tasks = [asyncio.create_task(pump(place, stream)) for place, stream in enumerate(streams)]
    left = len(tasks)
    try:
        while left:
            place, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield place, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _cut(scope: Scope) -> None:
    """Drop a connection with all that waits to be sent on it."""
    connection = scope.get("state", {}).get("connection")
    if connection is not None:
        connection.abort()
        # uvicorn learns of it in the loop's next turn, and does not miss the end of the answer then
        await asyncio.sleep(0)


def too_slow(service: Service) -> ApiError:
    """The answer to a request that took more than its time."""
    seconds = service.settings.request_timeout
    return ApiError(
        504,
        f"the request was not answered within {seconds:g} s, the most that this server gives one; ask for fewer tokens",
        kind="server_error",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


class Usage:
    """Counts the tokens of an answer.

    Args:
        details: tell how many came from the prefix cache.
    """

    def __init__(self, details: bool) -> None:
        self._details = details
        self._prompts: dict[int, tuple[int, int]] = {}
        self._completion = 0

    def add(self, place: int, output: RequestOutput, num_tokens: int) -> None:
        """New tokens of the prompt at this place."""
        self._prompts[place] = (len(output.prompt_token_ids), output.num_cached_tokens)
        self._completion += num_tokens

    def value(self) -> dict[str, Any]:
        """The ``usage`` object."""
        prompt = sum(tokens for tokens, _ in self._prompts.values())
        value: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion,
            "total_tokens": prompt + self._completion,
        }
        if self._details:
            value["prompt_tokens_details"] = {"cached_tokens": sum(cached for _, cached in self._prompts.values())}
        return value


#: fields of a request that are fields of SamplingParams, with the same meaning
_SAME = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "truncate_prompt_tokens",
    "bad_words",
    "logit_bias",
    "allowed_token_ids",
    "prompt_logprobs",
)


def sampling_params(service: Service, fields: Any, **others: Any) -> SamplingParams:
    """The sampling parameters of a request, checked against the engine's limits.

    Args:
        service: whose engine is asked.
        fields: a ``GenerationFields``.
        **others: what the endpoint decides; goes before the request's fields.

    Raises:
        ApiError: a value is out of range.
    """
    engine = service.engine
    given = {name: value for name in _SAME if (value := getattr(fields, name)) is not None}
    try:
        params = SamplingParams(**(given | others))
        # before texts are encoded, so that what is wrong with the numbers shows at once
        params.check(vocab_size=engine.vocab_size, limits=engine.config.limits, tokenizer=engine.tokenizer)
    except RequestError as error:
        # its message begins with the field's name
        word = str(error).partition(" ")[0].partition("=")[0].rstrip(":")
        raise bad_request(str(error), word if word in type(fields).model_fields else None) from None
    return params


def check_stream_options(fields: Any) -> tuple[bool, bool]:
    """Whether a stream's last event, and whether all of them, bear the usage."""
    options = fields.stream_options
    if options is None:
        return False, False
    if not fields.stream:
        raise bad_request("stream_options is only for streams; send stream=true with it", "stream_options")
    return bool(options.include_usage), bool(options.include_usage and options.continuous_usage_stats)
