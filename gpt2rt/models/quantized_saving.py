"""Saving quantised models: what config.json says of them, and their tensors in each layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpt2rt.quantization.bitsandbytes import BitsAndBytesConfig, to_bitsandbytes
from gpt2rt.quantization.config import QuantizationConfig
from gpt2rt.quantization.stored_bitsandbytes import bitsandbytes_tensors
from gpt2rt.quantization.weight import QuantizedWeight

from .layers import Conv1D
from .quantized import PARTS, QuantizedLayer

LAYOUTS = ("gpt2rt", "bitsandbytes")

# of BitsAndBytesConfig: what the layers do not show
_CALLERS_FIELDS = (
    "llm_int8_threshold",
    "llm_int8_enable_fp32_cpu_offload",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
)


def describe(model: Any, noted: QuantizationConfig | None) -> QuantizationConfig:
    """The config that says how a model's layers are quantised now.

    Args:
        model: with at least one quantised layer.
        noted: what was noted when they were; it tells what the layers themselves do not show.
    Raises:
        ValueError: no config can say it, because layers of one kind differ.
    """
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    inner, floats, embeddings = {}, [], set()
    for name, module in model.named_modules():
        is_table = any(module is table for table in tables)
        if isinstance(module, QuantizedLayer) and is_table:
            embeddings.add(module.scheme)
        elif isinstance(module, QuantizedLayer):
            inner[name] = module.quantized
        elif is_table or isinstance(module, Conv1D):
            floats.append((name, is_table))
    if len(embeddings) > 1:
        raise ValueError(f"embedding and output layer are {' and '.join(sorted(embeddings))}; config.json can say one")
    config = noted if noted is not None else _guess(next(iter(inner.values()), None))
    config = dataclasses.replace(config, embeddings=embeddings.pop() if embeddings else "none")
    if config.scheme == "int4":
        zeros = [
            weight for weight in inner.values() if isinstance(weight, QuantizedWeight) and weight.zeros is not None
        ]
        config = dataclasses.replace(config, symmetric=not zeros)
    for name, weight in inner.items():
        expected = config.scheme, config.group_size_of(weight.shape[1]), config.activations
        if isinstance(weight, Tensor) or (weight.scheme, weight.group_size, weight.activations) != expected:
            found = (
                str(weight.dtype)
                if isinstance(weight, Tensor)
                else (weight.scheme, weight.group_size, weight.activations)
            )
            raise ValueError(
                f"{name} is {found}, but the config of the model says {expected} (scheme, group size, activations), "
                "and config.json can say one for all; quantise model.dequantize() again"
            )
    skip = [name for name in config.skip_modules if not any(QuantizationConfig.skips(_only(name), n) for n in inner)]
    left = dataclasses.replace(config, skip_modules=tuple(skip))
    prefix = f"{model.base_model_prefix}."
    skip += [
        name.removeprefix(prefix)
        for name, is_table in floats
        if not left.skips(name) and not (is_table and config.embeddings == "none")
    ]
    return dataclasses.replace(config, skip_modules=tuple(skip))


def _only(name: str) -> QuantizationConfig:
    return QuantizationConfig("int8", skip_modules=(name,))


def _guess(weight: QuantizedWeight | Tensor | None) -> QuantizationConfig:
    if not isinstance(weight, QuantizedWeight):
        return QuantizationConfig("int8")
    size = None if weight.scheme == "int8" else weight.group_size
    return QuantizationConfig(weight.scheme, size, activations=weight.activations)


def own_tensors(model: Any, state: Mapping[str, Tensor], config: QuantizationConfig) -> dict[str, Tensor]:
    """A state dict in gpt2rt's layout: it has that already, but for zero points that only some layers have.

    Raises:
        ValueError: the state dict is not that of the model's layers.
    """
    tensors = dict(state)
    for name, layer in model._quantized_layers().items():
        weight = layer.quantized
        if config.symmetric or not isinstance(weight, QuantizedWeight) or weight.scheme != "int4":
            continue
        codes, _, zeros = (f"{name}.{part}" for part in PARTS)
        # a tied layer is written under its embedding's name
        if codes in tensors and zeros not in tensors:
            tensors[zeros] = torch.full(weight.scales.shape, 8, dtype=torch.uint8)
    return tensors


def in_bitsandbytes(
    model: Any, state: Mapping[str, Tensor], config: QuantizationConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict in bitsandbytes' layout, and the ``quantization_config`` of config.json.

    Raises:
        ValueError: bitsandbytes has no such format.
    """
    if config.embeddings != "none":
        raise ValueError(
            f"embedding and output layer are {config.embeddings}, but bitsandbytes keeps them as floats; quantise with "
            "QuantizationConfig(..., embeddings='none'), or save in gpt2rt's own layout"
        )
    shown = getattr(model.config, "quantization_config", None)
    storage = shown.bnb_4bit_quant_storage if isinstance(shown, BitsAndBytesConfig) else torch.uint8
    tensors = dict(state)
    nested = []
    for name, layer in model._quantized_layers().items():
        weight = layer.quantized
        assert isinstance(weight, QuantizedWeight)
        for part in PARTS:
            tensors.pop(f"{name}.{part}", None)
        block_size = config.group_size or 0
        new = bitsandbytes_tensors(f"{name}.weight", weight, layer.file_scales, block_size, model.dtype, storage)
        tensors |= new
        nested.append(f"{name}.weight.nested_absmax" in new)
    said = to_bitsandbytes(dataclasses.replace(config, double_quant=all(nested))).to_dict()
    floats = [name for name, module in model.named_modules() if isinstance(module, Conv1D | nn.Linear)]
    # a list of one's own replaces transformers' default, which keeps the output layer
    said["llm_int8_skip_modules"] = None if floats in ([], ["lm_head"]) else floats
    if isinstance(shown, BitsAndBytesConfig):
        # what does not say which layers are quantised how
        said |= {name: value for name, value in shown.to_dict().items() if name in _CALLERS_FIELDS}
    return tensors, said
