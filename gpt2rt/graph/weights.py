"""What the builders of plans share: a model's weights by name, checked to fit together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gpt2rt.quantization.weight import QuantizedWeight

from .plan import Embed, Linear, Norm


class PlanWeights:
    """A model's weights.

    Args:
        weights: by checkpoint name without prefix.
        tokens, positions: names of the embeddings. Token embedding and ``lm_head.weight`` may be narrower floats than
            the rest; quantised weights have dtypes of their own.

    Attributes:
        dtype, device: of the floats.

    Raises:
        ValueError: dtypes or devices differ.
    """

    def __init__(self, weights: Mapping[str, Tensor | QuantizedWeight], tokens: str, positions: str) -> None:
        self._weights = weights
        self._tokens = tokens
        self._positions = self._float(positions)
        self.dtype: torch.dtype = self._positions.dtype
        self.device: torch.device = self._positions.device
        for name, weight in weights.items():
            has_own_dtype = isinstance(weight, QuantizedWeight) or name in (tokens, "lm_head.weight")
            found = weight.scheme if isinstance(weight, QuantizedWeight) else weight.dtype
            if weight.device != self.device or not (has_own_dtype or found == self.dtype):
                raise ValueError(
                    f"{name} is {found} on {weight.device}, but {positions} is {self.dtype} on {self.device}; move the "
                    "whole model to one dtype and device with model.to(...)"
                )

    def _float(self, name: str) -> Tensor:
        weight = self._weights[name]
        assert isinstance(weight, Tensor), f"{name} is never quantised"
        return weight

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer, or of the embedding without one."""
        return self._weights.get("lm_head.weight", self._weights[self._tokens]).shape[0]

    def embed(self) -> Embed:
        """The two embeddings."""
        return Embed(self._weights[self._tokens], self._positions)

    def norm(self, prefix: str, eps: float) -> Norm:
        """The layer norm ``prefix``."""
        return Norm(self._float(f"{prefix}.weight"), self._float(f"{prefix}.bias"), eps)

    def conv1d(self, prefix: str) -> Linear:
        """The layer ``prefix``, whose weight is [in, out], or quantised [out, in]."""
        weight = self._weights[f"{prefix}.weight"]
        return Linear(weight.t() if isinstance(weight, Tensor) else weight, self._float(f"{prefix}.bias"))

    def head(self) -> Linear | None:
        """The output layer, or None."""
        weight = self._weights.get("lm_head.weight")
        return None if weight is None else Linear(weight, None)
