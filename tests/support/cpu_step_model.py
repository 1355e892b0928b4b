"""A random GPT in plan form, run by ``cpu_step``, beside the same GPT in plain float64 torch.

The plan is written here row by row rather than by ``gpt2rt.graph``, so that the tests of the C++ step stand on the
layout that its documentation gives and on nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import struct

import torch
from torch import Tensor
from torch.nn import functional as F

import gpt2rt.ops as ops

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {
    "none": (0, lambda x: x),
    "gelu_new": (1, lambda x: F.gelu(x, approximate="tanh")),
    "gelu": (2, F.gelu),
    "relu": (3, F.relu),
    "silu": (4, F.silu),
    "tanh": (5, torch.tanh),
    "quick_gelu": (6, lambda x: x * torch.sigmoid(1.702 * x)),
}


def double_bits(value: float) -> int:
    """The bits of a double as a signed 64-bit integer, as the plan holds real numbers."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def aligned_bytes(size: int) -> Tensor:
    """[size] uint8 whose first byte lies at a multiple of 64."""
    raw = torch.zeros(size + 64, dtype=torch.uint8)
    start = -raw.data_ptr() % 64
    return raw[start : start + size]


class Arena:
    """Collects weights and gives out their offsets."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, Tensor]] = []
        self.size = 0

    def add(self, tensor: Tensor) -> int:
        offset = self.size
        self.pieces.append((offset, tensor))
        self.size += -(-tensor.numel() * tensor.element_size() // 64) * 64
        return offset

    def vector(self, v: Tensor | None) -> int:
        return -1 if v is None else self.add(v.float().contiguous())

    def linear(self, weight: Tensor) -> int:
        """``weight`` [N, K] in panels."""
        packed = aligned_bytes(ops.packed_linear_bytes(weight.size(0), weight.size(1), weight.dtype))
        ops.pack_linear(weight, packed)
        return self.add(packed)

    def tensor(self) -> Tensor:
        arena = aligned_bytes(self.size)
        for offset, piece in self.pieces:
            data = piece.view(torch.uint8)
            arena[offset : offset + data.numel()] = data
        return arena


@dataclasses.dataclass
class Config:
    """Shape of a random model; ``post_norm`` puts the norms after the additions, as OpenAI GPT does."""

    n_layer: int = 2
    n_head: int = 3
    head_dim: int = 20
    n_inner: int = 50
    vocab_size: int = 97
    n_positions: int = 600
    activation: str = "gelu_new"
    post_norm: bool = False
    bias: bool = True
    head: bool = True
    eps: float = 1e-5
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32
    block_size: int = 16
    num_blocks: int = 48
    seed: int = 0

    @property
    def n_embd(self) -> int:
        return self.n_head * self.head_dim


class StepModel:
    """Weights, plan, arena and cache of a random model."""

    def __init__(self, config: Config, arena_hook=None) -> None:
        self.config = c = config
        g = torch.Generator().manual_seed(c.seed)

        def randn(*shape: int, std: float = 0.08) -> Tensor:
            return torch.randn(*shape, generator=g) * std

        n = c.n_embd
        self.wte = randn(c.vocab_size, n, std=0.5).to(c.dtype)
        self.wpe = randn(c.n_positions, n, std=0.2).to(c.dtype)
        self.layers = []
        for _ in range(c.n_layer):
            layer = {}
            for name, n_out, n_in in (("qkv", 3 * n, n), ("proj", n, n), ("fc", c.n_inner, n), ("out", n, c.n_inner)):
                layer[name] = (randn(n_out, n_in, std=n_in**-0.5).to(c.dtype), randn(n_out) if c.bias else None)
            for name in ("ln_1", "ln_2"):
                layer[name] = (1 + randn(n), randn(n))
            self.layers.append(layer)
        self.ln_f = (1 + randn(n), randn(n))
        self.plan, self.arena = self._build_plan()
        if arena_hook is not None:
            self.arena = arena_hook(self.arena)
        self.reset_cache()

    def _build_plan(self) -> tuple[Tensor, Tensor]:
        c, n = self.config, self.config.n_embd
        arena, rows = Arena(), []

        def row(opcode: int, **fields: int) -> None:
            values = [0] * 16
            values[0] = opcode
            for name, value in fields.items():
                values[int(name[1:])] = value
            rows.append(values)

        def norm(ln: tuple[Tensor, Tensor] | None) -> dict[str, int]:
            if ln is None:
                return {"f1": -1, "f2": -1}
            return {"f1": arena.vector(ln[0]), "f2": arena.vector(ln[1]), "f9": double_bits(c.eps)}

        def linear(w: tuple[Tensor, Tensor | None]) -> dict[str, int]:
            weight, bias = w
            return {
                "f3": arena.linear(weight),
                "f4": arena.vector(bias),
                "f5": weight.size(1),
                "f6": weight.size(0),
                "f7": DTYPE_CODE[weight.dtype],
            }

        row(0, f1=c.vocab_size, f2=c.n_positions, f3=n, f4=-1)
        for i, layer in enumerate(self.layers):
            row(1, **norm(None if c.post_norm else layer["ln_1"]), **linear(layer["qkv"]), f8=i)
            row(2, f1=i, f2=c.n_head, f3=c.head_dim, f4=double_bits(c.head_dim**-0.5))
            row(3, **linear(layer["proj"]))
            if c.post_norm:
                row(5, **norm(layer["ln_1"]), f5=n)
            activation = ACTIVATIONS[c.activation][0]
            row(4, **norm(None if c.post_norm else layer["ln_2"]), **linear(layer["fc"]), f10=activation)
            row(3, **linear(layer["out"]))
            if c.post_norm:
                row(5, **norm(layer["ln_2"]), f5=n)
        head = linear((self.wte, None)) if c.head else {"f3": -1, "f4": -1, "f5": n, "f6": 0}
        row(6, **norm(None if c.post_norm else self.ln_f), **head)
        return torch.tensor(rows), arena.tensor()

    def reset_cache(self) -> None:
        c = self.config
        # what was never written must never be read; an int8 cache has its NaN in the scales
        shape = (c.n_layer, 2, c.num_blocks, c.n_head, c.block_size, c.head_dim)
        scaled = c.cache_dtype == torch.int8
        self.kv_cache = torch.full(shape, 77 if scaled else math.nan, dtype=c.cache_dtype)
        self.kv_scales = torch.full(shape[:-1], math.nan) if scaled else None

    def batch(self, chunks: list[tuple[list[int], int]], blocks: list[list[int]]) -> dict[str, Tensor]:
        """Inputs of a step over ``chunks``: (tokens, number of tokens already in the cache) for each sequence."""
        bs = self.config.block_size
        ids, positions, slots, starts = [], [], [], [0]
        for (tokens, past), table in zip(chunks, blocks, strict=True):
            ids += tokens
            steps = range(past, past + len(tokens))
            positions += steps
            slots += [table[p // bs] * bs + p % bs for p in steps]
            starts.append(len(ids))
        width = max((len(table) for table in blocks), default=0)
        return {
            "input_ids": torch.tensor(ids, dtype=torch.int64),
            "position_ids": torch.tensor(positions, dtype=torch.int64),
            "query_start_loc": torch.tensor(starts, dtype=torch.int32),
            "seq_lens": torch.tensor([past + len(tokens) for tokens, past in chunks], dtype=torch.int32),
            # unused entries may hold anything
            "block_table": torch.tensor([t + [-99] * (width - len(t)) for t in blocks], dtype=torch.int32).reshape(
                len(blocks), width
            ),
            "slot_mapping": torch.tensor(slots, dtype=torch.int64),
            "logits_indices": torch.arange(len(ids)),
        }

    def arguments(self, batch: dict[str, Tensor], *, hidden: bool = False, num_threads: int = 1) -> dict:
        """Arguments of ``cpu_step`` by name, with outputs and workspace full of NaN."""
        c = self.config
        num_tokens, num_logits = batch["input_ids"].numel(), batch["logits_indices"].numel()
        size = ops.cpu_step_workspace_bytes(self.plan, num_tokens, num_logits)
        return {
            "plan": self.plan,
            "arena": self.arena,
            "wte": self.wte,
            "wpe": self.wpe,
            **batch,
            "kv_cache": self.kv_cache,
            "workspace": torch.full((-(-size // 4),), math.nan),
            "logits": torch.full((num_logits if c.head else 0, c.vocab_size), math.nan),
            "hidden": torch.full((num_logits if hidden else 0, c.n_embd), math.nan),
            "num_threads": num_threads,
            "times": None,
            "kv_scales": self.kv_scales,
        }

    def step(self, batch: dict[str, Tensor], *, hidden: bool = False, num_threads: int = 1) -> tuple[Tensor, Tensor]:
        """(logits, hidden) of one step."""
        arguments = self.arguments(batch, hidden=hidden, num_threads=num_threads)
        ops.cpu_step(*arguments.values())
        return arguments["logits"], arguments["hidden"]

    def run(self, tokens: list[int], blocks: list[int], chunk: int | None = None, num_threads: int = 1) -> Tensor:
        """Logits of all positions of one sequence, computed ``chunk`` tokens at a time: [len(tokens), vocab_size]."""
        return self.run_from(0, tokens, blocks, chunk, num_threads)

    def run_from(
        self, start: int, tokens: list[int], blocks: list[int], chunk: int | None = None, num_threads: int = 1
    ) -> Tensor:
        """The same for the positions from ``start`` on; those before are in the cache."""
        chunk = chunk or len(tokens)
        parts = [
            self.step(self.batch([(tokens[i : i + chunk], i)], [blocks]), num_threads=num_threads)[0]
            for i in range(start, len(tokens), chunk)
        ]
        return torch.cat(parts)

    def reference(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """(logits, hidden) of all positions in plain float64: [len(tokens), vocab_size], [len(tokens), n_embd]."""
        c, n = self.config, self.config.n_embd
        act = ACTIVATIONS[c.activation][1]

        def norm(x: Tensor, ln: tuple[Tensor, Tensor]) -> Tensor:
            return F.layer_norm(x, (n,), ln[0].double(), ln[1].double(), c.eps)

        def linear(x: Tensor, w: tuple[Tensor, Tensor | None]) -> Tensor:
            return F.linear(x, w[0].double(), None if w[1] is None else w[1].double())

        t = len(tokens)
        x = self.wte.double()[tokens] + self.wpe.double()[:t]
        for layer in self.layers:
            qkv = linear(x if c.post_norm else norm(x, layer["ln_1"]), layer["qkv"])
            q, k, v = (part.view(t, c.n_head, c.head_dim).transpose(0, 1) for part in qkv.split(n, dim=1))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(t, n)
            x = x + linear(a, layer["proj"])
            if c.post_norm:
                x = norm(x, layer["ln_1"])
            x = x + linear(act(linear(x if c.post_norm else norm(x, layer["ln_2"]), layer["fc"])), layer["out"])
            if c.post_norm:
                x = norm(x, layer["ln_2"])
        hidden = x if c.post_norm else norm(x, self.ln_f)
        return hidden @ self.wte.double().t(), hidden
