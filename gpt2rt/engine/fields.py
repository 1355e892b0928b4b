"""Readers of the fields of sampling and pooling parameters: each checks a value and returns it as it is kept."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gpt2rt.errors import RequestError

#: the largest count, length or id of any field
LONGEST = 2**31 - 1
#: the only biases that OpenAI's API knows
LARGEST_BIAS = 100.0

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80

#: takes the name of a field and its value, and raises RequestError if that is no good
Reader = Callable[[str, Any], Any]


def check_listed_ids(name: str, ids: Iterable[Any], vocab_size: int) -> None:
    """Every id is a token of the model.

    Args:
        name: what the ids are, for the message.
        ids: any objects.
        vocab_size: tokens of the model.

    Raises:
        RequestError: one is no integer from 0 to below ``vocab_size``.
    """
    for token in ids:
        # the plain case first: a prompt has a thousand of them
        if type(token) is int and 0 <= token < vocab_size:
            continue
        if not is_integer(token) or not 0 <= token < vocab_size:
            raise RequestError(
                f"{name}: {shown(token)} is no token of the model, expected integers from 0 to {vocab_size - 1}"
            )


def as_texts(value: str | Sequence[str] | None) -> list[str]:
    """One text, several or none, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def bad_words_ids(words: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each word, at the beginning of a text and after a space.

    The second form counts only where it has as many tokens and begins with another one, as in vLLM: for a tokenizer
    that makes nothing of the space it would be the same, and with a token for the space alone the first form follows.

    Raises:
        RequestError: there is no tokenizer, or a word has no tokens.
    """
    if tokenizer is None:
        raise RequestError(f"bad_words={shown(list(words))} need a tokenizer, and this engine has none")

    def encode(text: str) -> list[int]:
        # how long it may be is checked by the caller
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    sequences: list[list[int]] = []
    for word in words:
        bare = word.lstrip()
        plain, spaced = encode(bare), encode(" " + bare)
        if not plain:
            raise RequestError(f"bad_words: {shown(word)} has no tokens")
        sequences.append(plain)
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            sequences.append(spaced)
    return sequences


def is_integer(value: Any) -> bool:
    """Whether this is a whole number; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value as a message shows it: in a few words, however large it is."""
    # an integer of a million digits has no repr
    if is_integer(value) and abs(value) >= 2**128:
        return f"an integer of {int(value).bit_length()} bits"
    try:
        return _SHORT.repr(value)
    except ValueError:
        return f"a {type(value).__name__}"


def refuse(name: str, value: Any, rule: str) -> RequestError:
    """The error that says what a field must be."""
    return RequestError(f"{name} must be {rule}, got {shown(value)}")


def check_most(name: str, value: int, most: int) -> None:
    """A number within a limit.

    Raises:
        RequestError: it is above.
    """
    if value > most:
        raise RequestError(f"{name} must be at most {most}, got {value}")


def check_count(name: str, values: Sequence[Any] | Mapping[int, Any], most: int, what: str) -> None:
    """A list within a limit.

    Raises:
        RequestError: it is longer.
    """
    if len(values) > most:
        raise RequestError(f"{name} must have at most {most} {what}, got {len(values)}")


def integer(low: int, high: int, hint: str = "", *, optional: bool = False) -> Reader:
    """A whole number from ``low`` to ``high``; with ``optional`` also None."""

    def read(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if not is_integer(value) or not low <= value <= high:
            raise refuse(name, value, f"an integer from {low} to {high}{hint}{' or None' if optional else ''}")
        return int(value)

    return read


def number(low: float, high: float, *, above: bool = False, hint: str = "") -> Reader:
    """A finite number from ``low`` to ``high``, or, with ``above``, from above ``low``; as a float."""
    rule = f"a number {f'above {low:g} and at most' if above else f'from {low:g} to'} {high:g}{hint}"

    def read(name: str, value: Any) -> float:
        try:
            result = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
        except OverflowError:
            result = math.inf
        # NaN compares with nothing
        if not low <= result <= high or (above and result == low):
            raise refuse(name, value, rule)
        return result

    return read


def boolean(name: str, value: Any) -> bool:
    """True or False."""
    if type(value) is not bool:
        raise refuse(name, value, "True or False")
    return value


def one_of(*values: str) -> Reader:
    """One of several names."""

    def read(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise refuse(name, value, f"one of {', '.join(map(repr, values))}")
        return value

    return read


def texts(rule: str) -> Reader:
    """One text or several, none empty, all valid Unicode, or None; as a list."""

    def read(name: str, value: Any) -> list[str]:
        if not isinstance(value, str | list | tuple | None):
            raise refuse(name, value, rule)
        result = as_texts(value)
        for text in result:
            if not isinstance(text, str) or not text:
                raise refuse(name, text, rule)
            try:
                text.encode()
            except UnicodeEncodeError:
                raise refuse(name, text, f"{rule}, in valid Unicode (no half surrogate pairs)") from None
        return result

    return read


def token_ids(*, optional: bool) -> Reader:
    """A list of token ids; None is kept with ``optional``, and otherwise is an empty list."""

    # where None stays, an empty list would be another thing, which allows nothing
    def read(name: str, value: Any) -> list[int] | None:
        if value is None:
            return None if optional else []
        if not isinstance(value, list | tuple) or (optional and not value):
            raise refuse(name, value, "a list of token ids" + (" with at least one, or None" if optional else ""))
        for token in value:
            if not is_integer(token) or not 0 <= token <= LONGEST:
                raise refuse(f"each id in {name}", token, f"an integer from 0 to {LONGEST}")
        return [int(token) for token in value]

    return read


def bias_map(name: str, value: Any) -> dict[int, float] | None:
    """Token ids, which may be texts as in JSON, and their biases; None for none."""
    if value is None or (isinstance(value, Mapping) and not value):
        return None
    if not isinstance(value, Mapping):
        raise refuse(name, value, "a mapping of token ids to numbers")
    read = number(-LARGEST_BIAS, LARGEST_BIAS)
    result: dict[int, float] = {}
    for key, bias in value.items():
        # no longer text can be an id, and int() of a very long one takes long
        digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token = int(key) if digits or is_integer(key) else -1
        if not 0 <= token <= LONGEST:
            raise refuse(f"each key of {name}", key, f"a token id, an integer from 0 to {LONGEST}")
        result[token] = read(f"{name}[{token}]", bias)
    return result


def functions(name: str, value: Any) -> list[Callable[..., Any]] | None:
    """A list of functions; None for none."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(callable(item) for item in value):
        raise refuse(name, value, "a list of functions")
    return list(value) or None


def truncation(name: str, value: Any) -> int | None:
    """How many tokens are kept; -1: as many as the model takes; None: all."""
    if value is None:
        return None
    if not is_integer(value) or not (value == -1 or 1 <= value <= LONGEST):
        raise refuse(name, value, f"an integer from 1 to {LONGEST}, -1 for the model's own limit, or None")
    return int(value)
