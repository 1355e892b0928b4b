"""The cpu executor: a plan as a table of numbers and one arena of packed weights, run by one C++ call a step.

The residual stream, norms, softmax and logits are float32 whatever the weights' format; keys and values are stored in
the cache's dtype. Two arithmetics of the products: "exact" multiplies float32 activations; "fast" takes what the format
allows: where the processor has the instruction, bfloat16 activations with bfloat16 weights, and bfloat16 queries and
softmax weights with a bfloat16 cache; int8 activations with int8 and int4 weights (unless the weight itself asks for
float32). Results are bit-equal whatever the batch, its neighbours, the chunks of the prompt and the number of threads
(csrc/step says how).
"""

from __future__ import annotations

import copy
import dataclasses
import os
import struct
import threading

import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.cache import PagedKVCache
from gpt2rt.ops.arena import allocate_arena
from gpt2rt.quantization import QuantizedWeight

from .batch import StepBatch, StepOutput
from .executor import check_step
from .packed_cache import open_cache
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

# csrc/step/plan.h reads the same numbers
_FIELDS = 16
_EMBED, _NORM_QKV, _ATTENTION, _LINEAR_RESIDUAL, _NORM_LINEAR_ACT, _NORM, _HEAD = range(7)
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT8, _INT4, _CODE4 = 3, 4, 5
_PHASES = ("embed", "rows", "norm", "linear", "attention", "head rows", "head", "cache", "head top")
_ACTIVATION_CODES = {
    "linear": 0,
    "gelu_new": 1,
    "gelu_pytorch_tanh": 1,
    "gelu_accurate": 1,
    "gelu": 2,
    "gelu_python": 2,
    "relu": 3,
    "silu": 4,
    "swish": 4,
    "tanh": 5,
    "quick_gelu": 6,
}


ARITHMETICS = ("fast", "exact")

#: what a step returns of the logits: all, the largest of each row, or the k largest
HeadMode = str | tuple[str, int]


def unsupported(plan: Plan) -> str:
    """Why this executor cannot run a plan, in one clause; empty if it can."""
    if plan.dtype not in _DTYPE_CODES:
        return f"the weights are {plan.dtype}"
    for node in plan.nodes:
        if isinstance(node, NormLinearAct) and node.activation not in _ACTIVATION_CODES:
            return f"the C++ step has no activation {node.activation!r}"
    return ""


def _bits(value: float) -> int:
    """The bits of a float64 as an int64, the only type a plan row holds."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@dataclasses.dataclass
class _Vector:
    offset: int
    source: Tensor


@dataclasses.dataclass
class _Packed:
    offset: int
    num_bytes: int
    source: Tensor | QuantizedWeight

    def tensors(self) -> list[Tensor]:
        """What is packed."""
        source = self.source
        if not isinstance(source, QuantizedWeight):
            return [source]
        return [tensor for tensor in (source.codes, source.scales, source.zeros) if tensor is not None]

    def write(self, arena: Tensor) -> None:
        out = arena[self.offset : self.offset + self.num_bytes]
        source = self.source
        if isinstance(source, QuantizedWeight):
            sizes = {"in_features": source.shape[1], "group_size": source.group_size}
            ops.pack_quantized(source.codes, source.scales, source.zeros, source.codebook, out, **sizes)
        else:
            ops.pack_linear(source, out)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a profiled step.

    Attributes:
        node: index of its node in the plan.
        name: "embed", "rows" (norm, rounding or quantisation of many rows), "norm", "linear", "attention", "head rows",
            "head" or "head top" (the threads' best logits become one list).
        seconds: how long it took, the barrier after it included.
    """

    node: int
    name: str
    seconds: float


def default_arithmetic() -> str:
    """``GPT2RT_CPU_ARITHMETIC``, or "fast".

    Raises:
        ValueError: it is neither "fast" nor "exact".
    """
    value = os.environ.get("GPT2RT_CPU_ARITHMETIC") or "fast"
    if value not in ARITHMETICS:
        raise ValueError(f"GPT2RT_CPU_ARITHMETIC is {value!r}, expected one of {', '.join(ARITHMETICS)}")
    return value


def default_cache_dtype(plan: Plan, arithmetic: str) -> torch.dtype:
    """What keys and values are stored in unless the caller says otherwise.

    The plan's dtype; but bfloat16 where every matrix of the layers is int8 or int4 with int8 activations, the
    arithmetic is fast and the processor has bfloat16 dot products. There activations are rounded to 8 bits anyway, and
    attention reads half as much and computes with products of bfloat16.
    """
    linears = [node.linear for node in plan.nodes if isinstance(node, NormQKV | LinearResidual | NormLinearAct)]
    rounded = bool(linears) and all(
        isinstance(linear.weight, QuantizedWeight) and linear.weight.activations == "int8" for linear in linears
    )
    if rounded and arithmetic == "fast" and ops.has_bfloat16_products():
        return torch.bfloat16
    return plan.dtype


class _Encoder:
    """Lays a plan out: first every offset, then one allocation, then the packing."""

    def __init__(self, plan: Plan, arithmetic: str) -> None:
        self.rows: list[list[int]] = []
        self.vectors: list[_Vector] = []
        self.packed: list[_Packed] = []
        self.size = 0
        self.n_embd = plan.n_embd
        self.fast = arithmetic == "fast"
        # where quantised weights lie, by identity: a table that is the head's weight too is packed once
        self._places: dict[int, dict[int, int]] = {}
        for node in plan.nodes:
            self._encode(node)
        self.size = max(self.size, 64)

    def _reserve(self, num_bytes: int) -> int:
        offset = self.size
        self.size += -(-num_bytes // 64) * 64
        return offset

    def _vector(self, source: Tensor | None) -> int:
        if source is None:
            return -1
        self.vectors.append(_Vector(self._reserve(source.numel() * 4), source))
        return self.vectors[-1].offset

    def _norm(self, norm: Norm | None) -> dict[int, int]:
        if norm is None:
            return {1: -1, 2: -1}
        return {1: self._vector(norm.weight), 2: self._vector(norm.bias), 9: _bits(norm.eps)}

    def _linear(self, linear: Linear | None) -> dict[int, int]:
        if linear is None:
            return {3: -1, 4: -1}
        weight = linear.weight
        if isinstance(weight, QuantizedWeight):
            place = self._quantized(weight)
        else:
            num_bytes = ops.packed_linear_bytes(weight.size(0), weight.size(1), weight.dtype)
            self.packed.append(_Packed(self._reserve(num_bytes), num_bytes, weight))
            place = {3: self.packed[-1].offset, 7: _DTYPE_CODES[weight.dtype], 12: self.fast}
        n, k = weight.shape
        return {**place, 4: self._vector(linear.bias), 5: k, 6: n}

    def _quantized(self, weight: QuantizedWeight) -> dict[int, int]:
        if id(weight) in self._places:
            return self._places[id(weight)]
        int8, codebook = weight.scheme == "int8", weight.codebook
        n, k = weight.shape
        if not ops.has_kernel(int8, codebook is not None, k, weight.group_size):
            # the same numbers, in more memory: blocks of odd sizes are those of odd models
            dense = weight.dequantize()
            num_bytes = ops.packed_linear_bytes(n, k, dense.dtype)
            self.packed.append(_Packed(self._reserve(num_bytes), num_bytes, dense))
            place = {3: self.packed[-1].offset, 7: _DTYPE_CODES[dense.dtype]}
        else:
            num_bytes = ops.packed_quantized_bytes(
                n,
                k,
                bits=8 if int8 else 4,
                group_size=weight.group_size,
                has_zeros=weight.zeros is not None,
                has_codebook=codebook is not None,
            )
            self.packed.append(_Packed(self._reserve(num_bytes), num_bytes, weight))
            place = {
                3: self.packed[-1].offset,
                7: _INT8 if int8 else _INT4 if codebook is None else _CODE4,
                11: weight.group_size,
                12: self.fast and weight.activations == "int8",
                13: self._vector(codebook),
                14: weight.zeros is not None,
            }
        self._places[id(weight)] = place
        return place

    def _row(self, opcode: int, *parts: dict[int, int]) -> None:
        row = [0] * _FIELDS
        row[0] = opcode
        for part in parts:
            for field, value in part.items():
                row[field] = int(value)
        self.rows.append(row)

    def _encode(self, node) -> None:
        match node:
            case Embed():
                v, e = node.wte.shape
                place = self._quantized(node.wte) if isinstance(node.wte, QuantizedWeight) else {3: -1}
                table = {(4 if field == 3 else field): value for field, value in place.items()}
                self._row(_EMBED, {1: v, 2: node.wpe.size(0), 3: e}, table)
            case NormQKV():
                self._row(_NORM_QKV, self._norm(node.norm), self._linear(node.linear), {8: node.layer})
            case Attention():
                sizes = {1: node.layer, 2: node.n_head, 3: node.head_dim}
                self._row(_ATTENTION, sizes, {4: _bits(node.scale), 12: self.fast})
            case LinearResidual():
                self._row(_LINEAR_RESIDUAL, self._linear(node.linear))
            case NormLinearAct():
                activation = {10: _ACTIVATION_CODES[node.activation]}
                self._row(_NORM_LINEAR_ACT, self._norm(node.norm), self._linear(node.linear), activation)
            case NormResidual():
                self._row(_NORM, self._norm(node.norm), {5: node.norm.weight.numel()})
            case Head():
                width = {} if node.linear else {5: self.n_embd}
                self._row(_HEAD, self._norm(node.norm), self._linear(node.linear), width)

    def table(self) -> Tensor:
        """The plan's rows [num_nodes, fields] int64."""
        return torch.tensor(self.rows, dtype=torch.int64)

    def arena(self, plan: Plan) -> Tensor:
        """All that is packed, from the cache of packed weights if it is there."""
        cache = open_cache(self.size) if plan.from_files else None
        if cache is None:
            return self._fill()
        sources = [vector.source for vector in self.vectors]
        for packed in self.packed:
            sources += packed.tensors()
        key = cache.key(self.table().numpy().tobytes(), sources)
        arena = cache.load(key, self.size)
        if arena is None:
            arena = self._fill()
            cache.store_soon(key, arena)
        return arena

    def _fill(self) -> Tensor:
        arena = allocate_arena(self.size)
        for vector in self.vectors:
            end = vector.offset + vector.source.numel() * 4
            arena[vector.offset : end].view(torch.float32).copy_(vector.source)
        for packed in self.packed:
            packed.write(arena)
        return arena


class CpuExecutor:
    """Runs steps of a plan in C++.

    The weights are packed here, once, or come packed from an earlier process (packed_cache.py): later changes of the
    model's tensors are not seen. Embedding tables are read from the model's own tensors.

    Args:
        plan: what to run; weights on CPU.
        num_threads: 0 = ``GPT2RT_NUM_THREADS`` if set, else ``torch.get_num_threads()`` at each step.
        arithmetic: "fast" or "exact", see above; None = ``GPT2RT_CPU_ARITHMETIC`` if set, else "fast".

    Attributes:
        arithmetic: which one.
        cache_dtype: what keys and values are best stored in, see :func:`default_cache_dtype`.

    Raises:
        ValueError: this executor cannot run the plan (see :func:`unsupported`), ``num_threads`` is negative, or
            ``arithmetic`` is neither.
        OSError: there is not enough memory for the packed weights.
    """

    name = "cpu"

    def __init__(self, plan: Plan, *, num_threads: int = 0, arithmetic: str | None = None) -> None:
        reason = unsupported(plan)
        if reason:
            raise ValueError(f"the cpu executor cannot run this model: {reason}; use the eager executor")
        if num_threads < 0:
            raise ValueError(f"num_threads must be at least 0, got {num_threads}; 0 chooses")
        if arithmetic not in (None, *ARITHMETICS):
            raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, got {arithmetic!r}")
        self.plan = plan
        self.num_threads = num_threads
        self.arithmetic = arithmetic or default_arithmetic()
        self.cache_dtype = default_cache_dtype(plan, self.arithmetic)
        encoder = _Encoder(plan, self.arithmetic)
        self._table = encoder.table()
        self._arena = encoder.arena(plan)
        embed = plan.nodes[0]
        assert isinstance(embed, Embed)
        # a quantised table lies in the arena
        wte = torch.empty(0) if isinstance(embed.wte, QuantizedWeight) else embed.wte
        self._wte, self._wpe = wte.detach().contiguous(), embed.wpe.detach().contiguous()
        head = plan.nodes[-1]
        assert isinstance(head, Head)
        self._has_head = head.linear is not None
        # scratch memory of its own for each thread that calls step
        self._scratch = threading.local()

    @property
    def packed_bytes(self) -> int:
        """Memory that the packed weights take, in bytes."""
        return self._arena.numel()

    def with_positions(self, wpe: Tensor) -> CpuExecutor:
        """This executor with another position table [n_positions, n_embd]; the packed weights are shared."""
        other = copy.copy(self)
        other.plan = with_positions(self.plan, wpe)
        other._wpe = wpe.detach().contiguous()
        return other

    def _workspace(self, num_bytes: int) -> Tensor:
        workspace = getattr(self._scratch, "workspace", None)
        if workspace is None or workspace.numel() < num_bytes:
            # a quarter more, so that a batch which grows by a row now and then does not allocate each time
            workspace = self._scratch.workspace = allocate_arena(num_bytes + num_bytes // 4)
        return workspace

    def step(
        self, batch: StepBatch, cache: PagedKVCache, *, return_hidden: bool = False, head: HeadMode = "logits"
    ) -> StepOutput:
        """Run one step.

        A step can be run again on the same batch: it writes the same keys and values to the same slots.

        Args:
            batch: the tokens.
            cache: where their keys and values go, and those before them are read.
            return_hidden: also return the rows after the final norm.
            head: "logits": all of them. "argmax" or ("topk", k): only the best, or the k best, of each row, found while
                they are computed, so that the others are never stored.

        Returns:
            Logits, or the best of them (and hidden rows) of ``batch.logits_indices``, float32.

        Raises:
            ValueError: the batch or the cache does not fit the plan, or ``head`` is none of these.
            IndexError: an id, position, slot or block lies outside its table; nothing was written.
        """
        check_step(self.plan, batch, cache)
        return self._run(batch, cache, return_hidden, None, self._top_count(head))

    def _top_count(self, head: HeadMode) -> int:
        """How many of the best logits a head gives; 0: all logits, in their order."""
        if head == "logits":
            return 0
        if not self._has_head:
            raise ValueError(f"head={head!r}, but the plan has no output layer; leave it out")
        if head == "argmax":
            return 1
        most = min(ops.MAX_TOP, self.plan.vocab_size)
        name, count = head if isinstance(head, tuple) and len(head) == 2 else (head, 0)
        if name != "topk" or not isinstance(count, int) or not 1 <= count <= most:
            raise ValueError(f'head must be "logits", "argmax" or ("topk", k) with k from 1 to {most}, got {head!r}')
        return count

    def profile(self, batch: StepBatch, cache: PagedKVCache, *, head: HeadMode = "logits") -> list[Phase]:
        """Run one step as :meth:`step` does, and tell how long each of its phases took.

        The clock of the calling thread is read at the start of each phase, which costs about 50 ns.

        Raises:
            ValueError, IndexError: as :meth:`step`.
        """
        check_step(self.plan, batch, cache)
        # a node has at most two phases
        times = torch.empty((2 * len(self.plan.nodes), 3), dtype=torch.float64)
        self._run(batch, cache, False, times, self._top_count(head))
        return [Phase(int(node), _PHASES[int(kind)], s) for node, kind, s in times.tolist() if node >= 0]

    def _run(
        self, batch: StepBatch, cache: PagedKVCache, return_hidden: bool, times: Tensor | None, top: int
    ) -> StepOutput:
        num_tokens, num_logits = batch.input_ids.numel(), batch.logits_indices.numel()
        workspace = self._workspace(ops.cpu_step_workspace_bytes(self._table, num_tokens, num_logits))
        wants_logits = self._has_head and not top
        logits = torch.empty((num_logits if wants_logits else 0, self.plan.vocab_size), dtype=torch.float32)
        top_ids = torch.empty((num_logits, top), dtype=torch.int64) if top else None
        top_logits = torch.empty((num_logits, top), dtype=torch.float32) if top else None
        hidden = torch.empty((num_logits if return_hidden else 0, self.plan.n_embd), dtype=torch.float32)
        ops.cpu_step(
            self._table,
            self._arena,
            self._wte,
            self._wpe,
            batch.input_ids,
            batch.position_ids,
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_table,
            batch.slot_mapping,
            batch.logits_indices,
            cache.data,
            workspace,
            logits,
            hidden,
            self.num_threads,
            times,
            cache.scales,
            top_ids,
            top_logits,
        )
        return StepOutput(
            logits if wants_logits else None, hidden if return_hidden else None, top_ids=top_ids, top_logits=top_logits
        )
