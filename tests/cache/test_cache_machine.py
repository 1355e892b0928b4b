"""Allocator, sequences and prefix index together, against a plain model of them; L6 of the loads to hold.

Every token has a number that stands for it and all before it, salt included, and is written into its slot when it is
"computed". A block that anybody reads must hold the numbers of the reader's own tokens: whatever was written into a
block that somebody else holds, and whatever the index gave out for the wrong tokens, shows as a wrong number.
"""

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

from gpt2rt.cache import PagedKVCache, PrefixIndex, Sequence
from gpt2rt.errors import OutOfBlocksError

SIZE = 8
NUM_BLOCKS = 11
MAX_LIVE = 5
WAYS = ["adopt", "hold", "compute", "share the tail"]

PICK = st.integers(0, 11)
# few and long runs, so that prompts often start alike and often fill blocks
RUNS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([1, 3, SIZE - 1, SIZE, SIZE, SIZE + 1])), max_size=4)


class Numbers:
    """A number for each sequence of tokens: nodes of a tree, the same for the same tokens."""

    def __init__(self):
        self.nodes = {}
        self.parents = [(None, None)]

    def after(self, node, token):
        if (node, token) not in self.nodes:
            self.nodes[node, token] = len(self.parents)
            self.parents.append((node, token))
        return self.nodes[node, token]


class Live:
    """A branch: its sequence and chain, and what it must hold."""

    def __init__(self, sequence, chain, salt, tokens, numbers, stale):
        self.sequence = sequence
        self.chain = chain
        self.salt = salt
        self.tokens = tokens
        self.numbers = numbers  # of each token in the cache
        self.stale = stale  # begun before the index was cleared


class Cached:
    """What the model knows of an indexed block."""

    def __init__(self, block, used):
        self.block = block
        self.used = used


class IndexModel:
    """The index as a dictionary from the number of a block's last token to its block; parents by walking back."""

    def __init__(self, references):
        self.cached = {}
        self.parent = {}  # number of a block's last token: that of the block before it, or None
        self.references = references
        self.clock = 0

    def use(self, number):
        """A block was used, and so were all before it."""
        while number is not None:
            self.cached[number].used = self.clock
            number = self.parent[number]

    def add(self, number, parent, block):
        self.parent[number] = parent
        self.cached[number] = Cached(block, self.clock)
        self.references[block] += 1
        self.use(number)

    def drop(self, number):
        self.references[self.cached.pop(number).block] -= 1

    def unused(self):
        return [number for number, entry in self.cached.items() if self.references[entry.block] == 1]

    def leaves(self):
        parents = {self.parent[number] for number in self.cached}
        return [number for number in self.cached if number not in parents]

    def hangs_on_unused(self, number):
        unused, number = self.unused(), self.parent[number]
        while number is not None and number not in unused:
            number = self.parent[number]
        return number is not None

    def evict(self, count):
        """The blocks that become free, in their order."""
        gone = []
        while len(gone) < count and self.unused():
            leaves = [leaf for leaf in self.leaves() if leaf in self.unused()]
            candidates = leaves or [leaf for leaf in self.leaves() if self.hangs_on_unused(leaf)]
            number = min(candidates, key=lambda leaf: self.cached[leaf].used)
            if leaves:
                gone.append(self.cached[number].block)
            self.drop(number)
        return gone


class CacheMachine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.cache = PagedKVCache(1, 1, 1, NUM_BLOCKS, block_size=SIZE)
        self.pool = self.cache.pool
        self.index = PrefixIndex(self.cache, secret=bytes(16))
        self.slots = self.cache.data.view(2, -1).numpy()
        self.slots.fill(float("nan"))
        self.references = [0] * NUM_BLOCKS
        self.model = IndexModel(self.references)
        self.numbers = Numbers()
        self.live = []
        self.raw = []  # blocks that were allocated without a sequence
        self.held = []  # what a lookup gave, not adopted yet: (salt, tokens, chain, blocks)

    # ---- what the model says -----------------------------------------------------------------------------------

    def roots(self, salt):
        return self.numbers.after(0, salt)

    def count(self, salt, tokens, node=None):
        """The numbers of tokens behind a node."""
        result = []
        node = self.roots(salt) if node is None else node
        for token in tokens:
            node = self.numbers.after(node, token)
            result.append(node)
        return result

    @property
    def num_free(self):
        return self.references.count(0)

    def allocated(self, missing, call):
        """Call what allocates ``missing`` blocks; None if there are too few, after a check that nothing changed."""
        short = missing - self.num_free
        possible = short <= len(self.model.unused())
        before = list(self.pool.references), self.pool.num_free, self.index.num_cached
        try:
            result = call()
        except OutOfBlocksError:
            assert not possible
            assert before == (list(self.pool.references), self.pool.num_free, self.index.num_cached)
            return None
        assert possible
        if short > 0:
            self.model.evict(short)
        return result

    def append(self, live, tokens):
        """Compute tokens: each writes its number to its slot."""
        sequence, start = live.sequence, len(live.numbers)
        tail = sequence.blocks[-1] if start % SIZE else None
        copies = bool(tokens) and tail is not None and self.references[tail] > 1
        missing = self.cache.blocks_for(start + len(tokens)) - len(sequence.blocks) + copies
        old = list(sequence.blocks)
        slots = self.allocated(missing, lambda: sequence.append(len(tokens)))
        if slots is None:
            assert sequence.blocks == old
            assert len(sequence) == start
            return False
        for block in set(sequence.blocks) - set(old):
            # nobody else's, and not the index's
            assert self.references[block] == 0
            self.references[block] = 1
        if copies:
            self.references[tail] -= 1
            assert sequence.blocks[len(old) - 1] != tail
        node = live.numbers[-1] if live.numbers else None
        for slot, number in zip(slots, self.count(live.salt, tokens, node), strict=True):
            # a block that is written to is the writer's alone
            assert self.references[slot // SIZE] == 1
            self.slots[:, slot] = number
            live.numbers.append(number)
        live.tokens += tokens
        return True

    def insert(self, live):
        full = len(live.numbers) // SIZE
        model, expected = self.model, 0
        if full > len(live.chain) and not live.stale:
            model.clock += 1
            parent = None
            for place in range(full):
                number = live.numbers[(place + 1) * SIZE - 1]
                if number not in model.cached:
                    model.add(number, parent, live.sequence.blocks[place])
                    expected += 1
                model.use(number)
                parent = number
        assert self.index.insert(live.tokens, live.sequence.blocks, live.chain, len(live.sequence)) == expected

    # ---- sequences ---------------------------------------------------------------------------------------------

    @rule(salt=st.sampled_from([None, None, "a"]), runs=RUNS, how=st.sampled_from(WAYS), inserts=st.booleans())
    @precondition(lambda self: len(self.live) + len(self.held) < MAX_LIVE)
    def create(self, salt, runs, how, inserts):
        tokens = [token for token, length in runs for _ in range(length)]
        chain = self.index.chain(salt)
        if how == "compute":
            # as a request does that wants something of each prompt token
            self.begin(salt, tokens, chain, [], inserts)
            return
        limit = len(tokens) if how == "share the tail" else max(0, len(tokens) - 1)
        blocks = self.index.lookup(tokens, chain, limit)
        self.check_lookup(salt, tokens[:limit], blocks)
        assert len(chain) == len(blocks)
        if how == "hold":
            self.held.append((salt, tokens, chain, blocks))
        else:
            self.begin(salt, tokens, chain, blocks, inserts)

    def check_lookup(self, salt, tokens, blocks):
        self.model.clock += 1
        expected = []
        numbers = self.count(salt, tokens)
        for number in numbers[SIZE - 1 :: SIZE]:
            if number not in self.model.cached:
                break
            expected.append(self.model.cached[number].block)
            self.model.use(number)
        assert blocks == expected
        for block in blocks:
            self.references[block] += 1

    def begin(self, salt, tokens, chain, blocks, inserts, stale=False):
        sequence = Sequence(self.cache)
        # the last token is computed in any case, if need be in a copy of the block that has it
        known = min(len(blocks) * SIZE, max(0, len(tokens) - 1))
        sequence.adopt(blocks, known)
        chain.truncate(known // SIZE)
        live = Live(sequence, chain, salt, tokens[:known], self.count(salt, tokens[:known]), stale)
        self.live.append(live)
        if not self.append(live, tokens[known:]):
            self.free_one(live)
        elif inserts:
            self.insert(live)

    @rule(pick=PICK, inserts=st.booleans())
    @precondition(lambda self: self.held)
    def adopt(self, pick, inserts):
        salt, tokens, chain, blocks = self.held.pop(pick % len(self.held))
        self.begin(salt, tokens, chain, blocks, inserts)

    @rule(pick=PICK)
    @precondition(lambda self: self.held)
    def drop(self, pick):
        *_, blocks = self.held.pop(pick % len(self.held))
        self.pool.free(blocks)
        for block in blocks:
            self.references[block] -= 1

    @rule(pick=PICK, runs=RUNS, inserts=st.booleans())
    @precondition(lambda self: self.live)
    def extend(self, pick, runs, inserts):
        live = self.live[pick % len(self.live)]
        tokens = [token for token, length in runs for _ in range(length)]
        if self.append(live, tokens) and inserts:
            self.insert(live)

    @rule(pick=PICK)
    @precondition(lambda self: self.live)
    def insert_one(self, pick):
        self.insert(self.live[pick % len(self.live)])

    @rule(pick=PICK)
    @precondition(lambda self: self.live and len(self.live) + len(self.held) < MAX_LIVE)
    def fork(self, pick):
        live = self.live[pick % len(self.live)]
        tokens, numbers = list(live.tokens), list(live.numbers)
        self.live.append(Live(live.sequence.fork(), live.chain.fork(), live.salt, tokens, numbers, live.stale))
        for block in live.sequence.blocks:
            self.references[block] += 1

    @rule(pick=PICK, back=st.sampled_from([0, 1, 2, SIZE - 1, SIZE, SIZE + 1, 100]))
    @precondition(lambda self: self.live)
    def truncate(self, pick, back):
        live = self.live[pick % len(self.live)]
        length = max(0, len(live.numbers) - back)
        old = list(live.sequence.blocks)
        live.sequence.truncate(length)
        live.chain.truncate(length // SIZE)
        del live.numbers[length:], live.tokens[length:]
        assert live.sequence.blocks == old[: self.cache.blocks_for(length)]
        for block in old[len(live.sequence.blocks) :]:
            self.references[block] -= 1

    @rule(pick=PICK)
    @precondition(lambda self: self.live)
    def free(self, pick):
        self.free_one(self.live[pick % len(self.live)])

    def free_one(self, live):
        self.live.remove(live)
        for block in live.sequence.blocks:
            self.references[block] -= 1
        live.sequence.free()

    @rule(pick=PICK, inserts=st.booleans())
    @precondition(lambda self: self.live)
    def preempt_and_resume(self, pick, inserts):
        """A branch gives all back and is computed again, with what the index still knows of it."""
        live = self.live[pick % len(self.live)]
        tokens = list(live.tokens)
        self.free_one(live)
        chain = self.index.chain(live.salt)
        limit = max(0, len(tokens) - 1)
        blocks = self.index.lookup(tokens, chain, limit)
        self.check_lookup(live.salt, tokens[:limit], blocks)
        self.begin(live.salt, tokens, chain, blocks, inserts)

    # ---- pool and index ----------------------------------------------------------------------------------------

    @rule(count=st.integers(0, 5))
    def allocate(self, count):
        blocks = self.allocated(count, lambda: self.pool.allocate(count))
        if blocks is not None:
            assert all(self.references[block] == 0 for block in blocks)
            for block in blocks:
                self.references[block] = 1
                # whoever gets a block may write to it
                self.slots[:, block * SIZE : (block + 1) * SIZE] = -1.0
            self.raw.append(blocks)

    @rule(pick=PICK)
    @precondition(lambda self: self.raw)
    def give_back(self, pick):
        blocks = self.raw.pop(pick % len(self.raw))
        assert self.pool.free(blocks) == len(blocks)
        for block in blocks:
            self.references[block] = 0

    @rule(count=st.integers(0, 3))
    def evict(self, count):
        assert self.index.evict(count) == len(self.model.evict(count))

    @rule(count=st.integers(1, NUM_BLOCKS))
    @precondition(lambda self: self.model.unused())
    def fail_to_evict(self, count):
        """The pool refuses in the midst of it: the invariants and the later order say that nothing has changed."""

        def fail(_):
            raise MemoryError

        self.pool.free = fail
        try:
            with pytest.raises(MemoryError):
                self.index.evict(count)
        finally:
            del self.pool.free

    @rule(chance=st.integers(0, 9))
    def clear(self, chance):
        if chance:
            return
        self.index.clear()
        for number in list(self.model.cached):
            self.model.drop(number)
        # what was begun before is not indexed; a lookup's chain that knows nothing yet is of before, too
        for live in self.live:
            live.stale = True
        for held in self.held:
            self.begin(*held, inserts=False, stale=True)
        self.held.clear()

    # ---- always ------------------------------------------------------------------------------------------------

    @invariant()
    def references_are_those_of_the_holders(self):
        references = [0] * NUM_BLOCKS
        for live in self.live:
            for block in live.sequence.blocks:
                references[block] += 1
        for blocks in self.raw + [held[3] for held in self.held]:
            for block in blocks:
                references[block] += 1
        for entry in self.model.cached.values():
            references[entry.block] += 1
        assert list(self.pool.references) == self.references == references
        assert self.pool.num_free == references.count(0)
        assert self.pool.num_free + sum(count > 0 for count in references) == NUM_BLOCKS

    @invariant()
    def the_index_holds_what_the_model_holds(self):
        blocks = {entry.block for entry in self.model.cached.values()}
        assert {block for block in range(NUM_BLOCKS) if self.index._indexed[block]} == blocks
        assert self.index.num_cached == len(blocks) == len(self.model.cached)
        assert self.index.num_evictable == len(self.model.unused())
        assert len(self.index._leaves) <= len(blocks)

    @invariant()
    def everybody_reads_what_they_computed(self):
        for live in self.live:
            for place, block in enumerate(live.sequence.blocks):
                numbers = live.numbers[place * SIZE : (place + 1) * SIZE]
                for row in self.slots[:, block * SIZE : block * SIZE + len(numbers)].tolist():
                    assert row == numbers

    @invariant()
    def indexed_blocks_hold_what_they_are_indexed_for(self):
        for number, entry in self.model.cached.items():
            expected, node = [], number
            for _ in range(SIZE):
                expected.append(node)
                node = self.numbers.parents[node][0]
            assert self.slots[0, entry.block * SIZE : (entry.block + 1) * SIZE].tolist() == expected[::-1]
            assert self.slots[1, entry.block * SIZE : (entry.block + 1) * SIZE].tolist() == expected[::-1]

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for live in list(self.live):
            self.free_one(live)
        for blocks in self.raw + [held[3] for held in self.held]:
            self.pool.free(blocks)
        # everything else is the index's, and can be had
        assert self.index.num_evictable == self.index.num_cached == NUM_BLOCKS - self.pool.num_free
        assert len(self.pool.allocate(NUM_BLOCKS)) == NUM_BLOCKS
        assert self.index.num_cached == 0


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.proves("load:L6")
def test_cache_against_its_model():
    run_state_machine_as_test(CacheMachine, settings=SETTINGS)
