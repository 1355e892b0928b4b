"""The order of work that callers queue on several CUDA streams, and that shares buffers.

Source: CUDA programming guide, "Streams" and "Events": streams run side by side unless one waits for the other.
"""

from __future__ import annotations

import torch


class StreamOrder:
    """Lets what is queued on any stream run after what was queued before, on whichever stream that was.

    Args:
        device: of the work; on others than CUDA devices there is nothing to order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    def join(self) -> None:
        """Before work is queued on the current stream: if the work before it was on another, let it wait for that.

        The caller holds a lock until its work is queued.
        """
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream
