"""Penalties for repetition, frequency and presence of the rows of a step, and the counts that they read.

The definition is ``ops.penalties``. On a device it is the op that is used, with counts over the whole vocabulary in a
slot for each row. On the host only the tokens that a row has said are counted and changed, with the same arithmetic:
some 10 us for a row, where the op takes 21 us for 50257 scores (Zen 4, one core).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.graph.transfer import to_device

if TYPE_CHECKING:
    from .sampler import SamplingRow

_FIRST_SLOTS = 4


class HostPenalties:
    """Penalties where the scores are in the memory of the CPU; what was said is kept with each row."""

    def open(self, rows: Sequence[SamplingRow]) -> None:
        """Get ready for some rows."""
        for row in rows:
            if row.said is None:
                row.said = Said(row.prompt_ids, row.output_ids)

    def close(self, row: SamplingRow) -> None:
        """Forget what a row has said."""
        row.said = None

    def penalised(self, scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """The scores of rows after their penalties.

        Args:
            scores: [len(rows), vocab_size] float32, is changed.
            rows: in the same order; those without penalties keep their scores.

        Returns:
            ``scores``.
        """
        # rows whose scores are not finite are told later
        with np.errstate(all="ignore"):
            for row, values in zip(rows, scores.numpy(), strict=True):
                if row.penalised:
                    if row.said is None or not row.said.follow(row.output_ids):
                        row.said = Said(row.prompt_ids, row.output_ids)
                    params = row.params
                    row.said.penalise(
                        values, params.repetition_penalty, params.frequency_penalty, params.presence_penalty
                    )
        return scores


class Said:
    """The tokens of a text, each once, with the number of times that it stands in the output.

    Args:
        prompt_ids: tokens of the prompt.
        output_ids: tokens of the output so far.
    """

    __slots__ = ("_ids", "_length", "_places", "_times")

    def __init__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        times = dict.fromkeys(prompt_ids, 0)
        for token in output_ids:
            times[token] = times.get(token, 0) + 1
        self._places = {token: place for place, token in enumerate(times)}
        room = 2 * len(times) + 16
        self._ids = np.zeros(room, dtype=np.int64)
        self._times = np.zeros(room, dtype=np.float32)
        self._ids[: len(times)] = list(times)
        self._times[: len(times)] = list(times.values())
        self._length = len(output_ids)

    def follow(self, output_ids: Sequence[int]) -> bool:
        """Count the output's newest token, if there is one; False where more has changed than that."""
        new = len(output_ids) - self._length
        if new != 1:
            return new == 0
        token = output_ids[-1]
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._times = np.concatenate([self._times, np.zeros_like(self._times)])
        self._ids[place] = token
        self._times[place] += 1
        self._length += 1
        return True

    def penalise(self, scores: np.ndarray, repetition: float, frequency: float, presence: float) -> None:
        """Change a row of scores, [vocab_size] float32, as ``ops.penalties`` does."""
        count = len(self._places)
        ids, times = self._ids[:count], self._times[:count]
        values = scores[ids]
        # every operation rounds to float32
        if repetition != 1.0:
            factor = np.float32(repetition)
            values = np.where(values < 0, values * factor, values / factor)
        # what stands in the prompt alone loses 0
        if frequency != 0.0:
            values = values - times * np.float32(frequency)
        if presence != 0.0:
            values = values - (times > 0) * np.float32(presence)
        scores[ids] = values


class DevicePenalties:
    """Penalties by ``ops.penalties``, with a slot for each row that has any; there may be any number.

    Args:
        vocab_size: of the model; a slot takes 4 bytes for each token.
        device: where the scores are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._free: list[int] = []

    @property
    def num_taken(self) -> int:
        """Slots that rows have."""
        return self._counts.size(0) - len(self._free)

    def open(self, rows: Sequence[SamplingRow]) -> None:
        """Give a slot to rows that have none."""
        self._reset([row for row in rows if row.slot < 0])

    def close(self, row: SamplingRow) -> None:
        """Take back a row's slot, if it has one."""
        if row.slot >= 0:
            self._free.append(row.slot)
            row.slot, row.counted = -1, 0

    def penalised(self, scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """The scores of rows after their penalties; the newest tokens are counted first.

        Args:
            scores: [len(rows), vocab_size] float32.
            rows: in the same order; those without penalties keep their scores.

        Returns:
            [len(rows), vocab_size] float32, a new tensor.
        """
        self._count([row for row in rows if row.penalised])
        factors: dict[str, Tensor | None] = {}
        for name, off in (("repetition", 1.0), ("frequency", 0.0), ("presence", 0.0)):
            values = [getattr(row.params, name + "_penalty") for row in rows]
            active = any(value != off for value in values)
            factors[name] = to_device(values, torch.float64, self._device) if active else None
        return ops.penalties(scores, self._counts, self._tensor([row.slot for row in rows]), **factors)

    def _count(self, rows: Sequence[SamplingRow]) -> None:
        """Count the tokens that were appended since the last time: one of each row, in an undisturbed run."""
        slots, tokens, others = [], [], []
        for row in rows:
            new = len(row.output_ids) - row.counted
            if row.slot < 0 or not 0 <= new <= 1:
                others.append(row)
            elif new == 1:
                slots.append(row.slot)
                tokens.append(row.output_ids[-1])
                row.counted += 1
        if slots:
            ops.count_tokens(self._counts, self._tensor(slots), self._tensor(tokens))
        self._reset(others)

    def _reset(self, rows: Sequence[SamplingRow]) -> None:
        """Count rows from the beginning, in slots that they get if they have none."""
        if not rows:
            return
        for row in rows:
            if row.slot < 0:
                if not self._free:
                    self._grow()
                row.slot = self._free.pop()
        texts = [[*row.prompt_ids, *row.output_ids] for row in rows]
        starts = [0]
        for text in texts:
            starts.append(starts[-1] + len(text))
        ops.reset_counts(
            self._counts,
            self._tensor([row.slot for row in rows]),
            self._tensor([token for text in texts for token in text]),
            self._tensor(starts),
            self._tensor([len(row.prompt_ids) for row in rows]),
            max(map(len, texts)),
        )
        for row in rows:
            row.counted = len(row.output_ids)

    def _grow(self) -> None:
        """Make room for as many slots again."""
        old = self._counts.size(0)
        new = max(_FIRST_SLOTS, 2 * old)
        counts = torch.zeros((new, self._counts.size(1)), dtype=torch.int32, device=self._device)
        counts[:old] = self._counts
        self._counts = counts
        self._free.extend(range(new - 1, old - 1, -1))

    def _tensor(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self._device)
