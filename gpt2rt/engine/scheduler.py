"""Which tokens of which requests the next step computes.

Continuous batching: every step takes the next token of each sequence that is being decoded, and fills up with chunks
of prompts. Branches go in the order of (priority, arrival, choice). Where blocks run out, the last of them gives all of
its own back and waits; it is computed anew later, with what the prefix cache still has of it. The first can thus always
go on, and since every request fits into the pool alone, all of them end.

Sources: Yu et al., "Orca", OSDI'22, section 3 (iteration-level scheduling); Kwon et al., arXiv:2309.06180, section 4.5
(preemption by recomputation); Agrawal et al., arXiv:2403.02310, section 4 (chunked prefill).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from gpt2rt.cache import PagedKVCache, PrefixIndex, Sequence
from gpt2rt.errors import CacheFullError, OutOfBlocksError

from .batch import Item
from .pacing import PrefillPacer
from .request import Branch

# rows of logits or hidden states of a step beside those of next tokens: 26 MB of GPT-2's logits
_MAX_WIDE_ROWS = 128
# steps in a row that a branch may find no block although nobody else holds any
_MAX_STRIKES = 3

_KEY = attrgetter("key")


class Scheduler:
    """Branches that wait and branches that run.

    Args:
        cache: where their keys and values go.
        index: blocks of earlier prompts in it, or None.
        max_num_seqs: branches that run side by side.
        max_tokens: the most tokens of a step.
        pacer: limits prompt tokens beside decoding branches.

    Attributes:
        waiting, running: branches in their order.
        preempted: branches that gave their blocks back in the last :meth:`schedule`.
        failed: branches that cannot go on, each with the reason; they hold no blocks any more.
        queries, hits: prompt tokens that were looked up in the index in the last :meth:`schedule`, and found.
    """

    def __init__(
        self, cache: PagedKVCache, index: PrefixIndex | None, *, max_num_seqs: int, max_tokens: int, pacer: PrefillPacer
    ) -> None:
        self._cache = cache
        self._index = index
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max_tokens
        self._pacer = pacer
        self.waiting: list[Branch] = []
        self.running: list[Branch] = []
        self.preempted: list[Branch] = []
        self.failed: list[tuple[Branch, Exception]] = []
        self.queries = 0
        self.hits = 0
        self.num_decoding = 0
        # the branch that found too few blocks, and how many were free after it gave back what it had of the index
        self._blocked: Branch | None = None
        self._blocked_free = 0

    # ---- coming and going ------------------------------------------------------------------------------------------

    def add(self, branch: Branch) -> None:
        """Let a branch wait for its turn."""
        insort(self.waiting, branch, key=_KEY)

    def fork(self, branch: Branch, sibling: Branch) -> None:
        """Begin another choice of a branch whose prompt is in the cache: it shares the blocks, or else waits."""
        if len(self.running) >= self._max_num_seqs or branch.sequence is None:
            self.add(sibling)
            return
        sibling.sequence = branch.sequence.fork()
        sibling.num_computed = branch.num_computed
        sibling.chain = None if branch.chain is None else branch.chain.fork()
        insort(self.running, sibling, key=_KEY)

    def remove(self, branch: Branch) -> None:
        """Forget a branch, and give its blocks back; nothing happens to one that is not here."""
        _discard(self.running, branch)
        _discard(self.waiting, branch)
        if self._blocked is branch:
            self._blocked = None
        self._release(branch)

    def clear(self) -> None:
        """Forget all branches."""
        for branches in (self.waiting, self.running, self.preempted):
            branches.clear()
        self.failed.clear()
        self._blocked = None

    def _release(self, branch: Branch) -> None:
        sequence, branch.sequence = branch.sequence, None
        branch.chain = None
        branch.num_computed = 0
        if sequence is not None:
            sequence.free()

    def _preempt(self, branch: Branch) -> None:
        _discard(self.running, branch)
        self._release(branch)
        self.preempted.append(branch)
        self.add(branch)

    def _fail(self, branch: Branch, error: Exception) -> None:
        self.remove(branch)
        self.failed.append((branch, error))

    # ---- a step ----------------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks that a sequence could get: free ones, and those that only the index holds."""
        return self._cache.pool.num_free + (0 if self._index is None else self._index.num_evictable)

    @property
    def has_candidates(self) -> bool:
        """Whether one who waits may come in; not the first, if it found no blocks and there are no more since."""
        if not self.waiting or len(self.running) >= self._max_num_seqs:
            return False
        return not (self._blocked is self.waiting[0] and self.running and self.num_free <= self._blocked_free)

    def schedule(self) -> list[Item]:
        """The parts of the next step, with their cache slots reserved; empty if nobody can go on.

        Parts of branches that are in ``preempted`` or ``failed`` afterwards are void: those have no sequence any more.
        """
        self.preempted.clear()
        self.failed.clear()
        self.queries = self.hits = 0
        items: list[Item] = []
        running = self.running
        self.num_decoding = decoding = sum(len(b.tokens) - b.num_computed == 1 for b in running)
        # those that decode always find room: max_tokens is at least max_num_seqs
        left = self._pacer.budget(decoding, self._max_tokens - decoding)
        wide_left = _MAX_WIDE_ROWS
        place = 0
        while place < len(running):
            branch = running[place]
            count = len(branch.tokens) - branch.num_computed
            is_prompt = count > 1
            if is_prompt:
                count = min(count, left, wide_left if _is_wide(branch) else left)
                if count < 1:
                    place += 1
                    continue
            item = self._schedule(branch, count)
            if item is None:
                # it is gone from the list: the same place is another's now
                continue
            items.append(item)
            if is_prompt:
                left -= count
                wide_left -= item.num_logits if item.num_logits > 1 else 0
            place += 1
        # those who wait come in only where nobody had to make room
        while self.waiting and not self.preempted and len(running) < self._max_num_seqs and left > 0:
            branch = self.waiting[0]
            if (_is_wide(branch) and wide_left < 1) or not self._admit(branch):
                break
            if branch.sequence is None:
                continue
            count = min(len(branch.tokens) - branch.num_computed, left, wide_left if _is_wide(branch) else left)
            item = self._schedule(branch, count)
            if item is None:
                continue
            items.append(item)
            left -= count
            wide_left -= item.num_logits if item.num_logits > 1 else 0
        return items

    def _schedule(self, branch: Branch, count: int) -> Item | None:
        """The next tokens of a running branch as a part of the step; None: it had to give way, or failed."""
        try:
            slots = self._reserve(branch, count)
            if slots is None:
                return None
            return Item(branch, branch.num_computed, count, slots, _num_logits(branch, count))
        except Exception as error:
            self._fail(branch, error)
            return None

    def _admit(self, branch: Branch) -> bool:
        """Let the first that waits run if its tokens so far find room; one that fails is gone, and that is True too."""
        if self._blocked is branch and self.running and self.num_free <= self._blocked_free:
            return False
        try:
            # the branch's from the start: whatever happens, its blocks are given back with it
            branch.sequence = sequence = Sequence(self._cache)
            cached = self._begin(branch, sequence)
            # a block for the next token of everybody who runs, so that they need not give way at once
            missing = self._cache.blocks_for(len(branch.tokens)) - len(sequence.blocks) + len(self.running)
            if missing > self.num_free and self.running:
                self._release(branch)
                # looked at again when there are more
                self._blocked, self._blocked_free = branch, self.num_free
                return False
            self._blocked = None
            self.hits += cached
            branch.num_computed = branch.num_cached = cached
            self.waiting.pop(0)
            insort(self.running, branch, key=_KEY)
        except Exception as error:
            self._fail(branch, error)
        return True

    def _begin(self, branch: Branch, sequence: Sequence) -> int:
        """Give an empty sequence what the index knows of a branch's tokens; how many these are."""
        index, request = self._index, branch.request
        if index is None:
            return 0
        branch.chain = chain = index.chain(request.salt)
        if request.needs_prompt_rows:
            return 0
        # the last token is computed in any case, for its logits
        blocks = index.lookup(branch.tokens, chain, len(branch.tokens) - 1)
        cached = len(blocks) * self._cache.block_size
        try:
            sequence.adopt(blocks, cached)
        except BaseException:
            self._cache.pool.free(blocks)
            raise
        self.queries += len(branch.tokens)
        return cached

    def _reserve(self, branch: Branch, count: int) -> list[int] | None:
        """Slots for the next tokens of a running branch, for which others may have to give way; None: it had to."""
        sequence = branch.sequence
        assert sequence is not None
        while True:
            try:
                slots = sequence.append(count)
            except OutOfBlocksError as error:
                last = self.running[-1]
                if last is branch and len(self.running) == 1:
                    branch.strikes += 1
                    if branch.strikes >= _MAX_STRIKES:
                        full = CacheFullError(f"no KV blocks for {branch!r} although no other runs: {error}")
                        full.__cause__ = error
                        self._fail(branch, full)
                        return None
                self._preempt(last)
                if last is branch:
                    return None
            except Exception as error:
                self._fail(branch, error)
                return None
            else:
                branch.strikes = 0
                return slots


def _discard(branches: list[Branch], branch: Branch) -> None:
    place = bisect_left(branches, branch.key, key=_KEY)
    if place < len(branches) and branches[place] is branch:
        del branches[place]


def _is_wide(branch: Branch) -> bool:
    """Whether every prompt token gives a row of logits or hidden states."""
    return branch.request.needs_prompt_rows


def _num_logits(branch: Branch, count: int) -> int:
    """How many of the last rows of a branch's next ``count`` tokens give logits."""
    request = branch.request
    if request.needs_prompt_rows:
        return count
    return 1 if branch.num_computed + count == len(branch.tokens) else 0
