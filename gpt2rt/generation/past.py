"""``past_key_values`` of the result: the keys and values of all rows, out of the paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .batch import CachedRows
from .prompts import full_mask
from .starts import LayerPairs, read_sequences

if TYPE_CHECKING:
    from .decode import DecodePlan, Row


def cache_columns(plan: DecodePlan, rows_per_prompt: int, num_new: int) -> Tensor:
    """Which columns of a returned cache hold tokens.

    Args:
        plan: of the call.
        rows_per_prompt: rows of the cache for each prompt.
        num_new: columns after the prompt.

    Returns:
        [batch * rows_per_prompt, prompt columns + num_new] bool on CPU.
    """
    keep = full_mask(plan.columns, plan.keep) if plan.starts is None else plan.starts.keep
    keep = keep.repeat_interleave(rows_per_prompt, dim=0)
    return torch.cat([keep, keep.new_ones((len(keep), num_new))], dim=1)


def read_rows(plan: DecodePlan, cached: CachedRows, rows: Sequence[Row]) -> LayerPairs:
    """The keys and values of rows that have ended: of the prompt and of all new tokens but the last.

    A row that ended before others is computed on with padding, as transformers does, as far as positions go, so that
    the cache fits the padded sequences.

    Args:
        plan: of the call.
        cached: the rows in the cache, none of them freed.
        rows: their tokens.

    Returns:
        Of each layer, keys and values [num_rows, n_head, columns, head_dim], 0 where a prompt is padded.
    """
    longest = max(len(row.new_ids) for row in rows)
    behind: list[int] = []
    tokens: list[list[int]] = []
    for index, row in enumerate(rows):
        hidden = 0 if plan.starts is None else plan.starts.rows[row.prompt].hidden
        # what lies beyond was computed for candidates that the row did not take
        cached.truncate(index, hidden + len(row.ids) - 1)
        ids = row.ids + [plan.pad_token_id] * (longest - len(row.new_ids))
        stop = min(hidden + len(ids) - 1, plan.executor.plan.n_positions)
        missing = ids[cached.sequence(index).length - hidden : max(0, stop - hidden)]
        if missing:
            behind.append(index)
            tokens.append(missing)
    if behind:
        cached.compute(tokens, behind)
    columns = cache_columns(plan, plan.num_return_sequences, longest - 1)
    return read_sequences(cached.sequences, columns, cached.cache, plan.executor.plan.dtype)
