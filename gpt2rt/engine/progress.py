"""How far many requests are, for those who wait for them at a terminal."""

from __future__ import annotations

from typing import Any


class ProgressBar:
    """A bar on stderr, if one is wanted and somebody looks."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._bar: Any = None
        if wanted:
            from rich.console import Console
            from rich.progress import Progress

            console = Console(stderr=True)
            if console.is_terminal:
                self._bar = Progress(console=console, transient=True)
                self._task = self._bar.add_task("requests", total=total)

    def __enter__(self) -> Any:
        if self._bar is None:
            return lambda count: None
        self._bar.start()
        return lambda count: self._bar.advance(self._task, count)

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
