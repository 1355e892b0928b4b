"""The score of each generated token, read from what ``generate`` recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2rt.errors import RequestError


def transition_scores(
    sequences: Tensor, scores: Sequence[Tensor], beam_indices: Tensor | None, normalize_logits: bool
) -> Tensor:
    """The score that each new token of ``sequences`` had when it was chosen.

    Args:
        sequences: [num_rows, length] int64, prompts and new tokens.
        scores: for each step [rows of the step, vocab_size] float32.
        beam_indices: [num_rows, steps] integers, in which row of its step each token was chosen, negative after a row's
            end; None: row i in row i.
        normalize_logits: take the log-softmax of the scores first.

    Returns:
        [num_rows, steps] float32, as many steps as the longest row has; 0 after a row's end.

    Raises:
        RequestError: there are no scores, or their numbers do not fit the sequences.
    """
    if not scores:
        raise RequestError("scores is empty; call generate with return_dict_in_generate=True and output_scores=True")
    if beam_indices is None:
        if sequences.size(0) != scores[0].size(0):
            raise RequestError(
                f"sequences has {sequences.size(0)} rows, scores has {scores[0].size(0)}; pass the beam_indices that "
                "beam search returned"
            )
        beam_indices = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, len(scores))
    ended = beam_indices < 0
    steps = int((~ended).sum(dim=1).max())
    if steps > len(scores) or steps > sequences.size(1):
        raise RequestError(
            f"beam_indices has {steps} steps, scores {len(scores)} and sequences {sequences.size(1)} tokens; pass what "
            "one call of generate returned"
        )
    ended, rows = ended[:, :steps], beam_indices[:, :steps].clamp(min=0).long()
    tokens = sequences[:, sequences.size(1) - steps :]
    # padding after a row's end may be no token
    tokens = tokens.masked_fill(ended, 0)
    # [steps, rows of a step, vocab_size]
    stacked = torch.stack(list(scores[:steps])).to(sequences.device)
    if normalize_logits:
        stacked = torch.log_softmax(stacked, dim=-1)
    result = stacked[torch.arange(steps, device=sequences.device), rows, tokens]
    return result.masked_fill(ended, 0.0)
