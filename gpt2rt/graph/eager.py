"""The eager executor: a plan's nodes as ops, one after another, on any device. The reference for every other one."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.cache import PagedKVCache

from .batch import StepBatch, StepOutput
from .executor import check_step
from .plan import (
    Attention,
    Embed,
    Head,
    Linear,
    LinearResidual,
    Norm,
    NormLinearAct,
    NormQKV,
    NormResidual,
    Plan,
    with_positions,
)


class EagerExecutor:
    """Runs steps of a plan with ``gpt2rt.ops``; activations are kept in the plan's dtype.

    Args:
        plan: what to run.
    """

    name = "eager"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.cache_dtype = plan.dtype

    def with_positions(self, wpe: Tensor) -> EagerExecutor:
        """An executor with another position table [n_positions, n_embd]; all other weights are shared."""
        return EagerExecutor(with_positions(self.plan, wpe))

    @torch.no_grad()
    def step(self, batch: StepBatch, cache: PagedKVCache, *, return_hidden: bool = False) -> StepOutput:
        """Run one step.

        Args:
            batch: the tokens, on the plan's device or on the CPU.
            cache: where their keys and values go, and those before them are read; on the plan's device.
            return_hidden: also return the rows after the final norm.

        Returns:
            Logits (and hidden rows) of ``batch.logits_indices``.

        Raises:
            ValueError: the batch or the cache does not fit the plan.
        """
        check_step(self.plan, batch, cache)
        return _Step(batch.to(self.plan.device), cache).run(self.plan, return_hidden)


def _embed(node: Embed, batch: StepBatch) -> Tensor:
    if isinstance(node.wte, Tensor) and node.wte.dtype == node.wpe.dtype:
        return ops.embedding(batch.input_ids, batch.position_ids, node.wte, node.wpe)
    wte = node.wte
    tokens = wte[batch.input_ids] if isinstance(wte, Tensor) else wte.rows(batch.input_ids)
    return (tokens.float() + node.wpe[batch.position_ids].float()).to(node.wpe.dtype)


def _linear(x: Tensor, linear: Linear) -> Tensor:
    weight = linear.weight
    if isinstance(weight, Tensor):
        if weight.dtype == x.dtype:
            return ops.linear(x, weight, linear.bias)
        # a head with a dtype of its own
        return ops.linear(x.float(), weight.float(), None if linear.bias is None else linear.bias.float()).to(x.dtype)
    k = weight.shape[1]
    if not ops.has_kernel(weight.scheme == "int8", weight.codebook is not None, k, weight.group_size):
        return ops.linear(x, weight.dequantize(x.dtype), linear.bias)
    return ops.quantized_linear(
        x,
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.codebook,
        linear.bias,
        in_features=k,
        group_size=weight.group_size,
        int8_activations=weight.activations == "int8",
    )


class _Step:
    """The state that flows through the nodes: the residual stream, and what was computed but not yet added to it."""

    def __init__(self, batch: StepBatch, cache: PagedKVCache) -> None:
        self.batch = batch
        self.cache = cache
        self.x: Tensor
        self.query: Tensor
        self.buffer: Tensor
        # a branch's result waits here so that its addition and the next norm become one op
        self.branch: Tensor | None = None

    def run(self, plan: Plan, return_hidden: bool) -> StepOutput:
        for node in plan.nodes:
            match node:
                case Embed():
                    self.x = _embed(node, self.batch)
                case NormQKV():
                    self._qkv(node, plan)
                case Attention():
                    self.buffer = self._attention(node).reshape(self.x.shape)
                case LinearResidual():
                    self.branch = _linear(self.buffer, node.linear)
                case NormLinearAct():
                    self.buffer = self._activated(node)
                case NormResidual():
                    self.x = self._normed(node.norm)
                    self.branch = None
                case Head():
                    return self._head(node, return_hidden)
        raise AssertionError("a plan ends with its head")

    def _normed(self, norm: Norm | None) -> Tensor:
        """norm(x) after the waiting branch has been added to x."""
        if norm is None:
            if self.branch is not None:
                self.x, self.branch = self.x + self.branch, None
            return self.x
        if self.branch is None:
            return ops.layer_norm(self.x, norm.weight, norm.bias, norm.eps)
        normed, self.x = ops.add_layer_norm(self.branch, self.x, norm.weight, norm.bias, norm.eps)
        self.branch = None
        return normed

    def _qkv(self, node: NormQKV, plan: Plan) -> None:
        qkv = _linear(self._normed(node.norm), node.linear)
        heads = qkv.view(qkv.size(0), 3, plan.n_head, plan.head_dim)
        self.query, key, value = heads.unbind(1)
        self.cache.write(node.layer, key, value, self.batch.slot_mapping)

    def _attention(self, node: Attention) -> Tensor:
        batch = self.batch
        caches = self.cache.key_cache(node.layer), self.cache.value_cache(node.layer)
        scales = self.cache.key_scales(node.layer), self.cache.value_scales(node.layer)
        if batch.max_query_len == 1:
            return ops.paged_decode_attention(
                self.query, *caches, batch.block_table, batch.seq_lens, batch.max_seq_len, node.scale, *scales
            )
        return ops.paged_prefill_attention(
            self.query,
            *caches,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            batch.max_query_len,
            node.scale,
            *scales,
        )

    def _activated(self, node: NormLinearAct) -> Tensor:
        normed = self._normed(node.norm)
        weight = node.linear.weight
        if node.activation == "gelu_new" and isinstance(weight, Tensor):
            return ops.linear_gelu_new(normed, weight, node.linear.bias)
        return node.function(_linear(normed, node.linear))

    def _head(self, node: Head, return_hidden: bool) -> StepOutput:
        rows = self.batch.logits_indices
        self.x = self.x[rows]
        if self.branch is not None:
            self.branch = self.branch[rows]
        hidden = self._normed(node.norm)
        logits = _linear(hidden, node.linear).float() if node.linear else None
        return StepOutput(logits, hidden.float() if return_hidden else None)
