"""The order of work that callers queue on several CUDA streams, and that shares buffers.

Torch gives memory that is freed to the next who asks on the stream that it was allocated on, at once: what is queued
there comes after what was queued there before. Work on other streams that still uses it is not waited for, unless the
tensor was recorded on them, or that stream waits for them.

Source: CUDA programming guide, "Streams" and "Events": streams run side by side unless one waits for the other; torch's
notes on CUDA, "Memory management" and ``Tensor.record_stream``.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class StreamOrder:
    """Lets what is queued on any stream run after what was queued before, on whichever stream that was.

    Args:
        device: of the work; on others than CUDA devices there is nothing to order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None
        # all that there was work on
        self._streams: list[torch.cuda.Stream] = []

    def join(self, *tensors: Tensor | None) -> None:
        """Before work is queued on the current stream: if the work before it was on another, let it wait for that.

        The caller holds a lock until its work is queued.

        Args:
            tensors: that the work uses, and that others may free while it is under way.
        """
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._last != stream:
            if self._last is not None:
                stream.wait_stream(self._last)
            if stream not in self._streams:
                self._streams.append(stream)
            self._last = stream
        if len(self._streams) > 1:
            for tensor in tensors:
                if tensor is not None:
                    # nothing happens where it was allocated on this stream
                    tensor.record_stream(stream)

    def settle_with(self, owner: object) -> None:
        """When ``owner`` goes, and its tensors with it, let all streams wait for the last work.

        Whichever of them a tensor was allocated on, what gets its memory there comes after that work. This costs a step
        nothing, where recording each tensor on each stream would.
        """
        weakref.finalize(owner, self._settle).atexit = False

    def _settle(self) -> None:
        last = self._last
        for stream in self._streams:
            if last is not None and stream != last:
                stream.wait_stream(last)
