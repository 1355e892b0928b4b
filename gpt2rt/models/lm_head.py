"""Around the output layer of a language model: which positions get logits, and the loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import values_readable
from .inputs import InputRangeError, check_integers
from .layers import is_plain, project
from .quantized import QuantizedLinear

IGNORED = -100


def keep_positions(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The hidden states that get logits; all of [*leading, seq_len, n_embd] for 0.

    Args:
        hidden: [*leading, seq_len, n_embd].
        logits_to_keep: an int n: the last n positions, 0 = all; [n] integers or [seq_len] bool: these positions of
            every row; [*leading, n] integers: these of each row; [*leading, seq_len] bool: the true ones, flattened to
            [num_true, n_embd]. Negative positions count from the end.

    Raises:
        ValueError: a negative int, or a shape that does not fit.
        InputRangeError: a position outside the sequence (CPU only).
        TypeError: neither int nor such a tensor.
    """
    seq_len = hidden.size(-2)
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep = {logits_to_keep}, but it must be >= 0: the last n positions, 0 = all")
        return hidden if logits_to_keep == 0 else hidden[..., -logits_to_keep:, :]
    if not isinstance(logits_to_keep, Tensor) or logits_to_keep.is_floating_point():
        kind = logits_to_keep.dtype if isinstance(logits_to_keep, Tensor) else type(logits_to_keep).__name__
        raise TypeError(f"logits_to_keep must be an int, an integer tensor or a bool tensor, got {kind}")
    keep = logits_to_keep.to(hidden.device)
    if keep.dtype == torch.bool and keep.shape == (seq_len,):
        return hidden[..., keep, :]
    if keep.dtype == torch.bool:
        if tuple(keep.shape) != tuple(hidden.shape[:-1]):
            raise ValueError(
                f"logits_to_keep is a bool mask of shape {list(keep.shape)}, expected {list(hidden.shape[:-1])}"
            )
        return hidden[keep]
    if values_readable(keep) and keep.numel() and not -seq_len <= int(keep.min()) <= int(keep.max()) < seq_len:
        raise InputRangeError(
            f"logits_to_keep holds {keep.tolist()}, but positions go from 0 to {seq_len - 1} (or -{seq_len} to -1)"
        )
    if keep.dim() == 1:
        return hidden[..., keep.long(), :]
    if keep.shape[:-1] != hidden.shape[:-2]:
        raise ValueError(
            f"logits_to_keep has shape {list(keep.shape)}, expected [n] or {[*hidden.shape[:-2], 'n']}: positions of "
            "each row"
        )
    return torch.take_along_dim(hidden, keep.long().remainder(seq_len).unsqueeze(-1), dim=-2)


def token_logits(head: nn.Module, base: Any, logits_to_keep: int | Tensor = 0) -> Tensor:
    """The logits of every position, or of those asked for.

    Args:
        head: the output layer.
        base: the bare model's output; of the rows that stand for several places each is multiplied once.
        logits_to_keep: see :func:`keep_positions`.

    Returns:
        [*leading, seq_len or less, vocab_size].
    """
    shared, hidden = base.shared_rows, base.last_hidden_state
    everything = isinstance(logits_to_keep, int) and logits_to_keep == 0
    plain = is_plain(head, nn.Linear) or is_plain(head, QuantizedLinear)
    if shared is not None and shared.whole is hidden and everything and plain:
        return project(head, shared.rows)[shared.places].view(*hidden.shape[:-1], -1)
    return project(head, keep_positions(hidden, logits_to_keep))


def check_token_labels(labels: Tensor | None, shift_labels: Tensor | None, vocab_size: int) -> None:
    """Check labels before anything is computed for them.

    Args:
        labels: [..., seq_len], whose first is dropped by the shift, or None.
        shift_labels: labels that a caller has shifted, which go before ``labels``, or None.
        vocab_size: the labels go from 0 to here, or are -100.

    Raises:
        TypeError: they are not integers.
        InputRangeError: one lies outside the vocabulary (CPU only).
    """
    given = labels if shift_labels is None else shift_labels
    if given is None:
        return
    if isinstance(given, Tensor) and (given.is_floating_point() or given.dtype == torch.bool):
        raise TypeError(f"labels must be integers, got {given.dtype}; use labels.long()")
    check_integers("labels", given)
    target = given if shift_labels is not None or given.dim() == 0 else given[..., 1:]
    if values_readable(target) and target.numel():
        bad = target[(target != IGNORED) & ((target < 0) | (target >= vocab_size))]
        if bad.numel():
            raise InputRangeError(
                f"labels hold {int(bad[0])}, but the vocabulary has {vocab_size} tokens; use 0 to {vocab_size - 1}, or "
                f"{IGNORED} for positions without a label"
            )


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Cross entropy of the next token, in float32.

    Args:
        logits: [..., vocab_size].
        labels: [..., seq_len], the token at each position, -100 = ignored; the logits of a position are compared with
            the label of the next.
        shift_labels: the same, already shifted by the caller; taken instead of ``labels``.
        num_items_in_batch: divide the sum by this number of labels instead of by those in this call.

    Returns:
        Scalar, float32: the mean over labels that are not ignored, NaN if there are none; or sum / num_items_in_batch.

    Raises:
        ValueError: there is not one label for each row of logits.
        TypeError: the labels are not integers.
        InputRangeError: a label outside the vocabulary (CPU only).
    """
    given = labels if shift_labels is None else shift_labels
    assert given is not None
    check_token_labels(labels, shift_labels, logits.size(-1))
    rows_fit = given.numel() == logits[..., 0].numel()
    if not rows_fit or (shift_labels is None and (given.dim() == 0 or given.size(-1) != logits.size(-2))):
        raise ValueError(
            f"labels of shape {list(given.shape)} do not match logits of shape {list(logits.shape)}: one label per "
            "position with logits; leave logits_to_keep at 0 with labels"
        )
    if shift_labels is None:
        shift_labels = F.pad(given, (0, 1), value=IGNORED)[..., 1:]
    vocab_size = logits.size(-1)
    target = shift_labels.reshape(-1).to(logits.device, torch.int64)
    rows = logits.float().reshape(-1, vocab_size)
    if num_items_in_batch is None:
        return F.cross_entropy(rows, target, ignore_index=IGNORED)
    total = F.cross_entropy(rows, target, ignore_index=IGNORED, reduction="sum")
    return total / (
        num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    )
