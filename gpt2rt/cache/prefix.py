"""Computed blocks that outlive their sequence, found again by the tokens they were computed from.

Keys and values of a block depend on its own tokens and on all tokens before them, and on nothing else of a request. So
a full block is known by a keyed hash of both:

    root    = SHA-256(secret | 0)                                   a branch without a salt
            = SHA-256(secret | 1 | salt in UTF-8)                   a branch with one
    key(i)  = SHA-256(secret | 2 | key(i - 1) | token ids of block i, 8 bytes each),   key(-1) = root

The byte behind the secret says what follows, and only the salt, which ends its message, varies in length: no salt can
look like tokens, nor tokens like a salt. Without the secret nobody can choose two prompts with one key or foretell a
key; and a hit still compares the token ids of its block with the stored ones.

Least recently used blocks go first, children before their parents. A block is used when it is looked up, when it is
indexed, and when a block behind it is.

Sources: Kwon et al., arXiv:2309.06180, section 4.4 (shared prefixes); Zheng et al., "SGLang", arXiv:2312.07104,
section 3 (least recently used leaves of a tree of prefixes go first).
"""

from __future__ import annotations

import heapq
import itertools
import os
import struct
import threading
from collections.abc import Sequence as Row
from hashlib import sha256

import numpy as np

from .paged import PagedKVCache

_NO_SALT, _SALT, _BLOCK = b"\x00", b"\x01", b"\x02"


class Chain:
    """Keys of the full blocks of one branch, so that each block is hashed once; :meth:`PrefixIndex.chain` makes it.

    ``len(chain)`` is how many blocks it knows. It goes with the branch's ``Sequence``: a fork of one needs a
    :meth:`fork` of the other, and a cut of one a :meth:`truncate` of the other.
    """

    __slots__ = ("_generation", "_keys", "_root")

    def __init__(self, root: bytes, generation: int, keys: list[bytes] | None = None) -> None:
        self._root = root
        self._generation = generation
        self._keys = [] if keys is None else keys

    def fork(self) -> Chain:
        """A chain with the same keys, for a branch with the same tokens so far."""
        return Chain(self._root, self._generation, self._keys.copy())

    def truncate(self, num_blocks: int) -> None:
        """Forget the keys of all but the first ``num_blocks`` blocks: those that are still full after a cut.

        Raises:
            ValueError: ``num_blocks`` is negative.
        """
        if num_blocks < 0:
            raise ValueError(f"num_blocks must be at least 0, got {num_blocks}")
        del self._keys[num_blocks:]

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"Chain({len(self)} blocks)"


class _Entry:
    """One indexed block; ``last_used`` is behind what its children know (:meth:`PrefixIndex._unlink` mends it)."""

    __slots__ = ("block", "children", "key", "last_used", "parent", "queued", "tokens")

    def __init__(self, key: bytes, block: int, tokens: bytes, parent: _Entry | None, last_used: int) -> None:
        self.key = key
        self.block = block
        self.tokens = tokens
        self.parent = parent
        self.last_used = last_used
        self.children = 0
        self.queued = False


class PrefixIndex:
    """Full blocks of computed tokens, by a keyed hash chain.

    The index holds one reference to each of its blocks. A block that nobody else holds stays in the pool, ready for
    the next prompt that starts alike, until the pool runs out: ``BlockPool.allocate`` then asks the index, and gets as
    many blocks as it misses or, where that many cannot be had, none, so that a failed allocation changes nothing.

    All methods may be called from several threads; a :class:`Chain` belongs to one.

    Args:
        cache: whose blocks are indexed; its pool's ``reclaim`` is set.
        secret: key of the hashes, at least 16 bytes; None: 32 random bytes.

    Raises:
        ValueError: the secret is shorter, or the pool has another index.
    """

    def __init__(self, cache: PagedKVCache, *, secret: bytes | None = None) -> None:
        if secret is not None and len(secret) < 16:
            raise ValueError(f"the secret of a prefix index needs at least 16 bytes, got {len(secret)}; leave it out")
        if cache.pool.reclaim is not None:
            raise ValueError("this cache has a prefix index already; use that one")
        # the pool, not the cache: pool and index point at each other, and such a circle must not keep the tensors
        self.pool = cache.pool
        self.block_size = cache.block_size
        # hashed to a fixed length: what follows starts at the same byte whatever the secret
        self._secret = sha256(os.urandom(32) if secret is None else secret).digest()
        self._block_prefix = self._secret + _BLOCK
        self._pack_ids = struct.Struct(f"<{cache.block_size}q")
        self._lock = threading.Lock()
        self._entries: dict[bytes, _Entry] = {}
        # leaves as (last_used when queued, number, entry), each once at most; what has changed since shows later
        self._leaves: list[tuple[int, int, _Entry]] = []
        self._numbers = itertools.count()
        self._clock = 0
        self._generation = 0
        self._references = self.pool.references
        self._indexed = bytearray(self.pool.num_blocks)
        self.pool.reclaim = self._reclaim

    @property
    def num_cached(self) -> int:
        """Blocks in the index, in use or not."""
        return len(self._entries)

    @property
    def num_evictable(self) -> int:
        """Blocks that only the index holds: so many can be had beyond ``pool.num_free``."""
        with self._lock:
            return self._count_unused()

    def chain(self, salt: str | None = None) -> Chain:
        """The keys of a new branch.

        Args:
            salt: branches share blocks only where their salts are equal; None and "" are two salts.

        Raises:
            TypeError: the salt is no string.
        """
        if salt is None:
            return Chain(sha256(self._secret + _NO_SALT).digest(), self._generation)
        if not isinstance(salt, str):
            raise TypeError(f"salt must be a str or None, got {type(salt).__name__} {salt!r}")
        # a lone surrogate is no valid UTF-8, and still a salt like another
        root = sha256(self._secret + _SALT + salt.encode("utf-8", "surrogatepass")).digest()
        return Chain(root, self._generation)

    def lookup(self, tokens: Row[int], salt: Chain | str | None = None, limit: int | None = None) -> list[int]:
        """The blocks of the longest known prefix; the caller holds a reference to each, and gives it back with
        ``pool.free`` or through the sequence that adopts the blocks (``Sequence.adopt``).

        Args:
            tokens: ids, in [-2**63, 2**63).
            salt: see :meth:`chain`; or the chain of a new branch, which takes up the keys found, so that
                :meth:`insert` need not compute them.
            limit: tokens that may be covered at most: ``len(tokens) - 1`` where the last one must be computed for its
                logits. None: all.

        Returns:
            Block ids in order; they cover ``len(result) * block_size`` tokens.

        Raises:
            ValueError: ``limit`` is negative, an id is no such number, or the chain has keys already. Nothing is
                changed.
            TypeError: the salt is none.
        """
        if limit is not None and limit < 0:
            raise ValueError(f"limit must be at least 0, got {limit}")
        chain = salt if isinstance(salt, Chain) else self.chain(salt)
        if chain._keys:
            raise ValueError(f"lookup is for the chain of a new branch, got {chain!r}; make one with PrefixIndex.chain")
        count = (len(tokens) if limit is None else min(limit, len(tokens))) // self.block_size
        blocks: list[int] = []
        keys: list[bytes] = []
        key = chain._root
        with self._lock:
            self._clock += 1
            for index in range(count):
                ids = self._pack(tokens, index)
                key = sha256(self._block_prefix + key + ids).digest()
                entry = self._entries.get(key)
                if entry is None or entry.tokens != ids:
                    break
                entry.last_used = self._clock
                blocks.append(entry.block)
                keys.append(key)
            if blocks:
                self.pool.incref(blocks)
            chain._keys = keys
            chain._generation = self._generation
        return blocks

    def insert(self, tokens: Row[int], blocks: Row[int], chain: Chain, num_tokens: int | None = None) -> int:
        """Index the full blocks of a branch that the chain does not know yet.

        Where another branch's block stands for the same tokens already, that one stays, this branch keeps its own, and
        its later blocks hang on the other's. Blocks before them that were evicted meanwhile are indexed again, from
        this branch. A chain from before :meth:`clear` indexes nothing.

        Args:
            tokens: the branch's ids from its start, in [-2**63, 2**63).
            blocks: its block table; it holds a reference to each.
            chain: its keys so far; those of the new blocks are added.
            num_tokens: how many of the tokens are in the cache, written and not merely reserved; None: all.

        Returns:
            How many blocks were added.

        Raises:
            ValueError: fewer blocks than the tokens need, an id is no such number, or a block is indexed for other
                tokens already. Nothing is changed.
            RuntimeError: a block is not in use. Nothing is changed.
        """
        count = (len(tokens) if num_tokens is None else num_tokens) // self.block_size
        known = len(chain._keys)
        if count <= known:
            return 0
        if count > min(len(blocks), len(tokens) // self.block_size):
            raise ValueError(
                f"{count} full blocks were announced, but there are {len(blocks)} blocks and {len(tokens)} tokens of "
                f"{self.block_size} to a block; pass the whole block table and all tokens from the start"
            )
        with self._lock:
            if chain._generation != self._generation:
                return 0
            # ancestors that were evicted come back with this branch's blocks
            first, keys = known, chain._keys
            while first and keys[first - 1] not in self._entries:
                first -= 1
            key = keys[first - 1] if first else chain._root
            parent = self._entries[key] if first else None
            self._clock += 1
            fresh: list[_Entry] = []
            new_keys: list[bytes] = []
            for index in range(first, count):
                ids = self._pack(tokens, index)
                key = keys[index] if index < known else sha256(self._block_prefix + key + ids).digest()
                entry = self._entries.get(key)
                if entry is None:
                    entry = self._new_entry(key, blocks[index], ids, parent)
                    fresh.append(entry)
                elif entry.tokens != ids:
                    # two prefixes with one key: what hangs on it would be the other's
                    break
                else:
                    entry.last_used = self._clock
                if index >= known:
                    new_keys.append(key)
                parent = entry
            if fresh:
                self.pool.incref([entry.block for entry in fresh])
                for entry in fresh:
                    self._link(entry)
                # the others have children
                self._queue(fresh[-1])
            keys.extend(new_keys)
        return len(fresh)

    def evict(self, num_blocks: int) -> int:
        """Give blocks that only the index holds back to the pool, the least recently used first.

        A block in use leaves the index, without becoming free, only where a block before it is wanted that nobody uses:
        its holder has a copy of that one, computed at the same time as the indexed one.

        Args:
            num_blocks: how many; all there are, if those are fewer.

        Returns:
            How many became free.
        """
        with self._lock:
            return self._evict(num_blocks)

    def clear(self) -> None:
        """Forget all blocks, as is due after a change of weights; those in use stay with their sequences.

        Branches from before, known by their chains, index nothing any more.
        """
        with self._lock:
            if self._entries:
                self.pool.free([entry.block for entry in self._entries.values()])
            self._forget()

    def reset(self) -> None:
        """As :meth:`clear`, but no block is given back: goes with ``BlockPool.reset``, which takes them all."""
        with self._lock:
            self._forget()

    def __repr__(self) -> str:
        return f"PrefixIndex({self.num_cached} blocks, {self.num_evictable} of them unused)"

    def _pack(self, tokens: Row[int], index: int) -> bytes:
        ids = tokens[index * self.block_size : (index + 1) * self.block_size]
        try:
            return self._pack_ids.pack(*ids)
        except struct.error as error:
            raise ValueError(f"token ids must be integers in [-2**63, 2**63), got {list(ids)}") from error

    def _new_entry(self, key: bytes, block: int, tokens: bytes, parent: _Entry | None) -> _Entry:
        if self._indexed[block]:
            raise ValueError(
                f"block {block} is in the prefix index for other tokens already; a branch that was cut needs "
                "Chain.truncate, and one that was forked Chain.fork"
            )
        return _Entry(key, block, tokens, parent, self._clock)

    def _count_unused(self) -> int:
        unused = np.asarray(self._references) == 1
        return int(np.count_nonzero(unused & np.frombuffer(self._indexed, np.bool_)))

    def _forget(self) -> None:
        self._entries.clear()
        self._leaves.clear()
        self._indexed[:] = bytes(len(self._indexed))
        self._generation += 1

    def _link(self, entry: _Entry) -> None:
        self._entries[entry.key] = entry
        self._indexed[entry.block] = 1
        if entry.parent is not None:
            entry.parent.children += 1

    def _unlink(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._indexed[entry.block] = 0
        parent = entry.parent
        if parent is not None:
            parent.children -= 1
            # whoever used the child used the parent
            parent.last_used = max(parent.last_used, entry.last_used)
            self._queue(parent)

    def _queue(self, entry: _Entry) -> None:
        if not entry.queued and not entry.children:
            entry.queued = True
            heapq.heappush(self._leaves, (entry.last_used, next(self._numbers), entry))

    def _oldest_leaf(self) -> _Entry | None:
        """Take the least recently used leaf out of the queue."""
        while self._leaves:
            last_used, _, entry = heapq.heappop(self._leaves)
            entry.queued = False
            if last_used == entry.last_used and not entry.children:
                return entry
            # used since it was queued, or a leaf no more
            self._queue(entry)
        return None

    def _reclaim(self, missing: int) -> int:
        with self._lock:
            # a single one is found or not, without a count
            if missing > 1 and self._count_unused() < missing:
                return 0
            return self._evict(missing)

    def _evict(self, num_blocks: int) -> int:
        dropped: list[_Entry] = []
        in_use: list[_Entry] = []
        num_unused = 0
        try:
            while num_unused < num_blocks:
                leaf = self._oldest_leaf()
                if leaf is None:
                    leaf = self._obstacle(in_use)
                    if leaf is None:
                        break
                    in_use.remove(leaf)
                elif self._references[leaf.block] > 1:
                    in_use.append(leaf)
                    continue
                else:
                    num_unused += 1
                self._unlink(leaf)
                dropped.append(leaf)
            return self.pool.free([entry.block for entry in dropped]) if dropped else 0
        except BaseException:
            # the pool kept all references: so does the index
            for entry in reversed(dropped):
                self._link(entry)
            in_use += dropped
            raise
        finally:
            for entry in in_use:
                self._queue(entry)

    def _obstacle(self, in_use: list[_Entry]) -> _Entry | None:
        """The least recently used of these leaves that hangs on a block that nobody uses."""
        if not self._count_unused():
            return None
        return min((leaf for leaf in in_use if self._hangs_on_unused(leaf)), key=lambda leaf: leaf.last_used)

    def _hangs_on_unused(self, leaf: _Entry) -> bool:
        entry = leaf.parent
        while entry is not None and self._references[entry.block] > 1:
            entry = entry.parent
        return entry is not None
