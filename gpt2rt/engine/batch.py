"""The batch of an engine's step, in tensors that are made once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as ListLike

import torch

from gpt2rt.cache import Sequence
from gpt2rt.graph import StepBatch

from .request import Branch


@dataclasses.dataclass(slots=True)
class Item:
    """A branch's part of a step.

    Attributes:
        branch: whose tokens.
        start: its first token that is computed.
        count: how many.
        slots: where their keys and values go, one for each.
        num_logits: how many of its last rows give logits (or hidden states).
    """

    branch: Branch
    start: int
    count: int
    slots: list[int]
    num_logits: int

    @property
    def complete(self) -> bool:
        """Whether all tokens of the branch are computed after this step."""
        return self.start + self.count == len(self.branch.tokens)


class StepBuffers:
    """Lays steps out in the host's memory, through numpy, where a store costs a tenth of a tensor operation.

    Args:
        max_tokens: the most tokens of a step.
        max_seqs: the most branches.
        max_blocks: the most blocks of a branch.
    """

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int) -> None:
        self._tensors = {
            "input_ids": torch.zeros(max_tokens, dtype=torch.int64),
            "position_ids": torch.zeros(max_tokens, dtype=torch.int64),
            "slot_mapping": torch.zeros(max_tokens, dtype=torch.int64),
            "logits_indices": torch.zeros(max_tokens, dtype=torch.int64),
            "query_start_loc": torch.zeros(max_seqs + 1, dtype=torch.int32),
            "seq_lens": torch.zeros(max_seqs, dtype=torch.int32),
            "block_table": torch.zeros((max_seqs, max_blocks), dtype=torch.int32),
        }
        self._arrays = {name: tensor.numpy() for name, tensor in self._tensors.items()}
        self._counting = torch.arange(max(max_tokens, max_blocks * 2), dtype=torch.int64).numpy()
        # whose block table stands in each row, and how many blocks of it
        self._owners: list[Sequence | None] = [None] * max_seqs
        self._written = [0] * max_seqs
        # views of the tensors by (tokens, branches, logits): making them costs more than filling them
        self._views: dict[tuple[int, int, int], StepBatch] = {}

    def lay_out(self, items: ListLike[Item]) -> StepBatch:
        """The batch of a step, on the CPU; valid until the next call.

        Args:
            items: at least one; their slots are reserved.
        """
        arrays = self._arrays
        ids, positions, slots = arrays["input_ids"], arrays["position_ids"], arrays["slot_mapping"]
        rows, starts, lengths = arrays["logits_indices"], arrays["query_start_loc"], arrays["seq_lens"]
        token = logit = longest = most = 0
        for place, item in enumerate(items):
            branch, start, count = item.branch, item.start, item.count
            sequence = branch.sequence
            assert sequence is not None
            stop = start + count
            if count == 1:
                ids[token] = branch.tokens[start]
                positions[token] = start
                slots[token] = item.slots[0]
            else:
                ids[token : token + count] = branch.tokens[start:stop]
                positions[token : token + count] = self._counting[:count] + start
                slots[token : token + count] = item.slots
            token += count
            starts[place + 1] = token
            lengths[place] = stop
            if item.num_logits == 1:
                rows[logit] = token - 1
                logit += 1
            elif item.num_logits:
                rows[logit : logit + item.num_logits] = self._counting[: item.num_logits] + (token - item.num_logits)
                logit += item.num_logits
            self._write_table(place, sequence)
            longest = max(longest, stop)
            most = max(most, count)
        batch = self._view(token, len(items), logit)
        batch.max_seq_len, batch.max_query_len = longest, most
        return batch

    def _write_table(self, place: int, sequence: Sequence) -> None:
        blocks = sequence.blocks
        count = len(blocks)
        table = self._arrays["block_table"]
        if self._owners[place] is not sequence or count < self._written[place]:
            # nobody's while it is written: an interrupt may leave it half done
            self._owners[place] = None
            table[place, :count] = blocks
            self._owners[place] = sequence
        elif count == self._written[place]:
            # the last one may be a copy that replaced a shared block
            table[place, count - 1] = blocks[-1]
        else:
            first = max(self._written[place] - 1, 0)
            table[place, first:count] = blocks[first:]
        self._written[place] = count

    def _view(self, tokens: int, seqs: int, logits: int) -> StepBatch:
        key = tokens, seqs, logits
        batch = self._views.get(key)
        if batch is None:
            if len(self._views) >= 1024:
                self._views.clear()
            sizes = {"query_start_loc": seqs + 1, "seq_lens": seqs, "block_table": seqs, "logits_indices": logits}
            views = {name: tensor[: sizes.get(name, tokens)] for name, tensor in self._tensors.items()}
            batch = self._views[key] = StepBatch(**views, max_query_len=0, max_seq_len=0)
        return batch

    def forget(self) -> None:
        """Write whole tables at the next step: a sequence has lost blocks since the last."""
        self._owners = [None] * len(self._owners)
