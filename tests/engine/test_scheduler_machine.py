"""The scheduler, its blocks and its prefix index under random loads and faults; L6 of the loads to hold.

The model computed here is a sum: a token's number stands for it and all before it and is written into its slot, and the
next token follows from what is read back. Whoever reads a slot that was lost, overwritten or given out for other tokens
goes on with a wrong text, and every request must end with the text that it has alone.
"""

import struct

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from machines import SETTINGS, TIMEOUT

from gpt2rt.cache import PagedKVCache, PrefixIndex
from gpt2rt.engine.pacing import PrefillPacer
from gpt2rt.engine.params import SamplingParams
from gpt2rt.engine.request import Branch, Request
from gpt2rt.engine.scheduler import Scheduler
from gpt2rt.errors import CacheFullError, OutOfBlocksError

SIZE = 8
NUM_BLOCKS = 9
MAX_SEQS = 3
MAX_TOKENS = 14
MAX_WIDE_ROWS = 6
PRIME = 8191

RUNS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([1, 5, SIZE, SIZE + 1])), min_size=1, max_size=3)


def number_after(number, token):
    """What stands for a text and one more token."""
    return (number * 31 + token + 7) % PRIME


def numbers_of(salt, tokens):
    number, result = (1 if salt is None else 2), []
    for token in tokens:
        number = number_after(number, token)
        result.append(number)
    return result


def next_token(number, choice):
    return (number + choice) % 3


def text_of(request, choice):
    """What a choice's output is when nothing goes wrong."""
    tokens = list(request.prompt_ids)
    for _ in range(request.max_tokens):
        tokens.append(next_token(numbers_of(request.salt, tokens)[-1], choice))
    return tokens[len(request.prompt_ids) :]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(indexed=st.booleans())
    def start(self, indexed):
        self.cache = PagedKVCache(1, 1, 1, NUM_BLOCKS, block_size=SIZE)
        self.pool = self.cache.pool
        self.slots = self.cache.data.view(2, -1).numpy()
        self.slots.fill(float("nan"))
        self.index = PrefixIndex(self.cache) if indexed else None
        self.scheduler = Scheduler(
            self.cache, self.index, max_num_seqs=MAX_SEQS, max_tokens=MAX_TOKENS, pacer=PrefillPacer(None)
        )
        self.requests = []
        self.arrivals = 0
        self.num_preempted = 0

    # ---- the engine's part ---------------------------------------------------------------------------------------

    def new_branch(self, request):
        branch = Branch(request, len(request.branches))
        request.branches.append(branch)
        return branch

    def end(self, request):
        for branch in request.branches:
            self.scheduler.remove(branch)
            assert branch.sequence is None
        request.finished = True
        self.requests.remove(request)

    def compute(self, item):
        """The numbers of an item's tokens, from those that are read back."""
        branch, sequence = item.branch, item.branch.sequence
        expected = numbers_of(branch.request.salt, branch.tokens)
        before = [self.slots[0, sequence.blocks[i // SIZE] * SIZE + i % SIZE] for i in range(item.start)]
        assert before == expected[: item.start]
        for place, slot in zip(range(item.start, item.start + item.count), item.slots, strict=True):
            assert slot == sequence.blocks[place // SIZE] * SIZE + place % SIZE
            # what is written to is the writer's alone
            assert self.pool.reference_count(slot // SIZE) == 1
            last = self.slots[0, self.slot(sequence, place - 1)] if place else (1 if branch.request.salt is None else 2)
            self.slots[:, slot] = number_after(int(last), branch.tokens[place])

    def slot(self, sequence, place):
        return sequence.blocks[place // SIZE] * SIZE + place % SIZE

    def take_prompt_rows(self, item):
        request = item.branch.request
        if request.needs_prompt_rows:
            known = request.prompt_logprobs = request.prompt_logprobs or [None]
            if item.start + 1 == len(known):
                known += [{}] * min(item.count, len(request.prompt_ids) - len(known))

    def run_step(self):
        scheduler = self.scheduler
        items = scheduler.schedule()
        self.check_plan(items)
        failed = list(scheduler.failed)
        for branch, _ in failed:
            if not branch.request.finished:
                self.end(branch.request)
        items = [item for item in items if item.branch.sequence is not None]
        for item in items:
            self.compute(item)
        for item in items:
            item.branch.num_computed += item.count
            self.take_prompt_rows(item)
        rows = []
        for item in items:
            if item.complete:
                number = int(self.slots[1, item.slots[-1]])
                request = item.branch.request
                rows.append((item.branch, number))
                while len(request.branches) < request.num_choices:
                    sibling = self.new_branch(request)
                    rows.append((sibling, number))
                    scheduler.fork(item.branch, sibling)
        for branch, number in rows:
            token = next_token(number, branch.index)
            branch.tokens.append(token)
            branch.output_ids.append(token)
        for item in items:
            branch = item.branch
            if branch.chain is not None and branch.num_computed // SIZE > len(branch.chain):
                self.index.insert(branch.tokens, branch.sequence.blocks, branch.chain, branch.num_computed)
        for branch, _ in rows:
            request = branch.request
            if len(branch.output_ids) == request.max_tokens:
                branch.finish_reason = "length"
                scheduler.remove(branch)
                assert branch.output_ids == text_of(request, branch.index)
            if len(request.branches) == request.num_choices and all(b.finish_reason for b in request.branches):
                self.end(request)
        return len(items), failed

    def check_plan(self, items):
        scheduler = self.scheduler
        gone = {id(branch) for branch in scheduler.preempted} | {id(branch) for branch, _ in scheduler.failed}
        for item in items:
            assert item.count > 0
            assert len(item.slots) == item.count
            if item.branch.sequence is None:
                # it had to give way to one that came after it in this step
                assert id(item.branch) in gone
                continue
            assert item.branch in scheduler.running
            assert item.start == item.branch.num_computed
            assert item.num_logits == (item.count if item.branch.request.needs_prompt_rows else int(item.complete))
        assert len({id(item.branch) for item in items}) == len(items)
        slots = [slot for item in items if item.branch.sequence is not None for slot in item.slots]
        assert len(set(slots)) == len(slots)
        assert sum(item.count for item in items) <= MAX_TOKENS
        assert sum(item.num_logits for item in items if item.num_logits > 1) <= MAX_WIDE_ROWS
        self.num_preempted += len(scheduler.preempted)
        if scheduler.preempted:
            first = min(branch.key for branch in scheduler.preempted)
            assert all(branch.key < first for branch in scheduler.running)

    # ---- what happens --------------------------------------------------------------------------------------------

    @rule(
        runs=RUNS,
        max_tokens=st.sampled_from([1, 2, 9, 30]),
        n=st.sampled_from([1, 1, 1, 3]),
        salt=st.sampled_from([None, None, "a"]),
        priority=st.sampled_from([0, 0, -1, 1]),
        wide=st.sampled_from([False, False, True]),
    )
    @precondition(lambda self: len(self.requests) < 8)
    def add(self, runs, max_tokens, n, salt, priority, wide):
        prompt = [token for token, length in runs for _ in range(length)]
        if self.cache.blocks_for(len(prompt) + max_tokens - 1) > NUM_BLOCKS:
            return
        params = SamplingParams(n=n, max_tokens=max_tokens, prompt_logprobs=0 if wide else None)
        request = Request(
            f"{self.arrivals}",
            None,
            prompt,
            params,
            lambda _: None,
            priority=priority,
            arrival=self.arrivals,
            salt=salt,
            max_tokens=max_tokens,
        )
        self.arrivals += 1
        self.requests.append(request)
        self.scheduler.add(self.new_branch(request))

    @rule(count=st.integers(1, 5))
    @precondition(lambda self: self.requests)
    def steps(self, count):
        for _ in range(count):
            computed, failed = self.run_step()
            assert not failed
            assert computed or not self.requests

    @rule(call=st.integers(0, 4), kind=st.sampled_from([OutOfBlocksError, MemoryError]), persists=st.booleans())
    @precondition(lambda self: self.requests)
    def step_with_failing_allocations(self, call, kind, persists):
        """F54: one allocation of a step fails, or it and all after it do."""
        allocate, calls = self.pool.allocate, []

        def fail(count):
            calls.append(count)
            if len(calls) == call + 1 or (persists and len(calls) > call):
                raise kind("injected")
            return allocate(count)

        running = len(self.scheduler.running)
        self.pool.allocate = fail
        try:
            _, failed = self.run_step()
        finally:
            del self.pool.allocate
        for branch, error in failed:
            assert branch.sequence is None
            assert isinstance(error, kind if kind is MemoryError else CacheFullError)
        if not persists:
            # whose allocation failed, or who was alone for the third time
            assert len(failed) <= (len(calls) > call)
        assert len(failed) <= running + len(calls)

    @rule(pick=st.integers(0, 7))
    @precondition(lambda self: self.requests)
    def abort(self, pick):
        self.end(self.requests[pick % len(self.requests)])

    @rule(count=st.integers(0, 4))
    @precondition(lambda self: self.index is not None)
    def evict(self, count):
        if count:
            self.index.evict(count)
        else:
            self.index.clear()

    # ---- always --------------------------------------------------------------------------------------------------

    @invariant()
    def lists_are_in_order_and_hold_every_branch_once(self):
        scheduler = self.scheduler
        for branches in (scheduler.running, scheduler.waiting):
            keys = [branch.key for branch in branches]
            assert keys == sorted(set(keys))
        assert len(scheduler.running) <= MAX_SEQS
        unfinished = [b for request in self.requests for b in request.branches if b.finish_reason is None]
        assert sorted(map(id, scheduler.running + scheduler.waiting)) == sorted(map(id, unfinished))
        for branch in scheduler.running:
            assert branch.sequence is not None
            assert len(branch.sequence) == branch.num_computed < len(branch.tokens)
        # a chain follows one branch's tokens
        chains = [branch.chain for branch in scheduler.running if branch.chain is not None]
        assert len(set(map(id, chains))) == len(chains)
        for branch in scheduler.waiting:
            assert branch.sequence is None
            assert branch.chain is None
            assert branch.num_computed == 0

    @invariant()
    def every_block_is_free_or_somebodys(self):
        references = [0] * NUM_BLOCKS
        for branch in self.scheduler.running:
            for block in branch.sequence.blocks:
                references[block] += 1
        if self.index is not None:
            for block in range(NUM_BLOCKS):
                references[block] += self.index._indexed[block]
        assert list(self.pool.references) == references
        assert self.pool.num_free == references.count(0)
        unused = 0 if self.index is None else self.index.num_evictable
        assert self.scheduler.num_free == self.pool.num_free + unused

    @invariant()
    def indexed_blocks_hold_what_they_are_indexed_for(self):
        for entry in [] if self.index is None else self.index._entries.values():
            tokens, ancestor = [], entry
            while ancestor is not None:
                tokens = [*struct.unpack(f"<{SIZE}q", ancestor.tokens), *tokens]
                ancestor = ancestor.parent
            held = self.slots[:, entry.block * SIZE : (entry.block + 1) * SIZE].tolist()
            assert held[0] == held[1]
            assert held[0] in [numbers_of(salt, tokens)[-SIZE:] for salt in (None, "a")]

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        # everybody ends, the last alone if need be
        bound = 4 * sum(
            request.num_choices * (len(request.prompt_ids) + request.max_tokens) for request in self.requests
        )
        while self.requests:
            computed, failed = self.run_step()
            assert computed
            assert not failed
            assert bound > 0
            bound -= 1
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.scheduler.num_free == NUM_BLOCKS


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.proves("load:L6", "fault:F53", "fault:F54", "promise:D4")
def test_scheduler_under_load_and_faults(monkeypatch):
    monkeypatch.setattr("gpt2rt.engine.scheduler._MAX_WIDE_ROWS", MAX_WIDE_ROWS)
    run_state_machine_as_test(SchedulerMachine, settings=SETTINGS)
