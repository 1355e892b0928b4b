"""``custom_generate``: a caller's own decoding loop, called as transformers calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gpt2rt.errors import RequestError

from .config import GenerationConfig
from .decode import DecodePlan
from .logits import LogitsProcessorList
from .prompts import full_mask
from .stopping import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria

#: what every decoding loop gets; anything else in its signature is taken from the call of ``generate``
_STANDARD = (
    "model",
    "self",
    "input_ids",
    "logits_processor",
    "stopping_criteria",
    "generation_config",
    "synced_gpus",
    "model_kwargs",
)


def split_arguments(
    custom_generate: Any, kwargs: dict[str, Any], **named: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keyword arguments that are meant for a caller's loop, and the others.

    Args:
        custom_generate: the loop, or None.
        kwargs: of ``generate``.
        **named: further arguments of ``generate``, None if not given, that only a loop which names them can use.

    Raises:
        RequestError: ``custom_generate`` is a name: code from a hub or a checkpoint is never run. Or the loop does not
            take one of ``named``.
    """
    if custom_generate is None:
        return {}, kwargs
    if not callable(custom_generate):
        raise RequestError(
            f"custom_generate={custom_generate!r} names code in a repository, which gpt2rt never runs; read that code, "
            "and pass its generate function itself if you trust it"
        )
    parameters = inspect.signature(custom_generate).parameters
    own = {name: value for name, value in kwargs.items() if name in parameters and name not in _STANDARD}
    for name, value in named.items():
        if value is not None and name not in parameters:
            raise RequestError(
                f"custom_generate has no parameter {name}, so the loop would not see it; leave {name} out"
            )
    own |= {name: value for name, value in named.items() if value is not None}
    return own, {name: value for name, value in kwargs.items() if name not in own}


def call_custom(
    model: Any,
    custom_generate: Callable[..., Any],
    plan: DecodePlan,
    config: GenerationConfig,
    arguments: dict[str, Any],
    cache: Any,
    tokenizer: Any,
) -> Any:
    """Run a caller's loop: ``custom_generate(model, input_ids, logits_processor=..., ...)``.

    It gets ``logits_processor``, ``stopping_criteria`` and ``generation_config`` of the call, the model's arguments
    ``attention_mask`` (None without padding), ``position_ids``, ``past_key_values`` (an empty cache), ``use_cache`` and
    ``logits_to_keep``, and its own ``arguments``, ``streamer`` and ``assistant_model`` among them if it names them.
    Rows are repeated for ``num_return_sequences`` or ``num_beams``.

    Args:
        model: with forward.
        custom_generate: the loop.
        plan: the call, checked.
        config: its settings.
        arguments: of :func:`split_arguments`.
        cache: an empty one.
        tokenizer: for stop texts, or None.

    Returns:
        Whatever it returns.
    """
    rows = max(plan.num_beams, plan.num_return_sequences)
    device = plan.executor.plan.device
    keep = full_mask(plan.columns, plan.keep)
    positions = (keep.long().cumsum(dim=1) - 1).clamp(min=0)

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(rows, dim=0).to(device)

    columns = plan.columns.size(1)
    longest = max(limit - len(prompt) for limit, prompt in zip(plan.max_lengths, plan.prompts, strict=True))
    criteria = StoppingCriteriaList([MaxLengthCriteria(columns + longest)])
    if plan.max_time is not None:
        criteria.append(MaxTimeCriteria(plan.max_time))
    if plan.stop_strings is not None:
        criteria.append(StopStringCriteria(stop_strings=plan.stop_strings.strings, tokenizer=tokenizer))
    if plan.eos_token_ids:
        criteria.append(EosTokenCriteria(eos_token_id=sorted(plan.eos_token_ids)))
    criteria.extend(plan.user_criteria)
    return custom_generate(
        model,
        repeated(plan.columns),
        logits_processor=LogitsProcessorList([*plan.processors, *plan.user_processors, *plan.warpers]),
        stopping_criteria=criteria,
        generation_config=config,
        attention_mask=None if plan.keep is None else repeated(keep.long()),
        position_ids=repeated(positions),
        past_key_values=cache,
        use_cache=plan.use_cache,
        logits_to_keep=1,
        **arguments,
    )
