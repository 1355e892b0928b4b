"""Gradient checkpointing: less memory in training for a second forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class GradientCheckpointing(nn.Module):
    """A module with a token embedding, and transformers' switches.

    Modules that can compute their blocks twice have an attribute ``gradient_checkpointing``: the keywords for
    ``torch.utils.checkpoint.checkpoint``, or None when it is off.
    """

    supports_gradient_checkpointing: ClassVar[bool] = True
    get_input_embeddings: Callable[[], nn.Module]
    _input_hook: RemovableHandle | None = None

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

    def enable_input_require_grads(self) -> None:
        """Let gradients flow into the output of the token embedding although its weights are frozen.

        Reentrant checkpointing needs it where only adapters are trained: it records nothing for blocks whose input
        needs no gradient.
        """

        self.disable_input_require_grads()
        self._input_hook = self.get_input_embeddings().register_forward_hook(_require_gradient)

    def disable_input_require_grads(self) -> None:
        """Undo :meth:`enable_input_require_grads`."""
        if self._input_hook is not None:
            self._input_hook.remove()
            self._input_hook = None

    def _set_checkpointing(self, kwargs: dict[str, Any] | None) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                # a plain attribute; mypy takes every attribute of a module for a tensor or module
                module.gradient_checkpointing = kwargs  # type: ignore[assignment]


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
