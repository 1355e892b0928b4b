"""The paged KV cache: a pool of reference-counted blocks, the tensors behind them, and one block table a sequence."""

from .block_pool import BlockPool
from .paged import PagedKVCache, Sequence

__all__ = ["BlockPool", "PagedKVCache", "Sequence"]
