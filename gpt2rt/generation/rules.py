"""Processors that allow or exclude given tokens: at the beginning, at the end, never, or as a function says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpt2rt.errors import RequestError

from .processors import LogitsProcessor, as_list, only, token_list, without


class MinLengthLogitsProcessor(LogitsProcessor):
    """No end token before the row has ``min_length`` tokens, prompt and padding included.

    Args:
        min_length: from 0 on.
        eos_token_id: the end tokens.
        device: without effect; tensors are where the scores are.
    """

    def __init__(self, min_length: int, eos_token_id: int | Sequence[int] | Tensor, device: object = "cpu") -> None:
        if min_length < 0:
            raise RequestError(f"min_length must be at least 0, got {min_length}")
        self.min_length = min_length
        self.eos_token_id = as_list(eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores if input_ids.size(1) >= self.min_length else without(scores, self.eos_token_id)


class MinNewTokensLengthLogitsProcessor(LogitsProcessor):
    """No end token before ``min_new_tokens`` tokens follow a prompt of ``prompt_length_to_skip`` columns.

    Args:
        prompt_length_to_skip, min_new_tokens: from 0 on.
        eos_token_id: the end tokens.
        device: without effect; tensors are where the scores are.
    """

    def __init__(
        self,
        prompt_length_to_skip: int,
        min_new_tokens: int,
        eos_token_id: int | Sequence[int] | Tensor,
        device: object = "cpu",
    ) -> None:
        if prompt_length_to_skip < 0 or min_new_tokens < 0:
            raise RequestError(
                f"prompt_length_to_skip and min_new_tokens must be at least 0, got {prompt_length_to_skip} and "
                f"{min_new_tokens}"
            )
        self.prompt_length_to_skip = prompt_length_to_skip
        self.min_new_tokens = min_new_tokens
        self.eos_token_id = as_list(eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        enough = input_ids.size(1) - self.prompt_length_to_skip >= self.min_new_tokens
        return scores if enough else without(scores, self.eos_token_id)


class SuppressTokensLogitsProcessor(LogitsProcessor):
    """Some tokens are never drawn.

    Args:
        suppress_tokens: their ids.
        device: without effect; tensors are where the scores are.
    """

    def __init__(self, suppress_tokens: Sequence[int], device: object = "cpu") -> None:
        self.suppress_tokens = list(suppress_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return without(scores, self.suppress_tokens)


class SuppressTokensAtBeginLogitsProcessor(LogitsProcessor):
    """Some tokens are not drawn as the first new one, when the rows have ``begin_index`` columns.

    Args:
        begin_suppress_tokens: their ids.
        begin_index: columns of the prompt.
        device: without effect; tensors are where the scores are.
    """

    def __init__(self, begin_suppress_tokens: Sequence[int], begin_index: int, device: object = "cpu") -> None:
        self.begin_suppress_tokens = list(begin_suppress_tokens)
        self.begin_index = begin_index

    def set_begin_index(self, begin_index: int) -> None:
        """Another number of columns."""
        self.begin_index = begin_index

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores if input_ids.size(1) != self.begin_index else without(scores, self.begin_suppress_tokens)


class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """Allows one token only after a prompt of a single column."""

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return only(scores, [self.bos_token_id]) if input_ids.size(1) == 1 else scores


class ForcedEOSTokenLogitsProcessor(LogitsProcessor):
    """Allows end tokens only as the last token of a row.

    Args:
        max_length: columns that rows have at their end; a list: of each row of the call.
        eos_token_id: the tokens that are allowed there.
        device: without effect; tensors are where the scores are.
    """

    def __init__(
        self, max_length: int | Sequence[int], eos_token_id: int | Sequence[int] | Tensor, device: object = "cpu"
    ) -> None:
        self.max_length = max_length
        self.eos_token_id = token_list("eos_token_id", eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.for_rows(input_ids, scores, range(scores.size(0)))

    def for_rows(self, input_ids: Tensor, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """As a call, for some rows of the call."""
        last = input_ids.size(1) + 1
        if isinstance(self.max_length, int):
            return only(scores, self.eos_token_id) if self.max_length == last else scores
        ends = [index for index, row in enumerate(rows) if self.max_length[row] == last]
        if not ends:
            return scores
        result = scores.clone()
        result[ends] = only(scores[ends], self.eos_token_id)
        return result


class PrefixConstrainedLogitsProcessor(LogitsProcessor):
    """Allows the tokens that a function names.

    If none of them is left in any beam of a prompt, for another rule excludes them, that rule is overruled.

    Source: De Cao et al., "Autoregressive Entity Retrieval", arXiv:2010.00904, section 3.2.

    Args:
        prefix_allowed_tokens_fn: ``(batch_id, input_ids) -> list of ids``; ``batch_id`` is the number of the row
            divided by ``num_beams``, ``input_ids`` [length] the tokens of the row so far.
        num_beams: neighbouring rows that share a number.
        pad_token_id: what the function sees in place of padding.
    """

    def __init__(
        self,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]],
        num_beams: int,
        *,
        pad_token_id: int = 0,
    ) -> None:
        if not callable(prefix_allowed_tokens_fn):
            raise RequestError(
                "prefix_allowed_tokens_fn must be a function (batch_id, input_ids) -> list of ids, got "
                f"{prefix_allowed_tokens_fn!r}"
            )
        self._function = prefix_allowed_tokens_fn
        self._num_beams = num_beams
        self._pad_token_id = pad_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.for_rows(input_ids, scores, range(scores.size(0)))

    def for_rows(self, input_ids: Tensor, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """As a call, for some rows of the call.

        Raises:
            RequestError: the function named no token, or one that is not in the vocabulary.
        """
        text = input_ids.masked_fill(input_ids < 0, self._pad_token_id)
        mask = torch.full_like(scores, float("-inf"))
        batch_ids = [row // self._num_beams for row in rows]
        for index, batch_id in enumerate(batch_ids):
            allowed = as_list(self._function(batch_id, text[index]))
            bad = [token for token in allowed if not 0 <= token < scores.size(1)]
            if not allowed or bad:
                raise RequestError(
                    f"prefix_allowed_tokens_fn returned {bad[0] if bad else 'no token'} for batch ID {batch_id}, "
                    f"expected a list of ids from 0 to {scores.size(1) - 1} with at least one"
                )
            mask[index, allowed] = 0.0
        result = scores + mask
        left = result.amax(dim=-1) > float("-inf")
        satisfiable = {batch_id for batch_id, any_left in zip(batch_ids, left.tolist(), strict=True) if any_left}
        for index, batch_id in enumerate(batch_ids):
            if batch_id not in satisfiable:
                result[index] = mask[index]
        return result


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """NaN becomes 0, infinity the largest finite number, and minus infinity the smallest."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        limits = torch.finfo(scores.dtype)
        return torch.nan_to_num(scores, nan=0.0, posinf=limits.max, neginf=limits.min)
