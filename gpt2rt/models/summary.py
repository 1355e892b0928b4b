"""One vector for a whole sequence, or one score: the head that ranks choices.

    y = last_dropout(activation(summary(first_dropout(x))))

x is the hidden state at one place of the sequence, or their mean; ``summary`` is a linear layer. Names of modules and
parameters, and all options, are those of transformers' ``GPT2SequenceSummary``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import values_readable
from .inputs import InputRangeError, check_integers
from .layers import Activation, project


class SequenceSummary(nn.Module):
    """The summary of a sequence.

    Args:
        config: of the model; read are

            - ``summary_type``: where x is taken. "cls_index": at a given place of each sequence. "last", "first" and
              "mean" work along dimension 1 of the hidden states, as in transformers: the tokens of [batch, seq_len,
              n_embd], but the choices of [batch, num_choices, seq_len, n_embd].
            - ``summary_use_proj``: False leaves the linear layer out.
            - ``summary_proj_to_labels``: the layer has ``num_labels`` outputs; False: ``n_embd``.
            - ``summary_activation``: any name in ``ACT2FN``, or None.
            - ``summary_first_dropout``, ``summary_last_dropout`` (0 if absent): dropout probabilities.

    Raises:
        NotImplementedError: ``summary_type`` is "attn", which transformers does not have either.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.summary_type: str = config.summary_type
        if self.summary_type == "attn":
            raise NotImplementedError(
                "summary_type = 'attn' is not implemented; use 'cls_index', 'last', 'first' or 'mean'"
            )
        self.summary: nn.Module = nn.Identity()
        if config.summary_use_proj:
            outputs = config.num_labels if config.summary_proj_to_labels else config.hidden_size
            self.summary = nn.Linear(config.hidden_size, outputs)
        activation = config.summary_activation
        self.activation: nn.Module = Activation(activation) if activation else nn.Identity()
        self.first_dropout = _dropout(config.summary_first_dropout)
        self.last_dropout = _dropout(getattr(config, "summary_last_dropout", None))

    @property
    def scores_choices(self) -> bool:
        """Whether each sequence gets one number: forward's result has the leading dimensions of the input and a 1."""
        head = self.summary
        return self.summary_type == "cls_index" and isinstance(head, nn.Linear) and head.out_features == 1

    def forward(self, hidden_states: Tensor, cls_index: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_states: [*leading, seq_len, n_embd].
            cls_index: [*leading] integers, places for "cls_index", by default the last; see :func:`check_cls_index`.
                The other types do not look at it.
        Returns:
            [*leading, outputs] for "cls_index"; for the others hidden_states without its dimension 1, and with
            ``outputs`` for n_embd.
        Raises:
            ValueError: "last", "first" or "mean" of a single sequence without a batch dimension.
        """
        x = self.first_dropout(self._take(hidden_states, cls_index))
        return self.last_dropout(self.activation(project(self.summary, x)))

    def _take(self, hidden: Tensor, cls_index: Tensor | None) -> Tensor:
        if self.summary_type == "cls_index":
            if cls_index is None:
                return hidden[..., -1, :]
            index = cls_index.to(hidden.device, torch.int64)[..., None, None]
            return torch.take_along_dim(hidden, index, dim=-2).squeeze(-2)
        if hidden.dim() < 3:
            raise ValueError(
                f"summary_type = {self.summary_type!r} works along dimension 1 of [batch, ..., n_embd], but the hidden "
                f"states have shape {list(hidden.shape)}; give the input a batch dimension"
            )
        if self.summary_type == "mean":
            return hidden.mean(dim=1)
        return hidden[:, -1 if self.summary_type == "last" else 0]


def check_cls_index(name: str, index: Any, leading: tuple[int, ...], seq_len: int) -> None:
    """Check the places that :class:`SequenceSummary` is to look at.

    Raises:
        TypeError: not a tensor of int64 or int32.
        ValueError: not one place for each sequence.
        InputRangeError: a place outside 0..seq_len-1 (CPU only).
    """
    check_integers(name, index)
    if tuple(index.shape) != leading:
        raise ValueError(f"{name} has shape {list(index.shape)}, expected {list(leading)}: one place in each sequence")
    if not values_readable(index):
        return
    low, high = (int(value) for value in index.aminmax())
    if low < 0 or high >= seq_len:
        raise InputRangeError(
            f"{name} holds {low if low < 0 else high}, but the sequences have {seq_len} tokens: use 0 to {seq_len - 1}"
        )


def _dropout(probability: float | None) -> nn.Module:
    return nn.Dropout(probability) if probability else nn.Identity()
