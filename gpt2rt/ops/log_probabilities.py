"""Log-probabilities of given tokens, their ranks, and the best tokens of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2rt.kernels import score_refs as refs

from ._checks import check_index
from ._library import define
from .sampling import check_scores

#: the most tokens of each row
MAX_BEST = 128


def _log_probabilities_fake(scores: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = scores.size(0)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=scores.device)

    return (
        empty(rows, dtype=torch.float32),
        empty(rows, dtype=torch.int64),
        empty(rows, k, dtype=torch.float32),
        empty(rows, k, dtype=torch.int64),
    )


_log_probabilities = define(
    "log_probabilities",
    "(Tensor scores, Tensor token_ids, int k) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=refs.log_probabilities_ref,
    triton="log_probabilities:log_probabilities_triton",
    fake=_log_probabilities_fake,
)


def log_probabilities(scores: Tensor, token_ids: Tensor, k: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log-softmax of one token of each row, the rank of that token, and the k best tokens.

    A row's results are a function of the row alone: not of its neighbours, of ``k`` or of threads; nor, in C++, of the
    instruction set. Their error is that of the exponentials, 1e-7 of the sum, and one rounding to float32.

    Long prompts are best given in chunks of rows: on CUDA a row takes 136 KiB of scratch memory.

    Args:
        scores: [num_rows, vocab_size] float32; rows contiguous, any stride between them; -inf: excluded.
        token_ids: [num_rows] int64; an id outside the vocabulary (-1): no token is asked for.
        k: how many of the best, 0 to 128 and at most vocab_size.

    Returns:
        [num_rows] float32, the log-probability of each token, NaN where none is asked for; [num_rows] int64, its rank,
        1 + the number of larger scores, -1 where none is asked for; [num_rows, k] float32, the largest of the row in
        falling order; [num_rows, k] int64, their tokens, of equal scores the lowest id first. A row that holds NaN,
        plus infinity or no token that is not excluded has NaN and -1 throughout.

    Raises:
        ValueError: a shape, stride or device does not fit, or ``k`` is out of range.
        TypeError: a dtype does not fit.
    """
    check_scores("log_probabilities", scores)
    check_index("log_probabilities", "token_ids", token_ids, (scores.size(0),), torch.int64, scores)
    largest = min(MAX_BEST, scores.size(1))
    if not 0 <= k <= largest:
        raise ValueError(f"log_probabilities: k is {k}, expected 0 to {largest}")
    return _log_probabilities(scores, token_ids, k)
