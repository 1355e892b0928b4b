"""Padding and truncation of encodings, as transformers' arguments describe them.

Nothing here changes the tokenizer, so one tokenizer can serve several threads with different arguments.
"""

import warnings
from typing import Any, NamedTuple

PADDING_NAMES = {False: None, "do_not_pad": None, True: "longest", "longest": "longest", "max_length": "max_length"}
TRUNCATION_NAMES = {
    False: None,
    None: None,
    "do_not_truncate": None,
    True: "longest_first",
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
}
# a model_max_length beyond this means "no limit"
NO_LIMIT = 10**20


class Layout(NamedTuple):
    """How long the rows of a result may and must be, in tokens."""

    padding: str | None  # None, "longest" or "max_length"
    truncation: str | None  # None, "longest_first", "only_first" or "only_second"
    max_length: int | None
    stride: int
    pad_to_multiple_of: int | None


def plan_layout(
    padding: Any, truncation: Any, max_length: int | None, stride: int, pad_to_multiple_of: int | None, limit: int
) -> Layout:
    """Resolve the arguments of a tokenizer call.

    Args:
        padding, truncation, max_length, stride, pad_to_multiple_of: as in transformers; ``max_length`` alone turns
            truncation on.
        limit: the tokenizer's ``model_max_length``, used where a length is needed and none is given.
    Raises:
        ValueError: an argument has an unknown or contradictory value.
    """
    padding = getattr(padding, "value", padding)
    truncation = getattr(truncation, "value", truncation)
    if not isinstance(padding, bool | str) or padding not in PADDING_NAMES:
        raise ValueError(f"padding = {padding!r}, but it must be True, False, 'longest', 'max_length' or 'do_not_pad'")
    if not isinstance(truncation, bool | str | None) or truncation not in TRUNCATION_NAMES:
        raise ValueError(
            f"truncation = {truncation!r}, but it must be True, False, 'longest_first', 'only_first', 'only_second' or "
            "'do_not_truncate'"
        )
    for name, value, low in (
        ("max_length", max_length, 0),
        ("stride", stride, 0),
        ("pad_to_multiple_of", pad_to_multiple_of, 1),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise ValueError(f"{name} = {value!r}, but it must be an integer >= {low}")
    if max_length is not None and padding is False and truncation is None:
        truncation = "longest_first"
    pad, cut = PADDING_NAMES[padding], TRUNCATION_NAMES[truncation]
    if padding is True and max_length is not None and cut is None:
        warnings.warn(
            f"max_length = {max_length} has no effect with padding=True and no truncation; pass truncation=True to cut "
            "longer texts or padding='max_length' to pad to it",
            stacklevel=4,
        )
    if max_length is None:
        known = limit if limit < NO_LIMIT else None
        if pad == "max_length" and known is None:
            pad = None
        if cut is not None and known is None:
            cut = None
        if pad == "max_length" or cut is not None:
            max_length = known
    if pad is not None and cut is not None and pad_to_multiple_of and max_length and max_length % pad_to_multiple_of:
        raise ValueError(
            f"max_length = {max_length} is not a multiple of pad_to_multiple_of = {pad_to_multiple_of}, so truncated "
            "and padded rows would differ in length; choose a multiple"
        )
    return Layout(pad, cut, max_length, stride, pad_to_multiple_of)


def truncate(first: Any, second: Any | None, room: int, strategy: str, stride: int, side: str) -> None:
    """Cut a text or a pair to ``room`` tokens, in place; the rest goes to ``encoding.overflowing``.

    Args:
        first, second: ``tokenizers.Encoding`` of the text and of its partner, if any.
        room: tokens left for both after special tokens.
        strategy: "longest_first" (both shrink towards half), "only_first" or "only_second".
        stride: tokens that consecutive overflowing pieces share.
        side: "right" or "left", where tokens are cut off.
    Raises:
        ValueError: the text that may be cut is too short, there is no second text, or ``stride`` leaves no progress.
    """
    n_first, n_second = len(first.ids), len(second.ids) if second is not None else 0
    excess = n_first + n_second - room
    if excess <= 0:
        return
    if strategy == "only_second" and second is None:
        raise ValueError("truncation = 'only_second' needs a pair of texts, got a single text")
    if strategy == "longest_first" and second is not None:
        short = min(n_first, n_second)
        # the longer text gives first, until both are equally long
        keep_long = short if short > room else max(short, room - short)
        keep_short = short
        if keep_short + keep_long > room:
            keep_short, keep_long = room // 2, room // 2 + room % 2
        keep = (keep_long, keep_short) if n_first > n_second else (keep_short, keep_long)
        _cut(first, keep[0], stride, side)
        _cut(second, keep[1], stride, side)
        return
    target = second if strategy == "only_second" and second is not None else first
    length = len(target.ids)
    if second is not None and length <= excess:
        raise ValueError(
            f"truncation = {strategy!r} must remove {excess} tokens from a text that has only {length}; raise "
            "max_length or use 'longest_first'"
        )
    _cut(target, max(0, length - excess), stride, side)


def _cut(encoding: Any, length: int, stride: int, side: str) -> None:
    if length >= len(encoding.ids):
        return
    if stride and stride >= length:
        raise ValueError(
            f"stride = {stride} must be smaller than the {length} tokens that a truncated text keeps; lower stride or "
            "raise max_length"
        )
    encoding.truncate(length, stride=stride, direction=side)


def pad_target(lengths: list[int], layout: Layout) -> int | None:
    """The length to pad rows to, or None for no padding."""
    if layout.padding is None or not lengths:
        return None
    target = layout.max_length if layout.padding == "max_length" and layout.max_length is not None else max(lengths)
    multiple = layout.pad_to_multiple_of or 1
    return -(-target // multiple) * multiple
