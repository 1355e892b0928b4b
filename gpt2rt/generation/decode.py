"""The decode loop: one ragged step for all prompts, then one step per token for all rows that go on.

Every way to generate runs through :class:`Decoder`; ``generate`` and the command line only differ in what they do with
each token.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterable
from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache
from gpt2rt.graph import Executor

from .batch import Best, CachedRows, Chosen
from .choice import Chooser
from .logits import LogitsProcessorList
from .past import read_rows
from .random import request_key
from .reserve import new_cache
from .scores import make_history
from .starts import BLOCK_SIZE, LayerPairs, Starts
from .stopping import StoppingCriteriaList, StopStrings

if TYPE_CHECKING:
    from .candidates import Speculation
    from .modes import Loop


@dataclasses.dataclass
class Row:
    """One continuation of one prompt.

    Attributes:
        prompt: which prompt it continues.
        ids: prompt and new tokens, no padding.
        prompt_length: how many of them are the prompt.
        max_length: it ends when it has as many ids.
        request, choice: where its random numbers come from, see ``random.uniform``.
        start: the first of its ids that the model sees; above 0 only where the context policy lets rows slide.
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
    start: int = 0
    finish_reason: str | None = None
    stop_state: Any = None

    @property
    def new_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.ids[self.prompt_length :]

    @property
    def num_new(self) -> int:
        """How many they are."""
        return len(self.ids) - self.prompt_length

    @property
    def window(self) -> list[int]:
        """The tokens that the model sees."""
        return self.ids[self.start :]


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
        prefill_chunk_size: the most tokens of a prompt in one step; None: as many as the scratch memory allows.
        context_stride: tokens by which a row's window slides when it is full; None: rows end with the positions.
        starts: what is in the cache of each prompt before the first step, or None.
        speculation: how candidates for the next tokens are found, or None.
        num_beams: running beams of each prompt; 1: no beam search.
        length_penalty, early_stopping: see :class:`BeamSearch`.
        remove_invalid_values: NaN and infinity in the logits are no error, for a processor takes them out.
        output_past: return keys and values.
        kv_cache_dtype: what keys and values are stored in; None: the executor's ``cache_dtype``.
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
    prefill_chunk_size: int | None = None
    context_stride: int | None = None
    starts: Starts | None = None
    speculation: Speculation | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    remove_invalid_values: bool = False
    output_past: bool = False
    kv_cache_dtype: torch.dtype | None = None

    @property
    def num_rows(self) -> int:
        """Rows that are computed side by side."""
        return len(self.prompts) * max(self.num_beams, self.num_return_sequences)

    @property
    def max_new_tokens(self) -> int:
        """The most new tokens of a row."""
        return max(limit - len(prompt) for prompt, limit in zip(self.prompts, self.max_lengths, strict=True))


def prompt_keys(plan: DecodePlan) -> list[tuple[int, int]]:
    """For each prompt, the request and the first choice of its random numbers; see ``random.uniform``.

    Equal prompts draw different numbers, as further choices of one request.
    """
    keys, seen = [], dict[int, int]()
    for index, prompt in enumerate(plan.prompts):
        key = request_key(prompt)
        if plan.starts is not None:
            key ^= plan.starts.rows[index].key
        keys.append((key, seen.get(key, 0)))
        seen[key] = seen.get(key, 0) + plan.num_return_sequences
    return keys


def cache_lengths(plan: DecodePlan) -> list[int]:
    """For each prompt, the most tokens that a row of it has in the cache.

    The last token is never computed, but costs at most one block. A cache that is returned is filled up to the longest
    row, as in transformers.
    """
    new = [limit - len(prompt) for prompt, limit in zip(plan.prompts, plan.max_lengths, strict=True)]
    hidden = [0] * len(new) if plan.starts is None else [start.hidden for start in plan.starts.rows]
    return [
        length + len(prompt) + (max(new) if plan.output_past else own)
        for length, prompt, own in zip(hidden, plan.prompts, new, strict=True)
    ]


def make_rows(plan: DecodePlan) -> list[Row]:
    """A row for each continuation of each prompt."""
    rows = []
    n_positions = plan.executor.plan.n_positions
    keys = prompt_keys(plan)
    for index, (prompt, limit) in enumerate(zip(plan.prompts, plan.max_lengths, strict=True)):
        key, first = keys[index]
        for choice in range(first, first + plan.num_return_sequences):
            start = max(0, len(prompt) - n_positions)
            rows.append(Row(index, list(prompt), len(prompt), limit, key, choice, start))
    return rows


def make_cache(plan: DecodePlan, executor: Executor | None = None) -> PagedKVCache:
    """A cache that holds all rows of a plan at their full length.

    Args:
        plan: the rows.
        executor: whose keys and values are kept; None: the plan's own.

    Raises:
        RequestError: it would not fit into this machine's memory.
    """
    executor = executor or plan.executor
    model = executor.plan
    num_blocks = 0
    for prompt, limit, length in zip(plan.prompts, plan.max_lengths, cache_lengths(plan), strict=True):
        slides = limit > model.n_positions + 1
        # full blocks of the prompt are shared, unless rows slide off it; the last token of a row is never computed, but
        # costs at most one block
        shared = len(prompt) // BLOCK_SIZE if plan.use_cache and not slides else 0
        longest = min(length, model.n_positions)
        num_blocks += shared + plan.num_return_sequences * (-(-longest // BLOCK_SIZE) - shared)
        # the prompt's own partial block lives on beside the copies until its first row writes to it
        num_blocks += 1
    return new_cache(
        executor,
        num_blocks,
        f"{len(plan.prompts)} prompts with num_return_sequences={plan.num_return_sequences}",
        "ask for fewer or shorter rows",
        plan.kv_cache_dtype,
    )


class Decoder:
    """Runs one call of ``generate``.

    Args:
        plan: what to do.

    Attributes:
        rows: all rows, in the order of the output.
        scores, logits: recorded steps, each [num_rows, vocab_size] float32, if asked for.
        cache: the KV cache.
        past: of each layer, keys and values of all rows at the end, if asked for.
    """

    def __init__(self, plan: DecodePlan) -> None:
        self.plan = plan
        # before the rows: a request for too many of them ends here
        self.cache = make_cache(plan)
        self.rows = make_rows(plan)
        self.past: LayerPairs | None = None
        lengths = cache_lengths(plan)
        self.cached = CachedRows(plan.executor, self.cache, [lengths[row.prompt] for row in self.rows])
        self._history = make_history(plan)
        self._chooser = Chooser(plan, self.rows, self._history)
        self.scores, self.logits = self._chooser.scores, self._chooser.logits
        self._began = 0.0

    def steps(self) -> Generator[list[int], None, None]:
        """Generate, step by step; each item holds the new token of every row, ``pad_token_id`` for finished ones.

        All KV blocks are free again when the iterator ends, is closed or raises.

        Raises:
            NumericsError: the logits of a row hold NaN or infinity.
            RequestError: the processors left a row no token.
        """
        self._begin()
        try:
            live = list(range(len(self.rows)))
            found: Tensor | Best | Chosen = self._prefill()
            while True:
                tokens = self._choose(found, live)
                step = [self.plan.pad_token_id] * len(self.rows)
                for index, token in zip(live, tokens, strict=True):
                    step[index] = token
                self._append(live, tokens)
                self._apply_clock(live)
                yield step
                going_on = [index for index in live if self.rows[index].finish_reason is None]
                if not going_on:
                    self._end()
                    return
                if len(going_on) < len(live):
                    self._release(index for index in live if self.rows[index].finish_reason is not None)
                    live = going_on
                found = self._next(live)
        finally:
            self.cached.free(range(len(self.rows)))

    def _begin(self) -> None:
        self._began = time.monotonic()
        if self.plan.stop_strings is not None:
            for row in self.rows:
                row.stop_state = self.plan.stop_strings.begin(row.ids)

    def _release(self, indices: Iterable[int]) -> None:
        """Rows have ended: give their blocks back, unless the cache is to be returned."""
        if not self.plan.output_past:
            self.cached.free(indices)

    def _end(self) -> None:
        """All rows have ended."""
        if self.plan.output_past:
            self.past = read_rows(self.plan, self.cached, self.rows)

    # ---- the model -----------------------------------------------------------------------------------------------

    def _prefill(self) -> Tensor:
        """[num_rows, vocab_size]: the logits after each row's prompt."""
        count = self.plan.num_return_sequences
        windows = [row.window for row in self.rows[::count]]
        return self.cached.prefill(windows, count, self.plan.starts, self.plan.prefill_chunk_size)

    def _choose(self, found: Tensor | Best | Chosen, live: list[int]) -> list[int]:
        """The next token of each row, from its logits or the best of them, or as the device chose it."""
        if isinstance(found, Best):
            return self._chooser.choose_best(found, live)
        if isinstance(found, Chosen):
            return self._chooser.take(found, live)
        return self._chooser.choose(found, live)

    def _next(self, live: list[int]) -> Tensor | Best | Chosen:
        """[len(live), vocab_size]: the logits after each row's newest token; or less, where that suffices."""
        moved = self._slide(live)
        if not self.plan.use_cache:
            moved = live
            for index in live:
                self.cached.truncate(index, 0)
        newest = [self.rows[index].ids[-1] for index in live]
        if not moved and self._chooser.on_device:
            return self.cached.next_chosen(newest, live, lambda: self._chooser.sampling_rows(live))
        if not moved and self._chooser.best_count:
            return self.cached.next_best(newest, live, self._chooser.best_count)
        if not moved:
            return self.cached.next(newest, live)
        anew = set(moved)
        tokens = [self.rows[i].window if i in anew else [token] for i, token in zip(live, newest, strict=True)]
        return self.cached.compute(tokens, live)

    def _slide(self, live: list[int]) -> list[int]:
        """Move the windows that are full, and return the rows whose windows must be computed anew."""
        if self.plan.context_stride is None:
            return []
        n_positions = self.plan.executor.plan.n_positions
        moved = [index for index in live if len(self.rows[index].ids) - self.rows[index].start > n_positions]
        for index in moved:
            row = self.rows[index]
            row.start = len(row.ids) - (n_positions - self.plan.context_stride)
            self.cached.truncate(index, 0)
        return moved

    # ---- the end of a row ----------------------------------------------------------------------------------------

    def _append(self, live: list[int], tokens: list[int]) -> None:
        """Give rows with equally many new tokens one more, and finish those that end with it."""
        step = self.rows[live[0]].num_new
        for index, token in zip(live, tokens, strict=True):
            self._append_token(self.rows[index], token)
        if self._history is None:
            return
        self._history.put(step, live, tokens)
        if self.plan.user_criteria:
            scores = tuple(self.scores) if self.plan.output_scores else None
            stopped = StoppingCriteriaList(self.plan.user_criteria)(self._history.columns(step + 1), scores).tolist()
            self._finish([index for index in live if stopped[index]], "stop")

    def _append_token(self, row: Row, token: int) -> None:
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

    def _apply_clock(self, live: list[int]) -> None:
        """Finish all rows when the time is over."""
        if self.plan.max_time is not None and time.monotonic() - self._began > self.plan.max_time:
            self._finish(live, "time")

    def _finish(self, indices: list[int], reason: str) -> None:
        for index in indices:
            row = self.rows[index]
            row.finish_reason = row.finish_reason or reason


def finished_sequences(decoder: Loop) -> Tensor:
    """[num_rows, length] int64 on CPU: the caller's prompt columns, the new tokens, then padding."""
    plan = decoder.plan
    new_ids = [row.new_ids for row in decoder.rows]
    longest = max(len(ids) for ids in new_ids)
    padded = [ids + [plan.pad_token_id] * (longest - len(ids)) for ids in new_ids]
    new = torch.tensor(padded, dtype=torch.int64)
    return torch.cat([plan.columns.repeat_interleave(plan.num_return_sequences, dim=0), new], dim=1)
