"""Branches of tokens over a small cache with a prefix index, and questions to the index that leave it as it is."""

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


def is_cached(index, *prompts):
    """Which prompts are found whole; asked without touching them."""
    stamps = {key: entry.last_used for key, entry in index._entries.items()}
    result = [len(found(index, tokens)) * SIZE == len(tokens) for tokens in prompts]
    for key, entry in index._entries.items():
        entry.last_used = stamps[key]
    return result
