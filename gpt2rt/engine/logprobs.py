"""Log-probabilities of chosen tokens, of the likeliest tokens, and of the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.errors import NumericsError
from gpt2rt.graph.transfer import fetch, to_device

from .outputs import Logprob

#: of one place: token -> log-probability and rank
Entry = dict[int, tuple[float, int]]


def entries(logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> list[Entry | None]:
    """What is known of one token and of the likeliest tokens of each row.

    An entry does not depend on what other rows ask for.

    Args:
        logits: [num_rows, vocab_size] float32, of the model, rows contiguous.
        token_ids: [num_rows] int64, on the same device.
        counts: for each row how many of the likeliest tokens, 0 to 128 and at most vocab_size.

    Returns:
        For each row its token, and the likeliest after it, with log-probability and rank: 1 + the number of larger
        logits for the token, 1, 2, 3, ... for the likeliest (of equal ones the lowest id first). None for a row whose
        logits hold NaN or plus infinity.
    """
    known = ops.log_probabilities(logits, token_ids, max(counts, default=0))
    ids, *found = fetch(token_ids, *known)
    return entries_of(ids, found, counts)


def entries_of(token_ids: Sequence[int], found: Sequence[Sequence[Any]], counts: Sequence[int]) -> list[Entry | None]:
    """As :func:`entries`, from what ``ops.log_probabilities`` gave for at least as many of the likeliest tokens.

    Args:
        token_ids: [num_rows], the tokens that it was asked for.
        found: its four results as lists.
        counts: for each row how many of the likeliest tokens.
    """
    result: list[Entry | None] = []
    columns = zip(token_ids, *found, counts, strict=True)
    for token, value, rank, values, ids, count in columns:
        if rank < 0:
            result.append(None)
            continue
        entry = {token: (value, rank)}
        for place in range(count):
            # the token itself keeps its own rank
            entry.setdefault(ids[place], (values[place], place + 1))
        result.append(entry)
    return result


def prompt_logprobs(logits: Tensor, next_ids: Sequence[int], k: int) -> list[Entry]:
    """What is known of the tokens of a prompt, a chunk at a time.

    Args:
        logits: [rows, vocab_size] float32: what the model expects after each token of the chunk.
        next_ids: [rows], the tokens that do follow.
        k: how many of the likeliest besides, 0 to 128.

    Returns:
        An entry for each of ``next_ids``, as :func:`entries` makes them.

    Raises:
        NumericsError: the logits of a row hold NaN or infinity.
    """
    ids = to_device(next_ids, torch.int64, logits.device)
    known: list[Entry] = []
    for place, entry in enumerate(entries(logits, ids, [k] * len(next_ids))):
        if entry is None:
            raise NumericsError(
                f"the logits for token {next_ids[place]}, in a chunk of the prompt, hold NaN or infinity; "
                "the weights are damaged or overflow their dtype (try dtype=torch.float32)"
            )
        known.append(entry)
    return known


class TokenTexts:
    """The text of each token alone, remembered.

    Args:
        tokenizer: any with ``decode(ids)``; None: tokens have no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # at most one for each token of the vocabulary
        self._texts: dict[int, str | None] = {}

    def __call__(self, token: int) -> str | None:
        """What ``decode([token])`` gives: half a character is "\\ufffd"; None without a tokenizer."""
        try:
            return self._texts[token]
        except KeyError:
            text = None if self._tokenizer is None else self._tokenizer.decode([token])
            self._texts[token] = text
            return text


def as_logprobs(entry: Mapping[int, tuple[float, int]], texts: TokenTexts) -> dict[int, Logprob]:
    """An entry as callers see it, with the text of each token."""
    return {token: Logprob(value, rank, texts(token)) for token, (value, rank) in entry.items()}
