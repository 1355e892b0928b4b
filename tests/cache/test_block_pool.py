"""The block pool against a model of it, and its refusals."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gpt2rt import ops
from gpt2rt.cache import BlockPool
from gpt2rt.errors import OutOfBlocksError
from gpt2rt.ops import block_pool as pool_forms

NUM_BLOCKS = 7


def free_reference(state, block_ids):
    """The plain torch form, counting as the public function does."""
    before = int(state[1])
    pool_forms._free_ref(state, block_ids)
    return int(state[1]) - before


class PoolMachine(RuleBasedStateMachine):
    """The op and its plain torch form, fed with the same calls, beside a dictionary of reference counts."""

    def __init__(self):
        super().__init__()
        self.state = ops.new_block_pool(NUM_BLOCKS)
        self.reference = ops.new_block_pool(NUM_BLOCKS)
        self.counts = dict.fromkeys(range(NUM_BLOCKS), 0)

    def both(self, op, reference, argument):
        """Call both forms; they agree in result, in refusal and in leaving the state alone when they refuse."""
        before = self.state.clone()
        outcomes = []
        for form, state in ((op, self.state), (reference, self.reference)):
            try:
                outcomes.append(form(state, argument))
            except RuntimeError:
                assert torch.equal(state, before)
                outcomes.append(None)
        first, second = outcomes
        assert (first is None) == (second is None)
        if isinstance(first, torch.Tensor):
            assert torch.equal(first, second)
        else:
            assert first == second
        return first

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count):
        ids = self.both(ops.block_pool_allocate, pool_forms._allocate_ref, count)
        free = [block for block, references in self.counts.items() if references == 0]
        assert (ids is None) == (count > len(free))
        if ids is not None:
            assert len(set(ids.tolist())) == count
            for block in ids.tolist():
                assert self.counts[block] == 0
                self.counts[block] = 1

    @rule(blocks=st.lists(st.integers(0, NUM_BLOCKS), max_size=4))
    def incref(self, blocks):
        allowed = all(self.counts.get(block, 0) > 0 for block in blocks)
        before = self.state.clone()
        self.both(ops.block_pool_incref, pool_forms._incref_ref, torch.tensor(blocks, dtype=torch.int32))
        if allowed:
            for block in blocks:
                self.counts[block] += 1
        else:
            assert torch.equal(self.state, before)

    @rule(blocks=st.lists(st.integers(-1, NUM_BLOCKS), max_size=5))
    def free(self, blocks):
        allowed = all(self.counts.get(block, 0) >= blocks.count(block) for block in blocks)
        result = self.both(ops.block_pool_free, free_reference, torch.tensor(blocks, dtype=torch.int32))
        assert (result is not None) == allowed
        if allowed:
            used = [block for block in self.counts if self.counts[block]]
            for block in blocks:
                self.counts[block] -= 1
            assert result == sum(self.counts[block] == 0 for block in used)

    @invariant()
    def state_is_whole(self):
        assert torch.equal(self.state, self.reference)
        free = self.state[2 : 2 + int(self.state[1])].tolist()
        assert sorted(free) == [block for block, references in self.counts.items() if references == 0]
        assert self.state[2 + NUM_BLOCKS :].tolist() == list(self.counts.values())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_exhaustion_takes_nothing_and_names_the_numbers():
    pool = BlockPool(4)
    held = pool.allocate(3)
    with pytest.raises(OutOfBlocksError, match=r"2 KV blocks are needed, but only 1 of 4"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert pool.free(held) == 3
    assert pool.num_free == 4


def test_double_free_is_refused_and_changes_nothing():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.free([block])
    with pytest.raises(RuntimeError, match="block 0"):
        pool.free([block])
    assert pool.num_free == 3


@pytest.mark.parametrize("num_blocks", [0, -1, 2**30 + 1])
def test_impossible_sizes_are_refused(num_blocks):
    with pytest.raises(ValueError, match="between 1 and"):
        BlockPool(num_blocks)


def test_negative_allocation_is_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        BlockPool(2).allocate(-1)


def test_reference_count_of_an_unknown_block():
    with pytest.raises(IndexError, match="block 2 does not exist"):
        BlockPool(2).reference_count(2)
