"""The range of each field of GenerationConfig that ``generate`` honours."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from gpt2rt.errors import RequestError

_LONGEST = 2**31 - 1
_LARGEST_BIAS = 1e30


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


def _choice(*values: Any) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not any(type(value) is type(v) and value == v for v in values):
            raise _refuse(name, value, f"one of {', '.join(map(repr, values))}")

    return check


def _decay(name: str, value: Any) -> None:
    pair = isinstance(value, list | tuple) and len(value) == 2
    if not pair or not _is_integer(value[0]) or not _is_number(value[1]) or value[0] < 0 or value[1] <= 0:
        raise _refuse(name, value, "a pair (start, factor) of an integer from 0 on and a number above 0")


def _is_bias(value: Any) -> bool:
    # minus infinity excludes the token; several large ones must not add up to infinity
    return (_is_number(value) and abs(value) <= _LARGEST_BIAS) or (isinstance(value, float) and value == -math.inf)


def bias_items(name: str, value: Any) -> list[tuple[tuple[int, ...], float]]:
    """The sequences and biases of ``sequence_bias``, in either form.

    Args:
        name: of the field, for the message.
        value: ``{(id, ...): bias}`` or ``[[[id, ...], bias], ...]``, which JSON can hold.

    Raises:
        RequestError: it is neither, or empty, or holds what is no token id, or no number up to 1e30 and not -inf.
    """
    rule = (
        "{(id, ...): number, ...} or [[[id, ...], number], ...] with at least one sequence, none of them empty, and "
        "numbers up to 1e30 or -inf"
    )
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple) and all(isinstance(item, list | tuple) and len(item) == 2 for item in value):
        items = [(item[0], item[1]) for item in value]
    else:
        raise _refuse(name, value, rule)
    if not items or not all(isinstance(ids, list | tuple) and ids and _is_bias(bias) for ids, bias in items):
        raise _refuse(name, value, rule)
    for ids, _ in items:
        _token_ids(f"each sequence in {name}", ids)
    return [(tuple(int(token) for token in ids), float(bias)) for ids, bias in items]


def _cache_config(name: str, value: Any) -> None:
    # transformers takes a dict, or in older files an object
    if not isinstance(value, Mapping) and not hasattr(value, "to_dict"):
        raise _refuse(name, value, "a dict")


def _anything(name: str, value: Any) -> None:
    """No value is wrong, for none has an effect."""


#: names of caches that transformers knows; ``generate`` says which of them it serves
CACHE_IMPLEMENTATIONS = (
    "dynamic",
    "static",
    "paged",
    "offloaded",
    "offloaded_static",
    "quantized",
    "sliding_window",
    "hybrid",
    "hybrid_chunked",
    "offloaded_hybrid",
    "offloaded_hybrid_chunked",
)

_COUNT = _integer(1, 2**63 - 1)
_MINIMUM = _integer(0, 2**63 - 1)
_ABOVE_ZERO = _number("a number above 0", lambda value: value > 0)
_ANY_NUMBER = _number("a finite number", lambda value: True)
_SHARE = _number("a number above 0 and at most 1 (1 keeps all tokens)", lambda value: 0 < value <= 1)
_TEMPERATURE = "a number above 0 (for the likeliest token use do_sample=False)"
_CUTOFF = _number("a number from 0, which keeps all tokens, to below 1", lambda value: 0 <= value < 1)

_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "max_length": _COUNT,
    "max_new_tokens": _COUNT,
    "min_length": _MINIMUM,
    "min_new_tokens": _MINIMUM,
    "early_stopping": _choice(True, False, "never"),
    "context_policy": _choice("stop", "error", "truncate_left", "sliding"),
    "context_stride": _COUNT,
    "max_time": _number("a number of seconds above 0", lambda value: value > 0),
    "stop_strings": _stop_strings,
    "do_sample": _boolean,
    "num_beams": _integer(1, _LONGEST),
    "num_return_sequences": _integer(1, _LONGEST),
    "use_cache": _boolean,
    "cache_implementation": _choice(*CACHE_IMPLEMENTATIONS),
    "cache_config": _cache_config,
    "kv_cache_dtype": _choice("auto", "float32", "bfloat16", "float16", "int8", "float8"),
    "max_cache_len": _COUNT,
    "prefill_chunk_size": _COUNT,
    "low_memory": _boolean,
    "compile_config": _anything,
    "disable_compile": _boolean,
    "seed": _integer(-(2**63), 2**63 - 1),
    "temperature": _number(_TEMPERATURE, lambda value: value >= 0),
    "top_k": _integer(0, _LONGEST, " (0 keeps all tokens)"),
    "top_p": _SHARE,
    "min_p": _number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "top_h": _SHARE,
    "typical_p": _SHARE,
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "repetition_penalty": _ABOVE_ZERO,
    "encoder_repetition_penalty": _ABOVE_ZERO,
    "length_penalty": _ANY_NUMBER,
    "no_repeat_ngram_size": _integer(0, _LONGEST, " (0 allows all)"),
    "encoder_no_repeat_ngram_size": _integer(0, _LONGEST, " (0 allows all)"),
    "bad_words_ids": _token_sequences,
    "renormalize_logits": _boolean,
    "forced_bos_token_id": _token_id,
    "forced_eos_token_id": _one_or_more_token_ids,
    "remove_invalid_values": _boolean,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _suppressed,
    "begin_suppress_tokens": _suppressed,
    "sequence_bias": bias_items,
    "token_healing": _boolean,
    "guidance_scale": _ANY_NUMBER,
    "is_assistant": _boolean,
    "num_assistant_tokens": _integer(1, _LONGEST),
    "num_assistant_tokens_schedule": _choice("constant", "heuristic", "heuristic_transient"),
    "assistant_confidence_threshold": _number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "prompt_lookup_num_tokens": _integer(1, _LONGEST),
    "max_matching_ngram_size": _integer(1, _LONGEST),
    "assistant_early_exit": _integer(1, _LONGEST),
    "assistant_lookbehind": _integer(1, _LONGEST),
    "target_lookbehind": _integer(1, _LONGEST),
    "return_dict_in_generate": _boolean,
    "output_scores": _boolean,
    "output_logits": _boolean,
    "output_attentions": _boolean,
    "output_hidden_states": _boolean,
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
    # files and calls that ask for no sampling often say temperature=0, which then means nothing
    if values.get("do_sample", False) and values.get("temperature") == 0:
        raise _refuse("temperature", values["temperature"], _TEMPERATURE)
    several, beams = values.get("num_return_sequences", 1), values.get("num_beams", 1)
    if several > 1 and beams == 1 and not values.get("do_sample", False):
        raise RequestError(
            f"num_return_sequences={several} needs do_sample=True or num_beams: Greedy methods (do_sample != True) "
            "without beam search do not support `num_return_sequences` different than 1"
        )
    if beams > 1 and several > beams:
        raise RequestError(
            f"`num_return_sequences` ({several}) has to be smaller or equal to `num_beams` ({beams}): the best beams "
            "are returned, and there are no more of them"
        )
    suppressed = set(values.get("suppress_tokens", ()))
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = values.get(name, ())
        forced = {forced} if _is_integer(forced) else set(forced)
        if forced and forced <= suppressed:
            raise RequestError(
                f"suppress_tokens holds all of {name}={sorted(forced)}, so that no token would be left where it is "
                "forced; take it out of one of the two"
            )
