"""The token embedding of a model and the output layer that may share it: ties, replacement, other numbers of tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gpt2rt.config import PretrainedConfig

from .quantized import QuantizedEmbedding, QuantizedLayer, QuantizedProduct, output_layer_of


class EmbeddingModel(nn.Module):
    """A module with a config, a bare model inside and a token embedding."""

    config: PretrainedConfig
    base_model_prefix: ClassVar[str] = "transformer"
    # state-dict key of a tied weight -> key of the weight it shares, both in the class' own names
    _tied_weights_keys: ClassVar[dict[str, str]] = {}
    # name of the token embedding inside the bare model
    _input_embedding_name: ClassVar[str] = "wte"

    def _init_weights(self, module: nn.Module) -> None:
        """Hook: fill the parameters that ``module`` itself owns; called for children before their parents."""
        raise NotImplementedError(f"{type(self).__name__} must define _init_weights(module)")

    @property
    def base_model(self) -> nn.Module:
        """The bare model without a head."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter; of a quantised model, what it computes with."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return getattr(self.base_model, self._input_embedding_name)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding; call :meth:`tie_weights` afterwards if the output layer shares it."""
        setattr(self.base_model, self._input_embedding_name, value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer over the vocabulary, or None."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer over the vocabulary."""
        self.lm_head = value

    # ---- ties ------------------------------------------------------------------------------------------------------

    def _active_ties(self) -> dict[str, str]:
        """The tied weights, if this model's config ties them."""
        return dict(self._tied_weights_keys) if getattr(self.config, "tie_word_embeddings", True) else {}

    def tie_weights(self) -> None:
        """Let tied layers share one weight, where ``config.tie_word_embeddings`` says so."""
        for target, source in self._active_ties().items():
            owner, _, name = target.rpartition(".")
            table, head = self.get_submodule(source.rpartition(".")[0]), self.get_submodule(owner)
            quantised = isinstance(table, QuantizedEmbedding) or isinstance(head, QuantizedLayer)
            if quantised and isinstance(table, QuantizedEmbedding | nn.Embedding):
                self.set_submodule(owner, output_layer_of(table, head))
            else:
                setattr(head, name, self.get_parameter(source))

    # ---- another number of tokens ----------------------------------------------------------------------------------

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Change the number of tokens: embedding, output layer and ``config.vocab_size`` together; ties stay.

        Args:
            new_num_tokens: rows afterwards; None keeps their number.
            pad_to_multiple_of: round up to a multiple of this.
            mean_resizing: new rows are the mean of the old ones, so that a new token starts with an average
                probability; False draws them as for a new model. In a quantised table they are rounded to its format.
        Returns:
            the token embedding.
        Raises:
            ValueError: a number is not positive.
        """
        old = self.get_input_embeddings()
        if not isinstance(old, nn.Embedding | QuantizedEmbedding):
            raise TypeError(f"resize_token_embeddings needs an nn.Embedding, the model has {type(old).__name__}")
        count = old.num_embeddings if new_num_tokens is None else new_num_tokens
        for name, value in (("new_num_tokens", count), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} = {value!r}, but it must be an integer >= 1")
        if pad_to_multiple_of is not None:
            count = -(-count // pad_to_multiple_of) * pad_to_multiple_of
        if count == old.num_embeddings:
            return old
        head = self.get_output_embeddings()
        tied = isinstance(head, nn.Module) and getattr(head, "weight", None) is old.weight
        self._resize_rows(old, count, mean_resizing)
        if isinstance(head, nn.Linear) and tied:
            head.weight = old.weight
            head.out_features = count
        elif isinstance(head, QuantizedProduct) and tied:
            self.set_output_embeddings(output_layer_of(old, head))
        elif isinstance(head, nn.Linear | QuantizedProduct):
            self._resize_rows(head, count, mean_resizing)
        self.config.vocab_size = count
        return old

    @torch.no_grad()
    def _resize_rows(self, module: nn.Module, count: int, mean_resizing: bool) -> None:
        """Give ``module.weight`` [rows, n] another number of rows."""
        if isinstance(module, QuantizedLayer):
            more = count - module.shape[0]
            module.resize(count, self._new_rows(module.dequantize(), more, mean_resizing) if more > 0 else None)
            return
        assert isinstance(module, nn.Embedding | nn.Linear)
        old = module.weight
        kept = min(count, old.shape[0])
        weight = old.new_empty(count, old.shape[1])
        weight[:kept] = old[:kept]
        if count > kept:
            weight[kept:] = self._new_rows(old, count - kept, mean_resizing)
        # a new parameter in place of the old one
        module.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", count)

    def _new_rows(self, old: Tensor, count: int, mean_resizing: bool) -> Tensor:
        """[count, n] rows to stand below ``old`` [rows, n], in its dtype."""
        if mean_resizing:
            return old.float().mean(dim=0).to(old.dtype).expand(count, -1)
        fresh = nn.Embedding(count, old.shape[1], device=old.device, dtype=old.dtype)
        self._init_weights(fresh)
        return fresh.weight.detach()
