"""From the arguments of ``generate`` to a decode loop: defaults filled in, everything checked, nothing computed yet."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gpt2rt.errors import RequestError

from .config import DEFAULTS, FIELDS, GenerationConfig
from .decode import DecodePlan, Decoder
from .logits import as_list, build_processors
from .prompts import Prompts, read_prompts
from .runtime import executor_for
from .stopping import StopStrings

_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "seed")

#: arguments that transformers' generate knows and this one does not do yet
_NOT_YET = (
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "token_type_ids",
    "head_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_outputs",
    "assistant_tokenizer",
    "trust_remote_code",
    "continuous_batching_config",
    "use_model_defaults",
)


def resolve_config(
    model_config: GenerationConfig, given: Any, kwargs: Mapping[str, Any]
) -> tuple[GenerationConfig, dict[str, Any], set[str]]:
    """The settings of one call.

    Args:
        model_config: the model's own settings.
        given: the ``generation_config`` argument: ours, transformers', or None.
        kwargs: the call's keyword arguments; a None among them unsets what the others say.

    Returns:
        The settings, the keyword arguments that are no field, and the fields that the caller set.

    Raises:
        RequestError: a value is outside its range or asks for something that is not done yet.
    """
    if given is None:
        given = GenerationConfig()
    elif not isinstance(given, GenerationConfig):
        if not hasattr(given, "to_dict"):
            raise RequestError(f"generation_config must be a GenerationConfig, got {type(given).__name__}")
        # transformers' own class has the same fields
        given = GenerationConfig.from_dict(given.to_dict())
    explicit = {name for name in FIELDS if getattr(given, name) is not None}
    explicit |= {name for name, value in kwargs.items() if name in FIELDS and value is not None}
    config = given.filled_from(model_config)
    rest = config.update(**kwargs)
    config.refuse_unsupported()
    _warn_of_idle_fields(config, explicit)
    return config, rest, explicit


def _warn_of_idle_fields(config: GenerationConfig, explicit: set[str]) -> None:
    """Say which of the caller's settings do nothing in this combination."""
    idle = []
    if not config.get("do_sample"):
        idle = [name for name in _SAMPLING_ONLY if name in explicit and config.get(name) != DEFAULTS[name]]
    if idle:
        warnings.warn(f"{', '.join(idle)} only matter with do_sample=True, which is not set", stacklevel=4)
    if not config.get("return_dict_in_generate"):
        idle = [name for name in ("output_scores", "output_logits") if name in explicit and config.get(name)]
        if idle:
            warnings.warn(f"{', '.join(idle)} only matter with return_dict_in_generate=True", stacklevel=4)
    if {"max_new_tokens", "max_length"} <= explicit:
        warnings.warn("both max_new_tokens and max_length are set; max_new_tokens counts", stacklevel=4)
    if {"min_new_tokens", "min_length"} <= explicit:
        warnings.warn("both min_new_tokens and min_length are set; min_new_tokens counts", stacklevel=4)


def refuse_leftovers(kwargs: Mapping[str, Any]) -> None:
    """Raise if keyword arguments remain that nobody has taken.

    Raises:
        RequestError: naming all of them.
    """
    left = [name for name, value in kwargs.items() if value is not None]
    known = [name for name in left if name in _NOT_YET]
    if known:
        raise RequestError(f"generate does not support {', '.join(known)} yet; leave it out")
    if left:
        raise RequestError(
            f"The following `model_kwargs` are not used by the model: {left} (note: typos in the generate arguments "
            "will also show up in this list)"
        )


def _check_ids(config: GenerationConfig, explicit: set[str], vocab_size: int) -> None:
    """Ids that a caller names must exist."""
    named: dict[str, list[int]] = {
        "suppress_tokens": as_list(config.suppress_tokens),
        "begin_suppress_tokens": as_list(config.begin_suppress_tokens),
        "bad_words_ids": [token for sequence in config.bad_words_ids or () for token in sequence],
    }
    if "eos_token_id" in explicit:
        named["eos_token_id"] = as_list(config.eos_token_id)
    for name, ids in named.items():
        bad = [token for token in ids if token >= vocab_size]
        if bad:
            raise RequestError(f"{name} holds {bad[0]}, but the vocabulary has ids 0 to {vocab_size - 1}")


def _max_lengths(
    config: GenerationConfig, explicit: set[str], prompts: Prompts, n_positions: int, own_max_length: bool
) -> list[int]:
    """The most ids of each row: as many as asked for, as far as positions go.

    The last new token needs no position, for nothing is computed from it, so a row may have ``n_positions + 1`` ids.
    """
    columns = prompts.columns.size(1)
    if config.max_new_tokens is not None:
        wanted = config.max_new_tokens
    elif own_max_length:
        wanted = config.get("max_length") - columns
        if wanted <= 0:
            raise RequestError(
                f"Input length of input_ids is {columns}, but `max_length` is set to {config.max_length}: no new token "
                "would fit; set max_new_tokens instead, or a larger max_length"
            )
    else:
        # transformers' default: 20 new tokens, or up to n_positions ids; a prompt that fills them all still gets one
        lengths = [len(row) for row in prompts.rows]
        return [max(length + 1, min(length + DEFAULTS["max_length"], n_positions)) for length in lengths]
    room = [n_positions + 1 - len(row) for row in prompts.rows]
    if wanted > min(room) and ("max_new_tokens" in explicit or "max_length" in explicit):
        warnings.warn(
            f"{wanted} new tokens were asked for, but after the longest prompt there is room for {min(room)} in the "
            f"model's n_positions={n_positions}; rows end there",
            stacklevel=5,
        )
    return [len(row) + min(wanted, space) for row, space in zip(prompts.rows, room, strict=True)]


def _pad_token(config: GenerationConfig, prompts: Prompts, limits: list[int], can_end_early: bool) -> int:
    """What fills rows that end before others."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    eos = as_list(config.eos_token_id)
    if eos:
        return eos[0]
    rows = len(limits) * config.get("num_return_sequences")
    uneven = len({limit - len(row) for limit, row in zip(limits, prompts.rows, strict=True)}) > 1
    if rows > 1 and (uneven or can_end_early):
        raise RequestError("rows may end at different lengths, so pad_token_id (or eos_token_id) must be set")
    # never shown
    return 0


def prepare(
    model: Any,
    inputs: Any,
    generation_config: Any,
    logits_processor: Sequence[Any] | None,
    stopping_criteria: Sequence[Any] | None,
    kwargs: dict[str, Any],
) -> tuple[Decoder, GenerationConfig, Prompts]:
    """Check a call of ``generate`` and make its decode loop.

    Args:
        model: with ``config``, ``generation_config``, ``device`` and what :func:`executor_for` needs.
        inputs, generation_config, logits_processor, stopping_criteria, kwargs: as ``generate`` got them.

    Returns:
        The loop, the settings in force, and the prompts.

    Raises:
        RequestError: (a ValueError) something in the call is wrong; nothing has been computed.
    """
    config, rest, explicit = resolve_config(model.generation_config, generation_config, kwargs)
    named = rest.pop("input_ids", None)
    if named is not None and inputs is not None:
        raise RequestError("inputs and input_ids were both given; they are the same argument, pass one")
    attention_mask, tokenizer = rest.pop("attention_mask", None), rest.pop("tokenizer", None)
    refuse_leftovers(rest)

    vocab_size, n_positions = model.config.vocab_size, model.config.n_positions
    _check_ids(config, explicit, vocab_size)
    # an end token of a foreign checkpoint can never be drawn
    eos = [token for token in as_list(config.eos_token_id) if token < vocab_size]
    prompts = read_prompts(
        named if inputs is None else inputs,
        attention_mask,
        vocab_size=vocab_size,
        n_positions=n_positions,
        bos_token_id=config.bos_token_id,
        eos_token_ids=as_list(config.eos_token_id),
        pad_token_id=config.pad_token_id,
        device=model.device,
    )
    limits = _max_lengths(config, explicit, prompts, n_positions, config.max_length is not None)
    if config.stop_strings is not None and tokenizer is None:
        raise RequestError("stop_strings need the tokenizer: generate(..., stop_strings=..., tokenizer=tokenizer)")
    can_end_early = bool(config.stop_strings or stopping_criteria)
    processors, warpers = build_processors(config, prompts.columns.size(1), eos)
    _warn_of_unreachable_minimum(config, prompts, limits)
    plan = DecodePlan(
        executor=executor_for(model),
        prompts=prompts.rows,
        max_lengths=limits,
        num_return_sequences=config.get("num_return_sequences"),
        eos_token_ids=frozenset(eos),
        pad_token_id=_pad_token(config, prompts, limits, can_end_early),
        processors=processors,
        warpers=warpers,
        user_processors=_callables("logits_processor", logits_processor),
        user_criteria=_callables("stopping_criteria", stopping_criteria),
        columns=prompts.columns,
        keep=prompts.keep,
        do_sample=config.get("do_sample"),
        seed=_seed(config),
        use_cache=config.get("use_cache"),
        stop_strings=None if config.stop_strings is None else StopStrings(config.stop_strings, tokenizer),
        max_time=config.max_time,
        output_scores=config.get("return_dict_in_generate") and config.get("output_scores"),
        output_logits=config.get("return_dict_in_generate") and config.get("output_logits"),
    )
    return Decoder(plan), config, prompts


def _callables(name: str, given: Any) -> list[Any]:
    """A caller's own processors or criteria."""
    if given is None:
        return []
    if not isinstance(given, list | tuple) or not all(callable(item) for item in given):
        raise RequestError(f"{name} must be a list of callables (input_ids, scores) -> ..., got {given!r}")
    return list(given)


def _seed(config: GenerationConfig) -> int:
    if config.seed is not None or not config.get("do_sample"):
        return config.seed or 0
    # torch's global generator, so that torch.manual_seed makes a script repeatable
    return int(torch.randint(-(2**63), 2**63 - 1, ()))


def _warn_of_unreachable_minimum(config: GenerationConfig, prompts: Prompts, limits: list[int]) -> None:
    columns = prompts.columns.size(1)
    minimum = config.get("min_length") - columns if config.min_new_tokens is None else config.min_new_tokens
    most = min(limit - len(row) for limit, row in zip(limits, prompts.rows, strict=True))
    if minimum > most:
        warnings.warn(f"a minimum of {minimum} new tokens was set, but rows end after {most}", stacklevel=5)
