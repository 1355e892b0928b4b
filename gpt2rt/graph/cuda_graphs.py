"""CUDA graphs: a step's launches recorded once for each size of step, and replayed with one call.

A graph holds addresses, so it belongs to one set of buffers and one cache: the key names both. What cannot be captured
runs as plain launches, with a warning; where several captures in a row fail, none is tried any more, and
:attr:`GraphStore.disabled` says why.

Source: CUDA programming guide, "CUDA Graphs"; capture as torch.cuda.graph does it.
"""

from __future__ import annotations

import collections
import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch

from gpt2rt.collector import collector_paused

# torch: only one capture may be under way in a process
_ONE_CAPTURE = threading.Lock()
# torch hands out its streams in turn: after some dozens a new one would be one that another thread launches on
_streams: dict[torch.device, torch.cuda.Stream] = {}
# captures in a row that may fail: a third failure is hardly chance
_MOST_FAILURES = 3


class GraphStore:
    """Captured graphs by key, the most recently used kept.

    Args:
        device: where the launches run; graphs are captured on CUDA devices only.
        max_graphs: how many are kept.
        enabled: False launches everything plainly.

    Attributes:
        disabled: why nothing is captured, in one clause; empty while graphs are in use.
    """

    def __init__(self, device: torch.device, *, max_graphs: int = 256, enabled: bool = True) -> None:
        self._graphs: collections.OrderedDict[Hashable, torch.cuda.CUDAGraph] = collections.OrderedDict()
        self._max_graphs = max_graphs
        self.disabled = ""
        if device.type != "cuda":
            self.disabled = f"the weights are on {device}"
        elif not enabled:
            self.disabled = "CUDA graphs are turned off"
        self._device = device
        self._pool: Any = None
        # torch's allocator may still ask a graph whose capture has failed
        self._failed: list[torch.cuda.CUDAGraph] = []
        # keys whose capture has failed, and how many captures did since one succeeded
        self._plain: set[Hashable] = set()
        self._failures = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget all graphs, and which steps had none."""
        self._graphs.clear()
        self._plain.clear()

    def run(self, key: Hashable, launches: Callable[[], None]) -> None:
        """Replay the graph of ``key``, or capture it from ``launches`` first.

        The launches run once plainly before the capture, which only records them: kernels are compiled then, which a
        capture does not allow. They must be the same for equal keys.

        Args:
            key: says everything that the launches depend on: addresses, sizes, settings.
            launches: starts kernels on the current stream; allocates nothing and does not wait.
        """
        if self.disabled or key in self._plain:
            launches()
            return
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            graph.replay()
            return
        launches()
        graph = self._capture(launches)
        if graph is None:
            self._plain.add(key)
            return
        self._failures = 0
        self._graphs[key] = graph
        while len(self._graphs) > self._max_graphs:
            # nothing of it is under way: the device was waited for before the capture
            self._graphs.popitem(last=False)

    def _capture(self, launches: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self._device)
        try:
            # whatever the garbage collector finds may wait for the device, which ends a capture
            with _ONE_CAPTURE, collector_paused():
                torch.cuda.synchronize(self._device)
                stream = _streams.get(self._device)
                if stream is None:
                    stream = _streams[self._device] = torch.cuda.Stream(self._device)
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    launches()
        except torch.cuda.OutOfMemoryError:
            self._give_up(graph, before)
            raise
        except RuntimeError as error:
            # the step itself has run already
            self._give_up(graph, before)
            self._failures += 1
            what = "a step as a CUDA graph and launches its kernels one by one"
            if self._failures >= _MOST_FAILURES:
                what = "CUDA graphs here and launches kernels one by one"
                self.disabled = f"{self._failures} captures in a row failed: {error}"
                self.clear()
            warnings.warn(f"gpt2rt cannot capture {what}, which is slower: {error}", RuntimeWarning, stacklevel=4)
            return None
        return graph

    def _give_up(self, graph: torch.cuda.CUDAGraph, stream: Any) -> None:
        """After a capture that failed: torch may have left the capture's stream current."""
        torch.cuda.set_stream(stream)
        self._failed.append(graph)
        self._pool = None
