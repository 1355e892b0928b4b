"""The rows of a call in a model's KV cache, and the batch of a decode step, kept from step to step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.graph import Executor, StepBatch
from gpt2rt.graph.cpu import CpuExecutor

from .starts import Starts, compute, prefill

if TYPE_CHECKING:
    from gpt2rt.graph.device_loop import DeviceLoop, SamplingRows


@dataclasses.dataclass
class Best:
    """The best logits of the rows of a step.

    Attributes:
        ids: [num_rows, count] int64, the tokens, the best first, of equal ones the lowest id; -1 in a row whose logits
            are not all finite.
        logits: [num_rows, count] float32, theirs.
        all_logits: computes [num_rows, vocab_size] float32, the logits of all tokens, before the next step.
    """

    ids: Tensor
    logits: Tensor
    all_logits: Callable[[], Tensor]


@dataclasses.dataclass
class Chosen:
    """The tokens that the device chose after a step.

    Attributes:
        tokens: of each row, -1 for one that has none to choose.
        all_logits: computes [num_rows, vocab_size] float32, the logits they were chosen from, before the next step.
    """

    tokens: list[int]
    all_logits: Callable[[], Tensor]


class DecodeBatch:
    """One token for each of some sequences.

    The tensors are made once; a step only writes the numbers that changed, through numpy, where one store costs a
    tenth of a tensor operation.

    Args:
        max_seqs: the most sequences in a step.
        max_blocks: the most blocks that one of them will have.
    """

    def __init__(self, max_seqs: int, max_blocks: int) -> None:
        self._tensors: dict[str, Any] = {
            "input_ids": torch.zeros(max_seqs, dtype=torch.int64),
            "position_ids": torch.zeros(max_seqs, dtype=torch.int64),
            "slot_mapping": torch.zeros(max_seqs, dtype=torch.int64),
            "seq_lens": torch.zeros(max_seqs, dtype=torch.int32),
            "block_table": torch.zeros((max_seqs, max_blocks), dtype=torch.int32),
        }
        self._arrays = {name: tensor.numpy() for name, tensor in self._tensors.items()}
        self._starts = torch.arange(max_seqs + 1, dtype=torch.int32)
        self._rows = torch.arange(max_seqs, dtype=torch.int64)
        self._sequences: ListLike[Sequence] = ()
        self._batch: StepBatch | None = None

    def set_sequences(self, sequences: ListLike[Sequence]) -> None:
        """Take these sequences from the next step on."""
        self._sequences = sequences
        count = len(sequences)
        table = self._arrays["block_table"]
        for row, sequence in enumerate(sequences):
            table[row, : len(sequence.blocks)] = sequence.blocks
        views = {name: tensor[:count] for name, tensor in self._tensors.items()}
        self._batch = StepBatch(
            **views,
            query_start_loc=self._starts[: count + 1],
            logits_indices=self._rows[:count],
            max_query_len=1,
            max_seq_len=0,
        )

    def next(self, tokens: ListLike[int]) -> StepBatch:
        """The batch that computes one more token of each sequence, for which cache slots are reserved.

        Args:
            tokens: the id for each sequence.

        Returns:
            A batch on the CPU that is valid until the next call.

        Raises:
            OutOfBlocksError: the pool is empty.
        """
        assert self._batch is not None
        arrays = self._arrays
        ids, positions, slots = arrays["input_ids"], arrays["position_ids"], arrays["slot_mapping"]
        lengths, table = arrays["seq_lens"], arrays["block_table"]
        longest = 0
        for row, sequence in enumerate(self._sequences):
            ids[row] = tokens[row]
            slots[row] = sequence.append(1)[0]
            length = sequence.length
            positions[row] = length - 1
            lengths[row] = length
            # the last block is new, or was copied because a fork shared it, or is the one that stands there
            table[row, len(sequence.blocks) - 1] = sequence.blocks[-1]
            longest = max(longest, length)
        self._batch.max_seq_len = longest
        return self._batch


class CachedRows:
    """The rows of a call in the KV cache of one model.

    Args:
        executor: runs the model.
        cache: where the rows' keys and values go.
        max_tokens: for each row, the most tokens it will have there.

    Attributes:
        sequences: the block table of each row; None before it is begun and after it was freed.
    """

    def __init__(self, executor: Executor, cache: PagedKVCache, max_tokens: ListLike[int]) -> None:
        self.executor = executor
        self.cache = cache
        self.sequences: list[Sequence | None] = [None] * len(max_tokens)
        self._max_tokens = max_tokens
        self._device = executor.plan.device
        self._batch: DecodeBatch | None = None
        # the rows whose block tables are in the batch; none once a table may have changed
        self._batch_rows: list[int] = []
        # steps whose tokens stay on the device, and the rows and tokens that it goes on with
        self._loop: DeviceLoop | None = None
        self._loop_rows: list[int] = []
        self._loop_tokens: ListLike[int] = ()

    def sequence(self, row: int) -> Sequence:
        """The block table of a row that was begun and not freed."""
        sequence = self.sequences[row]
        assert sequence is not None
        return sequence

    def begin(self, row: int) -> None:
        """Give a row an empty sequence."""
        self._settle()
        self.sequences[row] = Sequence(self.cache)

    def prefill(
        self,
        prompts: ListLike[ListLike[int]],
        num_return_sequences: int,
        starts: Starts | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Begin all rows; each prompt is computed once, and its rows share its blocks.

        Args:
            prompts: ids, at least one each.
            num_return_sequences: rows of each prompt.
            starts, chunk_size: as for :func:`starts.prefill`.

        Returns:
            [num_rows, vocab_size] float32, the logits after the prompts.
        """
        firsts = list(range(0, len(self.sequences), num_return_sequences))
        for first in firsts:
            self.begin(first)
        sequences = [self.sequence(first) for first in firsts]
        logits = prefill(self.executor, self.cache, prompts, sequences, starts, chunk_size)
        if num_return_sequences == 1:
            return logits
        for first in firsts:
            for row in range(first + 1, first + num_return_sequences):
                self.sequences[row] = self.sequence(first).fork()
        return logits.repeat_interleave(num_return_sequences, dim=0)

    def compute(self, tokens: ListLike[ListLike[int]], rows: ListLike[int]) -> Tensor:
        """[len(rows), vocab_size] float32: compute further tokens of some rows; the logits after each row's last."""
        self._settle()
        self._batch_rows = []
        return compute(self.executor, self.cache, tokens, [self.sequence(row) for row in rows])

    def compute_all(
        self, tokens: ListLike[ListLike[int]], rows: ListLike[int], wanted: ListLike[int] | None = None
    ) -> Tensor:
        """Compute a few further tokens of some rows in one step, and the logits after each.

        Args:
            tokens: for each row, at least one.
            rows: which rows.
            wanted: the tokens, numbered through from 0, after which logits are wanted, at least one; None: all.

        Returns:
            [len(wanted), vocab_size] float32.
        """
        self._settle()
        self._batch_rows = []
        sequences = [self.sequence(row) for row in rows]
        batch = StepBatch.build(tokens, sequences, all_logits=True, device=self._device)
        if wanted is not None:
            batch.logits_indices = torch.tensor(wanted, dtype=torch.int64, device=self._device)
        return self._step(batch)

    def next(self, tokens: ListLike[int], rows: list[int]) -> Tensor:
        """[len(rows), vocab_size]: compute one further token of each of some rows."""
        self._settle()
        return self._step(self._next_batch(tokens, rows))

    def next_best(self, tokens: ListLike[int], rows: list[int], count: int) -> Best:
        """As :meth:`next`, but only the best logits of each row; the executor must be a :class:`CpuExecutor`."""
        assert isinstance(self.executor, CpuExecutor)
        batch = self._next_batch(tokens, rows)
        found = self.executor.step(batch, self.cache, head=("topk", count))
        assert found.top_ids is not None
        assert found.top_logits is not None
        # a step writes the same keys and values again
        return Best(found.top_ids, found.top_logits, lambda: self._step(batch))

    def next_chosen(
        self, tokens: ListLike[int], rows: list[int], sampling: Callable[[], SamplingRows | None]
    ) -> Chosen:
        """As :meth:`next`, but the device chooses the next tokens, and begins the step after this one meanwhile.

        Args:
            tokens, rows: as for :meth:`next`; the executor must be a cuda executor.
            sampling: how tokens are drawn, asked for only where the device cannot go on by itself.
        """
        # the loop's blocks do not reach the other batch's tables
        self._batch_rows = []
        if self._loop is None:
            from gpt2rt.graph.cuda import CudaExecutor
            from gpt2rt.graph.device_loop import DeviceLoop

            assert isinstance(self.executor, CudaExecutor)
            self._loop = DeviceLoop(self.executor, self.cache, len(self.sequences))
        loop = self._loop
        if not loop.pending or self._loop_rows != rows or list(self._loop_tokens) != list(tokens):
            self._settle()
            # a row's last token is never computed, so no step is begun ahead for it
            n_positions = self.executor.plan.n_positions
            limits = [min(self._max_tokens[row] - 1, n_positions) for row in rows]
            loop.start(tokens, [self.sequence(row) for row in rows], limits, sampling())
            loop.launch()
            self._loop_rows = list(rows)
        if loop.can_launch():
            loop.launch()
        self._loop_tokens = loop.read()
        return Chosen(list(self._loop_tokens), lambda: self._again(tokens, rows))

    def _again(self, tokens: ListLike[int], rows: list[int]) -> Tensor:
        """The logits of a step that was just computed."""
        self._settle()
        for row in rows:
            self.truncate(row, self.sequence(row).length - 1)
        return self.next(tokens, rows)

    def _settle(self) -> None:
        """Take back what the device began on its own."""
        if self._loop is not None and self._loop.pending:
            self._loop.forget()

    def _next_batch(self, tokens: ListLike[int], rows: list[int]) -> StepBatch:
        if self._batch is None:
            max_blocks = self.cache.blocks_for(max(self._max_tokens))
            self._batch = DecodeBatch(len(self.sequences), max_blocks)
        if self._batch_rows != rows:
            self._batch.set_sequences([self.sequence(row) for row in rows])
            self._batch_rows = list(rows)
        return self._batch.next(tokens)

    def reorder(self, first: int, parents: ListLike[int]) -> None:
        """Let neighbouring rows go on from others of them: forks of block tables, no copies.

        Args:
            first: the first of the rows, all of them begun.
            parents: for each of the rows, whose past it gets, counted from ``first``.
        """
        self._settle()
        old = [self.sequence(first + place) for place in range(len(parents))]
        for place, parent in enumerate(parents):
            self.sequences[first + place] = old[parent].fork() if parent in parents[:place] else old[parent]
        for place, sequence in enumerate(old):
            if place not in parents:
                sequence.free()
        self._batch_rows = []

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of a row from ``length`` on, if it has been begun and has more."""
        self._settle()
        sequence = self.sequences[row]
        if sequence is not None and length < sequence.length:
            sequence.truncate(length)
            self._batch_rows = []

    def free(self, rows: Iterable[int]) -> None:
        """Give the blocks of these rows back; rows without any are left alone."""
        self._settle()
        for row in rows:
            sequence, self.sequences[row] = self.sequences[row], None
            if sequence is not None:
                sequence.free()
        if self._loop is not None and not any(self.sequences):
            self._loop.close()

    def _step(self, batch: StepBatch) -> Tensor:
        logits = self.executor.step(batch, self.cache).logits
        assert logits is not None
        return logits
