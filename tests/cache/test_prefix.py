"""The prefix index: what it finds, and what it takes in."""

import pytest
import torch
from prefix_branches import SECRET, SIZE, Branch, computed, found, ids, new_index, references

from gpt2rt.cache import PagedKVCache, PrefixIndex, Sequence
from gpt2rt.errors import OutOfBlocksError

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
