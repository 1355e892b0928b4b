"""The batch of a decode step, kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import Any

import torch

from gpt2rt.cache import Sequence
from gpt2rt.graph import StepBatch


class DecodeBatch:
    """One token for each of some sequences.

    The tensors are made once; a step only writes the numbers that changed, through numpy, where one store costs a
    tenth of a tensor operation.

    Args:
        max_seqs: the most sequences in a step.
        max_blocks: the most blocks that one of them will have.
        device: where the model is.
    """

    def __init__(self, max_seqs: int, max_blocks: int, device: torch.device) -> None:
        self._device = device
        self._host: dict[str, Any] = {
            "input_ids": torch.zeros(max_seqs, dtype=torch.int64),
            "position_ids": torch.zeros(max_seqs, dtype=torch.int64),
            "slot_mapping": torch.zeros(max_seqs, dtype=torch.int64),
            "seq_lens": torch.zeros(max_seqs, dtype=torch.int32),
            "block_table": torch.zeros((max_seqs, max_blocks), dtype=torch.int32),
        }
        self._arrays = {name: tensor.numpy() for name, tensor in self._host.items()}
        on_host = device.type == "cpu"
        self._tensors = {name: t if on_host else t.to(device) for name, t in self._host.items()}
        self._starts = torch.arange(max_seqs + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(max_seqs, dtype=torch.int64, device=device)
        self._sequences: ListLike[Sequence] = ()
        self._batch: StepBatch | None = None

    def set_sequences(self, sequences: ListLike[Sequence]) -> None:
        """Take these sequences from the next step on."""
        self._sequences = sequences
        count = len(sequences)
        table = self._arrays["block_table"]
        for row, sequence in enumerate(sequences):
            table[row, : len(sequence.blocks)] = sequence.blocks
        views = {name: tensor[:count] for name, tensor in self._tensors.items()}
        self._batch = StepBatch(
            **views,
            query_start_loc=self._starts[: count + 1],
            logits_indices=self._rows[:count],
            max_query_len=1,
            max_seq_len=0,
        )

    def next(self, tokens: ListLike[int]) -> StepBatch:
        """The batch that computes one more token of each sequence, for which cache slots are reserved.

        Args:
            tokens: the id for each sequence.

        Returns:
            A batch that is valid until the next call.

        Raises:
            OutOfBlocksError: the pool is empty.
        """
        assert self._batch is not None
        arrays = self._arrays
        ids, positions, slots = arrays["input_ids"], arrays["position_ids"], arrays["slot_mapping"]
        lengths, table = arrays["seq_lens"], arrays["block_table"]
        longest = 0
        for row, sequence in enumerate(self._sequences):
            ids[row] = tokens[row]
            slots[row] = sequence.append(1)[0]
            length = sequence.length
            positions[row] = length - 1
            lengths[row] = length
            # the last block is new, or was copied because a fork shared it, or is the one that stands there
            table[row, len(sequence.blocks) - 1] = sequence.blocks[-1]
            longest = max(longest, length)
        if self._device.type != "cpu":
            for name, tensor in self._tensors.items():
                tensor.copy_(self._host[name], non_blocking=True)
        self._batch.max_seq_len = longest
        return self._batch
