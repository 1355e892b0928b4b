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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_what_was_written_is_read_and_survives_forks(dtype):
    cache = PagedKVCache(2, 3, 5, 8, block_size=8, dtype=dtype)
    sequence = Sequence(cache)
    keys, values = torch.randn(2, 2, 11, 3, 5).unbind(0)  # [n_layer, tokens, n_head, head_dim]
    slots = torch.tensor(sequence.append(11))
    for layer in range(2):
        cache.write(layer, keys[layer], values[layer], slots)
    expected = torch.stack([keys, values], dim=1).transpose(2, 3)  # [n_layer, 2, n_head, tokens, head_dim]
    close = {"rtol": 2**-7, "atol": 0.02 if dtype == torch.int8 else 1e-6}

    def read(of):
        return cache.read(torch.tensor([of.blocks]), of.length, torch.float32)[:, :, 0]

    before = read(sequence)
    assert before.dtype == torch.float32
    torch.testing.assert_close(before, expected, **close)
    child = sequence.fork()
    slot = torch.tensor(child.append(1))
    for layer in range(2):
        # a hundred times as large: a scale that is shared by mistake would show
        cache.write(layer, 100 * keys[layer, :1], 100 * values[layer, :1], slot)
    assert torch.equal(read(sequence), before)
    assert torch.equal(read(child)[:, :, :, :11], before)
    torch.testing.assert_close(read(child)[:, :, :, 11], 100 * expected[:, :, :, 0], rtol=2**-7, atol=2.0)
    child.truncate(9)
    assert torch.equal(read(child), before[:, :, :, :9])


def test_an_int8_cache_has_a_scale_for_each_token_and_head():
    cache = PagedKVCache(3, 2, 64, 4, dtype=torch.int8)
    assert cache.data.shape == (3, 2, 4, 2, 16, 64)
    assert cache.scales.shape == (3, 2, 4, 2, 16)
    assert cache.scales.dtype == torch.float32
    assert cache.key_scales(1).data_ptr() == cache.scales[1, 0].data_ptr()
    assert cache.value_scales(1).data_ptr() == cache.scales[1, 1].data_ptr()
    # 68 bytes instead of 256 for a head
    assert "0.1 MB" in repr(cache)
    plain = PagedKVCache(3, 2, 64, 4)
    assert plain.scales is None
    assert plain.key_scales(0) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.int32, torch.bool, torch.float8_e5m2], ids=str)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=r"a KV cache cannot be .*; choose .*, int8 or float8_e4m3fn"):
        PagedKVCache(1, 1, 1, 1, dtype=dtype)


def test_large_caches_lie_on_huge_pages():
    cache = PagedKVCache(2, 2, 64, 256, dtype=torch.bfloat16)
    assert cache.data.data_ptr() % (2 * 1024 * 1024) == 0
    assert cache.data.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_an_8_bit_cache_reads_back_what_was_written(dtype):
    cache = PagedKVCache(1, 2, 24, 4, block_size=BLOCK_SIZE, dtype=dtype)
    for part in (cache.data.view(torch.uint8), cache.scales.view(torch.int32)):
        # NaN in float8 and in float32
        part.fill_(-1 if part.dtype == torch.int32 else 0x7F)
    sequence = Sequence(cache)
    slots = torch.tensor(sequence.append(11))
    key, value = torch.randn(2, 11, 2, 24)
    cache.write(0, key, value, slots)
    child = sequence.fork()
    child.append(1)
    for holder in (sequence, child):
        read = cache.read(torch.tensor([holder.blocks]), 11, torch.float32)
        assert read.shape == (1, 2, 1, 2, 11, 24)
        for x, wide in zip((key, value), read[0, :, 0], strict=True):
            largest = x.abs().amax(-1, keepdim=True)
            # half a step of int8; float8 has 3 bits after the first, which is up to a 16th of each element
            bound = largest / 127 / 2 if dtype == torch.int8 else x.abs() / 16 + largest / 448 / 512
            assert ((wide.transpose(0, 1) - x).abs() <= bound * 1.001).all()
    assert repr(cache).startswith("PagedKVCache(")
