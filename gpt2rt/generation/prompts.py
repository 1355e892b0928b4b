"""The door: whatever a caller gives as prompts becomes ragged rows of token ids, and every fault is found here."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2rt.errors import RequestError


@dataclasses.dataclass
class Prompts:
    """The prompts of one call.

    Attributes:
        rows: the ids of each prompt without padding.
        columns: [batch, length] int64 on CPU, the prompts as the caller laid them out (a list: left-padded).
        keep: [batch, length] bool on CPU, False at padding; None if there is none.
        device: where the caller expects the result.
        given: what comes besides the ids, see ``continuation.py``; None: nothing.
    """

    rows: list[list[int]]
    columns: Tensor
    keep: Tensor | None
    device: torch.device
    given: Any = None


def read_prompts(
    inputs: Any,
    attention_mask: Any,
    *,
    vocab_size: int,
    n_positions: int,
    bos_token_id: int | None,
    eos_token_ids: Sequence[int],
    pad_token_id: int | None,
    device: torch.device,
    allow_longer: bool = False,
) -> Prompts:
    """Check the prompts and take the padding out of them.

    Args:
        inputs: [batch, length] integers (tensor or array), a list of lists of ids of any lengths, or None to start from
            ``bos_token_id``.
        attention_mask: [batch, length], 1 = token, 0 = padding, wherever it stands; None: padding is where the ids are
            ``pad_token_id``, if that is set and no end token.
        vocab_size, n_positions: limits of the model.
        bos_token_id, eos_token_ids, pad_token_id: special tokens; ``pad_token_id`` as the caller or checkpoint set it.
        device: of the model; the device of the result unless ``inputs`` is a tensor.
        allow_longer: prompts of more than ``n_positions`` tokens are accepted.

    Raises:
        RequestError: the prompts or the mask are malformed, empty, too long, or hold ids outside the vocabulary.
    """
    if inputs is None:
        if attention_mask is not None:
            raise RequestError("attention_mask was given without input_ids; pass both, or neither to start from bos")
        if bos_token_id is None:
            raise RequestError("`bos_token_id` has to be defined when no `input_ids` are provided; pass input_ids")
        if bos_token_id >= vocab_size:
            raise RequestError(
                f"bos_token_id={bos_token_id} is where a call without input_ids starts, but the vocabulary has ids 0 "
                f"to {vocab_size - 1}; pass input_ids, or another bos_token_id"
            )
        inputs = [[bos_token_id]]
    if isinstance(inputs, str) or (isinstance(inputs, list | tuple) and inputs and isinstance(inputs[0], str)):
        raise RequestError("generate takes token ids, not text; use generate(**tokenizer(text, return_tensors='pt'))")
    if hasattr(inputs, "keys"):
        raise RequestError("generate takes token ids, not a mapping; unpack it: generate(**inputs)")
    if isinstance(inputs, list | tuple):
        prompts = _from_lists(inputs, attention_mask, pad_token_id, eos_token_ids, device)
    else:
        prompts = _from_tensor(inputs, attention_mask, pad_token_id, eos_token_ids)
    for index, row in enumerate(prompts.rows):
        if not row:
            raise RequestError(
                f"prompt {index} holds no token, expected at least one; start from bos_token_id if unsure"
            )
        # a row's largest and smallest id are found before anything is computed for any row
        if min(row) < 0 or max(row) >= vocab_size:
            bad = next(token for token in row if not 0 <= token < vocab_size)
            raise RequestError(
                f"prompt {index} holds the token id {bad}, but the vocabulary has ids 0 to {vocab_size - 1}; was the "
                "text encoded with another model's tokenizer, or padded without an attention_mask?"
            )
        if len(row) > n_positions and not allow_longer:
            raise RequestError(
                f"prompt {index} has {len(row)} tokens, but the model has n_positions={n_positions}; shorten it, for "
                "example with the tokenizer's truncation=True, or set context_policy"
            )
    return prompts


def _from_lists(
    inputs: Sequence[Any],
    attention_mask: Any,
    pad_token_id: int | None,
    eos_token_ids: Sequence[int],
    device: torch.device,
) -> Prompts:
    if attention_mask is not None:
        raise RequestError("attention_mask goes with a tensor; lists of ids need none, as each has its own length")
    if not inputs:
        raise RequestError("input_ids is an empty list, expected at least one prompt")
    rows: list[list[int]] = []
    for index, row in enumerate(inputs):
        if isinstance(row, Tensor) or hasattr(row, "tolist"):
            row = row.tolist()
        if not isinstance(row, list | tuple):
            raise RequestError(
                f"input_ids[{index}] is {row!r}, expected a list of token ids: pass one list for each prompt, [[...]]"
            )
        wrong = [token for token in row if not isinstance(token, int) or isinstance(token, bool)]
        if wrong:
            raise RequestError(
                f"prompt {index} holds {wrong[0]!r}, a {type(wrong[0]).__name__}; token ids are integers"
            )
        rows.append(list(row))
    length = max(len(row) for row in rows)
    fill = pad_token_id if pad_token_id is not None else next(iter(eos_token_ids), 0)
    if any(not -(2**63) <= token < 2**63 for row in rows for token in row):
        raise RequestError("a prompt holds a token id outside 64 bits")
    columns = torch.tensor([[fill] * (length - len(row)) + row for row in rows], dtype=torch.int64)
    keep = None
    if any(len(row) < length for row in rows):
        keep = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return Prompts(rows, columns, keep, device)


def _from_tensor(inputs: Any, attention_mask: Any, pad_token_id: int | None, eos_token_ids: Sequence[int]) -> Prompts:
    ids = as_tensor("input_ids", inputs)
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise RequestError(f"input_ids is a tensor of {ids.dtype}, expected token ids as torch.int64")
    if ids.dim() != 2:
        raise RequestError(
            f"input_ids has shape {list(ids.shape)}, expected [batch, length]"
            + ("; use input_ids.unsqueeze(0)" if ids.dim() == 1 else "")
        )
    if ids.size(0) == 0 or ids.size(1) == 0:
        raise RequestError(f"input_ids has shape {list(ids.shape)}, expected at least one prompt with one token")
    columns = ids.detach().to("cpu", torch.int64)
    keep = _kept(columns, attention_mask, pad_token_id, eos_token_ids)
    rows = columns.tolist()
    if keep is not None:
        rows = [
            [token for token, kept in zip(row, flags, strict=True) if kept]
            for row, flags in zip(rows, keep.tolist(), strict=True)
        ]
    return Prompts(rows, columns, keep, ids.device)


def full_mask(columns: Tensor, keep: Tensor | None) -> Tensor:
    """[batch, length] bool: ``keep``, or all True where it is None."""
    return torch.ones_like(columns, dtype=torch.bool) if keep is None else keep


def as_tensor(name: str, value: Any) -> Tensor:
    """A tensor of whatever torch can make one of.

    Raises:
        RequestError: of something else.
    """
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"{name} is a {type(value).__name__}, expected a tensor of integers: {error}") from None


def read_mask(attention_mask: Any, *shapes: tuple[int, ...]) -> Tensor:
    """A caller's mask, on CPU.

    Args:
        attention_mask: 1 = token, 0 = padding.
        *shapes: those it may have.

    Raises:
        RequestError: another shape, or other values.
    """
    mask = as_tensor("attention_mask", attention_mask).detach().cpu()
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        meaning = "the shape of input_ids" + (", or that with the cache before it" if len(shapes) > 1 else "")
        raise RequestError(f"attention_mask has shape {list(mask.shape)}, expected {wanted}, {meaning}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise RequestError("attention_mask must hold 1 for tokens and 0 for padding, and nothing else")
    return mask


def _kept(
    columns: Tensor, attention_mask: Any, pad_token_id: int | None, eos_token_ids: Sequence[int]
) -> Tensor | None:
    """Which columns hold tokens; None if all do."""
    if attention_mask is not None:
        keep = read_mask(attention_mask, tuple(columns.shape)) != 0
        empty = (~keep.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise RequestError(f"attention_mask is 0 in all of row {empty[0]}: that prompt would hold no token")
        return None if bool(keep.all()) else keep
    if pad_token_id is None:
        return None
    padding = columns == pad_token_id
    if pad_token_id not in eos_token_ids:
        return ~padding if bool(padding.any()) else None
    # as transformers: an end token at an edge may be meant, so it stays; but say so
    if columns.size(0) > 1 and bool((padding[:, 0] | padding[:, -1]).any()):
        warnings.warn(
            f"no attention_mask was given, and pad_token_id={pad_token_id} is an end token too, so padding cannot be "
            "told from text: all ids are taken as text; pass the tokenizer's attention_mask",
            stacklevel=9,
        )
    return None
