"""A step as a chain of Triton launches: what a CUDA graph captures, and what runs as it is where there is none.

Every launch writes into tensors made beforehand (:class:`Buffers`), so the chain allocates nothing, never waits for the
device, and a captured graph can be replayed on new inputs. The residual stream is float32; what lies between two nodes
has the plan's dtype; keys and values the cache's.

Launches a layer, for up to 8 tokens of one query a sequence: norm + QKV + cache write; attention, split over the
context; merge + projection + residual (two launches beyond 512 tokens of context); norm + product + activation; product
+ residual. Up to 64 tokens: the merge is a launch of its own, and so is the sum of each product that is split over K.
More tokens: the norms are launches of their own, and attention is that of prompts. An 8-bit cache adds one launch,
which needs whole heads at a time. Beside the layers: the embedding, and norm + output layer. A greedy decode loop of up
to 8 tokens embeds and chooses in one launch behind the output layer, which makes two beside the layers.

Triton is imported here, so this module is imported only where it is used.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache
from gpt2rt.kernels.advance import Embedding
from gpt2rt.kernels.embedding_rows import embedding_rows_triton
from gpt2rt.kernels.fused_linear import MAX_ROWS, Append, Partials, fused_linear_rows, fused_linear_triton
from gpt2rt.kernels.fused_linear import Norm as KernelNorm
from gpt2rt.kernels.fusion import ACTIVATIONS
from gpt2rt.kernels.head import head_argmax_triton, head_keys_triton, head_workspace_bytes
from gpt2rt.kernels.linear_tiles import workspace_bytes
from gpt2rt.kernels.merge_splits import merge_splits_triton
from gpt2rt.kernels.norm_rows import norm_rows_triton
from gpt2rt.kernels.paged_decode_attention import SPLIT, paged_decode_partials_triton
from gpt2rt.kernels.paged_prefill_attention import paged_prefill_into_triton
from gpt2rt.kernels.weights import DeviceWeight, pack_dense, pack_quantized
from gpt2rt.kernels.write_kv import write_kv_triton
from gpt2rt.quantization import QuantizedWeight

from .batch import StepBatch
from .inputs import StepInputs, StepSize
from .persistent import PersistentStep
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

__all__ = ["KERNEL_ACTIVATIONS", "MAX_FUSED_NORM", "SPLIT", "Buffers", "Chain", "StepSize"]

#: up to so many tokens a product takes the norm before it in
MAX_FUSED_NORM = 64
#: up to so many splits the projection merges them itself
MAX_MERGED = 8
#: columns that rows of logits are padded to, so that each starts on a 256-byte line
_LOGITS_PAD = 64

#: the kernels' names of activations
KERNEL_ACTIVATIONS = {
    **{name: name for name in ACTIVATIONS},
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}


def unsupported(plan: Plan) -> str:
    """Why the chain cannot run a plan, in one clause; empty if it can."""
    if plan.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the weights are {plan.dtype}"
    if plan.head_dim > 256:
        return f"head_dim is {plan.head_dim}, and the attention kernels have up to 256"
    if plan.n_embd > 32768:
        return f"n_embd is {plan.n_embd}, and the norm kernels have up to 32768"
    for node in plan.nodes:
        if isinstance(node, NormLinearAct) and node.activation not in KERNEL_ACTIVATIONS:
            return f"there is no kernel for the activation {node.activation!r}"
    return ""


class Buffers:
    """What a step reads and writes besides weights and cache.

    Args:
        chain: whose step.
        size: how large.
        other: of the same size but for ``num_splits``; all tensors but the partial attention are shared with it.

    Attributes:
        input_ids, position_ids, slot_mapping: [num_tokens] int64.
        seq_lens: [num_seqs] int32; 0 marks a padding row.
        query_start_loc: [num_seqs + 1] int32.
        block_table: [num_seqs, max_blocks] int32.
        logits_indices: [num_logits] int64.
        logits: [num_logits, vocab_size] float32; no rows where the plan has no output layer.
        hidden: [num_logits, n_embd] float32, the rows after the final norm.
        best: [num_logits] float32, the largest logits of a step whose tokens are chosen as they are computed.
    """

    input_ids: Tensor
    position_ids: Tensor
    slot_mapping: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    block_table: Tensor
    logits_indices: Tensor

    # what is made under a caller's inference mode could not be written outside of it
    @torch.inference_mode(False)
    def __init__(self, chain: Chain, size: StepSize, other: Buffers | None = None) -> None:
        plan, device = chain.plan, chain.plan.device
        tokens, seqs, wide = size.num_tokens, size.num_seqs, plan.n_head * plan.head_dim
        self.size = size

        def new(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        if other is not None:
            self.__dict__.update(other.__dict__)
            self.size = size
        self.values = new(seqs, plan.n_head, size.num_splits, plan.head_dim, dtype=torch.float32)
        self.lse = new(seqs, plan.n_head, size.num_splits, dtype=torch.float32)
        if other is not None:
            return
        self._inputs = StepInputs(size, device)
        self.__dict__.update(self._inputs.tensors)
        self.slot_mapping.fill_(-1)
        if size.num_splits:
            self.query_start_loc = torch.arange(seqs + 1, dtype=torch.int32, device=device)
            self.logits_indices = torch.arange(size.num_logits, dtype=torch.int64, device=device)
        self.x = new(tokens, plan.n_embd, dtype=torch.float32)
        self.normed = new(tokens if tokens > MAX_FUSED_NORM else 0, plan.n_embd, dtype=plan.dtype)
        self.qkv = new(tokens, 3 * wide, dtype=plan.dtype)
        self.attended = new(tokens, wide, dtype=plan.dtype)
        self.inner = new(tokens, chain.inner_size, dtype=plan.dtype)
        self.hidden = new(size.num_logits, plan.n_embd, dtype=torch.float32)
        self.best = new(size.num_logits, dtype=torch.float32)
        rows = size.num_logits if chain.has_head else 0
        padded = -(-plan.vocab_size // _LOGITS_PAD) * _LOGITS_PAD
        self.logits = new(rows, padded, dtype=torch.float32)[:, : plan.vocab_size]
        self.workspace = new(chain.workspace_bytes(max(tokens, size.num_logits)), dtype=torch.uint8)

    def load(self, batch: StepBatch) -> None:
        """Take a batch over; what it does not fill becomes padding, which is computed and changes nothing."""
        self._inputs.load(batch)


@dataclasses.dataclass(frozen=True)
class _Product:
    weight: DeviceWeight
    bias: Tensor | None


class Chain:
    """A plan with its weights as the kernels read them.

    Weights whose rows are contiguous are shared with the model; others (those of Conv1D, and all quantised ones) are
    laid out anew once, here.

    Args:
        plan: what to run, on a CUDA device (or, in Triton's interpreter, on the CPU).
        batch_invariant: a token's bits do not depend on how many rows a step has, nor on whether it is decoded or in a
            prompt (He et al., "Defeating Nondeterminism in LLM Inference", 2025).
        pdl: programmatic dependent launch; sm_90 and later.

    Attributes:
        persistent: what runs the steps that it serves in one launch instead; None, unless the executor sets it.

    Raises:
        ValueError: the chain cannot run the plan (see :func:`unsupported`).
    """

    def __init__(self, plan: Plan, *, batch_invariant: bool = False, pdl: bool = False) -> None:
        reason = unsupported(plan)
        if reason:
            raise ValueError(f"the cuda executor cannot run this model: {reason}; use the eager executor")
        self.plan = plan
        self.batch_invariant = batch_invariant
        self.pdl = pdl
        self.persistent: PersistentStep | None = None
        self._packed: dict[int, DeviceWeight] = {}
        self._products: dict[int, _Product] = {}
        for node in plan.nodes:
            linear = getattr(node, "linear", None)
            if linear is not None:
                self._products[id(linear)] = _Product(self._pack(linear.weight), linear.bias)
        embed, head = plan.nodes[0], plan.nodes[-1]
        assert isinstance(embed, Embed)
        assert isinstance(head, Head)
        self._wte = self._pack(embed.wte)
        self._wpe = _rows(embed.wpe)
        self.has_head = head.linear is not None
        inner = [node.linear.weight.shape[0] for node in plan.nodes if isinstance(node, NormLinearAct)]
        self.inner_size = max(inner, default=0)

    def with_positions(self, wpe: Tensor) -> Chain:
        """The same with another position table [n_positions, n_embd]; all weights are shared."""
        other = object.__new__(Chain)
        other.__dict__.update(self.__dict__)
        other.plan, other._wpe = with_positions(self.plan, wpe), _rows(wpe)
        if self.persistent is not None:
            other.persistent = self.persistent.with_positions(other.plan, wpe)
        return other

    @property
    def weight_bytes(self) -> int:
        """Bytes that a step of one token reads of the weights: all layers and the output layer."""
        return sum({id(p.weight): p.weight.num_bytes for p in self._products.values()}.values())

    def workspace_bytes(self, num_tokens: int) -> int:
        """Bytes of workspace that the products of a step of so many tokens need."""
        weights = [product.weight for product in self._products.values()]
        needed = [workspace_bytes(w, num_tokens, batch_invariant=self.batch_invariant) for w in weights]
        head = self.plan.nodes[-1]
        if isinstance(head, Head) and head.linear is not None and num_tokens <= MAX_ROWS:
            needed.append(head_workspace_bytes(self.product(head.linear).weight, num_tokens))
        return max(needed, default=0)

    def _pack(self, weight: Tensor | QuantizedWeight) -> DeviceWeight:
        """A weight in the kernels' form; one object gives one, so that tied weights stay tied."""
        if id(weight) not in self._packed:
            if isinstance(weight, QuantizedWeight):
                packed = pack_quantized(
                    weight.codes,
                    weight.scales,
                    weight.zeros,
                    weight.codebook,
                    in_features=weight.shape[1],
                    group_size=weight.group_size,
                    compute_dtype=self.plan.dtype,
                )
            else:
                packed = pack_dense(weight.detach())
            self._packed[id(weight)] = packed
        return self._packed[id(weight)]

    # ---- one step ------------------------------------------------------------------------------------------------

    def run(
        self,
        buffers: Buffers,
        cache: PagedKVCache,
        max_query_len: int,
        *,
        hidden: bool = True,
        chosen: Tensor | None = None,
        in_loop: bool = False,
    ) -> Tensor | None:
        """Launch a step on what is in the buffers; logits and hidden rows are there when the device has run it.

        Args:
            buffers: of this chain.
            cache: where keys and values go.
            max_query_len: a bound of the tokens that one sequence computes.
            hidden: the rows after the final norm are wanted too; else they may not be written.
            chosen: [num_logits] int64 for the first of the largest logits of each row, -1 unless all are finite.
            in_loop: the tokens' rows are embedded already (``advance.py``), and so is the choice among keys its affair.

        Returns:
            ``chosen``, if it was written; with ``in_loop`` perhaps instead of it the keys of which the largest say what
            it is, [num_logits, any] int64. Logits may not be written then. None: the choice is left to the caller.
        """
        if self.persistent is not None and self.persistent.serves(buffers, cache):
            self.persistent.run(buffers, cache, hidden=hidden, chosen=chosen)
            return chosen
        step = _Launches(self, buffers, cache, max_query_len, hidden, chosen, in_loop)
        for node in self.plan.nodes:
            step.launch(node)
        return step.choice

    def embedding(self, buffers: Buffers) -> Embedding:
        """Where the rows of a step's tokens come from, and where they go."""
        return Embedding(self._wte, self._wpe, buffers.x)

    def embed(self, buffers: Buffers) -> None:
        """Launch the embedding alone: what a step with ``in_loop`` takes for granted."""
        embedding_rows_triton(buffers.input_ids, buffers.position_ids, self._wte, self._wpe, buffers.x, pdl=self.pdl)

    def product(self, linear: Linear) -> _Product:
        """A linear layer of the plan, packed."""
        return self._products[id(linear)]


class _Launches:
    """The launches of one step; they remember what is not yet merged."""

    def __init__(
        self,
        chain: Chain,
        buffers: Buffers,
        cache: PagedKVCache,
        max_query_len: int,
        wants_hidden: bool,
        chosen: Tensor | None,
        in_loop: bool,
    ) -> None:
        self.chain = chain
        self.plan = chain.plan
        self.b = buffers
        self.cache = cache
        self.max_query_len = max_query_len
        self.wants_hidden = wants_hidden
        self.chosen = chosen
        self.in_loop = in_loop
        # what says which tokens were chosen
        self.choice: Tensor | None = None
        self.num_tokens = buffers.size.num_tokens
        # the product's own norm rounds unlike a separate one: a choice by size would let bits depend on it
        self.fuses_norm = chain.batch_invariant or self.num_tokens <= MAX_FUSED_NORM
        self.partials: Partials | None = None
        self.query: Tensor
        # what the next projection reads
        self.branch: Tensor

    def launch(self, node: object) -> None:
        match node:
            case Embed() if self.in_loop:
                pass
            case Embed():
                self.chain.embed(self.b)
            case NormQKV():
                self._qkv(node)
            case Attention():
                self._attention(node)
            case LinearResidual():
                self._residual(node)
            case NormLinearAct():
                self._activated(node)
            case NormResidual():
                norm_rows_triton(self.b.x, _norm(node.norm), self.b.x, pdl=self.chain.pdl)
            case Head():
                self._head(node)

    def _linear(self, x: Tensor, linear: Linear, out: Tensor, *, norm: Norm | None = None, **options) -> None:
        product = self.chain.product(linear)
        kernel_norm = None
        if norm is not None and self.fuses_norm:
            kernel_norm = _norm(norm)
        elif norm is not None:
            norm_rows_triton(x, _norm(norm), self.b.normed, pdl=self.chain.pdl)
            x = self.b.normed
        fused_linear_triton(
            x,
            product.weight,
            product.bias,
            out,
            workspace=self.b.workspace,
            norm=kernel_norm,
            batch_invariant=self.chain.batch_invariant,
            pdl=self.chain.pdl,
            **options,
        )

    def _qkv(self, node: NormQKV) -> None:
        plan, cache, b = self.plan, self.cache, self.b
        width = plan.n_head * plan.head_dim
        caches = cache.key_cache(node.layer), cache.value_cache(node.layer)
        if cache.scales is None:
            self._linear(b.x, node.linear, b.qkv[:, :width], norm=node.norm, append=Append(*caches, b.slot_mapping))
        else:
            self._linear(b.x, node.linear, b.qkv, norm=node.norm)
            heads = b.qkv.view(self.num_tokens, 3, plan.n_head, plan.head_dim)
            scales = cache.key_scales(node.layer), cache.value_scales(node.layer)
            write_kv_triton(heads[:, 1], heads[:, 2], *caches, b.slot_mapping, *scales, pdl=self.chain.pdl)
        self.query = b.qkv[:, :width].unflatten(1, (plan.n_head, plan.head_dim))

    def _attention(self, node: Attention) -> None:
        b, cache, chain = self.b, self.cache, self.chain
        caches = cache.key_cache(node.layer), cache.value_cache(node.layer)
        scales = cache.key_scales(node.layer), cache.value_scales(node.layer)
        self.branch = b.attended
        attended = b.attended.unflatten(1, (node.n_head, node.head_dim))
        if not b.size.num_splits:
            batch = b.block_table, b.seq_lens, b.query_start_loc, self.max_query_len
            paged_prefill_into_triton(
                self.query,
                *caches,
                *batch,
                attended,
                node.scale,
                *scales,
                batch_invariant=chain.batch_invariant,
                pdl=chain.pdl,
            )
            return
        paged_decode_partials_triton(
            self.query,
            *caches,
            b.block_table,
            b.seq_lens,
            b.values,
            b.lse,
            node.scale,
            *scales,
            batch_invariant=chain.batch_invariant,
            pdl=chain.pdl,
        )
        if b.size.num_splits <= MAX_MERGED and self.num_tokens <= MAX_ROWS and not chain.batch_invariant:
            self.partials = Partials(b.values, b.lse, b.seq_lens)
        else:
            merge_splits_triton(b.values, b.lse, b.seq_lens, attended, pdl=chain.pdl)

    def _residual(self, node: LinearResidual) -> None:
        b = self.b
        if self.partials is not None:
            partials, self.partials = self.partials, None
            product = self.chain.product(node.linear)
            fused_linear_rows(
                None, product.weight, product.bias, b.x, residual=b.x, partials=partials, pdl=self.chain.pdl
            )
            return
        self._linear(self.branch, node.linear, b.x, residual=b.x)

    def _activated(self, node: NormLinearAct) -> None:
        self.branch = self.b.inner[:, : node.linear.weight.shape[0]]
        activation = KERNEL_ACTIVATIONS[node.activation]
        self._linear(self.b.x, node.linear, self.branch, norm=node.norm, activation=activation)

    def _head(self, node: Head) -> None:
        b = self.b
        plain = not (self.wants_hidden or self.chain.batch_invariant)
        if node.linear is not None and b.size.num_splits and self.fuses_norm and plain:
            # the rows of a decode step are those whose logits are wanted
            product = self.chain.product(node.linear)
            if self.chosen is None or self.num_tokens > MAX_ROWS or product.bias is not None:
                self._linear(b.x, node.linear, b.logits, norm=node.norm)
                return
            norm = None if node.norm is None else _norm(node.norm)
            options = {"finite": True, "pdl": self.chain.pdl}
            if self.in_loop:
                self.choice = head_keys_triton(b.x, product.weight, norm, None, self.num_tokens, b.workspace, **options)
                return
            head_argmax_triton(b.x, product.weight, norm, None, self.chosen, b.best, b.workspace, **options)
            self.choice = self.chosen
            return
        norm = None if node.norm is None else _norm(node.norm)
        norm_rows_triton(b.x, norm, b.hidden, rows=b.logits_indices, pdl=self.chain.pdl)
        if node.linear is not None:
            self._linear(b.hidden, node.linear, b.logits)


def _rows(table: Tensor) -> Tensor:
    """The same numbers with contiguous rows."""
    return table.detach() if table.stride(1) == 1 else table.detach().contiguous()


def _norm(norm: Norm) -> KernelNorm:
    return KernelNorm(norm.weight, norm.bias, norm.eps)
