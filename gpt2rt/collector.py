"""A pause of Python's garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection meanwhile, in any thread; also a decorator.

    Threads that pause it at the same time end each other's pause: it is there to save time, or to make an accident
    rarer, never for correctness.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
