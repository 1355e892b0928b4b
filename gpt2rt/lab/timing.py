"""Times of calls: on a CUDA device from graphs between events, on a CPU from the clock; peers in interleaved rounds.

A call is repeated inside one measurement, each time on another copy of its data, so that a time is that of the call on
cold data without the cost of starting it from Python. Where a call cannot be captured it is started from Python, and
the result says so.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[int], Any]

# threads of torch's CPU kernels spin for a while after their last work; so long nobody else is measured
SETTLE_S = 0.02
# a call that has taken so long in so many rounds has no more of them
_MOST_US = 3e6
_LEAST_ROUNDS = 3
# a device is kept busy for so many cycles (some 100 us) before the first event: a graph that is launched meanwhile
# starts right behind it, and the time is the device's alone
_BUSY_CYCLES = 200_000
_FAILED: list[torch.cuda.CUDAGraph] = []


@dataclasses.dataclass
class Times:
    """Microseconds a call.

    Attributes:
        median, p10: of the rounds.
        samples: rounds.
        captured: measured inside a CUDA graph.
    """

    median: float
    p10: float
    samples: int
    captured: bool

    @classmethod
    def of(cls, values: list[float], captured: bool) -> Times:
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[len(ordered) // 10], len(ordered), captured)


class Timer:
    """Measures calls on one device.

    Args:
        device: where the calls run.
        rounds: measurements of each call.
        target_us: how long one measurement should take.
        max_calls: in one measurement.
        warm: run each call beforehand, to compile it and to guess its time; False measures single first calls.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rounds: int = 15,
        target_us: float = 1000.0,
        max_calls: int = 128,
        warm: bool = True,
    ) -> None:
        self.device = device
        self.rounds = rounds
        self.target_us = target_us
        self.max_calls = max_calls
        self.warm = warm

    def compare(self, calls: Mapping[str, Call], copies: int = 1) -> tuple[dict[str, Times], dict[str, str]]:
        """Times of peers, whose rounds alternate in an order that rotates.

        Args:
            calls: name -> call on a copy of its data.
            copies: of the data.

        Returns:
            (times by name, errors by name of those that failed).
        """
        prepared: dict[str, _Prepared] = {}
        failed: dict[str, str] = {}
        for name, call in calls.items():
            try:
                prepared[name] = self._prepare(call, copies)
            except Exception as error:
                failed[name] = describe(error)
        samples: dict[str, list[float]] = {name: [] for name in prepared}
        names = list(prepared)
        spent = dict.fromkeys(names, 0.0)
        for number in range(self.rounds):
            turn = number % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                if spent[name] > _MOST_US and len(samples[name]) >= _LEAST_ROUNDS:
                    # of a call that takes seconds a few rounds tell enough
                    continue
                samples[name].append(self._once(prepared[name]))
                spent[name] += samples[name][-1] * prepared[name].count
        return {name: Times.of(values, prepared[name].captured) for name, values in samples.items()}, failed

    def _prepare(self, call: Call, copies: int) -> _Prepared:
        if not self.warm:
            return _Prepared(lambda: call(0), 1, False)
        for _ in range(2):
            # compiles, and warms allocators
            call(0)
        self.wait()
        start = time.perf_counter()
        call(0)
        self.wait()
        guess = (time.perf_counter() - start) * 1e6
        wanted = self.target_us / max(guess, 1.0)
        if self.device.type != "cuda":
            count = max(1, min(self.max_calls, round(wanted)))
            turns = itertools.cycle(range(copies))

            def next_ones() -> None:
                for i in itertools.islice(turns, count):
                    call(i)

            return _Prepared(next_ones, count, False)
        count, several = self._several(call, copies, wanted)
        graph = self._capture(several)
        if graph is None:
            return _Prepared(several, count, False)
        prepared = _Prepared(graph.replay, count, True)
        # the guess was of launches from Python, which a graph can be many times faster than
        graph.replay()
        more, several = self._several(call, copies, self.target_us / max(self._once(prepared), 0.1))
        if more > count:
            again = self._capture(several)
            if again is not None:
                prepared = _Prepared(again.replay, more, True)
        return prepared

    def _several(self, call: Call, copies: int, wanted: float) -> tuple[int, Callable[[], None]]:
        """How many calls one measurement holds, and these calls."""
        # a graph always calls on the same copies: whole turns
        count = max(1, min(self.max_calls, max(1, round(wanted / copies)) * copies))

        def several() -> None:
            for i in range(count):
                call(i % copies)

        return count, several

    def _capture(self, launches: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self.device)
        try:
            # other threads (compilers, those that pin memory) may use the device meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                launches()
        except RuntimeError:
            # torch may have left the capture's stream current, and its allocator may still ask this graph
            torch.cuda.set_stream(before)
            _FAILED.append(graph)
            torch.cuda.synchronize(self.device)
            return None
        return graph

    def _once(self, prepared: _Prepared) -> float:
        if self.device.type != "cuda":
            if self.warm:
                time.sleep(SETTLE_S)
            start = time.perf_counter()
            prepared.run()
            return (time.perf_counter() - start) * 1e6 / prepared.count
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if prepared.captured:
            torch.cuda._sleep(_BUSY_CYCLES)
        before.record()
        prepared.run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e3 / prepared.count

    def wait(self) -> None:
        """Until the device has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclasses.dataclass
class _Prepared:
    run: Callable[[], object]
    count: int
    captured: bool


def describe(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def cuda_bandwidth(device: torch.device, num_bytes: int = 1 << 30) -> dict[str, float]:
    """Bytes a second of copying (read and written) and of reading, beyond all caches."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    timer = Timer(device, rounds=9, max_calls=4)
    times, _ = timer.compare({"copy": lambda _: target.copy_(source), "read": lambda _: source.sum()})
    return {"copy": 2 * num_bytes / times["copy"].median * 1e6, "read": num_bytes / times["read"].median * 1e6}


def cpu_bandwidth(num_bytes: int = 1 << 28) -> dict[str, float]:
    """Bytes a second that torch's threads copy and read."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    timer = Timer(torch.device("cpu"), rounds=7, max_calls=1)
    times, _ = timer.compare({"copy": lambda _: target.copy_(source), "read": lambda _: source.sum()})
    return {"copy": 2 * num_bytes / times["copy"].median * 1e6, "read": num_bytes / times["read"].median * 1e6}


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of torch's product of two square matrices."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    b = torch.ones(size, size, dtype=dtype, device=device)
    # small products need company: a measurement of a few of them would be mostly its own beginning and end
    timer = Timer(device, rounds=7, max_calls=64 if device.type == "cuda" else 4)
    times, _ = timer.compare({"product": lambda _: a @ b})
    return 2 * size**3 / times["product"].median * 1e6


def measure_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine gives: ``bytes_per_s`` (the faster of copying and reading) and ``operations_per_s``."""
    on_cuda = device.type == "cuda"
    bandwidth = cuda_bandwidth(device) if on_cuda else cpu_bandwidth()
    return {
        "bytes_per_s": max(bandwidth.values()),
        "operations_per_s": matmul_peak(device, dtype, 8192 if on_cuda else 1024),
    }
