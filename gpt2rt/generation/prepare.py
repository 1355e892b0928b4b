"""From the arguments of ``generate`` to a decode loop: defaults filled in, everything checked, nothing computed yet."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gpt2rt.errors import RequestError
from gpt2rt.graph import Executor

from .cache_names import check_cache, check_cache_length, kv_cache_dtype
from .config import DEFAULTS, FIELDS, GenerationConfig
from .context import LONG_PROMPTS, fit_prompts, row_limits, sliding_stride
from .continuation import Given, check_position_ids, read_call, table_rows, with_token_types
from .decode import DecodePlan
from .guidance import make_guidance
from .healing import heal_prompts
from .logits import as_list, build_processors
from .modes import Loop, make_decoder
from .prompts import Prompts, read_prompts
from .runtime import executor_for
from .speculation import make_speculation
from .stopping import ConfidenceCriteria, StopStrings, holds, without_replaced
from .validation import bias_items

_NEED_DICT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

_SAMPLING_ONLY = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "seed",
)

_BEAMS_ONLY = ("early_stopping", "length_penalty")

#: arguments of ``generate`` that are taken from its keywords
_CALL_ARGUMENTS = (
    "attention_mask",
    "past_key_values",
    "inputs_embeds",
    "position_ids",
    "token_type_ids",
    "tokenizer",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "assistant_tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)

#: arguments that transformers' generate knows, and why they are refused here
_REFUSED = {
    "synced_gpus": "the model is not spread over several processes",
    "head_mask": "the model is computed as one graph without it; call forward, or set the weights of a head to 0",
    "encoder_hidden_states": "models with cross attention run in forward only",
    "encoder_attention_mask": "models with cross attention run in forward only",
    "encoder_outputs": "there is no encoder",
    "continuous_batching_config": "generate computes the batch it is given, from first to last token",
}

#: arguments that change nothing: there is no code from a hub to trust, and a model's own settings are always used
_WITHOUT_EFFECT = ("trust_remote_code", "use_model_defaults", "logits_to_keep")


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
    given = GenerationConfig() if given is None else GenerationConfig.read(given)
    explicit = {name for name in FIELDS if getattr(given, name) is not None}
    explicit |= {name for name, value in kwargs.items() if name in FIELDS and value is not None}
    config = given.filled_from(model_config)
    rest = config.update(**kwargs)
    config.refuse_unsupported()
    _warn_of_idle_fields(config, explicit)
    return config, rest, explicit


def _warn_of_idle_fields(config: GenerationConfig, explicit: set[str]) -> None:
    """Say which of the caller's settings do nothing in this combination."""
    needs = (
        (_SAMPLING_ONLY, config.get("do_sample"), "do_sample=True, which is not set"),
        (_BEAMS_ONLY, config.get("num_beams") > 1, "num_beams above 1, which is not set"),
        (_NEED_DICT, config.get("return_dict_in_generate"), "return_dict_in_generate=True"),
    )
    for names, have, need in needs:
        idle = [name for name in names if not have and name in explicit and config.get(name) != DEFAULTS[name]]
        if idle:
            warnings.warn(f"{', '.join(idle)} only matter with {need}", stacklevel=6)
    # max_new_tokens may also come from the model's own settings
    for loser, winner in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if loser in explicit and getattr(config, winner) is not None:
            warnings.warn(f"both {winner} and {loser} are set; {winner} counts", stacklevel=6)


def refuse_leftovers(kwargs: Mapping[str, Any]) -> None:
    """Raise if keyword arguments remain that nobody has taken.

    Raises:
        RequestError: naming all of them.
    """
    left = [name for name, value in kwargs.items() if value is not None and name not in _WITHOUT_EFFECT]
    for name in left:
        if name in _REFUSED and kwargs[name] is not False:
            raise RequestError(f"generate does not support {name}: {_REFUSED[name]}")
    left = [name for name in left if name not in _REFUSED]
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
        "forced_bos_token_id": as_list(config.forced_bos_token_id),
        "forced_eos_token_id": as_list(config.forced_eos_token_id),
    }
    if config.sequence_bias is not None:
        items = bias_items("sequence_bias", config.sequence_bias)
        named["sequence_bias"] = [token for ids, _ in items for token in ids]
    if "eos_token_id" in explicit:
        named["eos_token_id"] = as_list(config.eos_token_id)
    for name, ids in named.items():
        bad = [token for token in ids if token >= vocab_size]
        if bad:
            raise RequestError(f"{name} holds {bad[0]}, but the vocabulary has ids 0 to {vocab_size - 1}")


def _wanted_tokens(config: GenerationConfig, columns: int) -> int | None:
    """How many new tokens are asked for; None: nobody said.

    Args:
        config: the settings in force.
        columns: of the prompts as the caller laid them out, ids or embeddings.
    """
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        return None
    wanted = config.max_length - columns
    if wanted <= 0:
        raise RequestError(
            f"Input length of input_ids is {columns}, but `max_length` is set to {config.max_length}: no new token "
            "would fit; set max_new_tokens instead, or a larger max_length"
        )
    return wanted


def _pad_token(config: GenerationConfig, room: list[int], can_end_early: bool) -> int:
    """What fills rows that end before others; ``room`` is the most new tokens of each prompt."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    eos = as_list(config.eos_token_id)
    if eos:
        return eos[0]
    rows = len(room) * config.get("num_return_sequences")
    if rows > 1 and (len(set(room)) > 1 or can_end_early):
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
) -> tuple[Loop, GenerationConfig, Prompts]:
    """Check a call of ``generate`` and make its decode loop.

    Args:
        model: with ``config``, ``generation_config``, ``device`` and what :func:`executor_for` needs.
        inputs, generation_config, logits_processor, stopping_criteria: as ``generate`` got them.
        kwargs: its other arguments, by name.

    Returns:
        The loop, the settings in force, and the prompts.

    Raises:
        RequestError: (a ValueError) something in the call is wrong; nothing has been computed.
    """
    plan, config, prompts = make_plan(model, inputs, generation_config, logits_processor, stopping_criteria, kwargs)
    return make_decoder(plan), config, prompts


def make_plan(
    model: Any,
    inputs: Any,
    generation_config: Any,
    logits_processor: Sequence[Any] | None,
    stopping_criteria: Sequence[Any] | None,
    kwargs: dict[str, Any],
) -> tuple[DecodePlan, GenerationConfig, Prompts]:
    """As :func:`prepare`, without the loop."""
    config, rest, explicit = resolve_config(model.generation_config, generation_config, kwargs)
    user_criteria = _callables("stopping_criteria", stopping_criteria)
    config = without_replaced(config, user_criteria)
    if config.get("is_assistant") and config.get("assistant_confidence_threshold") > 0:
        user_criteria.append(ConfidenceCriteria(config.get("assistant_confidence_threshold")))
    named = rest.pop("input_ids", None)
    if named is not None and inputs is not None:
        raise RequestError("inputs and input_ids were both given; they are the same argument, pass one")
    call = {name: rest.pop(name, None) for name in _CALL_ARGUMENTS}
    refuse_leftovers(rest)
    check_cache(config, call["past_key_values"])
    user_processors = _callables("logits_processor", logits_processor)
    if config.stop_strings is not None and call["tokenizer"] is None:
        raise RequestError("stop_strings need the tokenizer: generate(..., stop_strings=..., tokenizer=tokenizer)")

    vocab_size, n_positions = model.config.vocab_size, model.config.n_positions
    _check_ids(config, explicit, vocab_size)
    # an end token of a foreign checkpoint can never be drawn
    eos = [token for token in as_list(config.eos_token_id) if token < vocab_size]
    executor = executor_for(model)
    cache_dtype = kv_cache_dtype(config, executor)
    rows_per_prompt = max(config.get("num_beams"), config.get("num_return_sequences"))
    prompts, given = _read(model, executor, named if inputs is None else inputs, config, call, rows_per_prompt)
    # what max_length counts: the embeddings, or the ids
    columns = prompts.columns.size(1) if given is None or given.embeds is None else given.embeds.size(1)
    wanted = _wanted_tokens(config, columns)
    policy = config.get("context_policy")
    fitted = fit_prompts(prompts, policy, wanted, n_positions)
    whole, prompts = fitted is prompts, fitted
    hidden = [0] * len(prompts.rows) if given is None else given.hidden
    lengths = [before + len(row) for before, row in zip(hidden, prompts.rows, strict=True)]
    asked = "max_new_tokens" in explicit or "max_length" in explicit
    limits = row_limits(lengths, policy, wanted, n_positions, asked)
    check_cache_length(config, limits)
    limits = [limit - before for limit, before in zip(limits, hidden, strict=True)]
    # for each prompt, the most new tokens
    room = [limit - len(row) for limit, row in zip(limits, prompts.rows, strict=True)]
    pad_token_id = _pad_token(config, room, can_end_early=bool(config.stop_strings or user_criteria))
    if config.get("num_beams") > 1 and pad_token_id == 0 and eos:
        # transformers tests the id for truth here, so beams that ended are filled with the end token instead of id 0
        pad_token_id = as_list(config.eos_token_id)[0]
    _warn_of_unreachable_minimum(config, min(room), columns)
    # without ids, the lengths that processors see begin at 0
    shown = prompts.columns.size(1)
    ruled = config if columns == shown else _shifted(config, columns - shown)
    processors, warpers = build_processors(
        ruled,
        shown,
        eos,
        prefix_allowed_tokens_fn=call["prefix_allowed_tokens_fn"],
        guidance=make_guidance(
            config,
            executor,
            call["negative_prompt_ids"],
            call["negative_prompt_attention_mask"],
            prompt_columns=shown,
            num_rows=len(prompts.rows) * rows_per_prompt,
            max_new_tokens=max(room),
        ),
        max_length=_PerPrompt([shown + most for most in room], rows_per_prompt),
        pad_token_id=pad_token_id,
        user_processors=user_processors,
    )
    speculation = make_speculation(
        executor, config, call["assistant_model"], call["tokenizer"], call["assistant_tokenizer"]
    )
    if given is not None and given.token_type is not None:
        # what is added to every new token might as well be added to every position
        tokens, places = model.base_model.tables
        added = table_rows(tokens, torch.tensor(given.token_type, device=places.weight.device))
        executor = executor.with_positions(places.weight + added)
    returns_dict, use_cache = config.get("return_dict_in_generate"), config.get("use_cache") or given is not None
    caller_cache = hasattr(call["past_key_values"], "update")
    stride = sliding_stride(config, n_positions)
    plan = DecodePlan(
        executor=executor,
        prompts=prompts.rows,
        max_lengths=limits,
        num_return_sequences=config.get("num_return_sequences"),
        eos_token_ids=frozenset(() if holds(user_criteria, "EosTokenCriteria") else eos),
        pad_token_id=pad_token_id,
        processors=processors,
        warpers=warpers,
        user_processors=user_processors,
        user_criteria=user_criteria,
        columns=prompts.columns,
        keep=prompts.keep,
        do_sample=config.get("do_sample"),
        seed=_seed(config),
        use_cache=use_cache,
        stop_strings=None if config.stop_strings is None else StopStrings(config.stop_strings, call["tokenizer"]),
        max_time=config.max_time,
        output_scores=returns_dict and config.get("output_scores"),
        output_logits=returns_dict and config.get("output_logits"),
        prefill_chunk_size=config.prefill_chunk_size,
        context_stride=stride,
        speculation=speculation,
        num_beams=config.get("num_beams"),
        length_penalty=config.get("length_penalty"),
        early_stopping=config.get("early_stopping"),
        remove_invalid_values=config.get("remove_invalid_values"),
        # neither the windows of rows that slide nor the ends of prompts that were cut belong to the ids returned
        output_past=(returns_dict or caller_cache) and use_cache and stride is None and whole,
        kv_cache_dtype=cache_dtype,
    )
    if given is not None:
        # the first work of the call: everything has been checked
        plan.starts = given.starts(model, prompts, plan.do_sample)
    return plan, config, dataclasses.replace(prompts, given=given)


def _read(
    model: Any,
    executor: Executor,
    inputs: Any,
    config: GenerationConfig,
    call: Mapping[str, Any],
    rows_per_prompt: int,
) -> tuple[Prompts, Given | None]:
    """The prompts of a call, whatever they are given as, and what comes besides their ids.

    Args:
        model, executor: the model, and what runs it.
        inputs: the ids, or None.
        config: the settings in force.
        call: the arguments in :data:`_CALL_ARGUMENTS`.
        rows_per_prompt: rows of the result for each prompt.
    """
    policy, past = config.get("context_policy"), call["past_key_values"]
    limits = {
        "vocab_size": model.config.vocab_size,
        "n_positions": model.config.n_positions,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": as_list(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
        "device": model.device,
        "allow_longer": policy in LONG_PROMPTS,
    }
    prompts, given = read_call(
        inputs,
        call["attention_mask"],
        past,
        call["inputs_embeds"],
        plan=executor.plan,
        rows_per_prompt=rows_per_prompt,
        **limits,
    )
    if call["position_ids"] is not None:
        check_position_ids(call["position_ids"], prompts, given)
    if call["token_type_ids"] is not None:
        given = with_token_types(prompts, given, call["token_type_ids"], model.get_input_embeddings())
        if call["assistant_model"] is not None or config.assistant_early_exit is not None:
            raise RequestError("token_type_ids do not go with an assistant, which would not see them; leave one out")
    if given is not None:
        _check_given(config, given, call)
    if policy in LONG_PROMPTS and past is not None:
        raise RequestError(
            f"context_policy={policy!r} does not go with past_key_values: no cache can be filled with "
            "tokens that the model does not see"
        )
    if config.get("token_healing"):
        healed = heal_prompts(executor, prompts.rows, call["tokenizer"])
        prompts = read_prompts(healed, None, **(limits | {"device": prompts.device}))
    return prompts, given


class _PerPrompt(Sequence[int]):
    """A number for each row, where the rows of a prompt have the same; nothing is made for each of them.

    Args:
        values: one for each prompt.
        rows_per_prompt: how often each counts.
    """

    def __init__(self, values: list[int], rows_per_prompt: int) -> None:
        self._values = values
        self._rows_per_prompt = rows_per_prompt

    def __len__(self) -> int:
        return len(self._values) * self._rows_per_prompt

    def __getitem__(self, row: Any) -> Any:
        return self._values[row // self._rows_per_prompt]


def _check_given(config: GenerationConfig, given: Given, call: Mapping[str, Any]) -> None:
    """Refuse what does not go with a filled cache or with embeddings."""
    what = "a filled past_key_values"
    if given.embeds is not None:
        what = "token_type_ids" if call["inputs_embeds"] is None else "inputs_embeds"
    if config.use_cache is False and given.embeds is None:
        raise RequestError("use_cache=False computes rows anew from their ids; leave out past_key_values with it")
    if config.get("context_policy") in LONG_PROMPTS:
        raise RequestError(f"context_policy={config.context_policy!r} does not go with {what}; shorten the prompt")
    if config.get("token_healing"):
        raise RequestError(f"token_healing does not go with {what}; it changes the prompt's ids")
    speculation = {
        "assistant_model": call["assistant_model"],
        "assistant_early_exit": config.assistant_early_exit,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens,
    }
    asked = [name for name, value in speculation.items() if value is not None]
    if asked and any(given.hidden):
        raise RequestError(f"{asked[0]} needs the ids of the whole prompt, which {what} does not have; pass them")


def _shifted(config: GenerationConfig, columns: int) -> GenerationConfig:
    """The settings for processors that do not see the first ``columns`` of a prompt."""
    shifted = copy.copy(config)
    shifted.min_length = max(0, config.get("min_length") - columns)
    return shifted


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


def _warn_of_unreachable_minimum(config: GenerationConfig, most: int, columns: int) -> None:
    minimum = config.get("min_length") - columns if config.min_new_tokens is None else config.min_new_tokens
    if minimum > most:
        warnings.warn(f"a minimum of {minimum} new tokens was set, but rows end after {most}", stacklevel=5)
