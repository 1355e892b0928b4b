"""Decoding ahead: while the branches of a step stay the same, a GPU goes on from its own tokens.

A step of the engine waits for its tokens before the next one is laid out, and the device idles meanwhile. Where nothing
is to be decided between two steps the decode loop of ``graph/device_loop.py`` queues the next one first: the device
computes it while the host looks at the tokens of the one before. What the host then finds (an end, a stop string, an
abort) takes its row out; what it cannot follow in place (a request that may come in, an empty pool, a row without a
token) ends the run, and undoes what was computed too far.

Tokens are those of the engine's other steps: the kernels, the random numbers and the rules are the same.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from gpt2rt.cache import PagedKVCache
from gpt2rt.errors import OutOfBlocksError
from gpt2rt.graph import Executor

from .request import Branch
from .scheduler import Scheduler

if TYPE_CHECKING:
    from gpt2rt.graph.device_loop import DeviceLoop, SamplingRows

    from .sampler import SamplingRow

_LOG = logging.getLogger("gpt2rt.engine")

# steps that are queued before the oldest of them is read
_DEPTH = 2
# steps in a row with the same branches after which a run begins: beginning costs more than one step saves
_SETTLED = 2
# what changes nothing, by the setting's name
_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class DecodeAhead:
    """Runs of decode steps that are queued ahead.

    Args:
        executor: of the model; only a cuda executor decodes ahead, unless ``GPT2RT_CUDA_AHEAD=0``.
        cache: keys and values.
        scheduler: who waits and who runs; between the steps of a run it takes branches out, and lets none in.

    Attributes:
        branches: those of the run, by row; None: the row's has ended. Empty while there is no run.
        enabled: whether runs begin.
    """

    def __init__(self, executor: Executor, cache: PagedKVCache, scheduler: Scheduler) -> None:
        self._executor = executor
        self._cache = cache
        self._scheduler = scheduler
        self.branches: list[Branch | None] = []
        self._loop: DeviceLoop | None = None
        self._last: list[Branch] = []
        self._settled = 0
        # nothing more is queued: the run ends when what is pending has been read
        self._ends = False
        self.enabled = executor.name == "cuda" and os.environ.get("GPT2RT_CUDA_AHEAD") != "0"

    def note(self, branches: list[Branch]) -> None:
        """A step of the engine's own is over; a run may follow it.

        Args:
            branches: those that got a token in it.
        """
        if not self.enabled:
            return
        self._settled = self._settled + 1 if branches and branches == self._last else 0
        self._last = branches

    def next(self) -> list[tuple[Branch, int]] | None:
        """The next token of each branch of the run; begins or ends it as is due.

        Returns:
            None: there is no run, and the engine has to make a step of its own.
        """
        if not self.branches and not (self._settled >= _SETTLED and self._begin()):
            return None
        loop = self._loop
        assert loop is not None
        self._follow(loop)
        self._launch(loop)
        if not loop.pending:
            self.stop()
            return None
        tokens = loop.read()
        found = [(b, token) for b, token in zip(self.branches, tokens, strict=True) if b is not None]
        for branch, token in found:
            branch.num_computed += token >= 0
        if any(token < 0 for _, token in found):
            # computed again, where there is time to say what is wrong with it
            self.stop()
            found = [(branch, token) for branch, token in found if token >= 0]
        return found

    def stop(self) -> None:
        """End the run, if there is one: every sequence is as long again as what is known of its branch."""
        branches, self.branches = self.branches, []
        self._settled, self._last = 0, []
        if self._loop is None or not branches:
            return
        self._loop.close()
        for branch in branches:
            if branch is not None and branch.sequence is not None:
                branch.sequence.truncate(min(branch.num_computed, branch.sequence.length))

    def forget(self) -> None:
        """End the run without touching sequences or device: both are in an unknown state."""
        self.branches, self._last, self._loop = [], [], None
        self._settled = 0

    def _begin(self) -> bool:
        """Begin a run with those who run now, if all of them can be followed without the host."""
        running = self._scheduler.running
        if self._scheduler.has_candidates or running != self._last or not all(map(_can_follow, running)):
            return False
        rows = [branch.row for branch in running if branch.row is not None]
        from gpt2rt.graph.cuda import BATCH_SIZES, CudaExecutor

        if len(rows) > BATCH_SIZES[-1]:
            return False
        if self._loop is None:
            from gpt2rt.graph.device_loop import DeviceLoop

            assert isinstance(self._executor, CudaExecutor)
            self._loop = DeviceLoop(self._executor, self._cache, BATCH_SIZES[-1])
        n_positions = self._executor.plan.n_positions
        # a branch's last token is never computed
        limits = [min(len(b.request.prompt_ids) + b.request.max_tokens - 1, n_positions) for b in running]
        sequences = [branch.sequence for branch in running if branch.sequence is not None]
        tokens = [branch.tokens[-1] for branch in running]
        try:
            self._loop.start(tokens, sequences, limits, _sampling_rows(rows))
        except Exception as error:
            _LOG.warning("nothing is decoded ahead any more (%s: %s)", type(error).__name__, error)
            self.enabled = False
            return False
        self.branches = list(running)
        self._ends = False
        return True

    def _follow(self, loop: DeviceLoop) -> None:
        """Take out the rows of branches that have ended; see whether the run is worth going on with."""
        live = 0
        for row, branch in enumerate(self.branches):
            if branch is None:
                continue
            if branch.sequence is None or branch.finish_reason is not None:
                self.branches[row] = None
                loop.drop(row)
            else:
                live += 1
        # a smaller batch costs less
        too_large = loop.num_rows > 1 and 2 * live <= loop.num_rows
        if too_large or self._scheduler.has_candidates or live != len(self._scheduler.running):
            self._ends = True

    def _launch(self, loop: DeviceLoop) -> None:
        """Queue steps ahead of the next one that is read."""
        try:
            while not self._ends and loop.pending < _DEPTH and loop.can_launch(partly=True):
                loop.launch()
        except OutOfBlocksError:
            # the scheduler knows who gives way
            self._ends = True
        except Exception as error:
            # the engine's own step finds out whose fault it is
            _LOG.warning("decoding ahead failed (%s: %s); the step is made anew", type(error).__name__, error)
            self._ends = True


def _can_follow(branch: Branch) -> bool:
    """Whether all that is wanted of a branch is its next tokens, chosen by the logits as they are."""
    row, sequence, request = branch.row, branch.sequence, branch.request
    if row is None or sequence is None or request.needs_prompt_rows or row.params.logprobs is not None:
        return False
    decodes = branch.num_computed == sequence.length == len(branch.tokens) - 1
    return decodes and row.plain() and len(request.branches) == request.num_choices


def _sampling_rows(rows: list[SamplingRow]) -> SamplingRows | None:
    """How the tokens of rows are chosen from here on; None: all take the largest logit."""
    greedy = [row.params.greedy for row in rows]
    if all(greedy):
        return None
    from gpt2rt.graph.device_loop import SamplingRows

    settings: dict[str, list[Any] | None] = {}
    for name, off in _OFF.items():
        values = [off if row.params.greedy else getattr(row.params, name) for row in rows]
        if name == "top_k":
            values = [1 if row.params.greedy else max(row.params.top_k, off) for row in rows]
        settings[name] = values if any(value != off for value in values) else None
    return SamplingRows(
        seeds=[row.seed for row in rows],
        requests=[row.request for row in rows],
        choices=[row.choice for row in rows],
        positions=[len(row.prompt_ids) + len(row.output_ids) for row in rows],
        greedy=greedy if any(greedy) else None,
        **settings,
    )
