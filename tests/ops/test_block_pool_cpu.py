"""The block pool's C++ form against its documentation."""

import pytest
import torch

import gpt2rt.ops as ops

OPS = torch.ops.gpt2rt


def ids(*values):
    return torch.tensor(values, dtype=torch.int32)


def counts(state):
    return state[2 + int(state[0]) :].tolist()


def stack(state):
    return state[2 : 2 + int(state[1])].tolist()


def test_blocks_come_in_order_and_return_to_the_top():
    state = ops.new_block_pool(5)
    assert ops.block_pool_allocate(state, 3).tolist() == [0, 1, 2]
    assert (stack(state), counts(state)) == ([4, 3], [1, 1, 1, 0, 0])
    assert ops.block_pool_free(state, ids(1, 0)) == 2
    assert stack(state) == [4, 3, 1, 0]
    assert ops.block_pool_allocate(state, 4).tolist() == [0, 1, 3, 4]
    assert stack(state) == []
    assert ops.block_pool_allocate(state, 0).tolist() == []


def test_references_are_counted():
    state = ops.new_block_pool(3)
    ops.block_pool_allocate(state, 2)
    ops.block_pool_incref(state, ids(0, 1, 0))
    assert counts(state) == [3, 2, 0]
    assert ops.block_pool_free(state, ids(1, 0)) == 0
    # the same block several times in one call loses as many references
    assert ops.block_pool_free(state, ids(0, 1, 0)) == 2
    assert (stack(state), counts(state)) == ([2, 1, 0], [0, 0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: ops.block_pool_allocate(s, 3), "3 blocks asked for, 2 of 4 are free"),
        (lambda s: ops.block_pool_allocate(s, -1), "num_blocks is -1"),
        (lambda s: ops.block_pool_incref(s, ids(0, 2)), "block 2 is free"),
        (lambda s: ops.block_pool_incref(s, ids(0, 4)), r"block_ids\[1\] is 4, but the pool has 4 blocks"),
        (lambda s: ops.block_pool_free(s, ids(0, -1)), r"block_ids\[1\] is -1"),
        (lambda s: ops.block_pool_free(s, ids(1, 0, 1)), r"block 1 \(block_ids\[2\]\) is freed more often"),
        (lambda s: ops.block_pool_free(s, ids(0, 2)), r"block 2 \(block_ids\[1\]\) is freed more often"),
        (lambda s: OPS.block_pool_free(s, torch.tensor([0.0])), "block_ids is float32, expected int32 or int64"),
        (lambda s: OPS.block_pool_free(s, ids(0).view(1, 1)), r"block_ids has shape \[1, 1\]"),
    ],
)
def test_refusals_change_nothing(call, message):
    state = ops.new_block_pool(4)
    ops.block_pool_allocate(state, 2)
    before = state.clone()
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(state)
    assert torch.equal(state, before)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, 5, "state says 5 blocks, which needs 12 elements"),
        (0, -1, "state says -1 blocks"),
        (1, 5, "state says 5 of 4 blocks are free"),
        (1, -1, "state says -1 of 4"),
        (5, 9, "the stack of free blocks holds 9"),
        (5, -1, "the stack of free blocks holds -1"),
    ],
)
def test_damaged_states_are_refused(index, value, message):
    state = ops.new_block_pool(4)
    state[index] = value
    before = state.clone()
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.block_pool_allocate(state, 1)
    assert torch.equal(state, before)
    with pytest.raises((RuntimeError, ValueError), match="state is int64"):
        OPS.block_pool_allocate(state.long(), 1)
