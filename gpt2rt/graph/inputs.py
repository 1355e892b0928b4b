"""The inputs of a step where its kernels read them, and how a batch gets there: from the host by one copy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from .batch import StepBatch

_NUMPY = {torch.int64: np.int64, torch.int32: np.int32}


@dataclasses.dataclass(frozen=True)
class StepSize:
    """What the buffers of a step have room for.

    Attributes:
        num_tokens: rows of the residual stream.
        num_seqs: sequences.
        num_logits: rows whose logits are computed.
        max_blocks: columns of the block table.
        num_splits: splits of the context, when each sequence computes one token; 0: any number of tokens each.
    """

    num_tokens: int
    num_seqs: int
    num_logits: int
    max_blocks: int
    num_splits: int

    def like(self, other: StepSize) -> bool:
        """Whether both are decode steps of one size, over contexts of any."""
        return self.num_splits > 0 and dataclasses.replace(other, num_splits=self.num_splits) == self


@dataclasses.dataclass(frozen=True)
class _Part:
    """Where one input lies among the bytes of all."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class StepInputs:
    """Tensors of a size of step, all in one piece of memory.

    Args:
        size: how large. A decode step's ``query_start_loc`` and ``logits_indices`` never change and are not here.
        device: where the kernels run.

    Attributes:
        tensors: by the names of :class:`StepBatch`, zeros.
    """

    def __init__(self, size: StepSize, device: torch.device) -> None:
        self._size = size
        self._device = device
        rows = torch.int64, (size.num_tokens,)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "input_ids": rows,
            "position_ids": rows,
            "slot_mapping": rows,
        }
        if not size.num_splits:
            shapes["logits_indices"] = torch.int64, (size.num_logits,)
            shapes["query_start_loc"] = torch.int32, (size.num_seqs + 1,)
        shapes["seq_lens"] = torch.int32, (size.num_seqs,)
        shapes["block_table"] = torch.int32, (size.num_seqs, size.max_blocks)
        self._parts: list[_Part] = []
        stop = 0
        for name, (dtype, shape) in shapes.items():
            # kernels are compiled for addresses that are multiples of 16
            start = -(-stop // 16) * 16
            stop = start + dtype.itemsize * math.prod(shape)
            self._parts.append(_Part(name, dtype, shape, start, stop))
        self._data = torch.zeros(stop, dtype=torch.uint8, device=device)
        self.tensors = {
            part.name: self._data[part.start : part.stop].view(part.dtype).view(part.shape) for part in self._parts
        }

    def load(self, batch: StepBatch) -> None:
        """Take a batch over; what it does not fill becomes padding: no slot, no length.

        Args:
            batch: of at most this size; on the CPU, or on the device.
        """
        if batch.input_ids.device == self._device and self._device.type == "cuda":
            self._load_from_device(batch)
            return
        # a piece of its own for every step: the copy of the last one may still be under way
        staged = torch.zeros(self._data.numel(), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        pieces = staged.numpy()
        tokens = batch.input_ids.numel()
        for part in self._parts:
            target = pieces[part.start : part.stop].view(_NUMPY[part.dtype]).reshape(part.shape)
            values = getattr(batch, part.name).numpy()
            if part.name == "block_table":
                columns = min(values.shape[1], self._size.max_blocks)
                target[: len(values), :columns] = values[:, :columns]
                continue
            target[: len(values)] = values
            if part.name == "slot_mapping":
                target[tokens:] = -1
            elif part.name == "query_start_loc":
                target[len(values) :] = tokens
        self._data.copy_(staged, non_blocking=True)

    def _load_from_device(self, batch: StepBatch) -> None:
        tokens, seqs, logits = batch.input_ids.numel(), batch.seq_lens.numel(), batch.logits_indices.numel()
        columns = min(batch.block_table.size(1), self._size.max_blocks)
        mine = self.tensors
        for name, count, rest in (
            ("input_ids", tokens, 0),
            ("position_ids", tokens, 0),
            ("slot_mapping", tokens, -1),
            ("seq_lens", seqs, 0),
            ("query_start_loc", seqs + 1, tokens),
            ("logits_indices", logits, 0),
        ):
            if name in mine:
                mine[name][:count].copy_(getattr(batch, name))
                mine[name][count:].fill_(rest)
        mine["block_table"][:seqs, :columns].copy_(batch.block_table[:, :columns])
