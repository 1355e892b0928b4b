"""Counts and times of an engine: what each step did, and the sums of all."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from .request import Branch, Request
from .scheduler import Scheduler
from .stats import EngineStats, FinishedRequest, IterationStats

_LOG = logging.getLogger("gpt2rt.engine")


class Accounts:
    """Keeps the books of one engine.

    Args:
        num_blocks: of its cache.

    Attributes:
        iteration: the step that is being made.
        observer: is told of each step; None: nobody is.
    """

    def __init__(self, num_blocks: int) -> None:
        self.iteration = IterationStats()
        self.observer: Callable[[IterationStats], None] | None = None
        self._totals = EngineStats(0, 0, num_blocks, 0, 0.0, 0, 0, 0, 0, 0, 0, 0, {})

    def token(self, branch: Branch, now: float) -> None:
        """A branch has got a token."""
        metrics, iteration = branch.request.metrics, self.iteration
        iteration.num_generation_tokens += 1
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            iteration.num_prompt_tokens += len(branch.request.prompt_ids)
            iteration.time_to_first_token.append(now - branch.request.arrival_time)
        elif branch.last_token_time:
            iteration.inter_token_latency.append(now - branch.last_token_time)
        branch.last_token_time = metrics.last_token_time = now

    def finished(self, request: Request, now: float) -> None:
        """A request has ended."""
        reason = request.branches[0].finish_reason or "abort"
        self._totals.finished[reason] = self._totals.finished.get(reason, 0) + 1
        if self.observer is None:
            return
        metrics, params = request.metrics, request.sampling
        started = metrics.first_scheduled_time or now
        first = metrics.first_token_time or now
        last = metrics.last_token_time or first
        counts = [len(branch.output_ids) for branch in request.branches]
        self.iteration.finished.append(
            FinishedRequest(
                finish_reason=reason,
                num_prompt_tokens=len(request.prompt_ids),
                num_generation_tokens=sum(counts),
                e2e_latency=now - request.arrival_time,
                queue_time=started - request.arrival_time,
                prefill_time=first - started,
                decode_time=last - first,
                time_per_output_token=(last - first) / (max(counts) - 1) if max(counts) > 1 else None,
                max_tokens=None if params is None else params.max_tokens,
                n=request.num_choices,
                has_error=request.error is not None,
            )
        )

    def close(self, scheduler: Scheduler, num_steps: int = 1) -> None:
        """The step is over: add it to the sums, tell the observer, and begin the next."""
        iteration, totals = self.iteration, self._totals
        iteration.prefix_cache_queries, iteration.prefix_cache_hits = scheduler.queries, scheduler.hits
        totals.num_steps += num_steps
        totals.prompt_tokens += iteration.num_prompt_tokens
        totals.generation_tokens += iteration.num_generation_tokens
        totals.num_preemptions += iteration.num_preemptions
        totals.prefix_cache_queries += iteration.prefix_cache_queries
        totals.prefix_cache_hits += iteration.prefix_cache_hits
        totals.corrupted_requests += iteration.corrupted
        if self.observer is not None:
            iteration.running, iteration.waiting = len(scheduler.running), len(scheduler.waiting)
            iteration.kv_cache_usage = 1.0 - scheduler.num_free / totals.num_blocks
            try:
                self.observer(iteration)
            except Exception:
                _LOG.exception("the observer of the engine failed")
        self.iteration = IterationStats()

    def stats(self, scheduler: Scheduler) -> EngineStats:
        """What the engine does now, and the sums of all steps."""
        free = scheduler.num_free
        return dataclasses.replace(
            self._totals,
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            num_free_blocks=free,
            kv_cache_usage=1.0 - free / self._totals.num_blocks,
            finished=dict(self._totals.finished),
        )
