"""How fast this machine reads a buffer of a given size: the floor under a step that reads its weights once."""

from __future__ import annotations

import mmap
import os
import threading
import time


def read_bandwidth(num_bytes: int, threads: int, *, repeats: int = 9) -> list[float]:
    """Bytes a second of each of several readings of a buffer, from first to last of its threads.

    Each thread stays on a processor of its own and sums its part of the buffer with ``torch.sum``, which reads
    float32 in order and does little else. The buffer lies on 2 MiB pages where the system gives them. torch's own
    team of threads is not used: where the system puts two of them on one processor, it reads at half the speed.
    """
    import torch

    count = max(num_bytes // 4, 1 << 18) // threads * threads
    memory = mmap.mmap(-1, count * 4)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.float32, count=count).fill_(1.0)
    parts = buffer.chunk(threads)
    processors = sorted(os.sched_getaffinity(0))
    barrier = threading.Barrier(threads)
    spans: list[list[tuple[float, float]]] = [[] for _ in range(threads)]

    def read(number: int) -> None:
        os.sched_setaffinity(0, {processors[number % len(processors)]})
        for _ in range(repeats):
            barrier.wait()
            start = time.perf_counter()
            parts[number].sum()
            spans[number].append((start, time.perf_counter()))

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    readers = [threading.Thread(target=read, args=(number,)) for number in range(threads)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    torch.set_num_threads(before)
    turns = zip(*spans, strict=True)
    return [count * 4 / (max(end for _, end in turn) - min(start for start, _ in turn)) for turn in turns]
