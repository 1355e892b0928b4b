"""Checks on forward's arguments, before any work: what was wrong, what was expected, how to mend it.

Values are looked at on the CPU only. On an accelerator that would wait for the device: there only shapes are checked.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from .attention import values_readable


class InputRangeError(ValueError, IndexError):
    """A token id, a position or a length lies outside what the model has a row for.

    Both a ValueError, as other bad arguments are, and an IndexError, which transformers raises here.
    """


def reject_unknown(forward: Callable[..., Any], unknown: Iterable[str], passed_on: Iterable[str] = ()) -> None:
    """Raise TypeError if any keyword was passed that ``forward`` does not have; ``passed_on`` names others it takes.

    transformers ignores such keywords, and a misspelt ``attention_mask`` with them.
    """
    names = list(unknown)
    if not names:
        return
    parameters = inspect.signature(forward).parameters.values()
    accepted = [p.name for p in parameters if p.name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD]
    accepted += [name for name in passed_on if name not in accepted]
    near = difflib.get_close_matches(names[0], accepted, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise TypeError(f"forward() has no argument {names[0]!r}.{hint} It accepts {', '.join(accepted)}")


def check_integers(name: str, x: Any) -> None:
    """Raise TypeError unless ``x`` is a tensor of int64 or int32."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}; use torch.tensor({name})")
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype.itemsize < 4:
        raise TypeError(f"{name} must be int64 or int32, got {x.dtype}; use {name}.long()")


def check_ids(name: str, ids: Any, limit: int, table: str) -> None:
    """Check an integer tensor that indexes a table of ``limit`` rows.

    Args:
        name: of the argument.
        ids: the argument.
        limit: rows of the table.
        table: what the table is, for the message.

    Raises:
        TypeError: not a tensor of int64 or int32.
        InputRangeError: a value outside 0..limit-1 (CPU only).
    """
    check_integers(name, ids)
    if not values_readable(ids) or ids.numel() == 0:
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= limit:
        bad = low if low < 0 else high
        raise InputRangeError(f"{name} holds {bad}, but the {table} has {limit} rows: use values from 0 to {limit - 1}")


def check_input(input_ids: Any, inputs_embeds: Any, vocab_size: int, n_embd: int) -> tuple[int, ...]:
    """The shape [*leading, seq_len] of the input, whichever of the two was given.

    Raises:
        ValueError: both or neither were given, a dimension is empty, or the embeddings have another width.
        TypeError: not tensors of the right kind.
        InputRangeError: a token id outside the vocabulary.
    """
    if input_ids is not None and inputs_embeds is not None:
        raise ValueError("You cannot specify both input_ids and inputs_embeds at the same time")
    if input_ids is not None:
        check_ids("input_ids", input_ids, vocab_size, "vocabulary")
        shape, name = tuple(input_ids.shape), "input_ids"
    elif inputs_embeds is not None:
        if not isinstance(inputs_embeds, Tensor) or not inputs_embeds.is_floating_point():
            kind = inputs_embeds.dtype if isinstance(inputs_embeds, Tensor) else type(inputs_embeds).__name__
            raise TypeError(f"inputs_embeds must be a floating-point tensor, got {kind}; token ids go to input_ids")
        if inputs_embeds.dim() < 2 or inputs_embeds.size(-1) != n_embd:
            raise ValueError(
                f"inputs_embeds has shape {list(inputs_embeds.shape)}, expected [..., seq_len, {n_embd}], the model's "
                "n_embd"
            )
        shape, name = tuple(inputs_embeds.shape[:-1]), "inputs_embeds"
    else:
        raise ValueError("You have to specify either input_ids or inputs_embeds")
    if not shape or 0 in shape:
        raise ValueError(f"{name} is empty: its shape is {list(shape)}, expected [..., seq_len] with seq_len >= 1")
    return shape


def check_length(seq_len: int, past_len: int, n_positions: int) -> None:
    """Raise InputRangeError if the sequence would run past the position embedding."""
    if seq_len + past_len > n_positions:
        past = f" after {past_len} in past_key_values" if past_len else ""
        raise InputRangeError(
            f"the sequence is too long: {seq_len} tokens{past} need {seq_len + past_len} positions, and the model has "
            f"n_positions = {n_positions}; shorten the input, or pass position_ids of your own below {n_positions}"
        )


def as_batch(name: str, ids: Tensor, leading: tuple[int, ...], seq_len: int) -> Tensor:
    """Bring [*leading, seq_len], [batch, seq_len], [1, seq_len] or [seq_len] to [batch or 1, seq_len], int64.

    Raises:
        ValueError: another shape.
    """
    batch = 1
    for size in leading:
        batch *= size
    if ids.dim() == 0 or ids.size(-1) != seq_len or ids.numel() not in (seq_len, batch * seq_len):
        raise ValueError(
            f"{name} has shape {list(ids.shape)}, expected {[*leading, seq_len]} like the input, or [1, {seq_len}]"
        )
    return ids.reshape(-1, seq_len).long()


def selected_layers(output_hidden_states: Any, count: int) -> set[int]:
    """Indices of the hidden states to return.

    Args:
        output_hidden_states: True (all), False or None (none), an index or a list of indices; negative ones count from
            the end.
        count: how many there are, n_layer + 1.

    Raises:
        ValueError: an index out of range.
        TypeError: anything else.
    """
    if output_hidden_states is None or isinstance(output_hidden_states, bool):
        return set(range(count)) if output_hidden_states else set()
    wanted = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    if not isinstance(wanted, list | tuple) or any(type(index) is not int for index in wanted):
        raise TypeError(f"output_hidden_states must be a bool, an int or a list of ints, got {output_hidden_states!r}")
    for index in wanted:
        if not -count <= index < count:
            raise ValueError(
                f"output_hidden_states asks for {index}, but there are {count} hidden states: the embeddings and one "
                f"per block; use {-count}..{count - 1}"
            )
    return {index % count for index in wanted}


def layer_head_masks(head_mask: Tensor | None, n_layer: int, n_head: int) -> list[Tensor | None]:
    """The factors on each head, per block: from [n_head] (every block) or [n_layer, n_head].

    Raises:
        ValueError: another shape.
    """
    if head_mask is None:
        return [None] * n_layer
    if tuple(head_mask.shape) not in ((n_head,), (n_layer, n_head)):
        raise ValueError(
            f"head_mask has shape {list(head_mask.shape)}, expected [{n_head}] (n_head) or [{n_layer}, {n_head}] "
            "(n_layer, n_head)"
        )
    return list(head_mask.expand(n_layer, n_head))
