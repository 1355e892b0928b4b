"""What a model says about its quantised layers, and the way back to floats."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from gpt2rt.quantization.config import QuantizationConfig

from .embeddings import EmbeddingModel
from .quantized import QuantizedEmbedding, QuantizedLayer, float_form


class QuantizableModel(EmbeddingModel):
    """A model whose layers may be quantised (:mod:`gpt2rt.models.quantized`)."""

    # how they were quantised, as far as the layers do not show it
    _quantization: QuantizationConfig | None = None

    def _quantized_layers(self) -> dict[str, QuantizedLayer]:
        """Name -> layer; tied ones stand there as often as they have names."""
        return {name: module for name, module in self.named_modules() if isinstance(module, QuantizedLayer)}

    @property
    def is_quantized(self) -> bool:
        """Whether any layer is quantised."""
        return any(isinstance(module, QuantizedLayer) for module in self.modules())

    @property
    def quantization_method(self) -> str | None:
        """``quant_method`` of ``config.quantization_config``: "gpt2rt" or "bitsandbytes"; None for a float model."""
        shown = getattr(self.config, "quantization_config", None)
        if not self.is_quantized:
            return None
        if shown is None:
            return "gpt2rt"
        return (shown if isinstance(shown, dict) else shown.to_dict())["quant_method"]

    @property
    def quantization_scheme(self) -> str | None:
        """The format of the blocks' weights: "int8", "int4", "nf4" or "fp4"; None if they are floats."""
        layers = self.base_model.get_submodule("h").modules()
        return next((layer.scheme for layer in layers if isinstance(layer, QuantizedLayer)), None)

    def note_quantization(self, config: QuantizationConfig, shown: Any = None) -> None:
        """Note how the layers are quantised.

        Args:
            config: how.
            shown: what ``config.quantization_config`` is to be, by default ``config``.
        """
        self._quantization = config
        self.config.quantization_config = config if shown is None else shown

    @property
    def is_loaded_in_4bit(self) -> bool:
        """Whether the blocks hold weights of 4 bits."""
        return self.quantization_scheme in ("int4", "nf4", "fp4")

    @property
    def is_loaded_in_8bit(self) -> bool:
        """Whether the blocks hold weights of 8 bits."""
        return self.quantization_scheme == "int8"

    def dequantize(self, dtype: torch.dtype | None = None) -> Self:
        """Put float layers with the same numbers in place of the quantised ones; tied layers stay tied.

        Args:
            dtype: of the weights; by default the model's.
        Returns:
            the model itself.
        Raises:
            ValueError: no layer is quantised.
        """
        layers = self._quantized_layers()
        if not layers:
            raise ValueError(
                f"no layer of this {type(self).__name__} is quantised; load it with quantization='int8', 'int4', 'nf4' "
                "or 'fp4' first"
            )
        dtype = self.dtype if dtype is None else dtype
        tied = {target.rpartition(".")[0] for target in self._active_ties()}
        for name, layer in layers.items():
            # a tied output layer follows its embedding
            if name not in tied:
                self.set_submodule(name, float_form(layer, dtype))
        self.to(dtype)
        self.tie_weights()
        self._quantization = None
        self.config.__dict__.pop("quantization_config", None)
        return self

    # ---- sizes -----------------------------------------------------------------------------------------------------

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of weights, quantised ones included; tied ones count once.

        Args:
            only_trainable: count only parameters that require a gradient, which quantised weights never do.
            exclude_embeddings: leave out the weights of embeddings.
        """
        left_out = set()
        if exclude_embeddings:
            left_out = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding | QuantizedEmbedding)}
        counts = {id(p): p.numel() for p in self.parameters() if p.requires_grad or not only_trainable}
        if not only_trainable:
            counts |= {id(m.weight): m.shape[0] * m.shape[1] for m in self._quantized_layers().values()}
        return sum(count for key, count in counts.items() if key not in left_out)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """The size of all weights, codes and scales of quantised ones included, in bytes; tied ones count once.

        Args:
            return_buffers: count other buffers too.
        """
        tensors: dict[int, Tensor] = {id(x): x for x in self.parameters()}
        for layer in self._quantized_layers().values():
            tensors |= {id(x): x for x in layer.buffers(recurse=False)}
        if return_buffers:
            tensors |= {id(x): x for x in self.buffers()}
        return sum(x.numel() * x.element_size() for x in tensors.values())

    # ---- what torch does to modules --------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # torch moves buffers one by one, so those of tied layers have come apart
        if any(isinstance(module, QuantizedEmbedding) for module in self.modules()):
            self.tie_weights()
        return self
