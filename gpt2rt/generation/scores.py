"""Scores on their way through the processors of a call."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2rt.errors import RequestError

from .history import History
from .sampling import quiet_threads

if TYPE_CHECKING:
    from .decode import DecodePlan

#: for warpers, which look at the scores alone
NO_IDS = torch.empty((0, 0), dtype=torch.int64)


def make_history(plan: DecodePlan) -> History | None:
    """What processors and criteria look at; None if there are none."""
    if not (plan.processors or plan.user_processors or plan.user_criteria):
        return None
    device = plan.executor.plan.device
    return History(plan.columns, plan.keep, plan.num_rows, plan.max_new_tokens, plan.pad_token_id, device)


def spread(values: Tensor, rows: ListLike[int], num_rows: int) -> Tensor:
    """[num_rows, vocab_size] from the values of some rows, in ascending order; the others are 0."""
    if len(rows) == num_rows:
        return values
    everything = values.new_zeros(num_rows, values.size(1))
    everything[rows] = values
    return everything


def processed_scores(
    plan: DecodePlan, history: History | None, scores: Tensor, rows: ListLike[int], step: int
) -> Tensor:
    """The scores after all processors, the caller's too, but before the warpers.

    The caller's processors see every row of the call, so that what they keep for a row stays its own.

    Args:
        plan: with the processors.
        history: from :func:`make_history`; None if there are no processors.
        scores: [len(rows), vocab_size] float32.
        rows: which rows these are, in ascending order.
        step: how many new tokens they have.

    Returns:
        [len(rows), vocab_size] float32.
    """
    if history is None:
        return scores
    if plan.processors:
        with quiet_threads(scores):
            scores = plan.processors(history.ids(step, rows), scores, rows=rows)
    if plan.user_processors:
        scores = spread(scores, rows, plan.num_rows)
        for processor in plan.user_processors:
            scores = _checked_scores(processor, processor(history.columns(step), scores), list(scores.shape))
        scores = scores if len(rows) == plan.num_rows else scores[rows]
    return scores


def _checked_scores(processor: Any, scores: Any, expected: list[int]) -> Tensor:
    """What a caller's processor returned, if it has the shape of what it got.

    Raises:
        RequestError: it has not.
    """
    if isinstance(scores, Tensor) and list(scores.shape) == expected:
        return scores
    shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    raise RequestError(
        f"the logits processor {type(processor).__name__} returned {shape}, expected a tensor of shape {expected}"
    )
