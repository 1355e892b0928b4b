"""What the bare models of both families share around their blocks: positions, embeddings, cache, layout."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gpt2rt import ops
from gpt2rt.quantization.weight import QuantizedWeight

from .attention import AttentionMask
from .cache import DynamicCache, as_cache
from .checkpointing import GradientCheckpointing
from .inputs import as_batch, check_ids, check_length
from .layers import computes_alone, is_plain, is_watched, runs_kernels
from .outputs import ModelOutput
from .pretrained import PreTrainedModel
from .quantized import QuantizedEmbedding, QuantizedLayer, QuantizedLinear
from .ragged import SharedRows, with_layout

# the layers of torch that the bare models are built from
_TORCH_LAYERS = (nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList)


def _replaced(module: nn.Module) -> bool:
    """Whether ``module`` is no layer that these models are built from, or one whose weight is computed from others."""
    known = type(module) in _TORCH_LAYERS or type(module).__module__.startswith("gpt2rt.")
    # where torch's hooks make a weight from others, it is a plain attribute
    return not known or not module.__dict__.keys().isdisjoint(("weight", "bias"))


def _replaced_head(head: nn.Module) -> bool:
    plain = type(head) in (nn.Linear, QuantizedLinear) and head.bias is None
    return not plain or not head.__dict__.keys().isdisjoint(("weight", "bias"))


def _not_plain(name: str, module: nn.Module) -> str:
    return (
        f"{name} is not the layer that the model was built with, but {type(module).__name__}(...) or one with a pruned "
        "or computed weight"
    )


class DecoderPreTrainedModel(GradientCheckpointing, PreTrainedModel):
    """What all classes of both families share: the weights of the graph, gradient checkpointing, forward's end."""

    def graph_weights(self) -> dict[str, Tensor | QuantizedWeight]:
        """The weights by their published names, detached: ``h.0.attn.c_attn.weight``, ...

        A language model's ``lm_head.weight`` is always there; tied, it shares the memory of the token embedding. Other
        heads are not part of the graph. Those of quantised layers are [out_features, in_features] whatever the layer.

        Raises:
            ValueError: a layer was replaced by one of another kind, or its weight is computed from others.
        """
        changed = self._replaced_layer()
        if changed is not None:
            raise ValueError(
                f"{changed}, and a graph knows only the published layers: merge adapters into the weights, make "
                "pruning and parametrizations permanent, or leave the choice of the executor to gpt2rt"
            )
        weights: dict[str, Tensor | QuantizedWeight] = {
            name: parameter.detach() for name, parameter in self.base_model.named_parameters()
        }
        for name, module in self.base_model.named_modules():
            if isinstance(module, QuantizedLayer):
                weights[f"{name}.weight"] = module.quantized
        head = self.get_output_embeddings()
        if isinstance(head, QuantizedLayer):
            weights["lm_head.weight"] = head.quantized
        elif head is not None:
            weights["lm_head.weight"] = head.get_parameter("weight").detach()
        return weights

    def _replaced_layer(self) -> str | None:
        for name, module in self.base_model.named_modules():
            if name and _replaced(module):
                return _not_plain(name, module)
        head = self.get_output_embeddings()
        return _not_plain("lm_head", head) if head is not None and _replaced_head(head) else None

    def changed_layer(self) -> str | None:
        """What makes forward compute something else than the graph, in a clause: a hook, or a layer of another kind."""
        for name, module in self.named_modules():
            if is_watched(module):
                return f"{name or type(self).__name__} has hooks or a forward of its own"
        for model in (self, self.base_model):
            if not type(model).forward.__module__.startswith("gpt2rt."):
                return f"{type(model).__name__} has a forward of its own"
        return self._replaced_layer()

    def _finish(self, return_dict: bool | None, output: ModelOutput) -> Any:
        """The output, or its values as a tuple."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class Trunk(nn.Module):
    """Mixin of the bare models, whose embeddings are ``tables``."""

    config: Any
    drop: nn.Module
    # arguments for torch's checkpoint function; None: off
    gradient_checkpointing: dict[str, Any] | None

    @property
    def tables(self) -> tuple[Any, nn.Embedding]:
        """The embeddings of tokens and of positions."""
        raise NotImplementedError(f"{type(self).__name__} must define tables")

    def _open_cache(self, past_key_values: Any, use_cache: bool | None, default: bool, batch: int) -> tuple[Any, bool]:
        """The cache to work with, a new one if the caller or else ``default`` wants one; and whether to return it."""
        if self.gradient_checkpointing is not None and self.training:
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values cannot be used with gradient checkpointing: blocks run twice and would append to "
                    "it twice; call model.gradient_checkpointing_disable() or model.eval()"
                )
            if use_cache:
                warnings.warn("use_cache=True has no effect with gradient checkpointing in training", stacklevel=3)
            return None, False
        use_cache = default if use_cache is None else use_cache
        cache = as_cache(past_key_values, self.config.n_layer, batch, self.config)
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        return cache, use_cache

    def _positions(self, position_ids: Tensor | None, leading: tuple[int, ...], seq_len: int, past_len: int) -> Tensor:
        """[batch or 1, seq_len] int64."""
        places = self.tables[1]
        if position_ids is None:
            check_length(seq_len, past_len, places.num_embeddings)
            return torch.arange(past_len, past_len + seq_len, device=places.weight.device).unsqueeze(0)
        check_ids("position_ids", position_ids, places.num_embeddings, "position embedding (n_positions)")
        return as_batch("position_ids", position_ids, leading, seq_len)

    def _token_types(self, token_type_ids: Tensor | None, leading: tuple[int, ...], seq_len: int) -> Tensor | None:
        """[batch or 1, seq_len] int64, or None."""
        if token_type_ids is None:
            return None
        rows = self.tables[0].num_embeddings
        check_ids("token_type_ids", token_type_ids, rows, "vocabulary, where this model looks types up,")
        return as_batch("token_type_ids", token_type_ids, leading, seq_len)

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_types: Tensor | None,
        positions: Tensor,
        batch: int,
        seq_len: int,
    ) -> Tensor:
        """[batch, seq_len, n_embd], what the first block reads."""
        tokens, places = self.tables
        n_embd = self.config.n_embd
        if input_ids is None:
            assert inputs_embeds is not None
            self._check_dtype("inputs_embeds", inputs_embeds)
            hidden = inputs_embeds.reshape(batch, seq_len, n_embd) + places(positions)
        elif (
            is_plain(tokens, nn.Embedding)
            and is_plain(places, nn.Embedding)
            and runs_kernels(self, tokens.weight, places.weight)
        ):
            rows = ops.embedding(
                input_ids.reshape(-1).long().contiguous(),
                positions.expand(batch, seq_len).reshape(-1).contiguous(),
                tokens.weight,
                places.weight,
            )
            hidden = rows.view(batch, seq_len, n_embd)
        elif is_plain(tokens, QuantizedEmbedding):
            # added before it is rounded, as the graph does
            rows = tokens.lookup(input_ids.reshape(batch, seq_len)) + places(positions)
            hidden = rows.to(places.weight.dtype)
        else:
            hidden = tokens(input_ids.reshape(batch, seq_len)) + places(positions)
        if token_types is not None:
            hidden = hidden + tokens(token_types)
        return self.drop(hidden)

    def _check_dtype(self, name: str, x: Tensor) -> None:
        dtype = self.tables[1].weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name} is {x.dtype}, but the model is {dtype}; use {name}.to(model.dtype)")

    def _lay_out(
        self,
        mask: AttentionMask,
        input_ids: Tensor | None,
        others: tuple[Tensor | None, ...],
        shape: tuple[int, int],
        past_len: int,
        share: bool,
    ) -> AttentionMask:
        """The mask, with a layout for the paged kernels where they can do it.

        Args:
            mask: of the call.
            input_ids: [*leading, seq_len], or None.
            others: what else a token's embedding is made of, [batch or 1, seq_len] each or None.
            shape: (batch, seq_len).
            past_len: tokens in the cache.
            share: compute common beginnings of rows once; False where every token's own result is wanted.
        """
        weight = self.tables[1].weight
        if weight.device.type != "cpu" or not runs_kernels(self, weight):
            return mask
        tokens: list[Tensor] = []
        if share and input_ids is not None:
            tokens = [x for x in (input_ids.reshape(shape), *others) if x is not None]
        return with_layout(mask, *shape, past_len, tokens, lambda: computes_alone(self, weight))

    def _note_shared(self, output: ModelOutput, mask: AttentionMask, last: Tensor, cache: Any, batch: int) -> None:
        """Bring a new cache into the caller's shape, and let the head know which rows stand for several places."""
        if mask.layout is None or mask.layout.places is None:
            return
        if cache is not None:
            mask.layout.spread_cache(cache, batch)
        output.shared_rows = SharedRows(last[0], mask.layout.places, output[0])


def last_tokens(model: PreTrainedModel, hidden: Tensor, input_ids: Tensor | None) -> Tensor:
    """The hidden state of each sequence's last token: the rightmost that is not ``config.pad_token_id``.

    Args:
        model: a sequence classifier.
        hidden: [*leading, seq_len, n_embd].
        input_ids: [*leading, seq_len], or None for embeddings; those, and models without a padding token, have their
            last position read.

    Returns:
        [*leading, n_embd].
    """
    pad_token_id = model.config.pad_token_id
    if pad_token_id is None:
        return hidden[..., -1, :]
    if input_ids is None:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"{type(model).__name__} cannot tell padding in inputs_embeds and reads the last position of every "
                "sequence; pad on the left",
                stacklevel=5,
            )
        return hidden[..., -1, :]
    places = torch.arange(input_ids.size(-1), device=hidden.device)
    last = (places * (input_ids.to(hidden.device) != pad_token_id)).argmax(-1)
    return torch.take_along_dim(hidden, last[..., None, None], dim=-2).squeeze(-2)
