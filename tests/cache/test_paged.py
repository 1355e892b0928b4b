"""Sequences over the paged cache: a state machine that writes, forks, cuts and frees, checked token by token."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.errors import OutOfBlocksError

BLOCK_SIZE = 8
NUM_BLOCKS = 12


def new_cache(num_blocks=NUM_BLOCKS):
    return PagedKVCache(2, 1, 1, num_blocks, block_size=BLOCK_SIZE)


class SequenceMachine(RuleBasedStateMachine):
    """Each token writes a number of its own to its slot; every live sequence must read back exactly its own."""

    def __init__(self):
        super().__init__()
        self.cache = new_cache()
        self.cache.data.fill_(float("nan"))
        self.live = []  # (sequence, the numbers it must hold)
        self.counter = 0

    @rule()
    @precondition(lambda self: len(self.live) < 4)
    def create(self):
        self.live.append((Sequence(self.cache), []))

    @rule(pick=st.integers(0, 9), count=st.integers(0, 20))
    @precondition(lambda self: self.live)
    def append(self, pick, count):
        sequence, numbers = self.live[pick % len(self.live)]
        before = (list(sequence.blocks), sequence.length, self.cache.pool.num_free)
        try:
            slots = sequence.append(count)
        except OutOfBlocksError:
            assert before == (sequence.blocks, sequence.length, self.cache.pool.num_free)
            return
        assert len(slots) == count
        for slot in slots:
            self.counter += 1
            self.cache.data[:, :, slot // BLOCK_SIZE, 0, slot % BLOCK_SIZE] = self.counter
            numbers.append(self.counter)

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.live and len(self.live) < 4)
    def fork(self, pick):
        sequence, numbers = self.live[pick % len(self.live)]
        self.live.append((sequence.fork(), list(numbers)))

    @rule(pick=st.integers(0, 9), fraction=st.floats(0, 1))
    @precondition(lambda self: self.live)
    def truncate(self, pick, fraction):
        sequence, numbers = self.live[pick % len(self.live)]
        length = int(fraction * len(numbers))
        sequence.truncate(length)
        del numbers[length:]

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.live)
    def free(self, pick):
        sequence, _ = self.live.pop(pick % len(self.live))
        sequence.free()
        sequence.free()

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for sequence, numbers in self.live:
            assert sequence.length == len(numbers)
            rows = self.cache.data[1, 1, sequence.blocks, 0, :, 0].flatten()[: len(numbers)]
            assert rows.tolist() == numbers

    @invariant()
    def references_match(self):
        held = [block for sequence, _ in self.live for block in sequence.blocks]
        for block in range(NUM_BLOCKS):
            assert self.cache.pool.reference_count(block) == held.count(block)
        assert self.cache.pool.num_free == NUM_BLOCKS - len(set(held))

    def teardown(self):
        for sequence, _ in self.live:
            sequence.free()
        assert self.cache.pool.num_free == NUM_BLOCKS


TestSequences = SequenceMachine.TestCase
TestSequences.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_a_fork_shares_full_blocks_and_copies_only_the_tail():
    cache = new_cache()
    parent = Sequence(cache)
    parent.append(BLOCK_SIZE + 3)
    child = parent.fork()
    assert cache.pool.num_free == NUM_BLOCKS - 2
    child.append(1)
    assert child.blocks[0] == parent.blocks[0]
    assert child.blocks[1] != parent.blocks[1]
    assert cache.pool.num_free == NUM_BLOCKS - 3
    # the parent is alone on its tail now and writes without a copy
    tail = parent.blocks[1]
    parent.append(1)
    assert parent.blocks[1] == tail


def test_a_failed_copy_on_write_changes_nothing():
    cache = new_cache(num_blocks=1)
    parent = Sequence(cache)
    parent.append(3)
    child = parent.fork()
    with pytest.raises(OutOfBlocksError):
        child.append(1)
    assert child.length == 3
    parent.free()
    child.append(1)
    assert child.length == 4


@pytest.mark.parametrize("block_size", [0, 4, 12, -8])
def test_block_sizes_are_powers_of_two(block_size):
    with pytest.raises(ValueError, match="power of two"):
        PagedKVCache(1, 1, 1, 1, block_size=block_size)


def test_sizes_are_positive():
    with pytest.raises(ValueError, match="n_head must be at least 1, got 0"):
        PagedKVCache(1, 0, 1, 1)


def test_bad_lengths_are_refused():
    sequence = Sequence(new_cache())
    with pytest.raises(ValueError, match="num_tokens"):
        sequence.append(-1)
    with pytest.raises(ValueError, match=r"length must lie in \[0, 0\], got 1"):
        sequence.truncate(1)


def test_dtype_and_shape():
    cache = PagedKVCache(3, 2, 5, 4, dtype=torch.bfloat16)
    assert cache.data.shape == (3, 2, 4, 2, 16, 5)
    assert cache.key_cache(1).data_ptr() == cache.data[1, 0].data_ptr()
    assert cache.value_cache(1).data_ptr() == cache.data[1, 1].data_ptr()
    assert cache.blocks_for(16) == 1
    assert cache.blocks_for(17) == 2
