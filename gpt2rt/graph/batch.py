"""What one forward step is given and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as ListLike
from typing import Any

import torch
from torch import Tensor

from gpt2rt.cache import Sequence


@dataclasses.dataclass
class StepBatch:
    """The tokens of one step: ragged rows, no padding.

    Attributes:
        input_ids: [num_tokens] int64.
        position_ids: [num_tokens] int64.
        query_start_loc: [num_seqs + 1] int32, prefix sums of the tokens each sequence computes in this step.
        seq_lens: [num_seqs] int32, tokens in the cache after this step.
        block_table: [num_seqs, max_blocks_per_seq] int32.
        slot_mapping: [num_tokens] int64, where each token's key and value go; -1 = nowhere.
        logits_indices: [num_logits] int64, the rows of ``input_ids`` whose logits are wanted.
        max_query_len: the most tokens that one sequence computes.
        max_seq_len: the largest of ``seq_lens``.
    """

    input_ids: Tensor
    position_ids: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    logits_indices: Tensor
    max_query_len: int
    max_seq_len: int

    def to(self, device: torch.device) -> StepBatch:
        """The same on a device; itself, if it is there."""
        if self.input_ids.device == device:
            return self
        tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **tensors)

    @classmethod
    def build(
        cls,
        tokens: ListLike[ListLike[int]],
        sequences: ListLike[Sequence],
        *,
        all_logits: bool = False,
        device: torch.device | str = "cpu",
    ) -> StepBatch:
        """Reserve cache slots for each sequence's next tokens and lay the batch out.

        Args:
            tokens: for each sequence, the ids to compute in this step, at least one each.
            sequences: their block tables, which grow by as many tokens.
            all_logits: ask for the logits of every token instead of each sequence's last.
            device: where the batch tensors go.

        Raises:
            ValueError: the lists differ in length or a sequence has no tokens.
            OutOfBlocksError: the pool has too few blocks; no sequence has grown.
        """
        if len(tokens) != len(sequences) or not all(len(ids) for ids in tokens):
            raise ValueError(
                f"every sequence needs at least one token in a step, got {[len(ids) for ids in tokens]} tokens for "
                f"{len(sequences)} sequences"
            )
        slots: list[int] = []
        positions: list[int] = []
        starts = [0]
        before = [sequence.length for sequence in sequences]
        try:
            for ids, sequence in zip(tokens, sequences, strict=True):
                start = sequence.length
                slots += sequence.append(len(ids))
                positions += range(start, sequence.length)
                starts.append(len(slots))
        except BaseException:
            for sequence, length in zip(sequences, before, strict=True):
                sequence.truncate(min(length, sequence.length))
            raise
        width = max(len(sequence.blocks) for sequence in sequences)
        table = [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence in sequences]
        lengths = [sequence.length for sequence in sequences]
        logits = range(len(slots)) if all_logits else [stop - 1 for stop in starts[1:]]
        return cls(
            input_ids=torch.tensor([token for ids in tokens for token in ids], dtype=torch.int64, device=device),
            position_ids=torch.tensor(positions, dtype=torch.int64, device=device),
            query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            block_table=torch.tensor(table, dtype=torch.int32, device=device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            logits_indices=torch.tensor(logits, dtype=torch.int64, device=device),
            max_query_len=max(len(ids) for ids in tokens),
            max_seq_len=max(lengths),
        )


@dataclasses.dataclass
class StepOutput:
    """Result of one step.

    Attributes:
        logits: [num_logits, vocab_size] float32, or None if the plan has no head, or only the best were asked for.
        hidden: [num_logits, n_embd] float32, the rows after the final norm, or None unless asked for.
        top_ids: [num_logits, k] int64, the tokens with the best logits, the best first, of equal ones the lowest id; -1
            in a row whose logits are not all finite. None unless asked for.
        top_logits: [num_logits, k] float32, their logits, NaN in such a row; likewise.
    """

    logits: Tensor | None
    hidden: Tensor | None
    top_ids: Tensor | None = None
    top_logits: Tensor | None = None
