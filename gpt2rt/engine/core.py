"""The engine's loop: schedule, run a step, choose tokens, hand out what is new.

Everything here runs in one thread. A fault of one request ends that request: a step that raises is run again for each
of its branches alone, and whatever is done for one branch is done inside its own guard.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable

from gpt2rt.cache import PagedKVCache, PrefixIndex
from gpt2rt.errors import EngineDeadError, NumericsError, QueueFullError, RequestError, RequestFailedError

from .accounts import Accounts
from .ahead import DecodeAhead
from .batch import Item, StepBuffers
from .logprobs import TokenTexts, as_logprobs
from .output_text import OutputText
from .pacing import PrefillPacer
from .prompt_rows import PromptRows
from .request import Branch, Request
from .runner import Row, StepRunner
from .sampler import Sampled, Sampler, SamplingRow
from .scheduler import Scheduler
from .served import ServedModel
from .stats import EngineStats, IterationStats
from .step_sampler import StepSampler

_LOG = logging.getLogger("gpt2rt.engine")


class EngineCore:
    """Runs requests to their ends.

    Args:
        served: the model.
        cache: for its keys and values, in use by nobody else.

    Attributes:
        cache: the same.
        scheduler: who waits and who runs.
        requests: unfinished ones, by name.
    """

    def __init__(self, served: ServedModel, cache: PagedKVCache) -> None:
        config = served.config
        self.served = served
        self.cache = cache
        self._index = PrefixIndex(self.cache) if config.enable_prefix_caching else None
        self._pacer = PrefillPacer(config.prefill_slowdown)
        self.scheduler = Scheduler(
            self.cache,
            self._index,
            max_num_seqs=config.max_num_seqs,
            max_tokens=config.step_tokens,
            pacer=self._pacer,
        )
        max_blocks = self.cache.blocks_for(served.max_model_len)
        buffers = StepBuffers(config.step_tokens, config.max_num_seqs, max_blocks)
        # weakly: an engine that nobody uses any more must go at once, and its cache with it
        own = weakref.ref(self)

        def fail(request: Request, error: Exception) -> None:
            core = own()
            assert core is not None
            core._fail(request, error)

        self._runner = StepRunner(
            served.executor, self.cache, buffers, lambda item, error: fail(item.branch.request, error)
        )
        sampler = Sampler(served.vocab_size, served.device, capacity=config.max_num_seqs)
        self._sampler = StepSampler(sampler, self._runner)
        self._ahead = DecodeAhead(served.executor, self.cache, self.scheduler)
        # a step is over when its tokens are known
        self._waits = served.device.type == "cuda"
        self._last_ahead: float | None = None
        self._texts = TokenTexts(served.tokenizer)
        self._prompt_rows = PromptRows(served, self._texts, fail)
        self.requests: dict[str, Request] = {}
        self._queued_tokens = 0
        self._accounts = Accounts(self.cache.pool.num_blocks)

    # ---- requests --------------------------------------------------------------------------------------------------

    def check_room(self, num_prompts: int, num_tokens: int) -> None:
        """Whether so many more may wait.

        Raises:
            QueueFullError: they may not.
        """
        config = self.served.config
        most = config.queued_tokens(self.served.max_model_len)
        if config.max_num_queued_reqs is None and most is None:
            return
        waiting = sum(1 for branch in self.scheduler.waiting if not branch.output_ids)
        # those that can run at once need not wait
        free = max(0, config.max_num_seqs - len(self.scheduler.running))
        if config.max_num_queued_reqs is not None and waiting + num_prompts - free > config.max_num_queued_reqs:
            raise QueueFullError(
                f"{waiting} requests wait already, and at most {config.max_num_queued_reqs} may "
                "(max_num_queued_reqs); try again later"
            )
        if most is not None and waiting and self._queued_tokens + num_tokens > most:
            raise QueueFullError(
                f"{self._queued_tokens} prompt tokens wait already, and at most {most} may (max_num_queued_tokens); "
                "try again later"
            )

    def add(self, request: Request) -> None:
        """Take a request in.

        Raises:
            RequestError: another unfinished one has its name, or the cache is too small for it.
            QueueFullError: too many wait.
        """
        if request.request_id in self.requests:
            raise RequestError(f"request_id {request.request_id!r} is in use by an unfinished request; choose another")
        # the last token is never computed
        longest = len(request.prompt_ids) + max(request.max_tokens - 1, 0)
        needed, have = self.cache.blocks_for(longest), self.cache.pool.num_blocks
        if needed > have:
            raise RequestError(
                f"the request needs up to {needed} KV blocks of {self.cache.block_size} tokens for its {longest} "
                f"tokens, but the engine has {have} in all; shorten it, or raise num_blocks"
            )
        self.check_room(1, len(request.prompt_ids))
        branch = self._new_branch(request, 0)
        # known only once it is sure to be computed
        self.scheduler.add(branch)
        self._queued_tokens += len(request.prompt_ids)
        self.requests[request.request_id] = request

    def _new_branch(self, request: Request, index: int) -> Branch:
        branch = Branch(request, index)
        params = request.sampling
        if params is not None:
            branch.row = SamplingRow(
                params,
                seed=request.seed,
                request=request.key,
                choice=index,
                prompt_ids=request.prompt_ids,
                output_ids=branch.output_ids,
                eos_token_ids=self.served.eos_token_ids,
                tokenizer=self.served.tokenizer,
            )
            if params.detokenize:
                branch.text = OutputText(self.served.tokenizer, request.prompt_ids, params)
            if params.logprobs is not None:
                branch.logprobs = []
        request.branches.append(branch)
        return branch

    def abort(self, request_id: str, reason: str = "abort") -> bool:
        """End a request; its blocks are free at once. False: there is none of this name."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        self._end(request, reason)
        return True

    def abort_all(self, error: Exception | None = None) -> None:
        """End all requests."""
        for request in list(self.requests.values()):
            request.error = error
            try:
                self._end(request, "abort" if error is None else "error")
            except Exception:
                _LOG.exception("request %r cannot be ended in order", request.request_id)

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.requests)

    def _fail(self, request: Request, error: Exception) -> None:
        """End a request by its own fault."""
        if request.finished:
            return
        if isinstance(error, NumericsError):
            self._accounts.iteration.corrupted += 1
            if self._index is not None:
                # what it computed may be as wrong
                self._index.clear()
        request.error = _as_request_error(error)
        self._end(request, "error")

    def _end(self, request: Request, reason: str) -> None:
        """Finish all branches of a request that still go on, and hand out its last output."""
        try:
            for branch in request.branches:
                if branch.finish_reason is None:
                    branch.finish_reason = reason
                    if branch.text is not None:
                        try:
                            branch.text.end()
                        except Exception:
                            _LOG.exception("the text of %r cannot be completed", branch)
                self._leave(branch)
        finally:
            # whatever goes wrong, nobody waits for it for ever
            self._finish(request)
            self._emit_last(request)

    def reset(self, error: BaseException) -> None:
        """End all requests and empty the cache, after an exception that left a step in its middle."""
        self._ahead.forget()
        self.abort_all(_as_request_error(error))
        self.requests.clear()
        self._queued_tokens = 0
        self.scheduler.clear()
        # nobody holds a block any more, whatever was half done
        if self._index is not None:
            self._index.reset()
        self.cache.pool.reset()
        self._sampler.forget()
        self._accounts.iteration = IterationStats()

    def _leave(self, branch: Branch) -> None:
        """Take a branch out of everything."""
        self.scheduler.remove(branch)
        if branch.row is not None:
            self._sampler.release(branch.row)

    def _finish(self, request: Request) -> None:
        request.finished = True
        if self.requests.pop(request.request_id, None) is None:
            return
        if request.metrics.first_scheduled_time is None:
            self._queued_tokens -= len(request.prompt_ids)
        now = request.metrics.finished_time = time.monotonic()
        self._accounts.finished(request, now)

    # ---- a step ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Compute the next tokens of all who can go on; outputs go to the requests' sinks."""
        scheduler = self.scheduler
        ahead = self._ahead.next()
        if ahead is not None:
            self._take_ahead(ahead)
            self._accounts.close(scheduler)
            return
        self._last_ahead = None
        items = scheduler.schedule()
        if scheduler.preempted:
            self._accounts.iteration.num_preemptions += len(scheduler.preempted)
            # the next step prepares for its rows again, though they may be the same
            self._sampler.forget()
            for branch in scheduler.preempted:
                branch.request.metrics.num_preemptions += 1
                # a pooled prompt is computed from its start
                branch.request.rows.clear()
                if branch.row is not None:
                    self._sampler.release(branch.row)
        for branch, error in list(scheduler.failed):
            self._fail(branch.request, error)
        if scheduler.failed or scheduler.preempted:
            # a failed request may have had other branches in this step
            items = [item for item in items if item.branch.sequence is not None]
        if items:
            self._compute(items)
        self._accounts.close(scheduler)

    def _compute(self, items: list[Item]) -> None:
        began = time.monotonic()
        num_prompt = 0
        for item in items:
            request = item.branch.request
            if item.count > 1 or not item.branch.output_ids:
                num_prompt += item.count
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = began
                request.metrics.num_cached_tokens = item.branch.num_cached
                self._queued_tokens -= len(request.prompt_ids)
        rows, forks = self._next_rows(items)
        if not items:
            return
        groups = self._runner.run(items, rows, self._sampler.best_count(rows))
        now = time.monotonic()
        if not self._waits:
            self._pacer.note(now - began, self.scheduler.num_decoding, num_prompt)
        live = groups[0].items if len(groups) == 1 else [item for group in groups for item in group.items]
        for item in live:
            item.branch.num_computed += item.count
        if len(live) < len(items):
            kept = set(map(id, live))
            rows = [row for row in rows if id(row.item) in kept and not row.branch.request.finished]
            forks = [fork for fork in forks if not fork.request.finished]
        for branch in forks:
            self._fork(branch)
        for group in groups:
            self._prompt_rows.take(group)
        chosen = [row.branch for row in rows]
        if rows:
            sampled = self._sampler.choose(rows, groups)
            if self._waits:
                now = time.monotonic()
                self._pacer.note(now - began, self.scheduler.num_decoding, num_prompt)
            self._take_tokens(chosen, sampled, now)
        self._ahead.note(chosen)
        self._remember([item.branch for item in live])
        self._hand_out(chosen)
        self._hand_out([item.branch for item in live if item.branch.row is None and item.branch.finish_reason])
        self._accounts.iteration.num_tokens += sum(item.count for item in live)

    def _next_rows(self, items: list[Item]) -> tuple[list[Row], list[Branch]]:
        """The branches that get a token after this step, and those of which further choices begin with it.

        Items of requests whose choices cannot begin are taken out of the list.
        """
        rows: list[Row] = []
        forks: list[Branch] = []
        for item in tuple(items):
            branch = item.branch
            if branch.row is None or not item.complete:
                continue
            request = branch.request
            if len(request.branches) == request.num_choices:
                rows.append(Row(branch, item))
                continue
            try:
                choices = [branch, *(self._new_branch(request, index) for index in range(1, request.num_choices))]
            except Exception as error:
                self._fail(request, error)
                items[:] = [other for other in items if other is not item]
                continue
            forks.append(branch)
            rows += [Row(choice, item) for choice in choices]
        return rows, forks

    def _fork(self, branch: Branch) -> None:
        request = branch.request
        try:
            for sibling in request.branches[1:]:
                self.scheduler.fork(branch, sibling)
        except Exception as error:
            self._fail(request, error)

    # ---- tokens ----------------------------------------------------------------------------------------------------

    def _take_ahead(self, found: list[tuple[Branch, int]]) -> None:
        """Take the tokens of a step that was queued ahead."""
        now = time.monotonic()
        branches = [branch for branch, _ in found]
        if self._last_ahead is not None:
            self._pacer.note(now - self._last_ahead, len(found), 0)
        self._last_ahead = now
        self.scheduler.queries = self.scheduler.hits = 0
        self._take_tokens(branches, Sampled([token for _, token in found], {}, {}), now)
        self._remember(branches)
        self._hand_out(branches)
        self._accounts.iteration.num_tokens += len(found)
        if not self.scheduler.running:
            self._ahead.stop()

    def _take_tokens(self, branches: list[Branch], sampled: Sampled, now: float) -> None:
        """Give every branch its next token."""
        for place, branch in enumerate(branches):
            if branch.request.finished:
                # it failed in this step, and the sampler has prepared for it since
                assert branch.row is not None
                self._sampler.release(branch.row)
                continue
            error = sampled.errors.get(place) if sampled.errors else None
            try:
                if error is not None:
                    raise error
                self._append(branch, sampled.tokens[place], sampled, place, now)
            except Exception as fault:
                self._fail(branch.request, fault)

    def _append(self, branch: Branch, token: int, sampled: Sampled, place: int, now: float) -> None:
        """Give a branch a token, and end it where that token does."""
        request = branch.request
        params = request.sampling
        assert params is not None
        branch.tokens.append(token)
        branch.output_ids.append(token)
        count = len(branch.output_ids)
        if branch.logprobs is not None:
            entry = sampled.logprobs[place]
            branch.cumulative_logprob += entry[token][0]
            branch.logprobs.append(as_logprobs(entry, self._texts))
        self._accounts.token(branch, now)
        counts = count >= params.min_tokens
        if counts and not params.ignore_eos and token in self.served.eos_token_ids:
            branch.finish_reason = "stop"
        elif counts and params.stop_token_ids and token in params.stop_token_ids:
            branch.finish_reason, branch.stop_reason = "stop", token
        ends = branch.finish_reason is not None
        # a token that ends the text by itself is shown only on request
        text = branch.text if not ends or params.include_stop_str_in_output else None
        if text is not None and text.put(token, counts=counts) and not ends:
            branch.finish_reason, branch.stop_reason = "stop", text.stop_reason
        if branch.finish_reason is None and count >= request.max_tokens:
            branch.finish_reason = "length"
        if branch.finish_reason is not None and branch.text is not None:
            branch.text.end()

    def _remember(self, branches: list[Branch]) -> None:
        """Index the blocks that are full now."""
        index, size = self._index, self.cache.block_size
        if index is None:
            return
        for branch in branches:
            chain, sequence = branch.chain, branch.sequence
            if chain is not None and sequence is not None and branch.num_computed // size > len(chain):
                try:
                    index.insert(branch.tokens, sequence.blocks, chain, branch.num_computed)
                except Exception as error:
                    self._fail(branch.request, error)

    def _hand_out(self, branches: list[Branch]) -> None:
        """Let branches go that have ended, and tell the callers what is new."""
        seen: Request | None = None
        for branch in branches:
            request = branch.request
            if branch.finish_reason is not None and not request.finished:
                self._leave(branch)
            if request is seen or request.finished:
                continue
            # choices of a request stand together
            seen = request
            if len(request.branches) == request.num_choices and all(b.finish_reason for b in request.branches):
                for choice in request.branches:
                    self._leave(choice)
                self._finish(request)
            if request.finished:
                self._emit_last(request)
                continue
            try:
                self._emit(request)
            except Exception as error:
                self._fail(request, error)

    def _emit(self, request: Request) -> None:
        output = request.output()
        if output is not None:
            request.sink(output)

    def _emit_last(self, request: Request) -> None:
        """Hand out the last output, or else say that there is none: somebody waits for it."""
        try:
            self._emit(request)
        except Exception as error:
            request.error = request.error or _as_request_error(error)
            try:
                request.sink(request.failed_output())
            except Exception:
                _LOG.exception("the last output of request %r cannot be handed out", request.request_id)

    # ---- what it did -----------------------------------------------------------------------------------------------

    @property
    def observer(self) -> Callable[[IterationStats], None] | None:
        """Is told what each step did; None: nobody is."""
        return self._accounts.observer

    @observer.setter
    def observer(self, observer: Callable[[IterationStats], None] | None) -> None:
        self._accounts.observer = observer

    def settle(self) -> None:
        """Tell the observer of requests that ended since the last step, where no step follows."""
        if self._accounts.iteration.finished:
            self.scheduler.queries = self.scheduler.hits = 0
            self._accounts.close(self.scheduler, 0)

    def stats(self) -> EngineStats:
        """What it does now, and the sums of all steps."""
        return self._accounts.stats(self.scheduler)

    def reset_prefix_cache(self) -> None:
        """Forget the blocks of earlier prompts, as is due after a change of weights."""
        if self._index is not None:
            self._index.clear()


def _as_request_error(error: BaseException) -> Exception:
    """What the caller of a request is told of a fault."""
    if isinstance(error, (NumericsError, RequestError, RequestFailedError, EngineDeadError)):
        return error
    failed = RequestFailedError(f"the request failed: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed
