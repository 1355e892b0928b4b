"""Random models of GPT-2's sizes, and steps of them that can be replayed."""

from __future__ import annotations

import copy
import gc
from typing import Any

import torch
from shapes import SHAPES
from torch import Tensor

from gpt2rt import GPT2Config, GPT2LMHeadModel
from gpt2rt.cache import PagedKVCache
from gpt2rt.graph import StepBatch

#: what is measured, smallest first
MODELS: dict[str, dict[str, Any]] = {
    "124M": SHAPES["124M"],
    "355M": SHAPES["355M"],
    "774M": dict(n_layer=36, n_embd=1280, n_head=20, vocab_size=50257, n_positions=1024),
    "1.5B": SHAPES["1.5B"],
    "toy": dict(n_layer=1, n_embd=32, n_head=2, vocab_size=61, n_positions=96),
}
#: format -> what quantize_model is asked for: (scheme of the layers, format of the embedding and the head tied to it)
FORMATS: dict[str, tuple[str, str] | None] = {
    "float16": None,
    "bfloat16": None,
    "float32": None,
    "int8": ("int8", "int8"),
    "int4": ("int4", "int8"),
    "nf4": ("nf4", "int8"),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def make_model(
    name: str, format: str, device: torch.device, *, scale: float = 1.0, sizes: dict[str, Any] | None = None
) -> GPT2LMHeadModel:
    """A random model, the same in every run; quantised formats have float16 activations.

    Args:
        name: of :data:`MODELS`.
        format: of :data:`FORMATS`.
        device: where it is made.
        scale: of all matrices; larger ones make logits that differ more, as trained models have them.
        sizes: instead of those of ``name``.
    """
    torch.manual_seed(0)
    config = GPT2Config(**{**(sizes or MODELS[name]), "bos_token_id": 0, "eos_token_id": None})
    with torch.device(device):
        model = GPT2LMHeadModel(config)
    if scale != 1.0:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(scale)
    model = model.eval().to(device=device, dtype=DTYPES.get(format, torch.float16))
    asked = FORMATS[format]
    if asked is not None:
        from gpt2rt import QuantizationConfig, quantize_model

        quantize_model(model, QuantizationConfig(asked[0], embeddings=asked[1]), progress=False)
    return model


def weights_of(plan: Any) -> dict[str, str]:
    """What a plan multiplies by, for the record: the formats of its layers and of its head, as they are."""
    formats = []
    for node in plan.nodes:
        linear = getattr(node, "linear", None)
        if linear is not None:
            weight = linear.weight
            formats.append(getattr(weight, "scheme", None) or str(weight.dtype).removeprefix("torch."))
    *layers, head = formats
    return {"layers": ", ".join(dict.fromkeys(layers)), "head": head}


def title_of(name: str, plan: Any) -> str:
    """What a model is called in rows: its size and format, and that of its head if it is another."""
    weights = weights_of(plan)
    other = "" if weights["head"] == weights["layers"] else f", head {weights['head']}"
    return f"{name} {weights['layers']}{other}"


def plan_of(model: Any) -> Any:
    """The plan that the model's executors run."""
    return model.generation_executor("eager").plan


def drop() -> None:
    """Give the memory of what is no longer named back to the device."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def random_cache(plan: Any, num_seqs: int, context: int, dtype: torch.dtype, *, room: int = 0) -> PagedKVCache:
    """A cache with room for sequences of ``context + room`` tokens, filled with random keys and values."""
    blocks = num_seqs * -(-(context + room) // 16)
    cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, blocks, dtype=dtype, device=plan.device)
    for layer in cache.data:
        if dtype.itemsize == 1:
            layer.view(torch.uint8).random_(0, 100)
        else:
            layer.normal_()
    if cache.scales is not None:
        cache.scales.fill_(0.02)
    return cache


def decode_batch(plan: Any, num_seqs: int, context: int, device: torch.device) -> StepBatch:
    """One new token for each of ``num_seqs`` sequences, which then have ``context`` tokens; blocks in random order."""
    each = -(-context // 16)
    table = torch.randperm(num_seqs * each, device=device).view(num_seqs, each).to(torch.int32)
    last = context - 1
    return StepBatch(
        input_ids=torch.randint(0, plan.vocab_size, (num_seqs,), device=device),
        position_ids=torch.full((num_seqs,), last, dtype=torch.int64, device=device),
        query_start_loc=torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
        seq_lens=torch.full((num_seqs,), context, dtype=torch.int32, device=device),
        block_table=table,
        slot_mapping=table[:, last // 16].long() * 16 + last % 16,
        logits_indices=torch.arange(num_seqs, device=device),
        max_query_len=1,
        max_seq_len=context,
    )


def prefill_batch(ids: Tensor, past: int, table: Tensor, *, all_logits: bool = False) -> StepBatch:
    """Tokens ``past`` and following of one sequence.

    Args:
        ids: [num_tokens] int64.
        past: tokens that are in the cache already.
        table: [1, max_blocks] int32.
        all_logits: ask for every row's instead of the last.
    """
    count, device = ids.numel(), ids.device
    positions = torch.arange(past, past + count, device=device)
    return StepBatch(
        input_ids=ids,
        position_ids=positions,
        query_start_loc=torch.tensor([0, count], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([past + count], dtype=torch.int32, device=device),
        block_table=table,
        slot_mapping=table[0, positions // 16].long() * 16 + positions % 16,
        logits_indices=torch.arange(count, device=device) if all_logits else torch.tensor([count - 1], device=device),
        max_query_len=count,
        max_seq_len=past + count,
    )


class ReplayedStep:
    """A step of a chain on fixed inputs: ``step(0)`` launches it, and gives the buffer of its logits.

    Args:
        chain: of an executor.
        batch: the inputs.
        cache: of its sequences.
        decode: one token a sequence; else prompts.
        greedy: choose the first of the largest logits, as decode loops do; the buffer of these tokens is given instead.
    """

    def __init__(
        self, chain: Any, batch: StepBatch, cache: PagedKVCache, *, decode: bool, greedy: bool = False
    ) -> None:
        from gpt2rt.graph.chain import Buffers, StepSize
        from gpt2rt.graph.cuda import num_splits_for
        from gpt2rt.kernels.sampling_select import select_workspace

        plan = chain.plan
        seqs, tokens, rows = batch.seq_lens.numel(), batch.input_ids.numel(), batch.logits_indices.numel()
        splits = num_splits_for(batch.max_seq_len) if decode else 0
        self.chain, self.cache, self.max_query_len = chain, cache, batch.max_query_len
        self.buffers = Buffers(chain, StepSize(tokens, seqs, rows, cache.blocks_for(plan.n_positions), splits))
        self.buffers.load(batch)
        self.ids = torch.zeros(rows, dtype=torch.int64, device=plan.device) if greedy else None
        self._maxima = select_workspace(rows, plan.vocab_size, plan.device).maxima
        self._places = torch.zeros_like(self._maxima, dtype=torch.int32)

    def __call__(self, _: int = 0) -> Tensor:
        from gpt2rt.kernels.sampling import argmax_into_triton

        chosen = self.chain.run(self.buffers, self.cache, self.max_query_len, hidden=False, chosen=self.ids)
        if self.ids is None:
            return self.buffers.logits
        if chosen is None:
            argmax_into_triton(self.buffers.logits, self.ids, self._maxima, self._places, finite=True)
        return self.ids


def altered(chain: Any, **changes: Any) -> Any:
    """The same chain, its packed weights shared, with other settings: ``pdl``, ``batch_invariant``."""
    other = copy.copy(chain)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def step_bytes(chain: Any, num_seqs: int, context: int, cache: PagedKVCache) -> int:
    """Bytes that a decode step must read: the weights once, each sequence's keys and values."""
    plan = chain.plan
    head = plan.head_dim * cache.data.element_size() + (0 if cache.scales is None else 4)
    return chain.weight_bytes + num_seqs * context * plan.n_layer * 2 * plan.n_head * head
