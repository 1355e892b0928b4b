"""The range of each field of GenerationConfig that ``generate`` honours."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from gpt2rt.errors import RequestError

_LONGEST = 2**31 - 1


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(name: str, value: Any, rule: str) -> RequestError:
    text = repr(value)
    return RequestError(f"{name} must be {rule}, got {text if len(text) <= 80 else text[:77] + '...'}")


def _integer(low: int, high: int, hint: str = "") -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not _is_integer(value) or not low <= value <= high:
            raise _refuse(name, value, f"an integer from {low} to {high}{hint}")

    return check


def _number(rule: str, inside: Callable[[float], bool]) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not _is_number(value) or not inside(value):
            raise _refuse(name, value, rule)

    return check


def _boolean(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise _refuse(name, value, "True or False")


def _stop_strings(name: str, value: Any) -> None:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not strings or not all(isinstance(s, str) and s for s in strings):
        raise _refuse(name, value, "a text or a list of texts, none of them empty")


def _token_id(name: str, value: Any) -> None:
    if not _is_integer(value) or not 0 <= value <= _LONGEST:
        raise _refuse(name, value, "a token id, an integer from 0 on, or None for no such token")


def _token_ids(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not value:
        raise _refuse(name, value, "a list of token ids with at least one")
    for item in value:
        _token_id(f"each id in {name}", item)


def _suppressed(name: str, value: Any) -> None:
    # an empty list, as some checkpoints have it, suppresses nothing
    if not isinstance(value, list | tuple) or value:
        _token_ids(name, value)


def _one_or_more_token_ids(name: str, value: Any) -> None:
    if _is_integer(value):
        _token_id(name, value)
    else:
        _token_ids(name, value)


def _token_sequences(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not value:
        raise _refuse(name, value, "a list of token sequences with at least one")
    for item in value:
        _token_ids(f"each sequence in {name}", item)


_COUNT = _integer(1, 2**63 - 1)
_MINIMUM = _integer(0, 2**63 - 1)
_ABOVE_ZERO = _number("a number above 0", lambda value: value > 0)

_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "max_length": _COUNT,
    "max_new_tokens": _COUNT,
    "min_length": _MINIMUM,
    "min_new_tokens": _MINIMUM,
    "max_time": _number("a number of seconds above 0", lambda value: value > 0),
    "stop_strings": _stop_strings,
    "do_sample": _boolean,
    "num_beams": _integer(1, _LONGEST),
    "num_return_sequences": _integer(1, _LONGEST),
    "use_cache": _boolean,
    "seed": _integer(-(2**63), 2**63 - 1),
    "temperature": _number("a number above 0 (for the likeliest token use do_sample=False)", lambda value: value > 0),
    "top_k": _integer(0, _LONGEST, " (0 keeps all tokens)"),
    "top_p": _number("a number above 0 and at most 1 (1 keeps all tokens)", lambda value: 0 < value <= 1),
    "min_p": _number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": _ABOVE_ZERO,
    "no_repeat_ngram_size": _integer(0, _LONGEST, " (0 allows all)"),
    "bad_words_ids": _token_sequences,
    "suppress_tokens": _suppressed,
    "begin_suppress_tokens": _suppressed,
    "return_dict_in_generate": _boolean,
    "output_scores": _boolean,
    "output_logits": _boolean,
    "pad_token_id": _token_id,
    "bos_token_id": _token_id,
    "eos_token_id": _one_or_more_token_ids,
}


def validate_fields(values: Mapping[str, Any]) -> None:
    """Check fields and their combinations.

    Args:
        values: the fields that are set.

    Raises:
        RequestError: a value is outside its range; the message names the field, the value and the range.
    """
    for name, value in values.items():
        _CHECKS[name](name, value)
    several = values.get("num_return_sequences", 1)
    if several > 1 and not values.get("do_sample", False):
        raise RequestError(
            f"num_return_sequences={several} needs do_sample=True: without sampling all continuations are the same"
        )
