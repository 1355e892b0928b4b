"""The choice of the next token from its scores, row by row."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.errors import NumericsError, RequestError

#: scores up to which one thread does the work; about five rows of GPT-2's vocabulary
_ONE_THREAD_SCORES = 2**18


@contextlib.contextmanager
def quiet_threads(scores: Tensor) -> Iterator[None]:
    """Keep torch's own threads asleep while a few rows of scores are worked on.

    OpenMP's threads spin for milliseconds after a parallel region, on the cores that the next step wants: on two cores
    a token of the 124M shape took 20.7 ms instead of 14.6 ms.

    Args:
        scores: [num_rows, vocab_size]; with many rows, or not on the CPU, nothing is changed.
    """
    threads = torch.get_num_threads()
    if threads == 1 or scores.device.type != "cpu" or scores.numel() > _ONE_THREAD_SCORES:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_logits(logits: Tensor, rows: Sequence[int]) -> None:
    """Every logit of the model is finite.

    Args:
        logits: [num_rows, vocab_size] float32.
        rows: the name of each row, for the message.

    Raises:
        NumericsError: a row holds NaN or infinity.
    """
    # one cheap reduction: a sum is finite only if its terms are; one of finite terms that overflows is looked into
    if logits.device.type == "cpu":
        # numpy's sum wakes no threads, see quiet_threads
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(logits.numpy().sum())
    else:
        total = logits.sum().item()
    if math.isfinite(total):
        return
    bad = (~torch.isfinite(logits)).sum(dim=-1).tolist()
    for row, count in zip(rows, bad, strict=True):
        if count:
            raise NumericsError(
                f"row {row}: {count} of {logits.size(-1)} logits are NaN or infinite; the weights are damaged or "
                "overflow their dtype (try dtype=torch.float32)"
            )


def check_scores(scores: Tensor, rows: Sequence[int]) -> None:
    """Each row's largest score is a number.

    Args:
        scores: [num_rows, vocab_size] float32, -inf for excluded tokens.
        rows: the name of each row, for the message.

    Raises:
        RequestError: every token of a row is excluded.
        NumericsError: a row holds NaN or plus infinity.
    """
    for row, value in zip(rows, scores.amax(dim=-1).tolist(), strict=True):
        if value == -math.inf:
            raise RequestError(
                f"row {row}: every token is excluded; loosen bad_words_ids, suppress_tokens, no_repeat_ngram_size or "
                "your own logits processors"
            )
        if not math.isfinite(value):
            raise NumericsError(f"row {row}: the scores hold {value} after the logits processors")


def greedy(scores: Tensor) -> list[int]:
    """The token with the largest score in each row, the lowest id of equals.

    Args:
        scores: [num_rows, vocab_size] float32, as :func:`check_scores` accepts them.
    """
    if scores.device.type == "cpu":
        # 4 us for 50257 scores, where torch's argmax takes 43 us (Zen 4, one core)
        return scores.numpy().argmax(axis=1).tolist()
    return scores.argmax(dim=-1).tolist()


def sample(scores: Tensor, uniforms: Sequence[float]) -> list[int]:
    """A token of each row drawn from softmax(scores) by inverting its cumulative distribution, see ``ops.sample``.

    Args:
        scores: [num_rows, vocab_size] float32, as :func:`check_scores` accepts them.
        uniforms: a number in [0, 1) for each row.

    Raises:
        NumericsError: a row has no token to draw, or scores that are NaN or infinite.
    """
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)
    tokens = ops.sample(scores.float().contiguous(), numbers).tolist()
    if -1 in tokens:
        raise NumericsError(
            f"place {tokens.index(-1)} of {len(tokens)}: no token can be drawn from its scores, which are NaN or "
            "infinite; is the temperature too small for them?"
        )
    return tokens
