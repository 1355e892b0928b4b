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

    def with_positions(self, wpe: Tensor) -> EagerExecutor:
        """An executor with another position table [n_positions, n_embd]; all other weights are shared."""
        return EagerExecutor(with_positions(self.plan, wpe))

    @torch.no_grad()
    def step(self, batch: StepBatch, cache: PagedKVCache, *, return_hidden: bool = False) -> StepOutput:
        """Run one step.

        Args:
            batch: the tokens, on the plan's device.
            cache: where their keys and values go, and those before them are read; dtype and device of the plan.
            return_hidden: also return the rows after the final norm.

        Returns:
            Logits (and hidden rows) of ``batch.logits_indices``.

        Raises:
            ValueError: the batch or the cache does not fit the plan.
        """
        check_step(self.plan, batch, cache)
        return _Step(batch, cache).run(self.plan, return_hidden)


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
                    self.x = ops.embedding(self.batch.input_ids, self.batch.position_ids, node.wte, node.wpe)
                case NormQKV():
                    self._qkv(node, plan)
                case Attention():
                    self.buffer = self._attention(node).reshape(self.x.shape)
                case LinearResidual():
                    self.branch = ops.linear(self.buffer, node.linear.weight, node.linear.bias)
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
        qkv = ops.linear(self._normed(node.norm), node.linear.weight, node.linear.bias)
        heads = qkv.view(qkv.size(0), 3, plan.n_head, plan.head_dim)
        self.query, key, value = heads.unbind(1)
        ops.write_kv(
            key, value, self.cache.key_cache(node.layer), self.cache.value_cache(node.layer), self.batch.slot_mapping
        )

    def _attention(self, node: Attention) -> Tensor:
        batch = self.batch
        caches = self.cache.key_cache(node.layer), self.cache.value_cache(node.layer)
        if batch.max_query_len == 1:
            return ops.paged_decode_attention(
                self.query, *caches, batch.block_table, batch.seq_lens, batch.max_seq_len, node.scale
            )
        return ops.paged_prefill_attention(
            self.query,
            *caches,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            batch.max_query_len,
            node.scale,
        )

    def _activated(self, node: NormLinearAct) -> Tensor:
        normed = self._normed(node.norm)
        if node.activation == "gelu_new":
            return ops.linear_gelu_new(normed, node.linear.weight, node.linear.bias)
        return node.function(ops.linear(normed, node.linear.weight, node.linear.bias))

    def _head(self, node: Head, return_hidden: bool) -> StepOutput:
        rows = self.batch.logits_indices
        self.x = self.x[rows]
        if self.branch is not None:
            self.branch = self.branch[rows]
        hidden = self._normed(node.norm)
        logits = ops.linear(hidden, node.linear.weight, node.linear.bias).float() if node.linear else None
        return StepOutput(logits, hidden.float() if return_hidden else None)
