"""What happens when a row needs more tokens than the model has positions.

Positions end at ``n_positions``. The last new token needs none, for nothing is computed from it, so a row can have
``n_positions + 1`` tokens. ``GenerationConfig.context_policy`` names what comes then; all of it is decided, and every
refusal raised, before anything is computed.

"stop" (the default)
    Rows end there. A prompt longer than ``n_positions`` is refused.
"error"
    A call is refused if a row could not have all the new tokens it asks for (``max_new_tokens``, or ``max_length``
    less the prompt; a call that names neither asks for what fits). A longer prompt is refused.
"truncate_left"
    A prompt that has more than ``n_positions`` tokens together with the new ones asked for (20 if none are named) is
    cut on the left to its last ``n_positions - new`` tokens, at least one. The model, our processors and the random
    numbers see nothing else: the new tokens are those of the shorter prompt. The result still shows the whole prompt.
    As transformers' text-generation pipeline does with ``handle_long_generation="hole"``.
"sliding"
    Rows go on for as long as they are asked to. The model sees a window of a row: at first the whole prompt, or its
    last ``n_positions`` tokens. When the window holds ``n_positions`` tokens and one more is to be computed, the last
    ``n_positions - context_stride`` tokens, that one among them, become the new window: they get the positions from 0
    on and are computed anew, for a cached key belongs to the position it was computed at. ``context_stride`` is
    ``n_positions // 2`` unless set. A stride of 1 gives every token all the context there can be, at the price of a
    whole window for each (Press, Smith, Lewis, "Shortformer", arXiv:2012.15832, section 2, calls these nonoverlapping
    and sliding window inference). Processors, stop texts and the result see the whole row. The result has no
    ``past_key_values``, here and where "truncate_left" has cut a prompt.
"""

from __future__ import annotations

import dataclasses
import warnings

from gpt2rt.errors import RequestError

from .config import DEFAULTS, GenerationConfig
from .prompts import Prompts, full_mask

#: policies under which a prompt may be longer than ``n_positions``
LONG_PROMPTS = ("truncate_left", "sliding")


def sliding_stride(config: GenerationConfig, n_positions: int) -> int | None:
    """By how many tokens a full window moves; None if it does not.

    Raises:
        RequestError: the stride leaves no token in the window, or the policy does not go with another setting.
    """
    stride = config.context_stride
    if config.get("context_policy") != "sliding":
        if stride is not None:
            warnings.warn("context_stride only matters with context_policy='sliding', which is not set", stacklevel=5)
        return None
    if config.get("num_beams") > 1:
        raise RequestError(
            f"context_policy='sliding' does not go with num_beams={config.num_beams}: beams that share a past would "
            "each compute it anew; use another policy or sample"
        )
    wanted = [name for name in ("output_attentions", "output_hidden_states") if config.get(name)]
    if wanted and config.get("return_dict_in_generate"):
        raise RequestError(
            f"{' and '.join(wanted)} does not go with context_policy='sliding': a token is computed at several "
            "positions, so there is no one answer; call the model's forward on the window you want to see"
        )
    if stride is None:
        stride = max(1, n_positions // 2)
    if stride >= n_positions:
        raise RequestError(
            f"context_stride={stride} must be smaller than the model's n_positions={n_positions}: at least one token "
            "stays in the window"
        )
    return stride


def fit_prompts(prompts: Prompts, policy: str, wanted: int | None, n_positions: int) -> Prompts:
    """The prompts as the model sees them.

    Args:
        prompts: as the caller gave them.
        policy: one of the four.
        wanted: new tokens asked for; None: nobody said.
        n_positions: of the model.
    """
    if policy != "truncate_left":
        return prompts
    kept = max(1, n_positions - (DEFAULTS["max_length"] if wanted is None else wanted))
    # a prompt that leaves room for all new tokens stays whole
    dropped = [max(0, len(row) - kept) for row in prompts.rows]
    if not any(dropped):
        return prompts
    keep = full_mask(prompts.columns, prompts.keep).clone()
    for flags, count in zip(keep, dropped, strict=True):
        flags[flags.nonzero().flatten()[:count]] = False
    rows = [row[count:] for row, count in zip(prompts.rows, dropped, strict=True)]
    return dataclasses.replace(prompts, rows=rows, keep=keep)


def row_limits(lengths: list[int], policy: str, wanted: int | None, n_positions: int, explicit: bool) -> list[int]:
    """The most ids of each row, prompt included.

    Args:
        lengths: tokens of each prompt, as :func:`fit_prompts` left them.
        policy: one of the four.
        wanted: new tokens asked for; None: nobody said.
        n_positions: of the model.
        explicit: the call itself asked for that number, not the model's settings: say it if rows end before.

    Raises:
        RequestError: under "error", a row has not enough positions.
    """
    if policy == "sliding":
        return [length + (DEFAULTS["max_length"] if wanted is None else wanted) for length in lengths]
    if wanted is None:
        # transformers' default: 20 new tokens, or up to n_positions ids; a prompt that fills them all still gets one
        return [max(length + 1, min(length + DEFAULTS["max_length"], n_positions)) for length in lengths]
    room = [n_positions + 1 - length for length in lengths]
    if wanted > min(room):
        if policy == "error":
            row = next(row for row, space in enumerate(room) if wanted > space)
            raise RequestError(
                f"prompt {row} has {lengths[row]} tokens and {wanted} new ones were asked for, but the model has "
                f"n_positions={n_positions}, room for {room[row]}; ask for fewer, or set context_policy to "
                "'stop', 'truncate_left' or 'sliding'"
            )
        if explicit:
            warnings.warn(
                f"{wanted} new tokens were asked for, but after the longest prompt there is room for {min(room)} in "
                f"the model's n_positions={n_positions}; rows end there",
                stacklevel=5,
            )
    return [length + min(wanted, space) for length, space in zip(lengths, room, strict=True)]
