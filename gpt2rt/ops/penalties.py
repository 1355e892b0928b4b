"""Penalties for what a sequence has said already, and the counts on the device that they read."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2rt.kernels import score_refs as refs

from ._checks import check_device, check_index, check_rows
from ._library import define


def _penalties_fake(
    scores: Tensor,
    counts: Tensor,
    slots: Tensor,
    repetition: Tensor | None,
    frequency: Tensor | None,
    presence: Tensor | None,
) -> Tensor:
    return torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)


def _count_tokens_fake(counts: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    return None


def _reset_counts_fake(
    counts: Tensor, slots: Tensor, token_ids: Tensor, starts: Tensor, prompt_lens: Tensor, max_len: int
) -> None:
    return None


_penalties = define(
    "penalties",
    "(Tensor scores, Tensor counts, Tensor slots, Tensor? repetition, Tensor? frequency, Tensor? presence) -> Tensor",
    reference=refs.penalties_ref,
    triton="penalties:penalties_triton",
    fake=_penalties_fake,
)
_count_tokens = define(
    "count_tokens",
    "(Tensor(a!) counts, Tensor slots, Tensor token_ids) -> ()",
    reference=refs.count_tokens_ref,
    triton="penalties:count_tokens_triton",
    fake=_count_tokens_fake,
)
_reset_counts = define(
    "reset_counts",
    "(Tensor(a!) counts, Tensor slots, Tensor token_ids, Tensor starts, Tensor prompt_lens, int max_len) -> ()",
    reference=refs.reset_counts_ref,
    triton="penalties:reset_counts_triton",
    fake=_reset_counts_fake,
)


def _check_counts(op: str, counts: Tensor) -> None:
    if counts.dim() != 2:
        raise ValueError(f"{op}: counts has shape {list(counts.shape)}, expected [num_slots, vocab_size]")
    check_index(op, "counts", counts, tuple(counts.shape), torch.int32, counts)


def penalties(
    scores: Tensor,
    counts: Tensor,
    slots: Tensor,
    *,
    repetition: Tensor | None = None,
    frequency: Tensor | None = None,
    presence: Tensor | None = None,
) -> Tensor:
    """Scores after the penalties for repetition, frequency and presence, in this order, in float32.

    A token of prompt or output has its score divided by ``repetition`` if positive, multiplied if negative. A token of
    the output loses ``frequency`` for each time it stands there, and ``presence`` once. The same bits on every device.

    Sources: Keskar et al., CTRL, arXiv:1909.05858, section 4.1, and transformers (repetition); OpenAI's API (the
    others).

    Args:
        scores: [num_rows, vocab_size] float32; rows contiguous, any stride between them.
        counts: [num_slots, vocab_size] int32, as :func:`reset_counts` and :func:`count_tokens` leave it.
        slots: [num_rows] int64, each row's place in ``counts``, below num_slots; negative: the scores stay. On CUDA
            the values are not checked, that would wait for the device; nor are those of the penalties anywhere.
        repetition: [num_rows] float64, above 0 and finite; 1 changes nothing; None: off.
        frequency: [num_rows] float64, finite; 0 changes nothing; None: off.
        presence: [num_rows] float64, finite; 0 changes nothing; None: off.

    Returns:
        [num_rows, vocab_size] float32, a new tensor.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a dtype does not fit.
        IndexError: on the CPU, ``counts`` has no such slot.
    """
    check_rows("penalties", "scores", scores)
    if scores.dtype != torch.float32:
        raise TypeError(f"penalties: scores has dtype {scores.dtype}, expected float32; call .float()")
    _check_counts("penalties", counts)
    check_device("penalties", "counts", counts, scores)
    if counts.size(1) != scores.size(1):
        raise ValueError(
            f"penalties: counts has shape {list(counts.shape)}, expected [num_slots, {scores.size(1)}], the tokens "
            f"of scores {list(scores.shape)}"
        )
    shape = (scores.size(0),)
    check_index("penalties", "slots", slots, shape, torch.int64, scores)
    for name, values in (("repetition", repetition), ("frequency", frequency), ("presence", presence)):
        if values is not None:
            check_index("penalties", name, values, shape, torch.float64, scores)
    return _penalties(scores, counts, slots, repetition, frequency, presence)


def count_tokens(counts: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    """Count one more token in the output of each slot.

    Args:
        counts: [num_slots, vocab_size] int32, is changed.
        slots: [num_rows] int64, below num_slots, which is not checked on CUDA; a negative one is skipped.
        token_ids: [num_rows] int64; an id outside the vocabulary is skipped.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a dtype does not fit.
        IndexError: on the CPU, ``counts`` has no such slot.
    """
    _check_counts("count_tokens", counts)
    if slots.dim() != 1:
        raise ValueError(f"count_tokens: slots has shape {list(slots.shape)}, expected [num_rows]")
    check_index("count_tokens", "slots", slots, (slots.size(0),), torch.int64, counts)
    check_index("count_tokens", "token_ids", token_ids, (slots.size(0),), torch.int64, counts)
    _count_tokens(counts, slots, token_ids)


def reset_counts(
    counts: Tensor, slots: Tensor, token_ids: Tensor, starts: Tensor, prompt_lens: Tensor, max_len: int
) -> None:
    """Count whole sequences anew; what their slots held is forgotten. Other slots stay.

    Args:
        counts: [num_slots, vocab_size] int32, is changed.
        slots: [num_seqs] int64, none twice, below num_slots, which is not checked on CUDA; a negative one is skipped.
        token_ids: [total] int64, prompt and output of each sequence, one sequence after another; ids outside the
            vocabulary count as no token.
        starts: [num_seqs + 1] int64, where each sequence begins, and the end of the last; not checked on CUDA.
        prompt_lens: [num_seqs] int64, how many tokens of each are its prompt.
        max_len: tokens in the longest sequence.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a dtype does not fit.
        IndexError: on the CPU, ``counts`` has no such slot.
    """
    _check_counts("reset_counts", counts)
    if slots.dim() != 1 or token_ids.dim() != 1:
        raise ValueError(
            f"reset_counts: slots and token_ids have shapes {list(slots.shape)} and {list(token_ids.shape)}, expected "
            "[num_seqs] and [total]"
        )
    num_seqs = slots.size(0)
    for name, indices, size in (
        ("slots", slots, num_seqs),
        ("token_ids", token_ids, token_ids.size(0)),
        ("starts", starts, num_seqs + 1),
        ("prompt_lens", prompt_lens, num_seqs),
    ):
        check_index("reset_counts", name, indices, (size,), torch.int64, counts)
    if not 0 <= max_len <= token_ids.size(0):
        raise ValueError(
            f"reset_counts: max_len is {max_len}, expected the length of the longest sequence, at most "
            f"{token_ids.size(0)}, the number of token_ids"
        )
    _reset_counts(counts, slots, token_ids, starts, prompt_lens, max_len)
