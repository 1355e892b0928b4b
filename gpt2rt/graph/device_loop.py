"""A decode loop that stays on the device: each step's tokens are chosen there and are the next step's inputs there.

The host only follows: it queues step after step, reserves blocks ahead, and reads the tokens that have been chosen, one
wait for each. While it looks at the tokens of one step the device runs the next, so nothing that the host does between
steps costs time unless it takes longer than a step.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence as ListLike
from typing import Any

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.kernels.advance import advance_triton
from gpt2rt.kernels.sampling import argmax_into_triton, sample_into_triton
from gpt2rt.kernels.sampling_select import SelectWorkspace, select_workspace
from gpt2rt.kernels.uniforms import uniforms_into_triton

from .chain import Buffers
from .cuda import BATCH_SIZES, CudaExecutor, cache_key, num_splits_for
from .inputs import StepSize
from .transfer import to_device

# names states in the keys of graphs: an address or an id may come again
_SERIAL = itertools.count()

#: steps whose tokens are kept on the device; the host may be one less behind
RING = 4


@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """How the tokens of the rows are drawn; what is None is off.

    Attributes:
        seeds, requests, choices, positions: [num_rows] integers of 64 bits, the arguments of
            ``generation.random.uniform``; positions of the next token.
        temperature, top_p, min_p: [num_rows] numbers, or None.
        top_k: [num_rows] integers, or None.
        greedy: [num_rows], rows whose numbers are 0: with ``top_k`` 1 they take the first of the largest logits; or
            None.
    """

    seeds: ListLike[int]
    requests: ListLike[int]
    choices: ListLike[int]
    positions: ListLike[int]
    temperature: ListLike[float] | None = None
    top_k: ListLike[int] | None = None
    top_p: ListLike[float] | None = None
    min_p: ListLike[float] | None = None
    greedy: ListLike[bool] | None = None


class DeviceLoop:
    """Steps of one token for up to ``max_rows`` sequences of one cache.

    Args:
        executor: runs the steps.
        cache: of the sequences.
        max_rows: the most of them, at most 256.

    Attributes:
        pending: steps that are queued and whose tokens were not read yet.

    Raises:
        ValueError: too many rows, or the plan has no output layer.
    """

    def __init__(self, executor: CudaExecutor, cache: PagedKVCache, max_rows: int) -> None:
        if not 1 <= max_rows <= BATCH_SIZES[-1]:
            raise ValueError(f"max_rows must be 1 to {BATCH_SIZES[-1]}, got {max_rows}")
        if not executor.chain.has_head:
            raise ValueError("a decode loop needs a plan with an output layer")
        self._executor = executor
        self._cache = cache
        self._device = executor.plan.device
        # None: the row was dropped
        self._sequences: list[Sequence | None] = []
        self._limits: list[int] = []
        # of each pending step, the sequences that it appends a token to
        self._grown: collections.deque[list[Sequence]] = collections.deque()
        self._max_blocks = cache.blocks_for(executor.plan.n_positions)
        self._key: tuple[int, bool, int, int] | None = None
        self._state: _State
        self._settings: tuple[bool, ...] = ()
        self._launched = self._read = 0

    @property
    def pending(self) -> int:
        """Steps that were queued and not read."""
        return self._launched - self._read

    @property
    def num_rows(self) -> int:
        """Rows that a step computes, padding included."""
        return 0 if self._key is None else self._key[0]

    def start(
        self,
        tokens: ListLike[int],
        sequences: ListLike[Sequence],
        limits: ListLike[int],
        sampling: SamplingRows | None = None,
    ) -> None:
        """Go on with these sequences; what was pending is forgotten.

        Args:
            tokens: the token of each that the first step computes.
            sequences: their block tables; positions go on from their lengths.
            limits: for each, the most tokens it may have in the cache.
            sampling: how tokens are drawn; None: the first of the largest logits.
        """
        rows = next(size for size in BATCH_SIZES if size >= len(sequences))
        key = rows, sampling is not None, self._max_blocks, self._cache.block_size
        if key != self._key:
            self.close()
            # states outlive the loop, and their graphs with them
            try:
                self._state = self._executor.loop_states.setdefault(key, []).pop()
            except IndexError:
                self._state = _State(self._executor, *key)
            self._key = key
        self._sequences, self._limits = list(sequences), list(limits)
        self._launched = self._read = 0
        self._grown.clear()
        with self._executor.lock:
            # a new state was zeroed on this stream; one of a loop before was used on another, maybe
            self._executor.streams.join()
            self._settings = self._state.fill(self._executor, tokens, sequences, limits, sampling)

    def can_launch(self, *, partly: bool = False) -> bool:
        """Whether every sequence has room for one more token, and the ring for its step.

        Args:
            partly: it suffices that one has; the others are padding from then on.
        """
        if self.pending >= RING - 1:
            return False
        room = [s.length < limit for s, limit in zip(self._sequences, self._limits, strict=True) if s is not None]
        return any(room) if partly else all(room)

    def drop(self, row: int) -> None:
        """Make a row padding in the steps to come; its sequence may be freed, before or after.

        What is pending still writes to the sequence's blocks, but before all that is queued later.
        """
        self._sequences[row] = None
        with self._executor.lock:
            self._executor.streams.join()
            self._state.drop(row)

    @torch.no_grad()
    def launch(self) -> None:
        """Queue a step: it appends one token to each sequence that has not reached its limit, and chooses the next.

        Raises:
            OutOfBlocksError: the pool is empty.
            RuntimeError: every sequence has reached its limit.
            torch.cuda.OutOfMemoryError: there is no memory for the step's buffers or its graph.

            Whatever is raised, no sequence has grown; :meth:`start` anew.
        """
        state, executor = self._state, self._executor
        grown: list[Sequence] = []
        try:
            with executor.lock:
                # a block that others share is copied when a sequence grows into it
                executor.streams.join(self._cache.data, self._cache.scales)
                going = [
                    sequence if sequence is not None and sequence.length < limit else None
                    for sequence, limit in zip(self._sequences, self._limits, strict=True)
                ]
                for sequence in going:
                    if sequence is not None:
                        sequence.append(1)
                        grown.append(sequence)
                if not grown:
                    raise RuntimeError("no sequence has room for a token; ask can_launch first")
                longest = max(sequence.length for sequence in grown)
                state.extend_tables(going, self._launched)
                state.run(executor, self._cache, longest, self._settings, self._launched)
        except BaseException:
            for sequence in grown:
                sequence.truncate(sequence.length - 1)
            raise
        self._launched += 1
        self._grown.append(grown)

    def read(self) -> list[int]:
        """The tokens that the oldest pending step chose, -1 for a row that had none; waits for that step alone.

        Those of rows that the step did not append to (they had reached their limit, or were dropped) mean nothing.

        Raises:
            RuntimeError: nothing is pending.
        """
        if not self.pending:
            raise RuntimeError("no step is pending; launch one first")
        tokens = self._state.tokens(self._read)
        self._read += 1
        self._grown.popleft()
        return tokens[: len(self._sequences)]

    def forget(self) -> None:
        """Undo what the pending steps did to the sequences: they may go elsewhere from their last read token.

        Waits for those steps: what the host wrote for them may be written over afterwards.
        """
        if self.pending:
            self._state.tokens(self._launched - 1)
        for sequence in itertools.chain.from_iterable(self._grown):
            # one that was freed has nothing to undo
            if sequence.blocks:
                sequence.truncate(sequence.length - 1)
        self._grown.clear()
        self._launched = self._read = 0
        self._sequences, self._limits = [], []

    def close(self) -> None:
        """Leave the tensors to the next loop; this one may start again. Pending steps are forgotten."""
        self.forget()
        if self._key is not None:
            self._executor.loop_states.setdefault(self._key, []).append(self._state)
            self._key = None


def warm_up_loop(executor: CudaExecutor, cache: PagedKVCache, num_rows: int) -> None:
    """Run one step of a loop of so many rows for each way to choose, so that no request waits for a compiler.

    Args:
        executor: whose kernels and graphs are made.
        cache: whose free blocks the step writes to, one a row; they are free again afterwards.
        num_rows: 1 to 256.

    Raises:
        OutOfBlocksError: the cache has fewer free blocks.
        ValueError: as :class:`DeviceLoop`.
    """
    integers, ones = [0] * num_rows, [1.0] * num_rows
    numbers = (integers, integers, integers, integers)
    limits: dict[str, Any] = {"top_k": [50] * num_rows, "top_p": ones, "min_p": [0.0] * num_rows}
    ways: list[SamplingRows | None] = [None]
    for chosen in itertools.product((False, True), repeat=len(limits)):
        used = {name: values for (name, values), on in zip(limits.items(), chosen, strict=True) if on}
        ways.append(SamplingRows(*numbers, **used))
    loop = DeviceLoop(executor, cache, num_rows)
    sequences = [Sequence(cache) for _ in range(num_rows)]
    try:
        for way in ways:
            loop.start(integers, sequences, [cache.block_size] * num_rows, way)
            loop.launch()
            loop.read()
    finally:
        loop.close()
        for sequence in sequences:
            sequence.free()


class _State:
    """The tensors of a batch size, on the device and where the host writes and reads them.

    It does not hold the executor, which holds it: an executor that nobody uses any more must go at once, not when the
    garbage collector finds the circle.
    """

    # what is made under a caller's inference mode could not be written outside of it
    @torch.inference_mode(False)
    def __init__(self, executor: CudaExecutor, rows: int, draws: bool, max_blocks: int, block_size: int) -> None:
        device = executor.plan.device
        on_device = device.type == "cuda"
        self._serial = next(_SERIAL)
        self._rows = rows
        self._device = device
        self._max_blocks = max_blocks
        self._block_size = block_size
        self._buffers: dict[int, Buffers] = {}

        def host(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=on_device)

        def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.chosen, self.step = new(rows), new(rows)
        self.ring = new(RING, rows)
        self.limits = new(rows, dtype=torch.int32)
        # one for each step of the ring: a copy to the device may still be under way when the next step's is written
        self._tables = host(RING, rows, max_blocks, dtype=torch.int32)
        self._slots = host(RING, rows, dtype=torch.int64)
        self._fetched = host(RING, rows, dtype=torch.int64)
        self._events = [torch.cuda.Event() for _ in range(RING)] if on_device else []
        # of each sequence, how many blocks the device's table has, and the last of them
        self._shape: list[tuple[int, int]] = []
        self.work: SelectWorkspace = select_workspace(rows, executor.plan.vocab_size, device)
        self._places = torch.zeros_like(self.work.maxima, dtype=torch.int32)
        self.draws = draws
        self._integers = {name: new(rows) for name in ("seeds", "requests", "choices", "positions", "top_k")}
        names = ("temperature", "top_p", "min_p", "uniforms", "drawn")
        self._floats = {name: new(rows, dtype=torch.float64) for name in names}
        # all buffers of a batch size share the inputs
        self._shared: Buffers | None = None

    def buffers(self, executor: CudaExecutor, num_splits: int) -> Buffers:
        """Those for a context of so many splits; all but the partial attention are the same for every context."""
        if num_splits not in self._buffers:
            size = StepSize(self._rows, self._rows, self._rows, self._max_blocks, num_splits)
            made = self._buffers[num_splits] = Buffers(executor.chain, size, self._shared)
            self._shared = self._shared or made
        return self._buffers[num_splits]

    def fill(
        self,
        executor: CudaExecutor,
        tokens: ListLike[int],
        sequences: ListLike[Sequence],
        limits: ListLike[int],
        sampling: SamplingRows | None,
    ) -> tuple[bool, ...]:
        """Write the state before the first step; says which settings of the sampler are in use."""
        count = len(sequences)
        # the inputs of the first step are what advance would have made of the step before it; its slots come later
        padding = [0] * (self._rows - count)
        lengths = [sequence.length + 1 for sequence in sequences]
        buffers = self.buffers(executor, num_splits_for(max(lengths)))
        self._send(buffers.input_ids, [*tokens, *padding])
        self._send(buffers.position_ids, [*(length - 1 for length in lengths), *padding])
        buffers.slot_mapping.fill_(-1)
        self._send(buffers.seq_lens, [*lengths, *padding])
        self._send(self.limits, [*limits, *padding])
        self.step.zero_()
        self._shape = []
        # later ones are embedded by the step before them
        executor.chain.embed(buffers)
        if sampling is None:
            return ()
        for name in ("seeds", "requests", "choices", "positions"):
            self._send(self._integers[name], [*map(_int64, getattr(sampling, name)), *padding])
        settings = []
        for name, store in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            values = getattr(sampling, name)
            if values is None and name == "temperature":
                # dividing by 1 changes no bit, and halves the number of kernels and graphs
                values = [1.0] * count
            settings.append(values is not None)
            if values is not None:
                target = self._integers[name] if name == "top_k" else self._floats[name]
                self._send(target, [*values, *(store for _ in padding)])
        settings.append(sampling.greedy is not None)
        if sampling.greedy is not None:
            self._send(self._floats["drawn"], [*(0.0 if greedy else 1.0 for greedy in sampling.greedy), *padding])
        return tuple(settings)

    def _send(self, target: Tensor, values: ListLike[float]) -> None:
        target.copy_(to_device(values, target.dtype, self._device))

    def drop(self, row: int) -> None:
        """Make a row padding from the next step on."""
        assert self._shared is not None
        self._shared.seq_lens[row : row + 1].zero_()
        self._shared.slot_mapping[row : row + 1].fill_(-1)

    def extend_tables(self, sequences: ListLike[Sequence | None], step: int) -> None:
        """Send the block tables again where one has grown; the slots of a first step are known only now.

        Args:
            sequences: of the rows; None: a row of padding.
            step: the number of the step that comes.
        """
        assert self._shared is not None
        shape = [(0, 0) if s is None else (len(s.blocks), s.blocks[-1]) for s in sequences]
        changed = shape != self._shape
        if changed:
            table = self._tables[step % RING]
            for row, sequence in enumerate(sequences):
                if sequence is not None:
                    table[row, : len(sequence.blocks)] = torch.tensor(sequence.blocks, dtype=torch.int32)
            self._shared.block_table.copy_(table, non_blocking=True)
            self._shape = shape
        if changed or step == 0:
            # a step before looked its slot up in the table as it was then
            size = self._block_size
            slots = [-1 if s is None else s.blocks[-1] * size + (s.length - 1) % size for s in sequences]
            staged = self._slots[step % RING, : len(slots)]
            staged.copy_(torch.tensor(slots, dtype=torch.int64))
            self._shared.slot_mapping[: len(slots)].copy_(staged, non_blocking=True)

    def run(
        self, executor: CudaExecutor, cache: PagedKVCache, longest: int, settings: tuple[bool, ...], step: int
    ) -> None:
        """Queue the step, and the copy of its tokens to the host; the executor's lock is held."""
        buffers = self.buffers(executor, num_splits_for(longest))
        key = ("loop", self._serial, buffers.size, settings, *cache_key(cache))
        executor.graphs.run(key, lambda: self._launches(executor, buffers, cache, settings))
        slot = step % RING
        self._fetched[slot].copy_(self.ring[slot], non_blocking=True)
        if self._events:
            self._events[slot].record(torch.cuda.current_stream(self._device))

    def tokens(self, step: int) -> list[int]:
        """The tokens of a step; waits for it."""
        slot = step % RING
        if self._events:
            self._events[slot].synchronize()
        return self._fetched[slot].tolist()

    def _launches(
        self, executor: CudaExecutor, buffers: Buffers, cache: PagedKVCache, settings: tuple[bool, ...]
    ) -> None:
        wanted = None if self.draws else self.chosen
        choice = executor.chain.run(buffers, cache, 1, hidden=False, chosen=wanted, in_loop=True)
        logits = buffers.logits
        if not self.draws and choice is None:
            argmax_into_triton(logits, self.chosen, self.work.maxima, self._places, finite=True)
        if self.draws:
            numbers = self._integers
            names = ("seeds", "requests", "choices", "positions")
            uniforms = self._floats["uniforms"]
            uniforms_into_triton(*(numbers[name] for name in names), uniforms, advance=1)
            *used, has_greedy = settings
            if has_greedy:
                uniforms.mul_(self._floats["drawn"])
            values = (self._floats["temperature"], numbers["top_k"], self._floats["top_p"], self._floats["min_p"])
            temperature, top_k, top_p, min_p = (v if on else None for v, on in zip(values, used, strict=True))
            sample_into_triton(
                logits,
                uniforms,
                self.chosen,
                self.work,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                finite=True,
            )
        advance_triton(
            self.chosen,
            buffers.input_ids,
            buffers.position_ids,
            buffers.slot_mapping,
            buffers.seq_lens,
            self.limits,
            buffers.block_table,
            self.ring,
            self.step,
            self._block_size,
            keys=None if choice is self.chosen else choice,
            embedding=executor.chain.embedding(buffers),
            pdl=executor.pdl,
        )


def _int64(value: int) -> int:
    """An integer of 64 bits, signed or not, as the signed one with the same bits."""
    return (value + 2**63) % 2**64 - 2**63
