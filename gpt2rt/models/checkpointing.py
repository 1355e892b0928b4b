"""Gradient checkpointing: less memory in training for a second forward pass."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class GradientCheckpointing(nn.Module):
    """A module with transformers' switches.

    Modules that can compute their blocks twice have an attribute ``gradient_checkpointing``: the keywords for
    ``torch.utils.checkpoint.checkpoint``, or None when it is off.
    """

    supports_gradient_checkpointing: ClassVar[bool] = True

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, keep only each block's input and compute the rest again in the backward pass.

        Args:
            gradient_checkpointing_kwargs: for ``torch.utils.checkpoint.checkpoint``; ``use_reentrant`` is False by
                default.
        """
        self._set_checkpointing({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything for the backward pass again."""
        self._set_checkpointing(None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is enabled."""
        return any(getattr(module, "gradient_checkpointing", None) is not None for module in self.modules())

    def _set_checkpointing(self, kwargs: dict[str, Any] | None) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                # a plain attribute; mypy takes every attribute of a module for a tensor or module
                module.gradient_checkpointing = kwargs  # type: ignore[assignment]
