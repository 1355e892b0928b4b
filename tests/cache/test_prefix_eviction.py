"""What leaves the prefix index first, what an allocation gets of it, and that nothing is lost when something fails."""

import gc
import random
import threading
import weakref

import pytest
from prefix_branches import SIZE, Branch, computed, found, ids, is_cached, new_index, references

from gpt2rt.cache import Sequence
from gpt2rt.errors import OutOfBlocksError

# ---- what goes first -----------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first():
    cache, index = new_index()
    prompts = [ids(100 * number, SIZE) for number in range(4)]
    for tokens in prompts:
        computed(cache, index, tokens)
    found(index, prompts[0])
    assert index.evict(1) == 1
    assert is_cached(index, *prompts) == [True, False, True, True]
    found(index, prompts[2])
    assert index.evict(2) == 2
    assert is_cached(index, *prompts) == [False, False, True, False]
    assert index.evict(5) == 1
    assert index.evict(5) == 0
    assert (index.num_cached, cache.pool.num_free) == (0, 16)


def test_children_go_before_their_parents():
    cache, index = new_index()
    stem, one, other = ids(0, 2 * SIZE), ids(100, SIZE), ids(200, 2 * SIZE)
    computed(cache, index, stem + one)
    computed(cache, index, stem + other)
    lone = ids(300, SIZE)
    computed(cache, index, lone)
    # the stem was used with the younger branch: it outlives the older one, the younger one's tail goes from the end
    prompts = [stem[:SIZE], stem, stem + one, stem + other[:SIZE], stem + other, lone]
    left = []
    while index.num_cached:
        left.append(is_cached(index, *prompts))
        assert index.evict(1) == 1
    assert left == [
        [True, True, True, True, True, True],
        [True, True, False, True, True, True],
        [True, True, False, True, False, True],
        [True, True, False, False, False, True],
        [True, False, False, False, False, True],
        [False, False, False, False, False, True],
    ]


def test_whoever_used_a_child_used_its_parent():
    cache, index = new_index()
    branch = computed(cache, index, ids(0, SIZE), keep=True)
    other = computed(cache, index, ids(100, SIZE), keep=True)
    branch.extend(ids(SIZE, SIZE))
    branch.free()
    # the other branch is in use, or it would have gone first
    assert index.evict(1) == 1
    other.free()
    assert index.evict(1) == 1
    assert is_cached(index, ids(0, SIZE), other.tokens) == [True, False]


def test_a_block_in_use_stays_with_those_before_it():
    cache, index = new_index()
    branch = computed(cache, index, ids(0, 2 * SIZE), keep=True)
    computed(cache, index, ids(0, SIZE) + ids(100, 2 * SIZE))
    assert (index.num_cached, index.num_evictable) == (4, 2)
    assert index.evict(9) == 2
    assert found(index, branch.tokens) == branch.blocks
    branch.free()
    assert index.num_evictable == 2


def test_a_parent_that_nobody_uses_is_had_although_its_child_is_in_use():
    """Two branches computed one prompt side by side; the first is gone, and its blocks stand before the second's."""
    cache, index = new_index(6)
    first = Branch(cache, index, ids(0, 2 * SIZE))
    second = Branch(cache, index, ids(0, 2 * SIZE))
    first.insert()
    second.insert()
    second.extend(ids(300, SIZE))
    shared = list(first.blocks)
    first.free()
    assert (index.num_cached, index.num_evictable, cache.pool.num_free) == (3, 2, 1)
    # one is free, one comes from the index: the second's third block leaves it without becoming free
    held = cache.pool.allocate(2)
    assert (index.num_cached, index.num_evictable) == (1, 1)
    assert found(index, second.tokens) == shared[:1]
    assert cache.pool.reference_count(second.blocks[2]) == 1
    # its blocks are indexed again, its own where the others' are gone
    cache.pool.free(held)
    assert second.extend(ids(400, SIZE)) == 3
    assert found(index, second.tokens) == [shared[0], *second.blocks[1:]]
    with pytest.raises(OutOfBlocksError):
        cache.pool.allocate(3)
    assert index.num_cached == 4
    second.free()
    assert index.num_evictable == 4
    assert len(cache.pool.allocate(6)) == 6
    assert index.num_cached == 0


def test_an_obstacle_is_only_moved_where_that_helps():
    cache, index = new_index(8)
    older = computed(cache, index, ids(500, 2 * SIZE), keep=True)
    first = Branch(cache, index, ids(0, SIZE))
    second = Branch(cache, index, ids(0, SIZE))
    first.insert()
    second.insert()
    second.extend(ids(300, SIZE))
    first.free()
    assert index.evict(3) == 1
    # the older branch, all of whose blocks are in use, keeps its place
    assert found(index, older.tokens) == older.blocks
    assert index.num_cached == 2
    assert found(index, second.tokens) == []


def test_of_two_branches_in_the_way_the_older_one_gives_way():
    cache, index = new_index(20)
    branches = []
    for start in (0, 500):
        first, second = (Branch(cache, index, ids(start, SIZE)) for _ in range(2))
        first.insert()
        second.insert()
        second.extend(ids(start + 100, 2 * SIZE))
        first.free()
        branches.append(second)
    assert (index.num_cached, index.num_evictable) == (6, 2)
    assert index.evict(1) == 1
    assert is_cached(index, branches[0].tokens[:SIZE], branches[1].tokens) == [False, True]


def test_computing_what_is_known_is_a_use_of_it():
    cache, index = new_index()
    first, second = (Branch(cache, index, ids(0, SIZE)) for _ in range(2))
    first.insert()
    computed(cache, index, ids(100, SIZE))
    second.insert()
    first.free()
    assert index.evict(1) == 1
    assert is_cached(index, ids(0, SIZE), ids(100, SIZE)) == [True, False]


# ---- running out ---------------------------------------------------------------------------------------------------


def test_an_allocation_gets_what_it_misses_and_no_more():
    cache, index = new_index(8)
    for number in range(6):
        computed(cache, index, ids(100 * number, SIZE))
    assert (cache.pool.num_free, index.num_evictable) == (2, 6)
    assert len(cache.pool.allocate(4)) == 4
    assert (cache.pool.num_free, index.num_evictable) == (0, 4)
    assert [number for number in range(6) if found(index, ids(100 * number, SIZE))] == [2, 3, 4, 5]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_an_allocation_that_fails_evicts_nothing(count):
    cache, index = new_index(8)
    held = cache.pool.allocate(8 - count + 1)
    for number in range(count - 1):
        computed(cache, index, ids(100 * number, SIZE))
    before = references(index)
    sequence = Sequence(cache)
    with pytest.raises(OutOfBlocksError, match=f"{count} KV blocks are needed, but only 0 of 8 are free"):
        sequence.append(count * SIZE)
    assert references(index) == before
    assert index.num_cached == index.num_evictable == count - 1
    assert sequence.blocks == []
    cache.pool.free(held)


def test_a_sequence_runs_through_a_cache_full_of_others():
    cache, index = new_index(8)
    for number in range(20):
        blocks = computed(cache, index, ids(100 * number, 3 * SIZE))
        assert found(index, ids(100 * number, 3 * SIZE)) == blocks
    assert index.num_cached == 8
    assert cache.pool.num_free == 0


class Injected(Exception):
    pass


@pytest.mark.parametrize("where", ["before", "inside"])
@pytest.mark.proves("fault:F54")
def test_an_exception_while_evicting_loses_nothing(monkeypatch, where):
    cache, index = new_index(6)
    stem = ids(0, 2 * SIZE)
    computed(cache, index, stem + ids(100, SIZE))
    computed(cache, index, stem + ids(200, SIZE))
    in_use = computed(cache, index, ids(300, SIZE), keep=True)
    before, order = references(index), []
    sequence = Sequence(cache)

    def fail(*_):
        raise Injected

    with monkeypatch.context() as patch:
        if where == "before":
            patch.setattr(cache.pool, "reclaim", fail)
        else:
            patch.setattr(cache.pool, "free", fail)
        for _ in range(3):
            with pytest.raises(Injected):
                sequence.append(5 * SIZE)
            assert references(index) == before
            assert (index.num_cached, index.num_evictable, sequence.blocks) == (5, 4, [])
    prompts = [stem[:SIZE], stem, stem + ids(100, SIZE), stem + ids(200, SIZE), in_use.tokens]
    while index.evict(1):
        order.append(is_cached(index, *prompts))
    assert order == [
        [True, True, False, True, True],
        [True, True, False, False, True],
        [True, False, False, False, True],
        [False, False, False, False, True],
    ]
    in_use.free()
    assert index.evict(9) == 1
    assert cache.pool.num_free == 6


@pytest.mark.parametrize("method", ["incref", "free"])
@pytest.mark.proves("fault:F54")
def test_an_exception_in_the_pool_leaves_the_index_as_it_was(monkeypatch, method):
    cache, index = new_index(6)
    computed(cache, index, ids(0, SIZE))
    branch = Branch(cache, index, ids(100, 2 * SIZE))
    before = references(index)

    def fail(*_):
        raise Injected

    chain = index.chain()
    calls = {
        "incref": [lambda: index.lookup(ids(0, SIZE), chain), branch.insert],
        "free": [lambda: index.evict(1), index.clear],
    }
    for call in calls[method]:
        with monkeypatch.context() as patch:
            patch.setattr(cache.pool, method, fail)
            with pytest.raises(Injected):
                call()
        assert references(index) == before
        assert (index.num_cached, len(chain), len(branch.chain)) == (1, 0, 0)
    assert branch.insert() == 2
    branch.free()
    assert index.evict(9) == 3
    assert cache.pool.num_free == 6


# ---- clear, threads, lifetime --------------------------------------------------------------------------------------


def test_clear_forgets_and_is_not_undone_by_those_who_run():
    cache, index = new_index()
    computed(cache, index, ids(500, 2 * SIZE))
    branch = computed(cache, index, ids(0, 2 * SIZE), keep=True)
    index.clear()
    assert (index.num_cached, index.num_evictable, cache.pool.num_free) == (0, 0, 14)
    # computed with the weights of before
    assert branch.extend(ids(20, SIZE)) == 0
    assert found(index, branch.tokens) == []
    twin = branch.chain.fork()
    assert index.insert(branch.tokens, branch.blocks, twin) == 0
    # a chain is of the time of its lookup, not of the time when it was made
    late = index.chain("late")
    index.clear()
    index.lookup([1], late)
    held = cache.pool.allocate(1)
    assert index.insert(ids(0, SIZE), held, late) == 1
    cache.pool.free(held)
    blocks = computed(cache, index, branch.tokens)
    assert found(index, branch.tokens) == blocks
    branch.free()
    assert index.evict(9) == 4
    assert cache.pool.num_free == 16


def test_pool_and_index_are_reset_together():
    """What is due after an exception that left both in any state: here the index has lost its references."""
    cache, index = new_index()
    branch = computed(cache, index, ids(0, 2 * SIZE), keep=True)
    cache.pool.free(branch.blocks * 2)
    with pytest.raises(RuntimeError):
        index.clear()
    index.reset()
    cache.pool.reset()
    assert (index.num_cached, index.num_evictable, cache.pool.num_free) == (0, 0, 16)
    assert index.insert(branch.tokens, cache.pool.allocate(2), branch.chain) == 0
    computed(cache, index, ids(0, 2 * SIZE))
    assert (index.num_cached, len(cache.pool.allocate(14)), cache.pool.num_free) == (2, 14, 0)


def test_the_queue_of_leaves_does_not_grow_with_use():
    cache, index = new_index()
    branch = computed(cache, index, ids(0, 4 * SIZE), keep=True)
    for _ in range(50):
        found(index, branch.tokens)
        index.evict(1)
    assert len(index._leaves) <= index.num_cached
    branch.free()
    for number in range(50):
        computed(cache, index, ids(1000 * number, 5 * SIZE))
        found(index, ids(0, 4 * SIZE))
    assert len(index._leaves) <= index.num_cached == 16


def test_the_tensors_go_with_the_cache():
    """Pool and index point at each other; the cache's memory does not wait for the collector of circles."""
    cache, index = new_index()
    computed(cache, index, ids(0, SIZE))
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()
    assert index.evict(1) == 1


def test_threads_share_an_index():
    cache, index = new_index(12)
    errors, rounds = [], []

    def work(seed):
        chosen = random.Random(seed)
        try:
            for _ in range(150):
                tokens = [chosen.randrange(2)] * SIZE + [chosen.randrange(2)] * SIZE + [5]
                try:
                    branch = Branch(cache, index, tokens)
                except OutOfBlocksError:
                    continue
                branch.insert()
                index.evict(chosen.randrange(2))
                branch.free()
                rounds.append(seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set(rounds)) == 4
    assert index.num_cached == index.num_evictable == 12 - cache.pool.num_free
    index.clear()
    assert references(index) == [0] * 12
    assert cache.pool.num_free == 12
