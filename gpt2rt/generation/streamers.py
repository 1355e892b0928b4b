"""Streamers: objects that ``generate`` hands each token to as soon as it is chosen.

``put`` is called first with the whole prompts [num_rows, length], then with the new token of every row [num_rows],
``end`` when all rows are finished. Objects of transformers' streamer classes work too. When generation fails, a
streamer that has ``abort`` is told the error; any other is ended, so that nobody waits for text for ever.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator
from typing import Any

from torch import Tensor

from gpt2rt.errors import RequestError

from .detokenize import TextDecoder, text_decoder


class BaseStreamer:
    """What ``generate`` expects of a streamer."""

    def put(self, value: Tensor) -> None:
        """Take the prompts, [num_rows, length] int64 on CPU, the first time; then new tokens, [num_rows]."""
        raise NotImplementedError(f"{type(self).__name__} must define put(value)")

    def end(self) -> None:
        """All rows are finished."""
        raise NotImplementedError(f"{type(self).__name__} must define end()")

    def abort(self, error: BaseException) -> None:
        """Generation failed; ``end`` is not called any more."""
        self.end()


class TextStreamer(BaseStreamer):
    """Prints the text of one row as it comes, each complete character at once.

    Args:
        tokenizer: turns ids into text.
        skip_prompt: do not print the prompt.
        skip_special_tokens: leave special tokens out.
        **decode_kwargs: only ``clean_up_tokenization_spaces=False`` is allowed: text that is shown cannot be tidied up
            later.

    Raises:
        RequestError: another keyword.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, *, skip_special_tokens: bool = False, **decode_kwargs: Any
    ) -> None:
        if decode_kwargs.pop("clean_up_tokenization_spaces", False):
            raise RequestError("a streamer cannot clean up spaces in text it has already shown; leave that option out")
        if decode_kwargs:
            raise RequestError(f"{type(self).__name__} does not know the options {', '.join(sorted(decode_kwargs))}")
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self._decoder: TextDecoder | None = None

    def put(self, value: Tensor) -> None:
        """Print what the ids complete.

        Raises:
            RequestError: there is more than one row.
        """
        if value.dim() > 1 and value.size(0) > 1:
            raise RequestError(f"{type(self).__name__} shows one row, got {value.size(0)}; generate without a streamer")
        ids = value.reshape(-1).tolist()
        if self._decoder is None:
            prompt = ids if self.skip_prompt else ()
            self._decoder = text_decoder(self.tokenizer, prompt, self.skip_special_tokens)
            if self.skip_prompt:
                return
        if text := self._decoder.put(ids):
            self.on_finalized_text(text)

    def end(self) -> None:
        """Print the rest and a line break."""
        text = self._finish()
        self.on_finalized_text(text, stream_end=True)

    def _finish(self) -> str:
        decoder, self._decoder = self._decoder, None
        return decoder.end() if decoder is not None else ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hook: show a piece of text; ``stream_end`` marks the last, which may be empty."""
        print(text, end="\n" if stream_end else "", flush=True)


class TextIteratorStreamer(TextStreamer):
    """Yields the text of one row piece by piece, for a consumer in another thread than ``generate``.

    Iteration ends with the row. If generation fails, the consumer gets the same exception.

    Args:
        tokenizer, skip_prompt, skip_special_tokens, **decode_kwargs: as for :class:`TextStreamer`.
        timeout: seconds to wait for the next piece before ``queue.Empty`` is raised; None waits for ever.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = False,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens, **decode_kwargs)
        self.timeout = timeout
        # a text, None for the end, or the exception that ended it
        self._queue: queue.Queue[str | BaseException | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._queue.put(text)
        if stream_end:
            self._queue.put(None)

    def abort(self, error: BaseException) -> None:
        """Let the consumer raise the error."""
        self._finish()
        self._queue.put(error)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        item = self._queue.get(timeout=self.timeout)
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item


class AsyncTextIteratorStreamer(TextStreamer):
    """Yields the text of one row to a coroutine while ``generate`` runs in another thread.

    To be made inside a running event loop. If generation fails, the consumer gets the same exception.

    Args:
        tokenizer, skip_prompt, skip_special_tokens, **decode_kwargs: as for :class:`TextStreamer`.
        timeout: seconds to wait for the next piece before ``TimeoutError`` is raised; None waits for ever.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = False,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens, **decode_kwargs)
        self.timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[str | BaseException | None] = asyncio.Queue()

    def _send(self, item: str | BaseException | None) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._send(text)
        if stream_end:
            self._send(None)

    def abort(self, error: BaseException) -> None:
        """Let the consumer raise the error."""
        self._finish()
        self._send(error)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        async with asyncio.timeout(self.timeout):
            item = await self._queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item
