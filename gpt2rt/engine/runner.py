"""Runs the parts of a step on the executor; what cannot be computed is found out and left out."""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache
from gpt2rt.graph import Executor, StepBatch, StepOutput
from gpt2rt.graph.cpu import CpuExecutor
from gpt2rt.graph.transfer import to_device

from .batch import Item, StepBuffers
from .request import Branch

_LOG = logging.getLogger("gpt2rt.engine")


@dataclasses.dataclass(slots=True)
class Row:
    """A branch that gets a token after a step, and the part of the step that its logits come from."""

    branch: Branch
    item: Item


@dataclasses.dataclass(slots=True)
class Group:
    """What one call of the executor computed; ``direct``: its rows of logits are those that are sampled."""

    items: list[Item]
    output: StepOutput
    direct: bool


class StepRunner:
    """Runs steps.

    Args:
        executor: of the model.
        cache: keys and values.
        buffers: for the batches.
        fail: is told of a part that cannot be computed, even alone, and why.
    """

    def __init__(
        self,
        executor: Executor,
        cache: PagedKVCache,
        buffers: StepBuffers,
        fail: Callable[[Item, Exception], None],
    ) -> None:
        self.executor = executor
        self._cache = cache
        self._buffers = buffers
        self._fail = fail
        # one call for everything reads the weights once; elsewhere decoding has a faster way of its own
        self._one_call = executor.name == "cpu"

    def run(self, items: list[Item], rows: list[Row], best_count: int) -> list[Group]:
        """Compute a step, in as many calls as suit the executor.

        A call that raises is made again for each of its parts alone: it changes nothing but the slots of its own
        tokens, and those it writes in any case. One that finds no memory is made once more before that, when what the
        failed one had allocated, and what torch keeps unused, was given back.

        Args:
            items: its parts, at least one.
            rows: who is sampled after it.
            best_count: how many of the best logits suffice for that; 0: all.

        Returns:
            What was computed; parts that failed are in none of the groups.
        """
        if self._one_call or len(items) == 1:
            return self._run_group(items, rows, best_count)
        # there decoding is one captured graph, and so is a prompt alone
        decoding = [item for item in items if item.count == 1 and item.num_logits == 1]
        prompts = [item for item in items if not (item.count == 1 and item.num_logits == 1)]
        parts = [part for part in (decoding, prompts) if part]
        whole = rows if len(parts) == 1 else None
        return [group for part in parts for group in self._run_group(part, whole, best_count)]

    def all_logits(self, group: Group) -> Tensor:
        """[num_rows, vocab_size]: the logits of a step of which only the best were computed."""
        # the same keys and values are written again
        logits = self.executor.step(self._buffers.lay_out(group.items), self._cache).logits
        assert logits is not None
        return logits

    def last_logits(self, item: Item) -> Tensor:
        """[1, vocab_size]: the logits after the last token of a part, which is computed again."""
        logits = self.executor.step(self._buffers.lay_out([item]), self._cache).logits
        assert logits is not None
        return logits[-1:]

    def _run_group(self, items: list[Item], rows: list[Row] | None, best_count: int) -> list[Group]:
        """One call, or one for each part; ``rows``: those that are sampled if it is the whole step, else None."""
        whole = self._try(items, rows, best_count)
        if whole is not None:
            return [whole]
        groups: list[Group] = []
        for item in items if len(items) > 1 else ():
            # another branch of a request that has failed meanwhile has no blocks any more
            if item.branch.sequence is not None:
                part = self._try([item], None, 0, again=False)
                groups += [] if part is None else [part]
        return groups

    def _try(self, items: list[Item], rows: list[Row] | None, best_count: int, *, again: bool = True) -> Group | None:
        """One call; None if it failed, and then, if it was of one part, that has been told."""
        try:
            return self._call(items, rows, best_count)
        except Exception as error:
            # not the error itself: whoever keeps it, or a record of it, would keep what the step had allocated
            reason, count = str(error), len(items)
            again = again and isinstance(error, torch.OutOfMemoryError)
            if again:
                _LOG.warning("no memory for a step of %d sequences; it is tried once more (%s)", count, reason)
            elif count > 1:
                _LOG.warning("a step of %d sequences failed (%s); each is computed alone", count, reason)
            else:
                traceback.clear_frames(error.__traceback__)
                self._fail(items[0], error)
        if not again:
            return None
        # outside of the handler, where the error would still be alive
        torch.cuda.empty_cache()
        return self._try(items, rows, best_count, again=False)

    def _call(self, items: list[Item], rows: list[Row] | None, best_count: int) -> Group:
        batch = self._lay_out(items)
        options: dict[str, Any] = {}
        if any(item.num_logits and item.branch.row is None for item in items):
            options["return_hidden"] = True
        direct = rows is not None and not options and _are_rows_of(items, rows)
        if direct and best_count and isinstance(self.executor, CpuExecutor):
            options["head"] = ("topk", best_count)
        elif direct and best_count == 1 and self.executor.name == "cuda":
            options["head"] = "argmax"
        return Group(items, self.executor.step(batch, self._cache, **options), direct)

    def _lay_out(self, items: list[Item]) -> StepBatch:
        batch = self._buffers.lay_out(items)
        if batch.logits_indices.numel() or self._one_call:
            return batch
        # kernels are not launched on nothing: a row of logits that nobody looks at
        items[-1].num_logits = 1
        batch = self._buffers.lay_out(items)
        items[-1].num_logits = 0
        return batch


def _are_rows_of(items: list[Item], rows: list[Row]) -> bool:
    """Whether every row of a step's logits is one that is sampled, and nothing else, in the same order."""
    place = 0
    for item in items:
        if not item.num_logits:
            continue
        branch = item.branch
        if item.num_logits > 1 or place == len(rows) or rows[place].item is not item:
            return False
        # a prompt of one token, or the rest of one, whose log-probabilities are wanted
        if not branch.output_ids and branch.request.needs_prompt_rows:
            return False
        place += 1
    return place == len(rows)


def logits_of(rows: list[Row], groups: list[Group]) -> Tensor:
    """[len(rows), vocab_size]: the logits after the last token of each row's item."""
    places: dict[int, int] = {}
    parts: list[Tensor] = []
    first = 0
    for group in groups:
        logits = group.output.logits
        if logits is None:
            continue
        stop = first
        for item in group.items:
            stop += item.num_logits
            places[id(item)] = stop - 1
        parts.append(logits)
        first += logits.size(0)
    logits = parts[0] if len(parts) == 1 else torch.cat(parts)
    return logits[to_device([places[id(row.item)] for row in rows], torch.int64, logits.device)]
