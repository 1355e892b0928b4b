"""Processors that look at the tokens so far: repetition, n-grams, forbidden and favoured sequences.

Negative ids in ``input_ids`` are padding and count as no token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2rt.errors import RequestError

from .processors import EXCLUDED, LogitsProcessor, as_list, token_list
from .validation import bias_items


def _penalised(input_ids: Tensor, scores: Tensor, penalty: float) -> Tensor:
    """Scores of the tokens in ``input_ids`` [num_rows, any], divided by ``penalty`` if positive, else multiplied."""
    vocab_size = scores.size(-1)
    # padding goes to a column past the vocabulary, which is cut off again
    columns = torch.where((input_ids < 0) | (input_ids >= vocab_size), vocab_size, input_ids)
    result = torch.nn.functional.pad(scores, (0, 1))
    seen = result.gather(1, columns)
    # a token that stands several times is penalised once: each time the same value is written
    result.scatter_(1, columns, torch.where(seen < 0, seen * penalty, seen / penalty))
    return result[:, :vocab_size]


def _ngrams_excluded(text: Tensor, input_ids: Tensor, scores: Tensor, n: int) -> Tensor:
    """Excludes tokens that would complete, at the end of ``input_ids``, an n-gram of ``text`` [num_rows, any]."""
    length = input_ids.size(1)
    if length < n - 1 or text.size(1) < n:
        return scores
    windows = text.unfold(1, n, 1)  # [num_rows, text length - n + 1, n], every n-gram
    start = input_ids[:, None, length - n + 1 :]  # [num_rows, 1, n - 1], what the next token continues
    repeated = (windows[:, :, : n - 1] == start).all(-1) & (windows >= 0).all(-1)
    vocab_size = scores.size(1)
    banned = torch.zeros((scores.size(0), vocab_size + 1), dtype=torch.bool, device=scores.device)
    banned.scatter_(1, torch.where(repeated, windows[:, :, n - 1].clamp(max=vocab_size), vocab_size), True)
    return scores.masked_fill(banned[:, :vocab_size], EXCLUDED)


class _PromptReader(LogitsProcessor):
    """A processor that looks at the prompt of each row.

    Args:
        encoder_input_ids: [batch, length] or [length], the prompts; rows of a call with ``k`` times as many rows share
            one, ``k`` neighbours each. None: the prompt is the first ``prompt_length`` columns of each row.
        prompt_length: columns of the prompt.
    """

    def __init__(self, encoder_input_ids: Tensor | None, prompt_length: int) -> None:
        self.encoder_input_ids = encoder_input_ids
        if encoder_input_ids is not None and encoder_input_ids.dim() == 1:
            self.encoder_input_ids = encoder_input_ids[None]
        self.prompt_length = prompt_length

    def prompts(self, input_ids: Tensor) -> Tensor:
        """[num_rows, length] int64."""
        prompts = self.encoder_input_ids
        if prompts is None:
            return input_ids[:, : self.prompt_length]
        if input_ids.size(0) % prompts.size(0):
            raise RequestError(
                f"{type(self).__name__} has {prompts.size(0)} prompts, and a call has {input_ids.size(0)} rows, which "
                "is no multiple of it"
            )
        return prompts.to(input_ids.device).repeat_interleave(input_ids.size(0) // prompts.size(0), dim=0)


class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Scores of tokens already in the row are divided by ``penalty`` if positive, multiplied by it if negative.

    Source: Keskar et al., CTRL, arXiv:1909.05858, section 4.1; the treatment of negative scores is transformers'.

    Args:
        penalty: above 0; 1 changes nothing.
        prompt_ignore_length: how many columns at the beginning do not count, for all rows or for each: [num_rows].
    """

    def __init__(self, penalty: float, prompt_ignore_length: int | Tensor | None = None) -> None:
        if not penalty > 0:
            raise RequestError(f"penalty must be above 0, got {penalty}; 1 changes nothing")
        if isinstance(prompt_ignore_length, int) and prompt_ignore_length < 0:
            raise RequestError(f"prompt_ignore_length must be at least 0, got {prompt_ignore_length}")
        if isinstance(prompt_ignore_length, Tensor) and prompt_ignore_length.dim() != 1:
            raise RequestError(
                f"prompt_ignore_length has shape {list(prompt_ignore_length.shape)}, expected [num_rows] or an integer"
            )
        self.penalty = float(penalty)
        self.prompt_ignore_length = prompt_ignore_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ignored = self.prompt_ignore_length
        if isinstance(ignored, int):
            input_ids = input_ids[:, ignored:]
        elif ignored is not None:
            if ignored.size(0) != input_ids.size(0):
                raise RequestError(
                    f"prompt_ignore_length is for {ignored.size(0)} rows, but the call has {input_ids.size(0)}"
                )
            positions = torch.arange(input_ids.size(1), device=input_ids.device)
            input_ids = input_ids.masked_fill(positions < ignored.to(input_ids.device)[:, None], -1)
        return _penalised(input_ids, scores, self.penalty)


class EncoderRepetitionPenaltyLogitsProcessor(_PromptReader):
    """Scores of the prompt's tokens are multiplied by ``penalty`` if positive, divided by it if negative.

    Args:
        penalty: above 0; above 1 favours what the prompt says.
        encoder_input_ids: [batch, length], the prompts; None: the first ``prompt_length`` columns of each row.
        prompt_length: columns of the prompt.
    """

    def __init__(self, penalty: float, encoder_input_ids: Tensor | None, *, prompt_length: int = 0) -> None:
        if not penalty > 0:
            raise RequestError(f"penalty must be above 0, got {penalty}; 1 changes nothing")
        super().__init__(encoder_input_ids, prompt_length)
        self.penalty = 1 / penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _penalised(self.prompts(input_ids), scores, self.penalty)


class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Excludes every token that would repeat an n-gram of the row."""

    def __init__(self, ngram_size: int) -> None:
        if ngram_size < 1:
            raise RequestError(f"ngram_size must be at least 1, got {ngram_size}")
        self.ngram_size = ngram_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _ngrams_excluded(input_ids, input_ids, scores, self.ngram_size)


class EncoderNoRepeatNGramLogitsProcessor(_PromptReader):
    """Excludes every token that would repeat an n-gram of the prompt.

    Args:
        encoder_ngram_size: n, at least 1.
        encoder_input_ids: [batch, length], the prompts; None: the first ``prompt_length`` columns of each row.
        prompt_length: columns of the prompt.
    """

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: Tensor | None, *, prompt_length: int = 0) -> None:
        if encoder_ngram_size < 1:
            raise RequestError(f"encoder_ngram_size must be at least 1, got {encoder_ngram_size}")
        super().__init__(encoder_input_ids, prompt_length)
        self.ngram_size = encoder_ngram_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _ngrams_excluded(self.prompts(input_ids), input_ids, scores, self.ngram_size)


class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Adds a number to the score of the token that completes a sequence.

    Args:
        sequence_bias: ``[[[id, ...], bias], ...]`` or ``{(id, ...): bias}``; of equal sequences the last counts.
    """

    def __init__(self, sequence_bias: Sequence[Any] | Mapping[tuple[int, ...], float]) -> None:
        self._set_biases(dict(bias_items("sequence_bias", sequence_bias)))

    def _set_biases(self, biases: dict[tuple[int, ...], float]) -> None:
        self.sequence_bias = biases
        self._largest = max((max(ids) for ids in biases), default=-1)
        single = [(ids[0], bias) for ids, bias in biases.items() if len(ids) == 1]
        self._single = torch.tensor([token for token, _ in single]), torch.tensor([bias for _, bias in single])
        # sequences of one length are compared together
        groups: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for ids, bias in biases.items():
            if len(ids) > 1:
                groups.setdefault(len(ids), []).append((ids, bias))
        self._longer = [
            (
                torch.tensor([ids[:-1] for ids, _ in group]),
                torch.tensor([ids[-1] for ids, _ in group]),
                torch.tensor([bias for _, bias in group]),
            )
            for group in groups.values()
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._largest >= scores.size(-1):
            raise RequestError(
                f"{type(self).__name__} has a sequence with the token {self._largest}, but the vocabulary has ids 0 to "
                f"{scores.size(-1) - 1}"
            )
        device = scores.device
        bias = torch.zeros_like(scores)
        token, value = self._single
        if token.numel():
            bias[:, token.to(device)] = value.to(device, bias.dtype)
        for start, last, value in self._longer:
            if start.size(1) <= input_ids.size(1):
                complete = (input_ids[:, None, -start.size(1) :] == start.to(device)).all(-1)  # [num_rows, sequences]
                # sequences with the same last token add up
                bias.index_add_(1, last.to(device), torch.where(complete, value.to(device), 0.0).to(bias.dtype))
        return scores + bias


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Excludes the token that would complete one of several sequences.

    Args:
        bad_words_ids: sequences of token ids; one that is just an end token is left out, as in transformers.
        eos_token_id: the end tokens.
    """

    def __init__(
        self, bad_words_ids: Sequence[Sequence[int]], eos_token_id: int | Sequence[int] | Tensor | None = None
    ) -> None:
        if not bad_words_ids or not all(len(sequence) for sequence in bad_words_ids):
            raise RequestError(f"bad_words_ids must hold at least one sequence, none empty, got {bad_words_ids!r}")
        ends = as_list(eos_token_id)
        sequences = [tuple(sequence) for sequence in bad_words_ids if not (len(sequence) == 1 and sequence[0] in ends)]
        self._set_biases(dict.fromkeys(sequences, EXCLUDED))


class ExponentialDecayLengthPenalty(LogitsProcessor):
    """Raises the scores of end tokens by ``|score| * (factor ** k - 1)``, k tokens after ``start`` new ones.

    Args:
        exponential_decay_length_penalty: (start, factor).
        eos_token_id: the end tokens.
        input_ids_seq_length: columns of the prompt.
    """

    def __init__(
        self,
        exponential_decay_length_penalty: tuple[int, float],
        eos_token_id: int | Sequence[int] | Tensor,
        input_ids_seq_length: int,
    ) -> None:
        self.regulation_start = exponential_decay_length_penalty[0] + input_ids_seq_length
        self.regulation_factor = exponential_decay_length_penalty[1]
        self.eos_token_id = token_list("eos_token_id", eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        steps = input_ids.size(1) - self.regulation_start
        if steps <= 0:
            return scores
        result = scores.clone()
        ends = scores[:, self.eos_token_id]
        try:
            growth = self.regulation_factor**steps - 1
        except OverflowError:
            # so large that only an end token is left to choose
            growth = torch.finfo(scores.dtype).max
        raised = (ends + ends.abs() * growth).clamp(max=torch.finfo(scores.dtype).max)
        # an excluded end token stays excluded
        result[:, self.eos_token_id] = torch.where(ends.isfinite(), raised, ends)
        return result
