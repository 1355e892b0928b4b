"""The paged KV cache: a pool of reference-counted blocks, the tensors behind them, and one block table a sequence."""

from .block_pool import BlockPool
from .paged import SCALED_DTYPES, PagedKVCache, Sequence

__all__ = ["SCALED_DTYPES", "BlockPool", "PagedKVCache", "Sequence"]
