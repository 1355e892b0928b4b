"""The cuda executor: a step as a chain of Triton kernels, replayed as a CUDA graph where its size has one.

Steps of one token a sequence are rounded up to a batch of 1, 2, 4, ... 256 rows and to a context of 256, 512, 1024,
... tokens; steps with prompts to 16, 32, ... 1024 tokens of 1, 4, 16 or 64 sequences. The rows that fill such a batch
up are padding: they have no cache slot and no length, and change nothing. Each of these sizes has its buffers and, for
each cache, its graph. Other steps (more tokens or sequences, more rows of logits than sequences) are launched kernel by
kernel.

Numbers: the residual stream, sums, norms, softmax and logits are float32; products of 16-bit weights are those of
tensor cores; quantised weights are multiplied by float activations, also where the cpu executor takes int8 ones. The
results of a row may differ in the last bits between up to 8 rows, up to 64, and more, and between decoding and prompts,
unless the executor is batch invariant. They do not depend on the other rows' contents.
"""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.cache import PagedKVCache
from gpt2rt.ops.cuda_extension import use_cuda_rows, use_persistent_decode

from .batch import StepBatch, StepOutput
from .chain import KERNEL_ACTIVATIONS, SPLIT, Buffers, Chain, unsupported
from .cuda_graphs import GraphStore
from .executor import check_step
from .inputs import StepSize
from .persistent import PersistentStep
from .persistent import unsupported as persistent_unsupported
from .plan import Plan
from .streams import StreamOrder

__all__ = ["BATCH_SIZES", "PROMPT_LENGTHS", "CudaExecutor", "unsupported"]

#: rows of the decode steps that have graphs
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: tokens of the prompts that have graphs, of all prompts of a step together
PROMPT_LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
#: prompts of such a step; each may give one row of logits
PROMPT_COUNTS = (1, 4, 16, 64)
#: splits of 64 tokens that decode steps are rounded up to; longer contexts to multiples of the last
SPLITS = (4, 8, 16)


def pdl_supported(device: torch.device) -> bool:
    """Programmatic dependent launch: sm_90 and later, unless ``GPT2RT_CUDA_PDL=0``."""
    if device.type != "cuda" or os.environ.get("GPT2RT_CUDA_PDL") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def graphs_enabled() -> bool:
    """Whether graphs are captured; ``GPT2RT_CUDA_GRAPHS=0`` says no."""
    return os.environ.get("GPT2RT_CUDA_GRAPHS") != "0"


def _round_up(value: int, sizes: tuple[int, ...]) -> int | None:
    return next((size for size in sizes if size >= value), None)


def num_splits_for(max_seq_len: int) -> int:
    """Splits that a decode step over so many tokens is launched with."""
    splits = -(-max_seq_len // SPLIT)
    return _round_up(splits, SPLITS) or -(-splits // SPLITS[-1]) * SPLITS[-1]


def cache_key(cache: PagedKVCache) -> tuple[object, ...]:
    """What a graph holds of a cache: another one at the same place, of the same shape, is as good."""
    data, scales = cache.data, cache.scales
    return data.data_ptr(), None if scales is None else scales.data_ptr(), tuple(data.shape), data.dtype


class CudaExecutor:
    """Runs steps of a plan as Triton kernels.

    Args:
        plan: what to run; weights on a CUDA device. (On the CPU it runs in Triton's interpreter, for tests.)
        batch_invariant: a token's bits do not depend on its company, nor on whether it is decoded or in a prompt, at
            some cost in speed; None = ``GPT2RT_BATCH_INVARIANT``, else False.
        pdl: programmatic dependent launch; None = where the device has it, unless ``GPT2RT_CUDA_PDL=0``.
        graphs: capture CUDA graphs; None = unless ``GPT2RT_CUDA_GRAPHS=0``.

    Attributes:
        batch_invariant, pdl: what was chosen.
        cache_dtype: what keys and values are stored in unless the caller says otherwise: the plan's dtype.
        chain: the launches of a step.
        graphs: those that were captured, and why not if none are.
        persistent_disabled: why no step runs as one launch of the persistent kernel (persistent.py); empty if some do.
        lock: held while launches of this executor are queued.
        streams: orders them where callers use several streams.
        loop_states: of decode loops, for ``device_loop.py`` alone.

    Raises:
        ValueError: this executor cannot run the plan (see ``chain.unsupported``).
        ImportError: ``GPT2RT_CUDA_INT4=1`` or ``GPT2RT_CUDA_PERSISTENT=1``, but there is no library of CUDA C++
            kernels.
        torch.cuda.OutOfMemoryError: the weights do not fit on the device a second time in the kernels' layout.
    """

    name = "cuda"

    def __init__(
        self,
        plan: Plan,
        *,
        batch_invariant: bool | None = None,
        pdl: bool | None = None,
        graphs: bool | None = None,
    ) -> None:
        if batch_invariant is None:
            batch_invariant = os.environ.get("GPT2RT_BATCH_INVARIANT", "0") not in ("", "0")
        self.plan = plan
        self.cache_dtype = plan.dtype
        self.batch_invariant = batch_invariant
        self.pdl = pdl_supported(plan.device) if pdl is None else pdl
        use_cuda_rows(plan.device)
        self.chain = Chain(plan, batch_invariant=batch_invariant, pdl=self.pdl)
        self.persistent_disabled = self._use_persistent()
        self.graphs = GraphStore(plan.device, enabled=graphs_enabled() if graphs is None else graphs)
        self._buffers: dict[StepSize, Buffers] = {}
        # of decode loops that have ended (device_loop.py), by their sizes
        self.loop_states: dict[tuple[int, bool, int, int], list[Any]] = {}
        # buffers are shared by all who call step, and so are graphs
        self.lock = threading.Lock()
        self.streams = StreamOrder(plan.device)
        # the weights were laid out on this stream
        self.streams.join()
        self.streams.settle_with(self)

    def _use_persistent(self) -> str:
        """Give single decode steps to the persistent kernel if that is asked for; says why not."""
        if not use_persistent_decode(self.plan.device):
            return "GPT2RT_CUDA_PERSISTENT is not set"
        reason = "the executor is batch invariant" if self.batch_invariant else persistent_unsupported(self.plan)
        if not reason:
            try:
                self.chain.persistent = PersistentStep(self.plan, KERNEL_ACTIVATIONS)
            except ValueError as error:
                reason = str(error)
        if reason:
            warnings.warn(
                f"GPT2RT_CUDA_PERSISTENT is set, but this model's steps are chains of Triton kernels: {reason}",
                RuntimeWarning,
                stacklevel=4,
            )
        return reason

    def with_positions(self, wpe: Tensor) -> CudaExecutor:
        """This executor with another position table [n_positions, n_embd]; the packed weights are shared."""
        other = copy.copy(self)
        other.chain = self.chain.with_positions(wpe)
        other.plan = other.chain.plan
        other.graphs = GraphStore(self.plan.device, enabled=not self.graphs.disabled)
        other._buffers = {}
        other.loop_states = {}
        # the lock and the order of streams are shared, like the persistent kernel's weights
        with self.lock:
            # the tables and the workspace that are its own were written on this stream
            other.streams.join()
        other.streams.settle_with(other)
        return other

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step of one token reads."""
        return self.chain.weight_bytes

    @torch.no_grad()
    def step(
        self, batch: StepBatch, cache: PagedKVCache, *, return_hidden: bool = False, head: str = "logits"
    ) -> StepOutput:
        """Run one step. It returns when the launches are queued; reading a result waits for the device.

        Args:
            batch: the tokens, on the plan's device, or, at the cost of one copy to it, on the CPU.
            cache: where their keys and values go, and those before them are read; any of its dtypes.
            return_hidden: also return the rows after the final norm.
            head: "logits", or "argmax": only the first of the largest logits of each row, in ``top_ids`` and
                ``top_logits`` [num_logits, 1].

        Returns:
            float32 tensors of their own, which later steps leave alone. A row that saw an id, position or block
            outside its table is NaN.

        Raises:
            ValueError: the batch or the cache does not fit the plan, or ``head`` is neither.
        """
        check_step(self.plan, batch, cache)
        if head not in ("logits", "argmax") or (head == "argmax" and not self.chain.has_head):
            raise ValueError(f'head must be "logits", or "argmax" of a plan with an output layer, got {head!r}')
        with self.lock:
            self.streams.join(cache.data, cache.scales)
            buffers, bound, key = self._prepare(batch, cache, return_hidden)
            buffers.load(batch)

            def launches() -> None:
                self.chain.run(buffers, cache, bound, hidden=return_hidden or not self.chain.has_head)

            if key is None:
                launches()
            else:
                self.graphs.run(key, launches)
            return self._output(buffers, batch, return_hidden, head, private=key is None)

    def _output(
        self, buffers: Buffers, batch: StepBatch, return_hidden: bool, head: str, *, private: bool
    ) -> StepOutput:
        """What was asked for, in tensors that the next step leaves alone; ``private``: the buffers are."""
        count = batch.logits_indices.numel()
        rows = None
        if buffers.size.num_splits and not _in_order(batch.logits_indices):
            # a decode step gives its rows in their own order
            rows = batch.logits_indices.to(self.plan.device)
        hidden = None
        if return_hidden:
            hidden = buffers.hidden[:count] if rows is None else buffers.hidden[rows]
            hidden = hidden.clone() if rows is None and not private else hidden
        if not self.chain.has_head:
            return StepOutput(None, hidden)
        logits = buffers.logits[:count] if rows is None else buffers.logits[rows]
        if head == "logits":
            return StepOutput(logits.clone() if rows is None and not private else logits, hidden)
        ids = ops.argmax(logits, finite=True)
        best = logits.gather(1, ids.clamp(min=0)[:, None]).masked_fill(ids[:, None] < 0, torch.nan)
        return StepOutput(None, hidden, top_ids=ids[:, None], top_logits=best)

    def _prepare(
        self, batch: StepBatch, cache: PagedKVCache, return_hidden: bool
    ) -> tuple[Buffers, int, tuple[object, ...] | None]:
        """Buffers for a batch, the bound of its query lengths, and the key of its graph; None: it has none."""
        size = self._bucket(batch, cache)
        if size is None:
            # they go when the step is queued, and may: whoever gets their memory is on the same stream, behind it
            return Buffers(self.chain, self._exact(batch, cache)), batch.max_query_len, None
        buffers = self._buffers.get(size)
        if buffers is None:
            # contexts differ in the partial attention alone
            alike = (b for b in self._buffers.values() if size.num_splits and b.size.like(size))
            buffers = self._buffers[size] = Buffers(self.chain, size, next(alike, None))
        return buffers, 1 if size.num_splits else size.num_tokens, (size, return_hidden, *cache_key(cache))

    def _max_blocks(self, cache: PagedKVCache) -> int:
        return cache.blocks_for(self.plan.n_positions)

    def _bucket(self, batch: StepBatch, cache: PagedKVCache) -> StepSize | None:
        """The size that a step is rounded up to; None if there is none."""
        tokens, seqs, logits = batch.input_ids.numel(), batch.seq_lens.numel(), batch.logits_indices.numel()
        blocks = self._max_blocks(cache)
        if batch.max_query_len == 1 and tokens == seqs == logits:
            rows = _round_up(seqs, BATCH_SIZES)
            return None if rows is None else StepSize(rows, rows, rows, blocks, num_splits_for(batch.max_seq_len))
        length, count = _round_up(tokens, PROMPT_LENGTHS), _round_up(seqs, PROMPT_COUNTS)
        if length is None or count is None or logits > count:
            return None
        return StepSize(length, count, count, blocks, 0)

    def _exact(self, batch: StepBatch, cache: PagedKVCache) -> StepSize:
        seqs, logits = batch.seq_lens.numel(), batch.logits_indices.numel()
        return StepSize(batch.input_ids.numel(), seqs, logits, self._max_blocks(cache), 0)

    def warm_up(
        self,
        cache: PagedKVCache,
        *,
        batch_sizes: Iterable[int] = BATCH_SIZES[:4],
        prompt_lengths: Iterable[int] = PROMPT_LENGTHS,
        loops: bool = True,
    ) -> int:
        """Compile every kernel and capture every graph for these sizes, so that no request waits for that.

        Steps that have no graph, such as those with a row of logits for each token, are run too, with up to as many
        tokens as the longest of the prompts, for their kernels. Compiled kernels are kept on disk by Triton
        (``TRITON_CACHE_DIR``, ``~/.triton/cache``), so a later process only loads them.

        What is left for when it is first met is a capture, which needs no compiler: of steps that return hidden states,
        and of decode loops beyond the shortest context.

        Args:
            cache: whose graphs are captured; only free blocks of it are written, by the loops, one a row.
            batch_sizes: rows of decode steps, rounded up to ``BATCH_SIZES``, and sequences of steps with prompts.
            prompt_lengths: tokens of the prompts of a step, rounded up to ``PROMPT_LENGTHS``.
            loops: also decode loops (device_loop.py), which have a graph for each way to choose tokens.

        Returns:
            How many sizes were run.

        Raises:
            ValueError: a size is not positive.
            OutOfBlocksError: the cache has fewer free blocks than rows, and there are loops.
            torch.cuda.OutOfMemoryError: there is no memory for the buffers of a step or for its graph.
        """
        from .device_loop import warm_up_loop

        batch_sizes, n_positions = list(batch_sizes), self.plan.n_positions
        sizes = []
        for rows in batch_sizes:
            if rows < 1:
                raise ValueError(f"batch_sizes must be positive, got {rows}")
            longest = -(-n_positions // SPLIT) * SPLIT
            for context in sorted({min(splits * SPLIT, longest) for splits in (*SPLITS, num_splits_for(longest))}):
                sizes.append((rows, 1, min(context, n_positions), 1))
        lengths = sorted(set(prompt_lengths))
        if lengths and lengths[0] < 1:
            raise ValueError(f"prompt_lengths must be positive, got {lengths[0]}")
        most = _round_up(max(batch_sizes, default=1), PROMPT_COUNTS) or PROMPT_COUNTS[-1]
        # a prompt may be rounded up to a length that none has
        for length in sorted({min(length, n_positions) for length in lengths}):
            for count in PROMPT_COUNTS[: PROMPT_COUNTS.index(most) + 1]:
                queries = -(-length // count)
                if queries > 1 or count == 1:
                    sizes.append((count, queries, queries, 1))
        for length in (2, *lengths):
            # a row of logits for each token: that has no graph, and kernels for each number of rows
            rows = -(-length // n_positions)
            sizes.append((rows, -(-length // rows), -(-length // rows), -(-length // rows)))
        for size in sizes:
            self.step(_padding(*size, cache, self.plan.device), cache)
        if loops and self.chain.has_head:
            for rows in batch_sizes:
                warm_up_loop(self, cache, min(rows, BATCH_SIZES[-1]))
        return len(sizes)

    def __repr__(self) -> str:
        graphs = self.graphs.disabled or f"{len(self.graphs)} graphs"
        return f"CudaExecutor({self.plan.device}, {graphs}, pdl={self.pdl}, batch_invariant={self.batch_invariant})"


def _in_order(indices: Tensor) -> bool:
    """Whether they are 0, 1, 2, ...; False where finding out would take a wait for a device."""
    return indices.device.type == "cpu" and np.array_equal(indices.numpy(), np.arange(len(indices)))


def _padding(
    rows: int, queries: int, context: int, logits: int, cache: PagedKVCache, device: torch.device
) -> StepBatch:
    """A step that computes and changes nothing: of padding rows, said to be of this size; ``logits``: of each row."""
    tokens = rows * queries
    zeros = torch.zeros(tokens, dtype=torch.int64, device=device)
    return StepBatch(
        input_ids=zeros,
        position_ids=zeros,
        query_start_loc=torch.zeros(rows + 1, dtype=torch.int32, device=device),
        seq_lens=torch.zeros(rows, dtype=torch.int32, device=device),
        block_table=torch.zeros((rows, cache.blocks_for(context)), dtype=torch.int32, device=device),
        slot_mapping=zeros - 1,
        logits_indices=torch.arange(rows * logits, dtype=torch.int64, device=device),
        max_query_len=queries,
        max_seq_len=context,
    )
