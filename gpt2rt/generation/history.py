"""The tokens so far as tensors, for processors and criteria that look at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# new tokens that there is room for at first; rows may be allowed many more than they will have
_FIRST_ROOM = 1024


class History:
    """Prompts and new tokens of all rows of a call, in columns.

    Args:
        columns: [batch, length] int64, the prompts as the caller laid them out.
        keep: [batch, length] bool, False at padding and at what the model does not see; None: everything is kept.
        num_rows: rows of the call, a multiple of ``batch``.
        max_new_tokens: the most new tokens of a row.
        pad_token_id: stands after a row's end.
        device: where processors expect the ids.
    """

    def __init__(
        self,
        columns: Tensor,
        keep: Tensor | None,
        num_rows: int,
        max_new_tokens: int,
        pad_token_id: int,
        device: torch.device,
    ) -> None:
        batch, self._prompt = columns.shape
        self._pad_token_id = pad_token_id
        self._most = self._prompt + max_new_tokens
        room = self._prompt + min(max_new_tokens, _FIRST_ROOM)
        repeated = columns.to(device).repeat_interleave(num_rows // batch, dim=0)
        # what the caller's own code sees
        self._columns = torch.full((num_rows, room), pad_token_id, dtype=torch.int64, device=device)
        self._columns[:, : self._prompt] = repeated
        # what ours sees: padding is negative, and no token
        self._ids = self._columns
        if keep is not None:
            self._ids = self._columns.clone()
            padding = ~keep.to(device).repeat_interleave(num_rows // batch, dim=0)
            self._ids[:, : self._prompt].masked_fill_(padding, -1)

    def put(self, step: int, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Set the new token number ``step`` (from 0) of some rows."""
        if self._prompt + step >= self._columns.size(1):
            self._grow()
        column = torch.tensor(tokens, dtype=torch.int64, device=self._columns.device)
        every = len(rows) == self._columns.size(0)
        for ids in (self._columns,) if self._ids is self._columns else (self._columns, self._ids):
            if every:
                ids[:, self._prompt + step] = column
            else:
                ids[rows, self._prompt + step] = column

    def _grow(self) -> None:
        """Make room for as many tokens again."""
        width = self._columns.size(1)
        more = min(self._most, 2 * width) - width
        shared = self._ids is self._columns
        self._columns = torch.nn.functional.pad(self._columns, (0, more), value=self._pad_token_id)
        self._ids = self._columns if shared else torch.nn.functional.pad(self._ids, (0, more), value=self._pad_token_id)

    def reorder(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        """Let rows begin as others do: row ``rows[i]`` gets all that row ``parents[i]`` has."""
        for ids in (self._columns,) if self._ids is self._columns else (self._columns, self._ids):
            ids[rows] = ids[parents]

    def columns(self, step: int) -> Tensor:
        """[num_rows, prompt columns + step] int64, every row as the caller laid it out; finished rows are padded."""
        return self._columns[:, : self._prompt + step]

    def ids(self, step: int, rows: Sequence[int]) -> Tensor:
        """[len(rows), prompt columns + step] int64, -1 for padding."""
        ids = self._ids[:, : self._prompt + step]
        return ids if len(rows) == ids.size(0) else ids[rows]
