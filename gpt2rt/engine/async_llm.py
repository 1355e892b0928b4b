"""``AsyncLLM``: the engine in a thread of its own, for programs with an event loop."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import torch

from gpt2rt.errors import EngineDeadError

from .base import DEFAULT_MODEL, ModelHolder
from .config import EngineConfig
from .fitting import new_core
from .inputs import Prompt, prompt_parts
from .outputs import PoolingRequestOutput, RequestOutput
from .params import PoolingParams, RequestOutputKind, SamplingParams
from .request import Output, Request
from .stats import EngineStats, IterationStats
from .streams import Stream, call_on, put_all

_LOG = logging.getLogger("gpt2rt.engine")
# texts up to so many characters are tokenised on the event loop: a thread costs more
_SHORT_TEXT = 2048
# by default a step with prompt tokens may take twice as long as one without
_PREFILL_SLOWDOWN = 2.0


class AsyncLLM(ModelHolder):
    """A model that answers requests as they come, each by an asynchronous iterator of outputs.

    Names are those of vLLM's ``AsyncLLM``. The engine runs in one thread; the methods may be called from any number of
    event loops and threads. A reader that falls behind gets what it missed in one output, so what waits for it is
    bounded by its own request. A fault that is nobody's alone stops the engine: all requests end with EngineDeadError,
    and so does every call in a child process after a fork, which has no such thread.

    Args:
        model, tokenizer, task, config, options: as for :class:`LLM`; ``max_num_queued_reqs`` is 256 and
            ``prefill_slowdown`` 2 unless given.

    Attributes:
        config: the settings.
        observer: is called in the engine's thread with what each step did.

    Raises:
        OSError, ValueError, TypeError: as :class:`LLM`.
    """

    def __init__(
        self,
        model: Any = DEFAULT_MODEL,
        *,
        tokenizer: Any = None,
        task: str | None = None,
        config: EngineConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, task, config, options, {"prefill_slowdown": _PREFILL_SLOWDOWN})
        self._core = new_core(self._served)
        self._core.observer = self._observe
        self.observer: Callable[[IterationStats], None] | None = None
        self._numbers = itertools.count()
        # guards what follows, and wakes the engine's thread
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._closed = False
        self._dead: BaseException | None = None
        self._ready: list[tuple[Stream, Output]] = []
        # what came out of the inbox and is not done yet
        self._doing: deque[Callable[[], None]] = deque()
        self._thread = threading.Thread(target=self._run, name="gpt2rt-engine", daemon=True)
        self._thread.start()
        _ENGINES.add(self)

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self._core.cache.pool.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._core.cache.block_size

    @property
    def kv_cache_dtype(self) -> str:
        """What keys and values are stored in, such as "float32"."""
        return str(self._core.cache.data.dtype).removeprefix("torch.")

    def stats(self) -> EngineStats:
        """What it does now, and the sums of all it did."""
        return self._core.stats()

    # ---- requests --------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        split_special_tokens: bool | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue a prompt.

        Args:
            prompt: a text, its token ids, ``{"prompt": ...}`` or ``{"prompt_token_ids": ...}``.
            sampling_params: None: :class:`SamplingParams`'s defaults.
            request_id: a name for :meth:`abort`; None: a new one.
            priority: the smaller goes first.
            cache_salt: prefixes are shared only with prompts of the same salt.
            split_special_tokens: read names of special tokens as ordinary text; None: as the tokenizer is set.

        Yields:
            Outputs, as ``output_kind`` says; the last is ``finished``. Closing the generator ends the request, and its
            blocks are free before the next step.

        Raises:
            RequestError: something is wrong with the request; nothing was begun.
            QueueFullError: too many requests wait.
            EngineDeadError: the engine has stopped.
            NumericsError, RequestFailedError: the request failed on its way.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        stream = await self._begin(prompt, params, request_id, priority, cache_salt, split_special_tokens)
        try:
            finished = False
            while not finished:
                output = await self._next(stream)
                assert isinstance(output, RequestOutput)
                finished = output.finished
                yield output
        finally:
            self._forsake(stream)

    async def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        split_special_tokens: bool | None = None,
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        """What a task makes of the hidden states of a prompt; arguments and errors as for :meth:`generate`.

        Yields:
            One output.
        """
        stream = await self._begin(prompt, pooling_params, request_id, priority, cache_salt, split_special_tokens)
        try:
            output = await self._next(stream)
            assert isinstance(output, PoolingRequestOutput)
            yield output
        finally:
            self._forsake(stream)

    async def tokenize(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool | None = None, cut: Any = None
    ) -> list[int]:
        """The ids of a text; a long one does not hold up the event loop.

        Args:
            text: any.
            add_special_tokens: as the tokenizer adds them by itself.
            split_special_tokens: read names of special tokens as ordinary text; None: as the tokenizer is set.
            cut: the request's parameters, whose ``truncate_prompt_tokens`` allows any length.

        Raises:
            RequestError: there is no tokenizer, or the text cannot be encoded or is far too long for the model.
        """

        def encode() -> list[int]:
            return self._frontend.encode(
                text, cut, add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens
            )

        if len(text) <= _SHORT_TEXT:
            return encode()
        return await asyncio.to_thread(encode)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests: their streams end with ``finish_reason`` "abort". Names of no request are passed over."""
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        self._submit(lambda: [self._core.abort(name) for name in names])

    async def _begin(
        self, prompt: Any, params: Any, request_id: str | None, priority: int, salt: str | None, split: bool | None
    ) -> Stream:
        self._check_alive()
        text, ids = prompt_parts(prompt)
        if ids is None:
            assert text is not None
            ids = await self.tokenize(text, split_special_tokens=split, cut=params)
        name = f"req-{next(self._numbers)}" if request_id is None else request_id
        stream = Stream(asyncio.get_running_loop())
        # before the engine knows of it: its first outputs may come while this waits to be accepted
        stream.aggregate = getattr(params, "output_kind", None) is RequestOutputKind.DELTA
        with self._wake:
            self._check_alive()
            request = self._frontend.make(
                ids,
                params,
                lambda output: self._ready.append((stream, output)),
                request_id=name,
                prompt=text,
                priority=priority,
                salt=salt,
            )
        stream.request = request
        if not self._submit(lambda: self._add(stream, request)):
            self._check_alive()
        try:
            # refusals come before the first output
            await stream.accepted
        except BaseException:
            self._submit(lambda: self._end(request))
            raise
        return stream

    async def _next(self, stream: Stream) -> Output:
        """What a reader gets next, or the error that ended its request."""
        output = await stream.next()
        if isinstance(output.error, EngineDeadError):
            # an exception of its own for each reader
            self._check_alive()
        if output.error is not None:
            raise output.error
        return output

    def _forsake(self, stream: Stream) -> None:
        """A reader reads no more."""
        request = stream.request
        if request is not None and not request.finished:
            self._submit(lambda: self._end(request))

    def _end(self, request: Request) -> None:
        # another request may have the name by now
        if self._core.requests.get(request.request_id) is request:
            self._core.abort(request.request_id)

    # ---- health ----------------------------------------------------------------------------------------------------

    @property
    def errored(self) -> bool:
        """Whether the engine has stopped by a fault."""
        return self._dead is not None

    @property
    def dead_error(self) -> BaseException | None:
        """What stopped it."""
        return self._dead

    @property
    def is_running(self) -> bool:
        """Whether it takes requests."""
        return self._dead is None and not self._stopping

    async def check_health(self) -> None:
        """Raise EngineDeadError if the engine has stopped."""
        self._check_alive()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"the engine has stopped: {type(self._dead).__name__}: {self._dead}") from self._dead
        if self._stopping:
            raise EngineDeadError("the engine was shut down")

    async def drain(self, timeout: float) -> bool:
        """Wait until no request is unfinished.

        Args:
            timeout: seconds.

        Returns:
            Whether it came to that.
        """
        end = time.monotonic() + timeout
        while (self._inbox or self._doing or self._core.has_unfinished) and self._dead is None:
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(0.02)
        return True

    def shutdown(self) -> None:
        """End all requests (``finish_reason`` "abort") and the thread; may be called again."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    # ---- the engine's thread -----------------------------------------------------------------------------------------

    def _submit(self, task: Callable[[], Any]) -> bool:
        """Let the engine's thread do something before its next step; False: it has ended."""
        with self._wake:
            if self._closed:
                return False
            self._inbox.append(task)
            self._wake.notify()
            return True

    def _add(self, stream: Stream, request: Request) -> None:
        try:
            self._check_alive()
            self._core.add(request)
        except Exception as error:
            request.finished = True
            stream.call(stream.refuse, error)
        else:
            stream.call(stream.accept)

    def _observe(self, iteration: IterationStats) -> None:
        if self.observer is not None:
            self.observer(iteration)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
                self._core.abort_all()
                self._core.settle()
        except BaseException as error:
            _LOG.critical("the engine has stopped", exc_info=True)
            self._dead = error
            self._bury(error)
        finally:
            self._refuse_rest()
            self._deliver()

    def _turn(self) -> bool:
        """Take in what came, and make a step; False: the engine is to stop."""
        with self._wake:
            while not (self._inbox or self._stopping or self._core.has_unfinished):
                self._wake.wait()
            if self._stopping:
                return False
            self._doing.extend(self._inbox)
            self._inbox.clear()
        while self._doing:
            # one that stops the engine is among those that are told of it
            self._doing[0]()
            self._doing.popleft()
        if self._core.has_unfinished:
            self._core.step()
        else:
            self._core.settle()
        self._deliver()
        return True

    def _deliver(self) -> None:
        """Give outputs to their streams, with one call for each event loop."""
        if not self._ready:
            return
        ready, self._ready = self._ready, []
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Output]]] = {}
        for stream, output in ready:
            by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, outputs in by_loop.items():
            if not call_on(loop, put_all, outputs):
                for stream, _ in outputs:
                    self._desert(stream)

    def _desert(self, stream: Stream) -> None:
        """End a request whose reader's event loop was closed."""
        request = stream.request
        if request is not None and not request.finished:
            request.sink = lambda output: None
            self._end(request)

    def _bury(self, error: BaseException) -> None:
        """Tell all requests that the engine has stopped."""
        dead = EngineDeadError(f"the engine has stopped: {type(error).__name__}: {error}")
        dead.__cause__ = error
        try:
            self._core.reset(dead)
        except Exception:
            _LOG.exception("requests of a stopped engine cannot be ended")

    def _leave_behind(self) -> None:
        """In a child after a fork: the engine's thread is the parent's."""
        # the parent's may be held
        self._wake = threading.Condition()
        self._stopping = self._closed = True
        self._dead = self._dead or EngineDeadError(
            "the engine's thread did not come along when this process was forked; make an AsyncLLM of its own in each "
            "process"
        )

    def _refuse_rest(self) -> None:
        """Requests that came while the engine was stopping."""
        with self._wake:
            self._stopping = self._closed = True
            tasks = [*self._doing, *self._inbox]
            self._doing.clear()
            self._inbox.clear()
        for task in tasks:
            try:
                task()
            except BaseException:
                _LOG.exception("what was left to do when the engine stopped failed")


_ENGINES: weakref.WeakSet[AsyncLLM] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_ENGINES):
        engine._leave_behind()


@atexit.register
def _before_exit() -> None:
    # the thread must not be in a step while Python takes apart what the step uses
    for engine in list(_ENGINES):
        engine.shutdown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
