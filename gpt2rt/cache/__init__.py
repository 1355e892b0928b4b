"""The paged KV cache: a pool of reference-counted blocks, the tensors behind them, one block table a sequence, and the
index that finds computed prefixes again."""

from .block_pool import BlockPool
from .paged import SCALED_DTYPES, PagedKVCache, Sequence
from .prefix import Chain, PrefixIndex

__all__ = ["SCALED_DTYPES", "BlockPool", "Chain", "PagedKVCache", "PrefixIndex", "Sequence"]
