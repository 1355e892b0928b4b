"""The flat plan: a model as a list of fused nodes, in the order they run.

A node is what one executor can do in one pass: the CPU executor turns each into one phase of a C++ call, the eager
executor into a few ops. Nodes hold views of the model's own weights in ``nn.Linear`` orientation [out, in]; executors
pack them as they like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from gpt2rt.quantization import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Norm:
    """Layer norm parameters: weight [n], bias [n], eps."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclasses.dataclass(frozen=True)
class Linear:
    """weight [out_features, in_features], quantised or with either dimension contiguous; bias [out_features]."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None


@dataclasses.dataclass(frozen=True)
class Embed:
    """x = wte[input_ids] + wpe[position_ids]; wte [vocab_size, n_embd], wpe [n_positions, n_embd].

    A quantised ``wte`` that is the head's weight too is the same object.
    """

    wte: Tensor | QuantizedWeight
    wpe: Tensor


@dataclasses.dataclass(frozen=True)
class NormQKV:
    """q, k, v = linear(norm(x)); k and v go to the cache of ``layer``."""

    layer: int
    norm: Norm | None
    linear: Linear


@dataclasses.dataclass(frozen=True)
class Attention:
    """buf = causal attention of q over the cache of ``layer``; ``scale`` multiplies q."""

    layer: int
    n_head: int
    head_dim: int
    scale: float


@dataclasses.dataclass(frozen=True)
class LinearResidual:
    """x = x + linear(buf)."""

    linear: Linear


@dataclasses.dataclass(frozen=True)
class NormLinearAct:
    """buf = activation(linear(norm(x))); ``function`` is the plain torch form of ``activation``."""

    norm: Norm | None
    linear: Linear
    activation: str
    function: Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class NormResidual:
    """x = norm(x), as in models that normalise after the residual addition."""

    norm: Norm


@dataclasses.dataclass(frozen=True)
class Head:
    """hidden = norm(x[logits_indices]); logits = linear(hidden)."""

    norm: Norm | None
    linear: Linear | None


Node = Embed | NormQKV | Attention | LinearResidual | NormLinearAct | NormResidual | Head


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model ready to run step by step.

    Attributes:
        nodes: in order; the first is Embed, the last Head.
        n_layer, n_head, head_dim, n_embd, vocab_size, n_positions: sizes.
        dtype: dtype of norms, biases, positions and of the weights that are not quantised or have a dtype of their own
            (and of the KV cache unless the caller chooses another).
        device: where the weights live.
        from_files: the weights are as they were loaded, so what is made of them may be kept for other processes.
    """

    nodes: tuple[Node, ...]
    n_layer: int
    n_head: int
    head_dim: int
    n_embd: int
    vocab_size: int
    n_positions: int
    dtype: torch.dtype
    device: torch.device
    from_files: bool = False


def with_positions(plan: Plan, wpe: Tensor) -> Plan:
    """A plan with another position table [n_positions, n_embd]; all other weights are shared."""
    embed, *others = plan.nodes
    assert isinstance(embed, Embed)
    return dataclasses.replace(plan, nodes=(dataclasses.replace(embed, wpe=wpe), *others))
