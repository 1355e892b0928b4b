"""The layers of quantised models: a weight of 8 or 4 bits, or a narrower float, in place of a float parameter.

    y = x @ w.T + bias            activations "float32"
    y = round8(x) @ w.T + bias    activations "int8": x in int8, with a scale for each group of a row

:mod:`gpt2rt.quantization.weight` says what the numbers of a weight are, :func:`gpt2rt.ops.quantized_linear` what the
product is. Codes, scales and zero points are buffers: they take no gradient, and a change of the model's dtype leaves
them as they are. Inputs and biases do take gradients, so adapters can be trained over a quantised model; the rounding
of activations then counts as the identity (the straight-through estimator of Bengio et al., arXiv:1308.3432).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpt2rt.quantization.config import QuantizationConfig
from gpt2rt.quantization.rtn import quantize_rtn
from gpt2rt.quantization.weight import QuantizedWeight

from .empty import NoFill
from .layers import Conv1D
from .quantized_product import product

#: a layer's buffers; the state dict has them under these names behind the layer's
PARTS = ("weight", "weight_scales", "weight_zeros")


class QuantizedLayer(nn.Module):
    """A layer whose weight is no parameter.

    Args:
        quantized: the weight, [out_features, in_features]: codes with their scales, or a floating-point tensor that
            keeps its dtype whatever the model's is. Its tensors become buffers of this layer.
    """

    weight: Tensor
    weight_scales: Tensor | None
    weight_zeros: Tensor | None
    _quantized: QuantizedWeight | Tensor
    #: the scales as a file of bitsandbytes holds them (``quantization/stored_bitsandbytes.py``), to write them again
    file_scales: Any = None

    def __init__(self, quantized: QuantizedWeight | Tensor) -> None:
        super().__init__()
        for name in PARTS:
            self.register_buffer(name, None)
        self.quantized = quantized

    @property
    def quantized(self) -> QuantizedWeight | Tensor:
        """The weight, made of the buffers as they are now; the same object as long as they are the same tensors."""
        held = self._quantized
        if isinstance(held, Tensor):
            return self.weight
        if (
            held.codes is not self.weight
            or held.scales is not self.weight_scales
            or held.zeros is not self.weight_zeros
        ):
            assert self.weight_scales is not None
            self._quantized = held = dataclasses.replace(
                held, codes=self.weight, scales=self.weight_scales, zeros=self.weight_zeros
            )
        return held

    @quantized.setter
    def quantized(self, value: QuantizedWeight | Tensor) -> None:
        self._quantized = value
        if isinstance(value, Tensor):
            self.weight, self.weight_scales, self.weight_zeros = value, None, None
        else:
            self.weight, self.weight_scales, self.weight_zeros = value.codes, value.scales, value.zeros

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        held = self._quantized
        # a tensor's is that of the buffer, which load_state_dict may have replaced
        return (self.weight.size(0), self.weight.size(1)) if isinstance(held, Tensor) else held.shape

    @property
    def scheme(self) -> str:
        """The format: "int8", "int4", "nf4", "fp4", or the name of a floating-point dtype."""
        held = self._quantized
        return str(held.dtype).removeprefix("torch.") if isinstance(held, Tensor) else held.scheme

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats: [out_features, in_features]."""
        held = self.quantized
        return held.to(dtype) if isinstance(held, Tensor) else held.dequantize(dtype)

    def resize(self, count: int, new_rows: Tensor | None) -> None:
        """Another number of rows.

        Args:
            count: of rows, afterwards.
            new_rows: [count - rows, in_features] floats, which are rounded to this weight's format; None for fewer.
        """
        held = self.quantized
        if isinstance(held, Tensor):
            self.quantized = held[:count].clone() if new_rows is None else torch.cat([held, new_rows.to(held.dtype)])
            return
        added = None
        if new_rows is not None:
            config = QuantizationConfig(
                held.scheme,
                None if held.scheme == "int8" else held.group_size,
                symmetric=held.zeros is None,
                activations=held.activations,
            )
            added = quantize_rtn(new_rows, config)
        parts: dict[str, Any] = {}
        for name in ("codes", "scales", "zeros"):
            old = getattr(held, name)
            if old is not None:
                parts[name] = old[:count].clone() if added is None else torch.cat([old, getattr(added, name)])
        self.quantized = dataclasses.replace(held, shape=(count, held.shape[1]), **parts)

    # ---- what torch does to modules --------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # .half() and .to(dtype) say what is computed with; the numbers of the weight stay what they are
        held = {name: self._buffers[name] for name in PARTS}
        self._buffers.update(dict.fromkeys(PARTS))
        super()._apply(fn, recurse)
        for name, tensor in held.items():
            if tensor is not None:
                moved = fn(tensor)
                self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        kept = dict(state_dict)
        for name in PARTS:
            key, own = prefix + name, self._buffers[name]
            given = kept.get(key)
            # torch would cast floats to codes
            if given is not None and own is not None and given.dtype != own.dtype:
                error_msgs.append(
                    f"{key} is {given.dtype}, but the layer holds {self.scheme} in {own.dtype}; load float weights "
                    "into a float model, such as model.dequantize(), and quantise that"
                )
                del kept[key]
        super()._load_from_state_dict(kept, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        rows, columns = self.shape
        held = self._quantized
        group = "" if isinstance(held, Tensor) or held.scheme == "int8" else f", group_size={held.group_size}"
        return f"{columns} -> {rows}, {self.scheme}{group}"


class QuantizedProduct(QuantizedLayer):
    """``x @ weight.T + bias``.

    Args:
        quantized: the weight.
        bias: [out_features], or None; taken as it is.
    """

    bias: nn.Parameter | None

    def __init__(self, quantized: QuantizedWeight | Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(quantized)
        # a plain None would look like a bias that pruning computes
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return product(x, self.quantized, self.bias)


class QuantizedConv1D(QuantizedProduct):
    """In place of a :class:`~gpt2rt.models.layers.Conv1D`, whose weight is [in, out]; here it is [out, in]."""

    @property
    def nf(self) -> int:
        """Number of output features."""
        return self.shape[0]

    @property
    def nx(self) -> int:
        """Number of input features."""
        return self.shape[1]


class QuantizedLinear(QuantizedProduct):
    """In place of an ``nn.Linear``."""

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]


class QuantizedEmbedding(QuantizedLayer):
    """In place of an ``nn.Embedding``.

    Args:
        quantized: the table, [num_embeddings, embedding_dim].
        dtype: of the rows looked up; it follows the model's.
    """

    _rows_like: Tensor

    def __init__(self, quantized: QuantizedWeight | Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(quantized)
        # without elements: it follows .to(dtype) in place of the table
        self.register_buffer("_rows_like", torch.empty(0, dtype=dtype, device=quantized.device), persistent=False)

    @property
    def num_embeddings(self) -> int:
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.shape[1]

    def lookup(self, input_ids: Tensor) -> Tensor:
        """[...] integers to [..., embedding_dim] in float32, before they are rounded to the model's dtype."""
        held = self.quantized
        return held[input_ids].float() if isinstance(held, Tensor) else held.rows(input_ids)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] integers to [..., embedding_dim]."""
        return self.lookup(input_ids).to(self._rows_like.dtype)


# ---- from float layers to these and back -----------------------------------------------------------------------------


def quantized_form(module: nn.Module, weight: QuantizedWeight | Tensor, dtype: torch.dtype) -> QuantizedLayer:
    """The layer that stands for ``module`` with another weight.

    Args:
        module: a Conv1D, ``nn.Linear`` or ``nn.Embedding``, or the quantised form of one; its bias is taken over.
        weight: [out_features, in_features].
        dtype: that the model computes with.
    Raises:
        TypeError: a layer of another kind.
        ValueError: the weight has another shape.
    """
    expected = weight_shape(module)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"the weight has shape {list(weight.shape)}, but {type(module).__name__} needs {list(expected)}: "
            "[out_features, in_features]"
        )
    new: QuantizedLayer
    if isinstance(module, Conv1D | QuantizedConv1D):
        if isinstance(weight, Tensor):
            raise TypeError(f"{type(module).__name__} takes a QuantizedWeight; its floats may not have another dtype")
        new = QuantizedConv1D(weight, module.bias)
    elif isinstance(module, nn.Linear | QuantizedLinear):
        new = QuantizedLinear(weight, module.bias)
    else:
        new = QuantizedEmbedding(weight, dtype)
    return new.train(module.training)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a layer.

    Raises:
        TypeError: it is none that can be quantised.
    """
    if isinstance(module, QuantizedLayer):
        return module.shape
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    raise TypeError(f"{type(module).__name__} cannot be quantised; Conv1D, nn.Linear and nn.Embedding can")


def float_form(module: QuantizedLayer, dtype: torch.dtype) -> nn.Module:
    """The float layer with the numbers of a quantised one."""
    weight = module.dequantize(dtype)
    if weight is module.weight:
        # nothing had to be converted
        weight = weight.clone()
    rows, columns = module.shape
    new: Conv1D | nn.Embedding | nn.Linear
    with torch.device("meta"), NoFill():
        if isinstance(module, QuantizedConv1D):
            new, weight = Conv1D(rows, columns), weight.t().contiguous()
        elif isinstance(module, QuantizedEmbedding):
            new = nn.Embedding(rows, columns)
        else:
            new = nn.Linear(columns, rows, bias=False)
    new.weight = nn.Parameter(weight)
    if isinstance(module, QuantizedProduct):
        new.register_parameter("bias", module.bias)
    return new.train(module.training)


def output_layer_of(table: nn.Embedding | QuantizedEmbedding, head: nn.Module) -> nn.Module:
    """``head`` as an output layer that shares the weight of ``table``."""
    if isinstance(table, nn.Embedding):
        with torch.device("meta"), NoFill():
            new = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False)
        new.weight = table.weight
        return new.train(head.training)
    if not isinstance(head, QuantizedLinear):
        bias = head.bias if isinstance(head, nn.Linear) else None
        head = QuantizedLinear(table.quantized, bias).train(head.training)
    head.quantized = table.quantized
    return head


def replace_with_quantized(
    model: Any, weights: Mapping[str, QuantizedWeight | Tensor], config: QuantizationConfig | None = None
) -> Any:
    """Put quantised layers in place of float ones; tied layers stay tied.

    Args:
        model: a gpt2rt model, changed in place.
        weights: name of a module -> its weight [out_features, in_features]; a tied output layer needs no entry.
        config: how they are quantised, for ``model.config.quantization_config``.
    Returns:
        ``model``.
    Raises:
        TypeError, ValueError: as :func:`quantized_form`, or a tied output layer is to have a weight of its own;
            nothing has been changed then.
    """
    for target, source in model._active_ties().items():
        head, table = target.rpartition(".")[0], source.rpartition(".")[0]
        if head in weights and weights.get(table) is not weights[head]:
            raise ValueError(f"{head} is tied to {table}; give the weight of {table}, which then serves both")
    dtype = model.dtype
    forms = {name: quantized_form(model.get_submodule(name), weight, dtype) for name, weight in weights.items()}
    for name, form in forms.items():
        model.set_submodule(name, form)
    model.tie_weights()
    if config is not None:
        model.note_quantization(config)
    return model
