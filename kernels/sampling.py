"""argmax, sampling_weights and sample on a GPU: the tokens of sampling_refs.py, bit for bit.

After the launches of sampling_select.py one program a row has in its hands the tokens that decide. All filters are
thresholds on the score, and a threshold is the smallest number T for which what lies above T is less than a target:

    top_k    the smallest T with    #{s > T} < k
    top_p    the smallest T with    W{s > T} < p W{all that top_k kept}

The left side falls with T and only changes at scores, so halving the range of the scores' ordered bits finds a T with
exactly the tokens of the definition's sort, ties with the last one included. Weights are integers (at most 2^42, so
2^20 of them fit int64): their sums have no rounding and no order. The token drawn is the first whose cumulative weight
exceeds a number; the chunk that holds it is found from sums of chunks, then the token inside it.

Names: R = num_rows, V = vocab_size, C = chunks of a row. No launch waits for the device, and with memory given by the
caller none allocates, so all of them can be captured in a CUDA graph. A setting out of range cannot raise without
waiting: such a row has no token, -1.

The floor of a row is three reads of it (200 KB for GPT-2) from L2, by a program for each chunk. The last launch has one
program a row: it looks at a list that fits its cache some tens of times, then once more at those chunks of the row that
hold a token which was kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import aligned, on_device
from .sampling_refs import argmax_ref, sample_ref, sampling_weights_ref
from .sampling_select import BINS as NUM_BINS
from .sampling_select import (
    EXACT,
    MAX_LIST,
    UNIT,
    SelectWorkspace,
    bin_edge,
    chunk_of,
    deciding_bin,
    key_of,
    launch_maxima,
    launch_select,
    load_scores,
    row_filters,
    row_state,
    select_workspace,
    tempered,
    weight_of,
)

__all__ = [
    "argmax_into_triton",
    "argmax_ref",
    "argmax_triton",
    "sample_into_triton",
    "sample_ref",
    "sample_triton",
    "sampling_weights_ref",
    "sampling_weights_triton",
    "select_workspace",
]

# entries of a list that are looked at together: a list is rarely longer
BLOCK = 1024
LOWEST_KEY = tl.constexpr(-2139095041)  # of -inf


@triton.jit(do_not_specialize=["num_chunks"])
def _first_maximum_kernel(maxima_ptr, places_ptr, out_ptr, num_chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    mask = chunks < num_chunks
    maxima = tl.load(maxima_ptr + row * num_chunks + chunks, mask=mask, other=float("-inf"))
    places = tl.load(places_ptr + row * num_chunks + chunks, mask=mask, other=0)
    largest = tl.max(maxima, 0)
    place = tl.min(tl.where(mask & (maxima == largest), places, 0x7FFFFFFF), 0)
    fine = (largest > float("-inf")) & (largest < float("inf"))
    tl.store(out_ptr + row, tl.where(fine, place, -1).to(tl.int64))


@triton.jit(do_not_specialize=["num_chunks"])
def _weights_kernel(scores_ptr, maxima_ptr, out_ptr, stride, n, num_chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    largest, _, _, fine = row_state(maxima_ptr, maxima_ptr, row, num_chunks, False, CHUNKS)
    x = load_scores(scores_ptr, row, stride, cols, n) - tl.where(fine, largest, 0.0)
    # a row that is not fine may hold NaN and +inf
    weights = tl.where(fine, weight_of(tl.where(fine, x, 0.0)), 0)
    tl.store(out_ptr + row * n + cols, weights, mask=cols < n)


@triton.jit
def _above(
    row_ptr,
    keys_ptr,
    weights_ptr,
    count,
    listed,
    key,
    counted,
    largest,
    shift,
    divisor,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The number, or else the weight, of tokens with keys above ``key``: of the list, or of the row if none is."""
    total = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, count, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        mask = places < count
        if listed:
            keys = tl.load(keys_ptr + places, mask=mask, other=0)
            weights = tl.load(weights_ptr + places, mask=mask, other=0)
        else:
            scores = tl.load(row_ptr + places, mask=mask, other=float("-inf"))
            scores = tempered(scores, shift, divisor, HAS_TEMPERATURE)
            keys = key_of(scores)
            weights = weight_of(scores - largest)
        measures = tl.where(counted, tl.full([BLOCK], 1, tl.int64), weights)
        total += tl.where(mask & (keys > key), measures, 0)
    return tl.sum(total, 0)


@triton.jit
def _threshold(
    row_ptr,
    keys_ptr,
    weights_ptr,
    count,
    listed,
    lowest,
    highest,
    before,
    target,
    counted,
    largest,
    shift,
    divisor,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest key from ``lowest`` to ``highest`` above which, with ``before``, is less than ``target``."""
    while lowest < highest:
        middle = (lowest + highest) >> 1
        measure = before + _above(
            row_ptr,
            keys_ptr,
            weights_ptr,
            count,
            listed,
            middle,
            counted,
            largest,
            shift,
            divisor,
            HAS_TEMPERATURE,
            BLOCK,
        )
        less = measure.to(tl.float64) < target
        highest = tl.where(less, middle, highest)
        lowest = tl.where(less, lowest, middle + 1)
    return highest


@triton.jit
def _kept_weights(
    row_ptr, n, chunk, lowest, least, largest, shift, divisor, HAS_TEMPERATURE: tl.constexpr, CHUNK: tl.constexpr
):
    """[CHUNK] weights, 0 for keys below ``lowest`` and for weights below ``least``."""
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    scores = tl.load(row_ptr + cols, mask=cols < n, other=float("-inf"))
    scores = tempered(scores, shift, divisor, HAS_TEMPERATURE)
    weights = weight_of(scores - largest)
    return tl.where((key_of(scores) >= lowest) & (weights >= least), weights, 0)


@triton.jit(do_not_specialize=["num_chunks"])
def _draw_kernel(
    scores_ptr,
    uniforms_ptr,
    maxima_ptr,
    sums_ptr,
    bins_ptr,
    found_ptr,
    list_keys_ptr,
    list_weights_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    out_ptr,
    stride,
    n,
    num_chunks,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS: tl.constexpr,
    MAX_LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest, shift, divisor, fine = row_state(maxima_ptr, temperature_ptr, row, num_chunks, HAS_TEMPERATURE, CHUNKS)
    k, p = row_filters(top_k_ptr, top_p_ptr, 0, row, n, HAS_TOP_K, HAS_TOP_P)
    uniform = tl.load(uniforms_ptr + row)
    fine = fine & (uniform >= 0.0) & (uniform < 1.0) & (p >= 0.0) & (p <= 1.0)
    least = tl.full([], 0, tl.int64)
    if HAS_MIN_P:
        min_p = tl.load(min_p_ptr + row)
        fine = fine & (min_p >= 0.0) & (min_p <= 1.0)
        # an integer is below a number if it is below the next integer
        share = tl.where(fine, min_p, 0.0) * UNIT
        least = share.to(tl.int64)
        least += (least.to(tl.float64) < share).to(tl.int64)
    token = tl.full([], -1, tl.int64)
    if fine:
        row_ptr = scores_ptr + row * stride
        chunks = tl.arange(0, CHUNKS)
        sums = tl.load(sums_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=0)  # [CHUNKS]
        lowest = tl.full([], LOWEST_KEY, tl.int64)
        if (HAS_TOP_K or HAS_TOP_P) and ((k > 0) | (p < 1.0)):
            found = tl.load(found_ptr + row)
            listed = found <= MAX_LIST
            count = tl.where(listed, found, n)
            keys_ptr = list_keys_ptr + row * MAX_LIST
            weights_ptr = list_weights_ptr + row * MAX_LIST
            last, before = deciding_bin(bins_ptr, sums_ptr, row, num_chunks, k, p, CHUNKS, BINS)
            # with top_k the list begins at the first bin, the row always does
            before = tl.where(listed & (k == 0), before, 0)
            # the threshold lies in this bin; its neighbours leave room for the rounding of its edges
            lowest = bin_edge(largest, last + 2)
            highest = bin_edge(largest, last - 1)
            total = tl.sum(sums, 0)
            if k > 0:
                lowest = _threshold(
                    row_ptr,
                    keys_ptr,
                    weights_ptr,
                    count,
                    listed,
                    lowest,
                    highest,
                    before,
                    k.to(tl.float64),
                    True,
                    largest,
                    shift,
                    divisor,
                    HAS_TEMPERATURE,
                    BLOCK,
                )
                total = _above(
                    row_ptr,
                    keys_ptr,
                    weights_ptr,
                    count,
                    listed,
                    lowest - 1,
                    False,
                    largest,
                    shift,
                    divisor,
                    HAS_TEMPERATURE,
                    BLOCK,
                )
                highest = bin_edge(largest, 0)
            if p < 1.0:
                lowest = _threshold(
                    row_ptr,
                    keys_ptr,
                    weights_ptr,
                    count,
                    listed,
                    lowest,
                    highest,
                    before,
                    p * total.to(tl.float64),
                    False,
                    largest,
                    shift,
                    divisor,
                    HAS_TEMPERATURE,
                    BLOCK,
                )
        if (HAS_TOP_K or HAS_TOP_P or HAS_MIN_P) and ((lowest > LOWEST_KEY) | (least > 0)):
            maxima = tl.load(maxima_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
            reaching = key_of(tempered(maxima, shift, divisor, HAS_TEMPERATURE)) >= lowest
            for chunk in range(num_chunks):
                kept = tl.full([], 0, tl.int64)
                # few chunks hold one of a few tokens
                if tl.max((reaching & (chunks == chunk)).to(tl.int32), 0) > 0:
                    kept = tl.sum(
                        _kept_weights(
                            row_ptr, n, chunk, lowest, least, largest, shift, divisor, HAS_TEMPERATURE, CHUNK
                        ),
                        0,
                    )
                sums = tl.where(chunks == chunk, kept, sums)
        total = tl.sum(sums, 0)
        # the product can round up to the total, which no sum exceeds
        target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
        reached = tl.cumsum(sums, 0)
        passed = reached <= target
        chunk = tl.sum(passed.to(tl.int32), 0)
        target -= tl.max(tl.where(passed, reached, 0), 0)
        weights = _kept_weights(row_ptr, n, chunk, lowest, least, largest, shift, divisor, HAS_TEMPERATURE, CHUNK)
        token = (chunk * CHUNK + tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)).to(tl.int64)
    tl.store(out_ptr + row, token)


def argmax_triton(scores: Tensor, finite: bool) -> Tensor:
    """Launch ``argmax``. Shapes and dtypes were checked by ``gpt2rt.ops``."""
    scores = aligned(scores)
    num_rows, n = scores.shape
    chunk = chunk_of(scores)
    num_chunks = triton.cdiv(n, chunk.size)
    maxima = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=scores.device)
    places = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=scores.device)
    out = torch.empty((num_rows,), dtype=torch.int64, device=scores.device)
    argmax_into_triton(scores, out, maxima, places, finite=finite)
    return out


def argmax_into_triton(scores: Tensor, out: Tensor, maxima: Tensor, places: Tensor, *, finite: bool) -> None:
    """The first of the largest scores of each row; -1 as ``argmax_ref`` says.

    Args:
        scores: [R, V] float32, rows contiguous, any stride between them.
        out: [R] int64, is written.
        maxima: [R, C] float32, scratch memory.
        places: [R, C] int32, scratch memory.
        finite: -inf is as bad as NaN.
    """
    num_rows, n = scores.shape
    if not num_rows:
        return
    num_chunks = triton.cdiv(n, chunk_of(scores).size)
    with on_device(scores):
        launch_maxima(scores, maxima, finite=finite, places=places)
        _first_maximum_kernel[(num_rows,)](
            maxima, places, out, num_chunks, CHUNKS=triton.next_power_of_2(num_chunks), num_warps=1, **EXACT
        )


def sampling_weights_triton(scores: Tensor) -> Tensor:
    """Launch ``sampling_weights``. Shapes and dtypes were checked by ``gpt2rt.ops``."""
    num_rows, n = scores.shape
    chunk = chunk_of(scores)
    num_chunks = triton.cdiv(n, chunk.size)
    maxima = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=scores.device)
    out = torch.empty((num_rows, n), dtype=torch.int64, device=scores.device)
    if num_rows:
        with on_device(scores):
            launch_maxima(scores, maxima, finite=False)
            _weights_kernel[(num_rows, num_chunks)](
                scores,
                maxima,
                out,
                scores.stride(0),
                n,
                num_chunks,
                CHUNK=chunk.size,
                CHUNKS=triton.next_power_of_2(num_chunks),
                num_warps=chunk.num_warps,
                **EXACT,
            )
    return out


def sample_triton(
    scores: Tensor,
    uniforms: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    token_ids: Tensor | None,
    partial: bool,
    finite: bool,
) -> Tensor:
    """Launch ``sample``. Shapes and dtypes were checked by ``gpt2rt.ops``.

    Columns that stand for other tokens run the definition: they come from the CPU step, not from a GPU's.
    """
    if token_ids is not None or partial:
        return sample_ref(scores, uniforms, temperature, top_k, top_p, min_p, token_ids, partial, finite)
    scores = aligned(scores)
    out = torch.empty((scores.size(0),), dtype=torch.int64, device=scores.device)
    work = select_workspace(*scores.shape, scores.device)
    sample_into_triton(
        scores, uniforms, out, work, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, finite=finite
    )
    return out


def sample_into_triton(
    scores: Tensor,
    uniforms: Tensor,
    out: Tensor,
    work: SelectWorkspace,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    finite: bool = False,
) -> None:
    """A token of each row, as ``sample_ref`` defines it; without allocation and without waiting for the device.

    Which settings are given decides what is launched; their values do not. A neutral value (1, 0 or V, 1, 0) costs its
    row next to nothing.

    Args:
        scores: [R, V] float32, rows contiguous, any stride between them.
        uniforms: [R] float64.
        out: [R] int64, is written; -1 also for a number or setting out of range.
        work: memory for as many rows and scores or more.
        temperature: [R] float64, or None.
        top_k: [R] int64, or None.
        top_p: [R] float64, or None.
        min_p: [R] float64, or None.
        finite: -inf is as bad as NaN.
    """
    num_rows, n = scores.shape
    if not num_rows:
        return
    chunk = chunk_of(scores)
    num_chunks = triton.cdiv(n, chunk.size)
    settings = [scores if setting is None else setting for setting in (temperature, top_k, top_p, min_p)]
    with on_device(scores):
        launch_maxima(scores, work.maxima, finite=finite, work=work)
        launch_select(scores, work, temperature=temperature, top_k=top_k, top_p=top_p)
        _draw_kernel[(num_rows,)](
            scores,
            uniforms,
            work.maxima,
            work.sums,
            work.bins,
            work.found,
            work.list_keys,
            work.list_weights,
            *settings,
            out,
            scores.stride(0),
            n,
            num_chunks,
            HAS_TEMPERATURE=temperature is not None,
            HAS_TOP_K=top_k is not None,
            HAS_TOP_P=top_p is not None,
            HAS_MIN_P=min_p is not None,
            CHUNK=chunk.size,
            CHUNKS=triton.next_power_of_2(num_chunks),
            BINS=NUM_BINS,
            MAX_LIST=MAX_LIST,
            BLOCK=BLOCK,
            num_warps=chunk.num_warps,
            # without a word on registers ptxas of triton 3.9 stops at 64 for sm_80 and spills
            maxnreg=128,
            **EXACT,
        )
