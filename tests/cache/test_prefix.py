"""The prefix index: what it finds, what it keeps, what goes first, and that nothing is lost when something fails."""

import gc
import random
import threading
import weakref

import pytest
import torch

from gpt2rt.cache import PagedKVCache, PrefixIndex, Sequence
from gpt2rt.errors import OutOfBlocksError

SIZE = 8
SECRET = bytes(range(32))


def new_index(num_blocks=16):
    cache = PagedKVCache(1, 1, 1, num_blocks, block_size=SIZE)
    return cache, PrefixIndex(cache, secret=SECRET)


def ids(start, count):
    return list(range(start, start + count))


class Branch:
    """A sequence and its chain, as an engine holds them."""

    def __init__(self, cache, index, tokens, salt=None, *, share=True):
        self.index = index
        self.sequence = Sequence(cache)
        self.chain = index.chain(salt)
        self.tokens = list(tokens)
        if share:
            blocks = index.lookup(self.tokens, self.chain, len(self.tokens) - 1)
            self.sequence.adopt(blocks, len(blocks) * SIZE)
        self.num_shared = len(self.sequence)
        try:
            self.sequence.append(len(self.tokens) - len(self.sequence))
        except OutOfBlocksError:
            self.sequence.free()
            raise

    @property
    def blocks(self):
        return self.sequence.blocks

    def insert(self):
        return self.index.insert(self.tokens, self.blocks, self.chain, len(self.sequence))

    def extend(self, tokens):
        self.sequence.append(len(tokens))
        self.tokens += tokens
        return self.insert()

    def free(self):
        self.sequence.free()


def computed(cache, index, tokens, salt=None, *, share=True, keep=False):
    """Tokens that were computed and indexed; the branch's blocks, which it still holds if it is kept."""
    branch = Branch(cache, index, tokens, salt, share=share)
    branch.insert()
    blocks = list(branch.blocks)
    if keep:
        return branch
    branch.free()
    return blocks


def found(index, tokens, salt=None, limit=None):
    """What a lookup gives, without keeping the references."""
    blocks = index.lookup(tokens, salt, limit)
    index.pool.free(blocks)
    return blocks


def references(index):
    return list(index.pool.references)


# ---- what is found -------------------------------------------------------------------------------------------------


def test_the_longest_known_prefix_is_found_in_whole_blocks():
    cache, index = new_index()
    tokens = ids(0, 3 * SIZE + 5)
    blocks = computed(cache, index, tokens)
    assert index.num_cached == index.num_evictable == 3
    assert found(index, tokens) == blocks[:3]
    assert found(index, tokens[: 2 * SIZE - 1]) == blocks[:1]
    assert found(index, tokens[: 2 * SIZE] + ids(900, SIZE)) == blocks[:2]
    assert found(index, [7, *tokens[1:]]) == []
    assert found(index, tokens[SIZE:]) == []
    assert found(index, []) == []


def test_a_limit_leaves_the_last_token_to_be_computed():
    cache, index = new_index()
    tokens = ids(0, 2 * SIZE)
    blocks = computed(cache, index, tokens)
    assert found(index, tokens, limit=len(tokens)) == blocks
    assert found(index, tokens, limit=len(tokens) - 1) == blocks[:1]
    assert found(index, tokens, limit=10**9) == blocks
    assert found(index, tokens, limit=0) == []


def test_a_lookup_holds_its_blocks():
    cache, index = new_index(4)
    blocks = computed(cache, index, ids(0, 2 * SIZE))
    held = index.lookup(ids(0, 2 * SIZE))
    assert held == blocks
    assert [cache.pool.reference_count(block) for block in held] == [2, 2]
    assert index.evict(10) == 0
    with pytest.raises(OutOfBlocksError):
        cache.pool.allocate(3)
    assert found(index, ids(0, 2 * SIZE)) == blocks
    cache.pool.free(held)
    assert index.evict(10) == 2
    assert cache.pool.num_free == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [(None, ""), (None, "a"), ("a", "b"), ("a", "A"), ("", "\0"), ("\ud800", "\ud801"), ("a", "a\0")],
)
def test_salts_do_not_share(one, other):
    cache, index = new_index()
    tokens = ids(0, SIZE)
    blocks = computed(cache, index, tokens, one)
    assert found(index, tokens, other) == []
    assert found(index, tokens, one) == blocks
    others = computed(cache, index, tokens, other)
    assert others != blocks
    assert found(index, tokens, one) == blocks
    assert found(index, tokens, other) == others


class Plain:
    """A hash that hides nothing: its result is the message."""

    def __init__(self, message):
        self.message = message

    def digest(self):
        return self.message


def test_a_salt_cannot_stand_for_tokens(monkeypatch):
    """vllm#44701: fields without tags let a salt take the place of ids."""
    monkeypatch.setattr("gpt2rt.cache.prefix.sha256", Plain)
    cache = PagedKVCache(1, 1, 1, 8, block_size=SIZE)
    index = PrefixIndex(cache, secret=b"the secret key of this test.....")
    first, second = ids(0, SIZE), ids(100, SIZE)
    computed(cache, index, first + second)
    assert len(found(index, first + second)) == 2
    # the salts whose root would be the first block's key if the message did not say what it holds
    chain = index.chain()
    cache.pool.free(index.lookup(first, chain))
    (key,) = chain._keys
    for tagless in (key.removeprefix(index._secret), key.removeprefix(index._block_prefix)):
        salt = tagless.decode()
        assert index.chain(salt)._root != key
        assert found(index, second, salt) == []


def test_no_two_ids_are_the_same():
    cache, index = new_index(32)
    tokens = [0, -1, 1, 2**32 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63), 2**32, 255, 65535, 50256]
    blocks = {token: computed(cache, index, [token] * SIZE) for token in tokens}
    assert len({block for (block,) in blocks.values()}) == len(tokens)
    for token in tokens:
        assert found(index, [token] * SIZE) == blocks[token]


@pytest.mark.parametrize("bad", [2**63, -(2**63) - 1, 1.5, "7", None])
def test_what_is_no_id_is_refused_and_changes_nothing(bad):
    cache, index = new_index()
    good = ids(0, SIZE)
    computed(cache, index, good)
    before, chain = references(index), index.chain()
    with pytest.raises(ValueError, match="must be integers in"):
        index.lookup([*good, bad, *good], chain)
    branch = Branch(cache, index, ids(50, 2 * SIZE))
    held = references(index)
    with pytest.raises(ValueError, match="must be integers in"):
        index.insert([*branch.tokens[: SIZE + 1], bad, *branch.tokens[SIZE + 2 :]], branch.blocks, branch.chain)
    assert references(index) == held
    assert len(chain) == len(branch.chain) == 0
    assert index.num_cached == 1
    branch.free()
    assert references(index) == before


def test_keys_depend_on_the_secret():
    keys = []
    for secret in (SECRET, SECRET[::-1], None, None):
        index = PrefixIndex(PagedKVCache(1, 1, 1, 2, block_size=SIZE), secret=secret)
        sequence = Sequence(PagedKVCache(1, 1, 1, 2, block_size=SIZE))
        chain = index.chain()
        index.pool.allocate(1)
        sequence.append(SIZE)
        index.insert(ids(0, SIZE), sequence.blocks, chain)
        keys += [chain._root, *chain._keys]
    assert len(set(keys)) == 8


def test_a_hit_compares_the_tokens(monkeypatch):
    """Two prefixes with one key, which nobody can make with SHA-256: the second is a miss, and is not indexed."""

    class Colliding:
        def __init__(self, message):
            self.message = message

        def digest(self):
            return b"%031d" % len(self.message)

    monkeypatch.setattr("gpt2rt.cache.prefix.sha256", Colliding)
    cache, index = new_index()
    blocks = computed(cache, index, ids(0, SIZE))
    assert found(index, ids(0, SIZE)) == blocks
    assert found(index, ids(500, SIZE)) == []
    branch = computed(cache, index, ids(500, 2 * SIZE), keep=True)
    assert len(branch.chain) == 0
    assert index.num_cached == 1
    assert [cache.pool.reference_count(block) for block in branch.blocks] == [1, 1]


# ---- insert and chain ----------------------------------------------------------------------------------------------


def test_each_block_is_hashed_once(monkeypatch):
    import gpt2rt.cache.prefix as module

    cache, index = new_index()
    computed(cache, index, ids(0, 2 * SIZE + 1))
    hashed, real = [], module.sha256
    monkeypatch.setattr(module, "sha256", lambda message: hashed.append(message) or real(message))
    branch = Branch(cache, index, ids(0, 4 * SIZE + 3))
    assert branch.num_shared == 2 * SIZE
    # the salt, two hits, a miss
    assert len(hashed) == 4
    assert branch.insert() == 2
    assert len(hashed) == 6
    assert branch.insert() == 0
    for token in range(4 * SIZE + 3, 6 * SIZE):
        branch.extend([token])
    assert len(hashed) == 8
    assert len(branch.chain) == 6


def test_only_computed_tokens_are_indexed():
    cache, index = new_index()
    branch = Branch(cache, index, ids(0, 3 * SIZE))
    assert index.insert(branch.tokens, branch.blocks, branch.chain, 0) == 0
    assert index.insert(branch.tokens, branch.blocks, branch.chain, SIZE - 1) == 0
    assert index.insert(branch.tokens, branch.blocks, branch.chain, 2 * SIZE - 1) == 1
    assert found(index, branch.tokens) == branch.blocks[:1]
    assert branch.insert() == 2
    assert found(index, branch.tokens) == branch.blocks


def test_the_second_to_compute_a_block_keeps_its_own():
    cache, index = new_index()
    first = Branch(cache, index, ids(0, 2 * SIZE))
    second = Branch(cache, index, ids(0, 2 * SIZE))
    assert first.insert() == 2
    assert second.insert() == 0
    assert second.blocks != first.blocks
    assert second.extend(ids(300, SIZE)) == 1
    # its third block hangs on the first branch's two
    assert found(index, second.tokens) == [*first.blocks, second.blocks[2]]
    assert [cache.pool.reference_count(block) for block in second.blocks] == [1, 1, 2]
    first.free()
    second.free()
    assert (index.num_cached, index.num_evictable, cache.pool.num_free) == (3, 3, 13)
    assert index.evict(3) == 3
    assert cache.pool.num_free == 16


def test_a_forked_branch_shares_the_keys_so_far():
    cache, index = new_index()
    branch = computed(cache, index, ids(0, SIZE + 2), keep=True)
    twin = Branch.__new__(Branch)
    twin.index, twin.tokens = index, list(branch.tokens)
    twin.sequence, twin.chain = branch.sequence.fork(), branch.chain.fork()
    assert branch.extend(ids(100, SIZE)) == 1
    assert twin.extend(ids(200, SIZE)) == 1
    assert branch.blocks[0] == twin.blocks[0]
    assert found(index, branch.tokens) == branch.blocks[:2]
    assert found(index, twin.tokens) == twin.blocks[:2]
    assert index.num_cached == 3


def test_a_cut_branch_does_not_write_into_an_indexed_block():
    """A cut within a full last block drops no block; what comes next must still not overwrite an indexed one."""
    cache, index = new_index()
    branch = computed(cache, index, ids(0, SIZE), keep=True)
    old = branch.blocks[0]
    cache.data[:, :, old] = 1.0
    length = SIZE - 3
    for start in (700, 800):
        branch.sequence.truncate(length)
        branch.chain.truncate(length // SIZE)
        del branch.tokens[length:]
        (slot, *_) = branch.sequence.append(3)
        branch.tokens += ids(start, 3)
        assert slot == branch.blocks[0] * SIZE + SIZE - 3
        assert branch.blocks[0] != old
        # what was kept came along
        assert torch.equal(cache.data[0, 0, branch.blocks[0], 0, : SIZE - 3], torch.ones(SIZE - 3, 1))
        branch.insert()
    assert found(index, ids(0, SIZE)) == [old]
    assert found(index, branch.tokens) == branch.blocks
    assert index.num_cached == 3


def test_a_tail_that_is_shared_is_copied_before_it_is_written():
    cache, index = new_index()
    blocks = computed(cache, index, ids(0, 2 * SIZE))
    cache.data[:, :, blocks] = 2.0
    sequence = Sequence(cache)
    sequence.adopt(index.lookup(ids(0, 2 * SIZE)), 2 * SIZE - 1)
    (slot,) = sequence.append(1)
    assert sequence.blocks[0] == blocks[0]
    assert slot // SIZE == sequence.blocks[1] != blocks[1]
    assert torch.equal(cache.data[:, :, sequence.blocks], cache.data[:, :, blocks])
    sequence.free()
    assert index.num_evictable == 2


def test_a_chain_that_was_not_cut_is_noticed():
    cache, index = new_index()
    branch = computed(cache, index, ids(0, 2 * SIZE), keep=True)
    forgotten = index.chain("another salt")
    with pytest.raises(ValueError, match=r"in the prefix index for other tokens already; .*Chain\.truncate"):
        index.insert(branch.tokens, branch.blocks, forgotten)
    assert (index.num_cached, len(forgotten)) == (2, 0)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        branch.chain.truncate(-1)


def test_insert_wants_all_tokens_and_blocks():
    cache, index = new_index()
    branch = Branch(cache, index, ids(0, 2 * SIZE))
    with pytest.raises(ValueError, match="2 full blocks were announced, but there are 1 blocks"):
        index.insert(branch.tokens, branch.blocks[:1], branch.chain)
    with pytest.raises(ValueError, match="and 8 tokens"):
        index.insert(branch.tokens[:SIZE], branch.blocks, branch.chain, 2 * SIZE)
    with pytest.raises(RuntimeError, match="block 9"):
        index.insert(branch.tokens, [branch.blocks[0], 9], branch.chain)
    assert (index.num_cached, len(branch.chain)) == (0, 0)
    assert [cache.pool.reference_count(block) for block in branch.blocks] == [1, 1]


def test_arguments_are_checked():
    cache, index = new_index()
    with pytest.raises(ValueError, match="limit must be at least 0, got -1"):
        index.lookup([1], limit=-1)
    with pytest.raises(TypeError, match="salt must be a str or None, got int 5"):
        index.lookup([1], 5)
    with pytest.raises(TypeError, match="got bytes"):
        index.chain(b"x")
    branch = computed(cache, index, ids(0, SIZE), keep=True)
    with pytest.raises(ValueError, match=r"chain of a new branch, got Chain\(1 blocks\)"):
        index.lookup(branch.tokens, branch.chain)
    with pytest.raises(ValueError, match="has a prefix index already"):
        PrefixIndex(cache)
    with pytest.raises(ValueError, match="at least 16 bytes, got 3"):
        PrefixIndex(PagedKVCache(1, 1, 1, 2), secret=b"abc")
    with pytest.raises(ValueError, match="only an empty sequence can adopt blocks, this one has 8 tokens"):
        branch.sequence.adopt([], 0)
    for count in (-1, 0, SIZE + 1):
        with pytest.raises(ValueError, match=f"{count} tokens in blocks of 8 do not take the 1 blocks given"):
            Sequence(cache).adopt([0], count)


# ---- what goes first -----------------------------------------------------------------------------------------------


def is_cached(index, *prompts):
    """Which prompts are found whole; asked without touching them."""
    stamps = {key: entry.last_used for key, entry in index._entries.items()}
    result = [len(found(index, tokens)) * SIZE == len(tokens) for tokens in prompts]
    for key, entry in index._entries.items():
        entry.last_used = stamps[key]
    return result


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


def test_ancestors_that_were_evicted_come_back_with_the_branch():
    cache, index = new_index()
    branch = computed(cache, index, ids(0, 2 * SIZE), keep=True)
    index.clear()
    fresh = computed(cache, index, ids(0, 2 * SIZE), keep=True)
    assert branch.extend(ids(100, SIZE)) == 0
    assert found(index, branch.tokens) == fresh.blocks
    assert len(branch.chain) == 2


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
    blocks = computed(cache, index, branch.tokens)
    assert found(index, branch.tokens) == blocks
    branch.free()
    assert index.evict(9) == 3
    assert cache.pool.num_free == 16


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
