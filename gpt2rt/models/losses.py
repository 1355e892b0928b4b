"""Losses of the task heads, and the checks on their labels.

Checks are apart from the arithmetic: a head checks its labels before the model runs. Losses are computed in float32
(float64 for float64 models), also where transformers leaves them in the 16 bits of the logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import values_readable
from .inputs import InputRangeError, check_integers
from .lm_head import IGNORED


def class_targets(
    name: str, labels: Any, shape: tuple[int, ...], num_classes: int, ignored: int | None = IGNORED
) -> Tensor:
    """Labels that are numbers of classes, flat and checked.

    Args:
        name: of the argument.
        labels: integers, one for each row of logits: of this shape, with extra dimensions of size 1, or flat.
        shape: of the logits without the classes.
        num_classes: of the logits.
        ignored: the label that stands for none; None: no value is out of range.

    Returns:
        [rows] int64.

    Raises:
        TypeError: not a tensor of int64 or int32.
        ValueError: another shape.
        InputRangeError: a label that is neither a class nor ``ignored`` (CPU only).
    """
    check_integers(name, labels)
    target = _reshape(name, labels, shape).reshape(-1).long()
    if ignored is not None and values_readable(target):
        bad = target[(target != ignored) & ((target < 0) | (target >= num_classes))]
        if bad.numel():
            raise InputRangeError(
                f"{name} holds {int(bad[0])}, but there are {num_classes} classes; use 0 to {num_classes - 1}, or "
                f"{ignored} for places without a label"
            )
    return target


def choice_targets(mc_labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The right choice of each question.

    Args:
        mc_labels: [*questions] integers, -100 = ignored.
        shape: [*questions, num_choices], the shape of the scores.

    Returns:
        [*questions] int64.

    Raises:
        ValueError: the input is a single sequence, or there is not one label for each question.
        InputRangeError: no such choice (CPU only).
        TypeError: the labels are not integers.
    """
    if not shape:
        raise ValueError(
            "mc_labels say which of several choices is right, but the input is a single sequence; give it the shape "
            "[batch, num_choices, seq_len]"
        )
    return class_targets("mc_labels", mc_labels, shape[:-1], shape[-1])


def class_loss(logits: Tensor, target: Tensor, ignored: int = IGNORED) -> Tensor:
    """Mean cross entropy over the targets that are not ignored, NaN if there are none.

    Args:
        logits: [..., num_classes].
        target: [rows], from :func:`class_targets`.
        ignored: the target that stands for none.
    """
    rows = _widened(logits).reshape(-1, logits.size(-1))
    return F.cross_entropy(rows, target.to(logits.device), ignore_index=ignored)


def sequence_targets(
    problem_type: str | None, labels: Any, leading: tuple[int, ...], num_labels: int
) -> tuple[str, Tensor]:
    """The labels of whole sequences, checked, and what kind of problem they are of.

    Args:
        problem_type: "regression", "single_label_classification" or "multi_label_classification". None: inferred as
            transformers does. One label is regression, whatever the dtype; int64 and int32 are numbers of classes;
            anything else says for every label whether it applies.
        labels: [*leading] numbers of classes for the second kind; [*leading, num_labels] values for the others, or
            [*leading] if there is one label.
        leading: dimensions of the batch.
        num_labels: width of the logits.

    Returns:
        The kind of problem, and the targets in the shape that :func:`sequence_loss` takes.

    Raises:
        TypeError, ValueError, InputRangeError: as :func:`class_targets`; values of the third kind must lie in 0..1.
    """
    if not isinstance(labels, Tensor) or labels.is_complex():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of integers or floats, got {kind}")
    if problem_type is None:
        if num_labels == 1:
            problem_type = "regression"
        else:
            classes = labels.dtype in (torch.int64, torch.int32)
            problem_type = "single_label_classification" if classes else "multi_label_classification"
    if problem_type == "single_label_classification":
        return problem_type, class_targets("labels", labels, leading, num_labels)
    if problem_type not in ("regression", "multi_label_classification"):
        raise ValueError(
            f"config.problem_type = {problem_type!r}, but it must be 'regression', 'single_label_classification', "
            "'multi_label_classification' or None"
        )
    shape = leading if num_labels == 1 else (*leading, num_labels)
    target = _reshape("labels", labels, shape, f" for problem_type = {problem_type!r}").reshape(*leading, num_labels)
    # written so that NaN is caught as well
    in_range = (target >= 0) & (target <= 1)
    if problem_type == "multi_label_classification" and values_readable(target) and not bool(in_range.all()):
        raise InputRangeError(
            f"labels hold {target[~in_range][0].item()}, but problem_type = 'multi_label_classification' takes 1 for "
            "each label that applies and 0 for the others, or values between"
        )
    return problem_type, target


def sequence_loss(problem_type: str, logits: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, cross entropy, or binary cross entropy of every label.

    Args:
        problem_type: as in :func:`sequence_targets`.
        logits: [*leading, num_labels].
        target: from :func:`sequence_targets`.
    """
    if problem_type == "single_label_classification":
        return class_loss(logits, target)
    wide = _widened(logits)
    target = target.to(wide.device, wide.dtype)
    if problem_type == "regression":
        return F.mse_loss(wide, target)
    return F.binary_cross_entropy_with_logits(wide, target)


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _reshape(name: str, labels: Tensor, shape: tuple[int, ...], why: str = "") -> Tensor:
    """``labels`` with ``shape``; dimensions of size 1 may differ, and all may be flattened into one."""
    same = [n for n in labels.shape if n != 1] == [n for n in shape if n != 1]
    if not same and tuple(labels.shape) != (math.prod(shape),):
        raise ValueError(f"{name} has shape {list(labels.shape)}, expected {list(shape)}{why}")
    return labels.reshape(shape)
