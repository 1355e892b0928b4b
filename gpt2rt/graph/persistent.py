"""Decode steps of one sequence as one launch of the persistent kernel (kernels/persistent_decode.py, csrc/cuda/).

Opt-in: ``GPT2RT_CUDA_PERSISTENT=1``, for no device has proven it yet. It takes the steps of one token of one sequence,
of GPT-2s in float16 or bfloat16 and with a cache of the same dtype; prompts, larger batches and other caches go on
through the chain of Triton kernels. A step's bits are then those of this kernel, which are not those that the token
would have in company or in a prompt.

Its weights are a copy of their own, in the order in which the kernel reads them, beside those of the chain.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache
from gpt2rt.kernels.persistent_decode import (
    MAX_HEAD_DIM,
    SPLIT,
    DecodeLayer,
    pack_decode_weights,
    persistent_blocks,
    persistent_decode_cuda,
    workspace_floats,
)

from .plan import Attention, Embed, Head, Linear, LinearResidual, Norm, NormLinearAct, NormQKV, Plan

if TYPE_CHECKING:
    from .chain import Buffers

__all__ = ["PersistentStep", "unsupported"]

_LAYER = (NormQKV, Attention, LinearResidual, NormLinearAct, LinearResidual)


def unsupported(plan: Plan) -> str:
    """Why the persistent kernel cannot run a plan, in one clause; empty if it can."""
    if plan.dtype not in (torch.float16, torch.bfloat16):
        return f"the weights are {plan.dtype}, expected float16 or bfloat16"
    kinds = tuple(type(node) for node in plan.nodes)
    if kinds != (Embed, *_LAYER * plan.n_layer, Head):
        return "its norms stand behind the residual additions"
    products = [node.linear for node in plan.nodes if hasattr(node, "linear")]
    if products[-1] is None:
        return "it has no output layer"
    tables = [plan.nodes[0].wte, plan.nodes[0].wpe]  # type: ignore[union-attr]
    dtypes = {getattr(weight, "dtype", None) for weight in (*tables, *(p.weight for p in products if p is not None))}
    if not all(isinstance(p.weight, Tensor) for p in products if p is not None) or not isinstance(tables[0], Tensor):
        return "its weights are quantised"
    if dtypes != {plan.dtype}:
        return f"its weights have other dtypes beside {plan.dtype}"
    norms = [node.norm for node in plan.nodes if hasattr(node, "norm")]
    if len({None if norm is None else norm.eps for norm in norms}) != 1 or norms[0] is None:
        return "its norms are missing or differ in eps"
    if plan.head_dim % 8 or plan.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {plan.head_dim}, expected a multiple of 8 up to {MAX_HEAD_DIM}"
    if plan.n_embd % 8:
        return f"n_embd is {plan.n_embd}, expected a multiple of 8"
    layers = [node for node in plan.nodes if isinstance(node, NormLinearAct)]
    if len({(node.linear.weight.shape[0], node.activation) for node in layers}) != 1:
        return "its layers differ in width or activation"
    return ""


class PersistentStep:
    """The persistent kernel with a plan's weights.

    Args:
        plan: what to run, on a CUDA device (or, emulated, on the CPU).
        activations: kernels' names of the plan's activations.

    Attributes:
        blocks: of a launch: one a multiprocessor.

    Raises:
        ValueError: :func:`unsupported` says why, or the device has too little shared memory.
        torch.cuda.OutOfMemoryError: there is no room for the kernel's copy of the weights.
    """

    def __init__(self, plan: Plan, activations: dict[str, str]) -> None:
        reason = unsupported(plan)
        if reason:
            raise ValueError(f"the persistent kernel cannot run this model: {reason}; unset GPT2RT_CUDA_PERSISTENT")
        embed, head = plan.nodes[0], plan.nodes[-1]
        assert isinstance(embed, Embed)
        assert isinstance(embed.wte, Tensor)
        assert isinstance(head, Head)
        assert head.linear is not None
        layers = [
            _layer(plan.nodes[first : first + len(_LAYER)]) for first in range(1, len(plan.nodes) - 1, len(_LAYER))
        ]
        inner = layers[0].fc[0].size(0)
        # before anything is copied
        self.blocks = persistent_blocks(embed.wte, plan.n_head, plan.head_dim, plan.n_embd, inner)
        first = plan.nodes[4]
        assert isinstance(first, NormLinearAct)
        with torch.no_grad():
            self.weights = pack_decode_weights(
                layers,
                _norm(head.norm),
                _weight(head.linear),
                eps=_eps(head.norm),
                activation=activations[first.activation],
            )
        self._wte = _rows(embed.wte)
        self._use(plan, embed.wpe)

    # what is made under a caller's inference mode could not be written outside of it
    @torch.inference_mode(False)
    def _use(self, plan: Plan, wpe: Tensor) -> None:
        """Tensors that depend on how many positions there are."""
        self._plan, self._wpe = plan, _rows(wpe)
        self._num_splits = -(-wpe.size(0) // SPLIT)
        wide = plan.n_head * plan.head_dim
        floats = workspace_floats(plan.n_embd, wide, self.weights.inner, plan.n_head, self._num_splits)
        self._workspace = torch.zeros(floats, dtype=torch.float32, device=plan.device)
        # launches follow one another on the stream of the step, so one is enough
        self._barrier = torch.zeros(1, dtype=torch.int32, device=plan.device)

    def with_positions(self, plan: Plan, wpe: Tensor) -> PersistentStep:
        """The same with another position table; the packed weights are shared."""
        other = copy.copy(self)
        other._use(plan, wpe)
        return other

    def serves(self, buffers: Buffers, cache: PagedKVCache) -> bool:
        """Whether it takes a step of this size on this cache."""
        size = buffers.size
        one = size.num_tokens == size.num_seqs == size.num_logits == 1 and size.num_splits > 0
        return one and cache.data.dtype == self._plan.dtype

    def run(self, buffers: Buffers, cache: PagedKVCache, *, hidden: bool, chosen: Tensor | None = None) -> None:
        """Launch a step on what is in the buffers.

        Args:
            buffers, cache: that it serves.
            hidden: the row after the final norm is wanted too.
            chosen: [1] int64 for the first of the largest logits (-1 unless all are finite), or None.
        """
        persistent_decode_cuda(
            self.weights,
            self._wte,
            self._wpe,
            buffers.input_ids,
            buffers.position_ids,
            buffers.slot_mapping,
            buffers.seq_lens,
            buffers.block_table,
            cache.data,
            self._workspace,
            self._barrier,
            buffers.logits,
            buffers.hidden if hidden else None,
            chosen,
            num_splits=self._num_splits,
            blocks=self.blocks,
        )


def _layer(nodes: ListLike[object]) -> DecodeLayer:
    """A layer of the plan as the kernel knows it."""
    qkv, attention, proj, fc, down = nodes
    assert isinstance(qkv, NormQKV)
    assert isinstance(attention, Attention)
    assert isinstance(proj, LinearResidual)
    assert isinstance(fc, NormLinearAct)
    assert isinstance(down, LinearResidual)
    products = [(_weight(node.linear), node.linear.bias) for node in (qkv, proj, fc, down)]
    return DecodeLayer(_norm(qkv.norm), *products[:2], _norm(fc.norm), *products[2:], attention.scale)


def _weight(linear: Linear) -> Tensor:
    assert isinstance(linear.weight, Tensor)
    return linear.weight


def _norm(norm: Norm | None) -> tuple[Tensor, Tensor]:
    assert norm is not None
    return norm.weight, norm.bias


def _eps(norm: Norm | None) -> float:
    assert norm is not None
    return norm.eps


def _rows(table: Tensor) -> Tensor:
    """The same numbers with contiguous rows."""
    return table.detach() if table.stride(1) == 1 else table.detach().contiguous()
