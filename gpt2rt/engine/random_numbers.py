"""The random numbers of a step's rows: those of ``generation.random.uniform``, made where that is cheapest.

On the CPU ``ops.uniforms`` takes a third of a millisecond however few numbers it makes (plain torch, Zen 4), the same
function in Python 5 us for each. So a row has numbers made ahead, together with those of many others, and only rows
that have run out while few others have are served one by one. Which way a number is made does not change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.generation.random import uniform

if TYPE_CHECKING:
    from .sampler import SamplingRow

# rows without numbers from which on it pays to make them ahead
_MANY = 5
# how many are made, and with how few left a row takes part when others have run out
_AHEAD = 64
_FEW_LEFT = 16


class RandomNumbers:
    """Makes the numbers that rows draw with.

    Args:
        device: where they are wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[SamplingRow] = []
        self._greedy: list[bool] = []
        self._keys: tuple[Tensor, Tensor, Tensor] | None = None
        self._zero: Tensor | None = None

    def set_rows(self, rows: list[SamplingRow]) -> None:
        """These rows come next; the numbers of greedy ones are 0."""
        self._rows = rows
        self._greedy = [row.params.greedy for row in rows]
        if self._device.type != "cpu":
            seeds, requests, choices = ([getattr(row, name) for row in rows] for name in ("seed", "request", "choice"))
            self._keys = self._tensor(seeds), self._tensor(requests), self._tensor(choices)
            zero = torch.tensor(self._greedy, device=self._device)
            self._zero = zero if any(self._greedy) else None

    def draw(self) -> Tensor:
        """[len(rows)] float64 from 0 to below 1: of the next token of each row."""
        if self._keys is not None:
            positions = self._tensor([len(row.prompt_ids) + len(row.output_ids) for row in self._rows])
            numbers = ops.uniforms(*self._keys, positions)
            return numbers if self._zero is None else numbers.masked_fill_(self._zero, 0.0)
        values = [0.0] * len(self._rows)
        missing = self._take(range(len(self._rows)), values)
        if len(missing) >= _MANY:
            self._make_ahead()
            missing = self._take(missing, values)
        for place in missing:
            row = self._rows[place]
            values[place] = uniform(row.seed, row.request, row.choice, len(row.prompt_ids) + len(row.output_ids))
        return torch.tensor(values, dtype=torch.float64)

    def _take(self, places: Sequence[int], values: list[float]) -> list[int]:
        """Write the numbers that some rows have to ``values``; the places of rows that have none."""
        missing = []
        for place in places:
            if self._greedy[place]:
                continue
            row = self._rows[place]
            index = len(row.prompt_ids) + len(row.output_ids) - row.ahead_from
            if 0 <= index < len(row.ahead):
                values[place] = row.ahead[index]
            else:
                missing.append(place)
        return missing

    def _make_ahead(self) -> None:
        """Make numbers for all rows that have few or none left."""
        rows, firsts = [], []
        for row, greedy in zip(self._rows, self._greedy, strict=True):
            position = len(row.prompt_ids) + len(row.output_ids)
            left = row.ahead_from + len(row.ahead) - position
            if not greedy and not (left > _FEW_LEFT and position >= row.ahead_from):
                rows.append(row)
                firsts.append(position)
        columns = [row.seed for row in rows], [row.request for row in rows], [row.choice for row in rows]
        seeds, requests, choices = (self._tensor(column).repeat_interleave(_AHEAD) for column in columns)
        positions = (self._tensor(firsts)[:, None] + torch.arange(_AHEAD)).flatten()
        numbers = ops.uniforms(seeds, requests, choices, positions).view(len(rows), _AHEAD).tolist()
        for row, first, ahead in zip(rows, firsts, numbers, strict=True):
            row.ahead_from, row.ahead = first, ahead

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
