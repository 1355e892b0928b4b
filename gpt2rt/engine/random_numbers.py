"""The random numbers of a step's rows: those of ``generation.random.uniform``, by one call of ``ops.uniforms``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.graph.transfer import to_device

if TYPE_CHECKING:
    from .sampler import SamplingRow


class RandomNumbers:
    """Makes the numbers that rows draw with.

    Args:
        device: where they are wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[SamplingRow] = []
        self._keys: tuple[Tensor, Tensor, Tensor]
        self._zero: Tensor | None = None

    def set_rows(self, rows: list[SamplingRow]) -> None:
        """These rows come next; the numbers of greedy ones are 0."""
        self._rows = rows
        seeds, requests, choices = ([getattr(row, name) for row in rows] for name in ("seed", "request", "choice"))
        self._keys = self._tensor(seeds), self._tensor(requests), self._tensor(choices)
        greedy = [row.params.greedy for row in rows]
        self._zero = to_device(greedy, torch.bool, self._device) if any(greedy) else None

    def draw(self) -> Tensor:
        """[len(rows)] float64 from 0 to below 1: of the next token of each row."""
        positions = self._tensor([len(row.prompt_ids) + len(row.output_ids) for row in self._rows])
        numbers = ops.uniforms(*self._keys, positions)
        return numbers if self._zero is None else numbers.masked_fill_(self._zero, 0.0)

    def _tensor(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self._device)
