"""A padded batch as ragged sequences of the paged kernels: where each key goes, and how many of them a query sees.

A row's keys that may be seen are written one behind the other without padding, so a query sees the first so many of
its row. Runs of tokens become sequences of the kernels; a padded token, whose output transformers also computes, is a
sequence of its own that sees the tokens before it. Where a row begins like the one above it, as the choices of one
question do, their common tokens are computed once, and the blocks of their keys are shared: results stay the same, bit
for bit, for a row's numbers do not depend on other rows.

Nothing here touches torch's own threads, which would spin on the cores that the next kernel wants: that made a forward
of 8 x 128 tokens of the 124M shape a third slower on two cores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gpt2rt import ops

from .layers import is_traced

if TYPE_CHECKING:
    from .attention import AttentionMask
    from .cache import DynamicCache

_BLOCK_SIZE = 16


@dataclasses.dataclass
class RaggedLayout:
    """The tokens of one forward call as sequences of the paged kernels.

    Attributes:
        slot_mapping: [num_tokens] int64, the slot of each token's key and value, -1 for padding.
        query_start_loc: [num_seqs + 1] int32, where each sequence's queries begin.
        seq_lens: [num_seqs] int32, the keys that a sequence's last query sees.
        block_table: [num_seqs, blocks of a row] int32.
        num_blocks: in all; the last one holds zeros if ``has_dead``.
        max_query_len: of all sequences.
        has_dead: some query may see no key: it reads zeros.
        computed: [num_tokens] int64, the places in the flattened batch that are computed; None: all, in order.
        places: [batch * seq_len] int64, for each place of the batch the token that has its result; None: in order.
    """

    slot_mapping: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    num_blocks: int
    max_query_len: int
    has_dead: bool
    computed: Tensor | None = None
    places: Tensor | None = None
    _storage: Tensor | None = None

    @classmethod
    def of(cls, kept: Tensor | None, batch: int, seq_len: int, same: Tensor | None = None) -> RaggedLayout:
        """The layout of a batch.

        Args:
            kept: [batch, seq_len] bool on CPU, False where a key may never be seen; None: all may.
            batch, seq_len: its shape.
            same: [batch - 1, seq_len] bool on CPU: the token equals that of the row above in everything, ``kept``
                included; None shares nothing.
        """
        keep = np.ones((batch, seq_len), dtype=bool) if kept is None else kept.numpy()
        seen = keep.cumsum(axis=1)
        width = -(-seq_len // _BLOCK_SIZE)
        table = np.arange(batch * width, dtype=np.int32).reshape(batch, width)
        first_own = np.zeros(batch, dtype=np.int64)
        if same is not None:
            common = np.cumprod(same.numpy(), axis=1, dtype=np.int64).sum(axis=1)
            for row in range(1, batch):
                length = common[row - 1]
                # only whole blocks are shared; what follows them is computed again
                blocks = seen[row, length - 1] // _BLOCK_SIZE if length else 0
                if blocks:
                    table[row, :blocks] = table[row - 1, :blocks]
                    first_own[row] = np.searchsorted(seen[row], blocks * _BLOCK_SIZE) + 1
        own = np.arange(seq_len) >= first_own[:, None]
        block = np.take_along_axis(table, (seen - 1).clip(min=0) // _BLOCK_SIZE, axis=1)
        slots = np.where(keep, block * _BLOCK_SIZE + (seen - 1) % _BLOCK_SIZE, -1)[own]
        # a sequence begins with a row's first own token, with each padded token and after it
        begins = ~keep
        begins[:, 1:] |= ~keep[:, :-1]
        begins[np.arange(batch)[first_own < seq_len], first_own[first_own < seq_len]] = True
        rows, columns = own.nonzero()
        starts = begins[own].nonzero()[0]
        ends = np.append(starts[1:], rows.size)
        lengths = seen[rows[ends - 1], columns[ends - 1]].astype(np.int32)
        tables = table[rows[starts]]
        dead = lengths == 0
        if dead.any():
            tables[dead, 0] = batch * width
            lengths[dead] = 1
        shared = bool(first_own.any())
        places = None
        if shared:
            places = np.empty((batch, seq_len), dtype=np.int64)
            places[own] = np.arange(rows.size)
            for row in range(1, batch):
                places[row, : first_own[row]] = places[row - 1, : first_own[row]]
        return cls(
            slot_mapping=torch.from_numpy(slots.astype(np.int64)),
            query_start_loc=torch.from_numpy(np.append(starts, rows.size).astype(np.int32)),
            seq_lens=torch.from_numpy(lengths),
            block_table=torch.from_numpy(tables),
            num_blocks=batch * width + int(dead.any()),
            max_query_len=int((ends - starts).max()),
            has_dead=bool(dead.any()),
            computed=torch.from_numpy(own.reshape(-1).nonzero()[0]) if shared else None,
            places=None if places is None else torch.from_numpy(places.reshape(-1)),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """softmax(scale * q k^T) v over the keys that each query sees.

        Args:
            query, key, value: [num_tokens, n_head, head_dim] on CPU, last dimension contiguous.
            scale: multiplies the query.

        Returns:
            [num_tokens, n_head, head_dim], contiguous; zeros for queries that see no key.
        """
        shape = (2, self.num_blocks, query.size(1), _BLOCK_SIZE, query.size(2))
        # one block of memory for all layers: each is done before the next begins
        if self._storage is None or self._storage.shape != shape or self._storage.dtype != key.dtype:
            self._storage = key.new_empty(shape)
            if self.has_dead:
                self._storage[:, -1].zero_()
        keys, values = self._storage[0], self._storage[1]
        ops.write_kv(key, value, keys, values, self.slot_mapping)
        return ops.paged_prefill_attention(
            query, keys, values, self.block_table, self.seq_lens, self.query_start_loc, self.max_query_len, scale
        )

    def gather(self, x: Tensor) -> Tensor:
        """[batch, seq_len, n] as [1, num_tokens, n], the tokens that are computed; ``x`` itself if that is all."""
        return x if self.computed is None else x.reshape(1, -1, x.size(-1))[:, self.computed]

    def spread(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`gather`, shared results repeated: [batch * seq_len, n]."""
        return x if self.places is None else x.reshape(-1, x.size(-1))[self.places]

    def spread_cache(self, cache: DynamicCache, batch: int) -> None:
        """The same for every block's keys and values: [1, n_head, num_tokens, head_dim] to those of the batch."""
        assert self.places is not None
        for layer in cache.layers:
            assert layer.keys is not None
            assert layer.values is not None
            keys, values = (
                x[0][:, self.places].unflatten(1, (batch, -1)).transpose(0, 1).contiguous()
                for x in (layer.keys, layer.values)
            )
            layer.set(keys, values)


@dataclasses.dataclass
class SharedRows:
    """Hidden states of which some stand for several places.

    Attributes:
        rows: [num_tokens, n_embd].
        places: as in :class:`RaggedLayout`.
        whole: [*leading, seq_len, n_embd], the same spread out; where an output holds another tensor, the rows are
            no longer its own.
    """

    rows: Tensor
    places: Tensor
    whole: Tensor


def with_layout(
    mask: AttentionMask,
    batch: int,
    seq_len: int,
    past_len: int,
    tokens: Sequence[Tensor],
    may_share: Callable[[], bool],
) -> AttentionMask:
    """The mask with a layout, if the paged kernels can do it: on the CPU, without a past, causality and keys alone.

    Args:
        mask: of the call.
        batch, seq_len: shape of the input.
        past_len: tokens in the cache.
        tokens: [batch or 1, seq_len] each: all that a token's embedding is made of, to share common beginnings of
            consecutive rows; empty to share nothing.
        may_share: whether nobody can tell that they are computed once; asked only if there are some, for it costs time.
    """
    simple = mask.causal or (mask.kept is not None and mask.level is None)
    if past_len or seq_len == 1 or not simple or is_traced():
        return mask
    if not ops.extension_status().loaded or (mask.kept is not None and mask.kept.device.type != "cpu"):
        return mask
    same = None
    if tokens and batch > 1 and seq_len >= _BLOCK_SIZE:
        features = [x for x in (*tokens, mask.kept) if x is not None and x.size(0) > 1]
        same = torch.ones((batch - 1, seq_len), dtype=torch.bool)
        for x in features:
            same &= x[1:] == x[:-1]
        if not bool(same[:, :_BLOCK_SIZE].all(dim=1).any()) or not may_share():
            same = None
    return dataclasses.replace(mask, layout=RaggedLayout.of(mask.kept, batch, seq_len, same))
