"""Prompts as callers give them, checked, as token ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gpt2rt.errors import RequestError

#: a text, its ids, or a dictionary with one of them, as vLLM takes it
Prompt = str | Sequence[int] | Mapping[str, Any]


def prompt_parts(prompt: Any) -> tuple[str | None, Any]:
    """The text of a prompt, or else its ids.

    Raises:
        RequestError: it is neither, or a dictionary without or with both of them.
    """
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        unknown = sorted(str(name) for name in prompt if name not in ("prompt", "prompt_token_ids"))
        if unknown:
            raise RequestError(
                f"a prompt's dictionary has {', '.join(unknown)}, but only 'prompt' or 'prompt_token_ids' is understood"
            )
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if ids is not None:
            # a text beside them is only shown, as in vLLM
            return (text if isinstance(text, str) else None), ids
        if isinstance(text, str):
            return text, None
        raise RequestError("a prompt's dictionary needs 'prompt', a text, or 'prompt_token_ids', a list of integers")
    return None, prompt


def check_text(text: str, max_tokens: int | None, longest_token: int) -> None:
    """A text can be encoded, and is not much too long to be worth trying.

    Args:
        text: of the prompt.
        max_tokens: the most tokens it may have; None: it will be cut.
        longest_token: bytes of the longest token; 0: unknown.

    Raises:
        RequestError: it holds half of a surrogate pair, or is longer than so many of the longest tokens.
    """
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt is no valid text: character {error.start} is {text[error.start]!r}, half of a surrogate pair; "
            "send whole characters"
        ) from None
    if max_tokens is not None and longest_token and size > max_tokens * longest_token:
        raise RequestError(
            f"the prompt has {size} bytes, and even in tokens of {longest_token} bytes, the longest there are, it does "
            f"not fit into the {max_tokens} tokens that the model takes; shorten it or set truncate_prompt_tokens"
        )


def check_token_ids(ids: Any, vocab_size: int) -> list[int]:
    """The ids of a prompt as a list of integers.

    Args:
        ids: a list, tuple, one-dimensional tensor or array of integers.
        vocab_size: of the model.

    Raises:
        RequestError: it is nothing of these, empty, or an id is no integer in [0, vocab_size).
    """
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise RequestError(f"a prompt is a text or a list of token ids, got {type(ids).__name__}")
    if not ids:
        raise RequestError("the prompt is empty; give at least one token (the bos token begins a text from nothing)")
    # one pass in C for the usual case: nothing but integers, in range
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return list(ids)
    checked = []
    for place, token in enumerate(ids):
        try:
            if isinstance(token, bool):
                raise TypeError
            token = operator.index(token)
        except TypeError:
            raise RequestError(
                f"token {place} of the prompt is {token!r} ({type(token).__name__}), expected an integer"
            ) from None
        if not 0 <= token < vocab_size:
            raise RequestError(f"token {place} of the prompt is {token}, expected an id in [0, {vocab_size})")
        checked.append(token)
    return checked


def is_single(prompts: Any) -> bool:
    """Whether this is one prompt and not a list of them."""
    if isinstance(prompts, (str, Mapping)):
        return True
    if isinstance(prompts, torch.Tensor):
        return prompts.dim() == 1
    return isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int)
