"""Chats written out by a template, beside the event loop and within a deadline.

The sandbox bounds what a template may loop over in numbers, but not loops in loops over a long chat; so rendering runs
in a thread of its own, which is stopped when its time is over.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from gpt2rt.errors import RequestError
from gpt2rt.tokenizers.chat import ChatTemplates

T = TypeVar("T")


class _OutOfTime(BaseException):
    """Raised inside a thread from outside."""


async def within(seconds: float, work: Callable[[], T], what: str) -> T:
    """What ``work`` returns, computed in a thread that is stopped after some seconds.

    It is stopped between two steps of Python: a single long call into C is waited for, without holding up anybody.

    Raises:
        RequestError: it took too long.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    lock = threading.Lock()
    over = False

    def finish(value: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(value)

    def run() -> None:
        nonlocal over
        value, error = None, None
        try:
            try:
                value = work()
            except Exception as raised:
                error = raised
            with lock:
                over = True
        except _OutOfTime:
            return
        try:
            loop.call_soon_threadsafe(finish, value, error)
        except RuntimeError:
            # the loop has been closed: nobody waits
            return

    thread = threading.Thread(target=run, name="gpt2rt-template", daemon=True)
    thread.start()
    try:
        return await asyncio.wait_for(asyncio.shield(done), seconds)
    except TimeoutError:
        raise RequestError(f"{what} took more than {seconds:g} s; send a shorter chat") from None
    finally:
        done.cancel()
        with lock:
            if not over and thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_OutOfTime))


def render_chat(
    tokenizer: Any,
    template: str | None,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> str:
    """The text of a chat.

    Args:
        tokenizer: whose template and special tokens are used.
        template: goes before the tokenizer's; Jinja text.

    Raises:
        TokenizerError: the template is unsafe or refuses the chat.
    """
    assert isinstance(tokenizer, ChatTemplates)
    return tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tokenize=False,
    )
