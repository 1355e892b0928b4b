"""Penalties for repetition, and the counts of tokens that they read, which live on the device.

The maths is that of ``penalties_ref``. ``counts`` [num_slots, V] int32 has a row for each running sequence, twice the
number of a token in its output plus 1 if it is in the prompt: one number says all that the three penalties ask. A step
adds its token; only when a slot gets another sequence are its counts made anew from all ids. Additions are of integers
and atomic, so their order does not matter.

Sources: Keskar et al., CTRL, arXiv:1909.05858, section 4.1 (repetition; of negative scores the product, as transformers
does it); frequency and presence are those of OpenAI's API.
Memory-bound: scores and counts are read once, scores are written once. A multiplication and an addition round
separately, so the scores have the bits of the definition.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config_table import Chunk, ConfigTable
from .launch import aligned, architecture_of, on_device
from .sampling_select import EXACT
from .score_refs import count_tokens_ref, penalties_ref, reset_counts_ref

__all__ = [
    "count_tokens_ref",
    "count_tokens_triton",
    "penalties_into_triton",
    "penalties_ref",
    "penalties_triton",
    "reset_counts_ref",
    "reset_counts_triton",
]

# by what a program goes over, scores and counts of a vocabulary or ids; starting points, not tuned on a device yet
CHUNKS: ConfigTable[Chunk] = ConfigTable("penalties", (), {"scores": ((Chunk(2048, 8),),), "ids": ((Chunk(256, 4),),)})


@triton.jit
def _penalties_kernel(
    scores_ptr,
    counts_ptr,
    slots_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    out_ptr,
    stride,
    stride_out,
    n,
    HAS_REPETITION: tl.constexpr,
    HAS_FREQUENCY: tl.constexpr,
    HAS_PRESENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64: row * n passes 2**31
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    slot = tl.load(slots_ptr + row)
    scores = tl.load(scores_ptr + row * stride + cols, mask=mask, other=0.0)  # [BLOCK]
    own = tl.load(counts_ptr + slot * n + cols, mask=cols < tl.where(slot >= 0, n, 0), other=0)
    said = own >> 1
    if HAS_REPETITION:
        factor = tl.load(repetition_ptr + row).to(tl.float32)
        penalised = tl.where(scores < 0.0, scores * factor, tl.div_rn(scores, factor))
        scores = tl.where(own != 0, penalised, scores)
    if HAS_FREQUENCY:
        cost = said.to(tl.float32) * tl.load(frequency_ptr + row).to(tl.float32)
        scores = tl.where(said > 0, scores - cost, scores)
    if HAS_PRESENCE:
        scores = tl.where(said > 0, scores - tl.load(presence_ptr + row).to(tl.float32), scores)
    tl.store(out_ptr + row * stride_out + cols, scores, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _count_tokens_kernel(counts_ptr, slots_ptr, token_ids_ptr, num_rows, n, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + rows, mask=rows < num_rows, other=-1)
    ids = tl.load(token_ids_ptr + rows, mask=rows < num_rows, other=-1)
    counted = (slots >= 0) & (ids >= 0) & (ids < n)
    tl.atomic_add(counts_ptr + slots * n + ids, tl.full([BLOCK], 2, tl.int32), mask=counted, sem="relaxed")


@triton.jit
def _clear_counts_kernel(counts_ptr, slots_ptr, n, BLOCK: tl.constexpr):
    slot = tl.load(slots_ptr + tl.program_id(0))
    if slot < 0:
        return
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts_ptr + slot * n + cols, tl.zeros([BLOCK], tl.int32), mask=cols < n)


@triton.jit
def _recount_kernel(counts_ptr, slots_ptr, token_ids_ptr, starts_ptr, prompt_lens_ptr, n, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    slot = tl.load(slots_ptr + sequence)
    if slot < 0:
        return
    begin = tl.load(starts_ptr + sequence)
    end = tl.load(starts_ptr + sequence + 1)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(token_ids_ptr + begin + places, mask=begin + places < end, other=-1)
    counted = (ids >= 0) & (ids < n)
    prompt = places < tl.load(prompt_lens_ptr + sequence)
    own_ptr = counts_ptr + slot * n + ids
    tl.atomic_add(own_ptr, tl.full([BLOCK], 2, tl.int32), mask=counted & ~prompt, sem="relaxed")
    tl.atomic_or(own_ptr, tl.full([BLOCK], 1, tl.int32), mask=counted & prompt, sem="relaxed")


def penalties_triton(
    scores: Tensor,
    counts: Tensor,
    slots: Tensor,
    repetition: Tensor | None,
    frequency: Tensor | None,
    presence: Tensor | None,
) -> Tensor:
    """Launch ``penalties``. Shapes and dtypes were checked by ``gpt2rt.ops``."""
    scores = aligned(scores)
    out = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    penalties_into_triton(scores, counts, slots, out, repetition=repetition, frequency=frequency, presence=presence)
    return out


def penalties_into_triton(
    scores: Tensor,
    counts: Tensor,
    slots: Tensor,
    out: Tensor,
    *,
    repetition: Tensor | None = None,
    frequency: Tensor | None = None,
    presence: Tensor | None = None,
) -> None:
    """The scores of ``penalties_ref``; without allocation.

    Args:
        scores: [R, V] float32, rows contiguous, any stride between them.
        counts: [num_slots, V] int32, contiguous.
        slots: [R] int64; negative: the scores stay.
        out: [R, V] float32, rows contiguous; may be ``scores``.
        repetition: [R] float64, or None.
        frequency: [R] float64, or None.
        presence: [R] float64, or None.
    """
    num_rows, n = scores.shape
    if not num_rows:
        return
    # where there is no penalty any tensor serves, it is not read
    settings = [scores if setting is None else setting for setting in (repetition, frequency, presence)]
    chunk = CHUNKS.find(architecture_of(scores), "scores")
    with on_device(scores):
        _penalties_kernel[(num_rows, triton.cdiv(n, chunk.size))](
            scores,
            counts,
            slots,
            *settings,
            out,
            scores.stride(0),
            out.stride(0),
            n,
            HAS_REPETITION=repetition is not None,
            HAS_FREQUENCY=frequency is not None,
            HAS_PRESENCE=presence is not None,
            BLOCK=chunk.size,
            num_warps=chunk.num_warps,
            **EXACT,
        )


def count_tokens_triton(counts: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    """Launch ``count_tokens``, see ``count_tokens_ref``. Shapes and dtypes were checked by ``gpt2rt.ops``."""
    num_rows = slots.size(0)
    if num_rows:
        size, warps = CHUNKS.find(architecture_of(counts), "ids")
        with on_device(counts):
            _count_tokens_kernel[(triton.cdiv(num_rows, size),)](
                counts, slots, token_ids, num_rows, counts.size(1), BLOCK=size, num_warps=warps, **EXACT
            )


def reset_counts_triton(
    counts: Tensor, slots: Tensor, token_ids: Tensor, starts: Tensor, prompt_lens: Tensor, max_len: int
) -> None:
    """Launch ``reset_counts``, see ``reset_counts_ref``. Shapes and dtypes were checked by ``gpt2rt.ops``."""
    num_slots, n = slots.size(0), counts.size(1)
    if not num_slots:
        return
    architecture = architecture_of(counts)
    size, warps = CHUNKS.find(architecture, "scores")
    with on_device(counts):
        _clear_counts_kernel[(num_slots, triton.cdiv(n, size))](counts, slots, n, BLOCK=size, num_warps=warps, **EXACT)
        if max_len:
            size, warps = CHUNKS.find(architecture, "ids")
            _recount_kernel[(num_slots, triton.cdiv(max_len, size))](
                counts, slots, token_ids, starts, prompt_lens, n, BLOCK=size, num_warps=warps, **EXACT
            )
