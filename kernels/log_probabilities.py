"""Log-probabilities of chosen tokens with their ranks, and the k best tokens of each row.

    log p_i = (s_i - m) - log(sum_j w_j / 2^42),   m = max_j s_j

with the integer weights w of sampling_refs.py: their sum has no rounding and no order, so a row's results depend on
nothing else. The weights' own error is 1e-7 of each, far below what float32 keeps of the logarithm.

The k best come from the short list of sampling_select.py, one maximum after another: (score, id) pairs are packed into
one integer each, so that no two are equal and the lowest id of equal scores is first. Where the list is too long (many
ties) or too short (few tokens weigh anything) the row itself takes its place.

Names: R = num_rows, V = vocab_size. Nothing waits for the device; only the op's own launcher allocates.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import aligned, on_device
from .sampling_select import (
    EXACT,
    MAX_LIST,
    UNIT,
    SelectWorkspace,
    chunk_of,
    key_of,
    launch_maxima,
    launch_select,
    row_state,
    row_total,
    select_workspace,
)
from .score_refs import log_probabilities_ref

__all__ = ["log_probabilities_into_triton", "log_probabilities_ref", "log_probabilities_triton"]

# entries that are looked at together
BLOCK = 1024


@triton.jit
def _score_of(keys):
    """The inverse of ``key_of``."""
    return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_chunks", "k"])
def _log_probabilities_kernel(
    scores_ptr,
    token_ids_ptr,
    maxima_ptr,
    sums_ptr,
    found_ptr,
    list_keys_ptr,
    list_ids_ptr,
    chosen_ptr,
    ranks_ptr,
    best_ptr,
    best_ids_ptr,
    stride,
    n,
    num_chunks,
    k,
    CHUNKS: tl.constexpr,
    MAX_LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + row * stride
    largest, _, _, fine = row_state(maxima_ptr, maxima_ptr, row, num_chunks, False, CHUNKS)
    token = tl.load(token_ids_ptr + row)
    chosen = tl.full([], float("nan"), tl.float32)
    rank = tl.full([], -1, tl.int64)
    if fine:
        total = row_total(sums_ptr, row, num_chunks, CHUNKS)
        log_total = tl.log((total.to(tl.float64) * (1.0 / UNIT)).to(tl.float32))
        if (token >= 0) & (token < n):
            score = tl.load(row_ptr + token)
            chosen = (score - largest) - log_total
            larger = tl.zeros([BLOCK], tl.int32)
            for begin in range(0, n, BLOCK):
                places = begin + tl.arange(0, BLOCK)
                larger += (tl.load(row_ptr + places, mask=places < n, other=float("-inf")) > score).to(tl.int32)
            rank = 1 + tl.sum(larger, 0).to(tl.int64)
        found = tl.load(found_ptr + row)
        listed = (found <= MAX_LIST) & (found >= k)
        count = tl.where(listed, found, n)
        last = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
        for place in range(k):
            best = tl.full([BLOCK], -0x7FFFFFFFFFFFFFFF, tl.int64)
            for begin in range(0, count, BLOCK):
                places = begin + tl.arange(0, BLOCK)
                mask = places < count
                if listed:
                    keys = tl.load(list_keys_ptr + row * MAX_LIST + places, mask=mask, other=0)
                    ids = tl.load(list_ids_ptr + row * MAX_LIST + places, mask=mask, other=0)
                else:
                    keys = key_of(tl.load(row_ptr + places, mask=mask, other=float("-inf")))
                    ids = places
                packed = (keys.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
                best = tl.where(mask & (packed < last), tl.maximum(best, packed), best)
            last = tl.max(best, 0)
            score = _score_of((last >> 32).to(tl.int32))
            tl.store(best_ptr + row * k + place, (score - largest) - log_total)
            tl.store(best_ids_ptr + row * k + place, 0x7FFFFFFF - (last & 0x7FFFFFFF))
    else:
        for place in range(k):
            tl.store(best_ptr + row * k + place, float("nan"))
            tl.store(best_ids_ptr + row * k + place, -1)
    tl.store(chosen_ptr + row, chosen)
    tl.store(ranks_ptr + row, rank)


def log_probabilities_triton(scores: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch ``log_probabilities``. Shapes and dtypes were checked by ``gpt2rt.ops``."""
    scores = aligned(scores)
    num_rows, device = scores.size(0), scores.device
    chosen = torch.empty((num_rows,), dtype=torch.float32, device=device)
    ranks = torch.empty((num_rows,), dtype=torch.int64, device=device)
    best = torch.empty((num_rows, k), dtype=torch.float32, device=device)
    best_ids = torch.empty((num_rows, k), dtype=torch.int64, device=device)
    work = select_workspace(*scores.shape, device)
    log_probabilities_into_triton(scores, token_ids, chosen, ranks, best, best_ids, work)
    return chosen, ranks, best, best_ids


def log_probabilities_into_triton(
    scores: Tensor,
    token_ids: Tensor,
    chosen: Tensor,
    ranks: Tensor,
    best: Tensor,
    best_ids: Tensor,
    work: SelectWorkspace,
) -> None:
    """What ``log_probabilities_ref`` defines; without allocation.

    Args:
        scores: [R, V] float32, rows contiguous, any stride between them.
        token_ids: [R] int64; an id outside the vocabulary: none.
        chosen: [R] float32, is written.
        ranks: [R] int64, is written.
        best: [R, k] float32, contiguous, is written; k may be 0.
        best_ids: [R, k] int64, contiguous, is written.
        work: memory for as many rows and scores or more.
    """
    num_rows, n = scores.shape
    k = best.size(1)
    if not num_rows:
        return
    chunk = chunk_of(scores)
    num_chunks = triton.cdiv(n, chunk.size)
    with on_device(scores):
        launch_maxima(scores, work.maxima, finite=False, work=work)
        launch_select(scores, work, fixed_k=k)
        _log_probabilities_kernel[(num_rows,)](
            scores,
            token_ids,
            work.maxima,
            work.sums,
            work.found,
            work.list_keys,
            work.list_ids,
            chosen,
            ranks,
            best,
            best_ids,
            scores.stride(0),
            n,
            num_chunks,
            k,
            CHUNKS=triton.next_power_of_2(num_chunks),
            MAX_LIST=MAX_LIST,
            BLOCK=BLOCK,
            num_warps=chunk.num_warps,
            **EXACT,
        )
