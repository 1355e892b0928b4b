"""The definition of penalties, of the counts they read, and of log_probabilities, in plain torch.

Names: R = num_rows, V = vocab_size. ``counts`` [num_slots, V] int32 holds what a sequence has said so far: twice the
number of times that a token stands in the output, plus 1 if it stands in the prompt.
"""

import torch
from torch import Tensor

from .sampling_refs import argmax_ref


def penalties_ref(
    scores: Tensor,
    counts: Tensor,
    slots: Tensor,
    repetition: Tensor | None,
    frequency: Tensor | None,
    presence: Tensor | None,
) -> Tensor:
    """Scores less what repeating costs; every operation rounds to float32.

    With c the times that a token stands in the output:

        s1 = s r if s < 0 else s / r      where the token stands in prompt or output
        s2 = s1 - c f                     where c > 0
        s3 = s2 - p                       where c > 0

    Args:
        scores: [R, V] float32.
        counts: [num_slots, V] int32.
        slots: [R] int64, the row of ``counts``; negative: the scores stay.
        repetition: r, [R] float64, above 0; 1: off.
        frequency: f, [R] float64; 0: off.
        presence: p, [R] float64; 0: off.

    Returns:
        [R, V] float32, a new tensor.
    """
    own = counts[slots.clamp(min=0)].masked_fill_((slots < 0)[:, None], 0)
    said = own >> 1
    result = scores.clone()
    if repetition is not None:
        factor = repetition.float()[:, None]
        result = torch.where(own != 0, torch.where(result < 0, result * factor, result / factor), result)
    if frequency is not None:
        result = torch.where(said > 0, result - said.float() * frequency.float()[:, None], result)
    if presence is not None:
        result = torch.where(said > 0, result - presence.float()[:, None], result)
    return result


def count_tokens_ref(counts: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    """One more of a token in the output of each slot; a negative slot, or an id outside the vocabulary: nothing.

    Args:
        counts: [num_slots, V] int32, is changed.
        slots: [R] int64.
        token_ids: [R] int64.
    """
    counted = (slots >= 0) & (token_ids >= 0) & (token_ids < counts.size(1))
    places = (slots * counts.size(1) + token_ids)[counted]
    counts.view(-1).index_add_(0, places, torch.full_like(places, 2, dtype=torch.int32))


def reset_counts_ref(
    counts: Tensor, slots: Tensor, token_ids: Tensor, starts: Tensor, prompt_lens: Tensor, max_len: int
) -> None:
    """The counts of sequences that are given as a whole, whatever was there before.

    Args:
        counts: [num_slots, V] int32, is changed.
        slots: [n] int64, none twice; a negative one: nothing.
        token_ids: [total] int64, prompt and output of each sequence, one after another; ids outside the vocabulary
            count as no token.
        starts: [n + 1] int64, where each begins; the last is the end.
        prompt_lens: [n] int64, how many of a sequence are its prompt.
        max_len: the longest of them.
    """
    counts[slots[slots >= 0]] = 0
    lengths = starts[1:] - starts[:-1]
    sequence = torch.arange(len(slots), device=slots.device).repeat_interleave(lengths)
    token_ids = token_ids[int(starts[0]) : int(starts[-1])]
    place = torch.arange(len(token_ids), device=slots.device) + starts[0] - starts[:-1][sequence]
    slot = slots[sequence]
    counted = (slot >= 0) & (token_ids >= 0) & (token_ids < counts.size(1))
    prompt = place < prompt_lens[sequence]
    count_tokens_ref(counts, slot, token_ids.masked_fill(prompt, -1))
    counts.view(-1)[(slot * counts.size(1) + token_ids)[counted & prompt].unique()] += 1


def log_probabilities_ref(scores: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log-softmax of one token of each row, its rank, and the k best; computed in float64.

    Args:
        scores: [R, V] float32; -inf: excluded.
        token_ids: [R] int64; an id outside the vocabulary: none.
        k: 0 to V.

    Returns:
        [R] float32, NaN without a token; [R] int64, 1 + the number of larger scores, -1 without a token; [R, k] float32
        and [R, k] int64, in falling order, of equal scores the lowest id first. A row that holds NaN, plus infinity or
        no token that is not excluded has NaN and -1 throughout.
    """
    fine = argmax_ref(scores, False) >= 0
    logs = torch.log_softmax(scores.double(), dim=-1)
    known = fine & (token_ids >= 0) & (token_ids < scores.size(1))
    column = torch.where(known, token_ids, 0)[:, None]
    chosen = logs.gather(1, column).squeeze(1).masked_fill(~known, torch.nan)
    ranks = 1 + (scores > scores.gather(1, column)).sum(dim=-1)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    values = logs.gather(1, best).masked_fill(~fine[:, None], torch.nan)
    return chosen.float(), ranks.masked_fill(~known, -1), values.float(), best.masked_fill(~fine[:, None], -1)
