"""The decode loop: one ragged step for all prompts, then one step per token for all rows that go on.

Every way to generate runs through :class:`Decoder`; ``generate`` and the command line only differ in what they do with
each token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Generator
from collections.abc import Sequence as ListLike
from typing import Any

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.errors import RequestError
from gpt2rt.graph import Executor, StepBatch

from .batch import DecodeBatch
from .logits import LogitsProcessorList
from .random import request_key, uniform
from .sampling import check_logits, check_scores, greedy, quiet_threads, sample
from .stopping import StoppingCriteriaList, StopStrings

_BLOCK_SIZE = 16

_NO_IDS = torch.empty((0, 0), dtype=torch.int64)

# the most prompt tokens of a step; as many take 230 MB of scratch memory in a 124M model
_MAX_STEP_TOKENS = 8192


@dataclasses.dataclass
class Row:
    """One continuation of one prompt.

    Attributes:
        prompt: which prompt it continues.
        ids: prompt and new tokens, no padding.
        prompt_length: how many of them are the prompt.
        max_length: it ends when it has as many ids.
        request, choice: where its random numbers come from, see ``random.uniform``.
        finish_reason: "stop" (an end token, a stop text, a criterion), "length" (``max_length``), "time"; None while it
            goes on.
        stop_state: what :class:`StopStrings` remembers of it.
    """

    prompt: int
    ids: list[int]
    prompt_length: int
    max_length: int
    request: int
    choice: int
    finish_reason: str | None = None
    stop_state: Any = None

    @property
    def new_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.ids[self.prompt_length :]


@dataclasses.dataclass
class DecodePlan:
    """Everything a decode loop is told; all of it checked before.

    Attributes:
        executor: runs the steps.
        prompts: the ids of each prompt.
        max_lengths: for each prompt, the most ids of a row.
        num_return_sequences: rows for each prompt.
        eos_token_ids: end tokens.
        pad_token_id: stands for the tokens of finished rows.
        processors, warpers: before and after the caller's own processors.
        user_processors, user_criteria: the caller's; they see all rows in the caller's layout.
        columns: [batch, length] int64 on CPU, the prompts in that layout.
        keep: [batch, length] bool, False at padding; None if there is none.
        do_sample, seed: how tokens are chosen.
        use_cache: False computes whole rows anew in each step.
        stop_strings: stop texts, or None.
        max_time: seconds, or None.
        output_scores, output_logits: what to record.
    """

    executor: Executor
    prompts: list[list[int]]
    max_lengths: list[int]
    num_return_sequences: int
    eos_token_ids: frozenset[int]
    pad_token_id: int
    processors: LogitsProcessorList
    warpers: LogitsProcessorList
    user_processors: ListLike[Any]
    user_criteria: ListLike[Any]
    columns: Tensor
    keep: Tensor | None
    do_sample: bool
    seed: int
    use_cache: bool
    stop_strings: StopStrings | None
    max_time: float | None
    output_scores: bool
    output_logits: bool


def make_rows(plan: DecodePlan) -> list[Row]:
    """A row for each continuation; equal prompts draw different numbers, as further choices of one request."""
    rows = []
    seen: dict[int, int] = {}
    for index, (prompt, limit) in enumerate(zip(plan.prompts, plan.max_lengths, strict=True)):
        key = request_key(prompt)
        first = seen.get(key, 0)
        seen[key] = first + plan.num_return_sequences
        for choice in range(first, first + plan.num_return_sequences):
            rows.append(Row(index, list(prompt), len(prompt), limit, key, choice))
    return rows


def make_cache(plan: DecodePlan) -> PagedKVCache:
    """A cache that holds all rows of a plan at their full length.

    Raises:
        RequestError: it would not fit into this machine's memory.
    """
    model = plan.executor.plan
    num_blocks = 0
    for prompt, limit in zip(plan.prompts, plan.max_lengths, strict=True):
        # full blocks of the prompt are shared; the last token of a row is never computed, but costs at most one block
        shared = len(prompt) // _BLOCK_SIZE if plan.use_cache else 0
        num_blocks += shared + plan.num_return_sequences * (-(-limit // _BLOCK_SIZE) - shared)
        # the prompt's own partial block lives on beside the copies until its first row writes to it
        num_blocks += 1
    num_bytes = num_blocks * _BLOCK_SIZE * model.n_layer * 2 * model.n_head * model.head_dim * model.dtype.itemsize
    memory = _memory_bytes(model.device)
    if num_bytes > memory:
        raise RequestError(
            f"{len(plan.prompts)} prompts with num_return_sequences={plan.num_return_sequences} need up to "
            f"{num_bytes / 1e9:.1f} GB of KV cache, but {model.device} has {memory / 1e9:.1f} GB of memory; ask for "
            "fewer or shorter rows"
        )
    return PagedKVCache(
        model.n_layer,
        model.n_head,
        model.head_dim,
        num_blocks,
        block_size=_BLOCK_SIZE,
        dtype=model.dtype,
        device=model.device,
    )


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Decoder:
    """Runs one call of ``generate``.

    Args:
        plan: what to do.

    Attributes:
        rows: all rows, in the order of the output.
        scores, logits: recorded steps, each [num_rows, vocab_size] float32, if asked for.
        cache: the KV cache.
    """

    def __init__(self, plan: DecodePlan) -> None:
        self.plan = plan
        # before the rows: a request for too many of them ends here
        self.cache = make_cache(plan)
        self.rows = make_rows(plan)
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self._sequences: list[Sequence | None] = [None] * len(self.rows)
        looked_at = plan.processors or plan.user_processors or plan.user_criteria
        self._history = _History(plan, len(self.rows)) if looked_at else None
        self._device = plan.executor.plan.device

    def steps(self) -> Generator[list[int], None, None]:
        """Generate, step by step; each item holds the new token of every row, ``pad_token_id`` for finished ones.

        All KV blocks are free again when the iterator ends, is closed or raises.

        Raises:
            NumericsError: the logits of a row hold NaN or infinity.
            RequestError: the processors left a row no token.
        """
        start = time.monotonic()
        try:
            live = list(range(len(self.rows)))
            if self.plan.stop_strings is not None:
                for row in self.rows:
                    row.stop_state = self.plan.stop_strings.begin(row.ids)
            logits = self._prefill()
            batch: DecodeBatch | None = None
            while True:
                tokens = self._choose(logits, live)
                step = [self.plan.pad_token_id] * len(self.rows)
                for index, token in zip(live, tokens, strict=True):
                    step[index] = token
                    self._append(self.rows[index], token)
                if self._history is not None:
                    self._history.append(step)
                self._apply_criteria(live, start)
                yield step
                going_on = [index for index in live if self.rows[index].finish_reason is None]
                if not going_on:
                    return
                if len(going_on) < len(live):
                    self._free(index for index in live if self.rows[index].finish_reason is not None)
                    live, batch = going_on, None
                if not self.plan.use_cache:
                    logits = self._recompute(live)
                    continue
                if batch is None:
                    batch = self._decode_batch(live)
                logits = self._logits(batch.next([self.rows[index].ids[-1] for index in live]))
        finally:
            self._free(range(len(self.rows)))

    # ---- the model -----------------------------------------------------------------------------------------------

    def _logits(self, batch: StepBatch) -> Tensor:
        logits = self.plan.executor.step(batch, self.cache).logits
        assert logits is not None
        return logits

    def _compute(self, tokens: ListLike[ListLike[int]], sequences: ListLike[Sequence]) -> Tensor:
        """[len(sequences), vocab_size]: ragged rows in as few steps as the scratch memory of a step allows."""
        logits, start, size = [], 0, 0
        for stop, ids in enumerate(tokens, 1):
            size += len(ids)
            if stop == len(tokens) or size + len(tokens[stop]) > _MAX_STEP_TOKENS:
                batch = StepBatch.build(tokens[start:stop], sequences[start:stop], device=self._device)
                logits.append(self._logits(batch))
                start, size = stop, 0
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _prefill(self) -> Tensor:
        """[num_rows, vocab_size]: each prompt once, whose cache its rows then share."""
        count = self.plan.num_return_sequences
        firsts = range(0, len(self.rows), count)
        for index in firsts:
            self._sequences[index] = Sequence(self.cache)
        sequences = self._live_sequences(list(firsts))
        logits = self._compute(self.plan.prompts, sequences)
        if count == 1:
            return logits
        for index, sequence in zip(firsts, sequences, strict=True):
            for other in range(index + 1, index + count):
                self._sequences[other] = sequence.fork()
        return logits.repeat_interleave(count, dim=0)

    def _live_sequences(self, live: list[int]) -> list[Sequence]:
        return [sequence for index in live if (sequence := self._sequences[index]) is not None]

    def _decode_batch(self, live: list[int]) -> DecodeBatch:
        longest = max(self.rows[index].max_length for index in live)
        batch = DecodeBatch(len(live), self.cache.blocks_for(longest), self._device)
        batch.set_sequences(self._live_sequences(live))
        return batch

    def _recompute(self, live: list[int]) -> Tensor:
        """The logits of whole rows, computed anew."""
        sequences = self._live_sequences(live)
        for sequence in sequences:
            sequence.truncate(0)
        return self._compute([self.rows[index].ids for index in live], sequences)

    def _free(self, indices: Any) -> None:
        for index in indices:
            sequence, self._sequences[index] = self._sequences[index], None
            if sequence is not None:
                sequence.free()

    # ---- the next token ------------------------------------------------------------------------------------------

    def _choose(self, logits: Tensor, live: list[int]) -> list[int]:
        plan = self.plan
        check_logits(logits, live)
        if plan.output_logits:
            self.logits.append(self._all_rows(logits, live).clone())
        scores = logits
        if plan.processors:
            assert self._history is not None
            with quiet_threads(scores):
                scores = plan.processors(self._history.ids(live), scores)
        if plan.user_processors:
            scores = self._user_scores(scores, live)
        changed = plan.processors or plan.user_processors
        with quiet_threads(scores) if changed or plan.do_sample else contextlib.nullcontext():
            if changed:
                check_scores(scores, live)
            # warpers look at the scores alone
            scores = plan.warpers(_NO_IDS, scores)
            if plan.output_scores:
                self.scores.append(self._all_rows(scores, live).clone())
            if not plan.do_sample:
                return greedy(scores)
            rows = (self.rows[index] for index in live)
            return sample(scores, [uniform(plan.seed, row.request, row.choice, len(row.ids)) for row in rows])

    def _all_rows(self, values: Tensor, live: list[int]) -> Tensor:
        """[num_rows, vocab_size] from the live rows' values; finished rows are 0."""
        if len(live) == len(self.rows):
            return values
        everything = values.new_zeros(len(self.rows), values.size(1))
        everything[live] = values
        return everything

    def _user_scores(self, scores: Tensor, live: list[int]) -> Tensor:
        """The caller's processors see every row of the call, so that what they keep for a row stays its own."""
        assert self._history is not None
        scores = self._all_rows(scores, live)
        for processor in self.plan.user_processors:
            scores = processor(self._history.columns(), scores)
            if not isinstance(scores, Tensor) or scores.shape != (len(self.rows), self.plan.executor.plan.vocab_size):
                shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise RequestError(
                    f"the logits processor {type(processor).__name__} returned {shape}, expected a tensor of shape "
                    f"[{len(self.rows)}, {self.plan.executor.plan.vocab_size}]"
                )
        return scores if len(live) == len(self.rows) else scores[live]

    # ---- the end of a row ----------------------------------------------------------------------------------------

    def _append(self, row: Row, token: int) -> None:
        row.ids.append(token)
        stops = self.plan.stop_strings
        if stops is not None:
            row.stop_state, found = stops.put(row.stop_state, token)
            if found:
                row.finish_reason = "stop"
        if token in self.plan.eos_token_ids:
            row.finish_reason = "stop"
        elif row.finish_reason is None and len(row.ids) >= row.max_length:
            row.finish_reason = "length"

    def _apply_criteria(self, live: list[int], start: float) -> None:
        """Finish rows by the clock and by the caller's criteria."""
        late = self.plan.max_time is not None and time.monotonic() - start > self.plan.max_time
        stopped: list[bool] = []
        if self.plan.user_criteria:
            assert self._history is not None
            scores = tuple(self.scores) if self.plan.output_scores else None
            stopped = StoppingCriteriaList(self.plan.user_criteria)(self._history.columns(), scores).tolist()
        for index in live:
            row = self.rows[index]
            if row.finish_reason is None and stopped and stopped[index]:
                row.finish_reason = "stop"
            if row.finish_reason is None and late:
                row.finish_reason = "time"


class _History:
    """The tokens so far as tensors, for processors and criteria that look at them."""

    def __init__(self, plan: DecodePlan, num_rows: int) -> None:
        batch, prompt_columns = plan.columns.shape
        longest = max(limit - len(prompt) for limit, prompt in zip(plan.max_lengths, plan.prompts, strict=True))
        self._length = prompt_columns
        device = plan.executor.plan.device
        repeated = plan.columns.to(device).repeat_interleave(num_rows // batch, dim=0)
        # what the caller's own code sees
        self._columns = torch.zeros((num_rows, prompt_columns + longest), dtype=torch.int64, device=device)
        self._columns[:, :prompt_columns] = repeated
        # what ours sees: padding is negative, and no token
        self._ids = self._columns
        if plan.keep is not None:
            self._ids = self._columns.clone()
            padding = ~plan.keep.to(device).repeat_interleave(num_rows // batch, dim=0)
            self._ids[:, :prompt_columns].masked_fill_(padding, -1)

    def append(self, step: list[int]) -> None:
        """Add the new token of every row."""
        column = torch.tensor(step, dtype=torch.int64, device=self._columns.device)
        self._columns[:, self._length] = column
        if self._ids is not self._columns:
            self._ids[:, self._length] = column
        self._length += 1

    def columns(self) -> Tensor:
        """[num_rows, length] int64, every row as the caller laid it out; finished rows are padded."""
        return self._columns[:, : self._length]

    def ids(self, live: list[int]) -> Tensor:
        """[len(live), length] int64, -1 for padding."""
        ids = self._ids[:, : self._length]
        return ids if len(live) == ids.size(0) else ids[live]


def finished_sequences(decoder: Decoder) -> Tensor:
    """[num_rows, length] int64 on CPU: the caller's prompt columns, the new tokens, then padding."""
    plan = decoder.plan
    new_ids = [row.new_ids for row in decoder.rows]
    longest = max(len(ids) for ids in new_ids)
    padded = [ids + [plan.pad_token_id] * (longest - len(ids)) for ids in new_ids]
    new = torch.tensor(padded, dtype=torch.int64)
    return torch.cat([plan.columns.repeat_interleave(plan.num_return_sequences, dim=0), new], dim=1)
