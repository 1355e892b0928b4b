"""What sampling and log-probabilities share on a GPU: integer weights, and short lists of the tokens that matter.

A row of scores is cut into chunks, so that a single row keeps many processors busy, and read three times:

    maxima    the largest score of each chunk
    weigh     the sum of each chunk's weights, which are those of sampling_refs.py; and for rows with top_k or top_p a
              histogram over the distance to the largest score, ``BINS_PER_UNIT`` bins to the unit: of tokens if the row
              has top_k, else of weight
    gather    the tokens that decide: with top_k all up to the bin in which the k-th largest lies; with top_p alone
              those of the one bin in which the share is reached, and the weight of the bins before

Whoever comes next finds the exact threshold among a few tokens instead of the vocabulary. Nothing is sorted. The atomic
additions are of integers, and the order of the list depends on them, so every use of the list must be one that has no
order: sums of integers and maxima. Then the outcome has the same bits on every run, and those of the definition.

The bins only ever have to be monotone in the score: a token in a later bin is not larger than one in an earlier bin.
A token ``REACH`` below the largest weighs nothing, since exp(-30) < 2^-42, and is in no list.

Multiplication and addition must round separately: launch with ``EXACT``, never with ``OPTIONS``.

Names: R = num_rows, V = vocab_size, C = chunks in a row. Row offsets are int64.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config_table import ALL, Chunk, ConfigTable
from .launch import architecture_of, architecture_of_device

# exp(-30) is less than the unit of weight
REACH = 30
BINS_PER_UNIT = 32
BINS = 1024  # a power of two above REACH * BINS_PER_UNIT
# the longest list; with more tokens in it the row itself is searched
MAX_LIST = 8192
# the definition's chain of multiplications and additions has a rounding at each
EXACT = {"enable_fp_fusion": False}

# 25 programs for a row of GPT-2's vocabulary; a starting point, not tuned on a device yet. The outcome is the same with
# any. Without limits: one size of chunks serves all vocabularies, so that a workspace fits those that are smaller too
CHUNKS: ConfigTable[Chunk] = ConfigTable("sampling", (), {ALL: ((Chunk(2048, 8),),)})

_BINS_PER_UNIT = tl.constexpr(BINS_PER_UNIT)
_USED_BINS = tl.constexpr(REACH * BINS_PER_UNIT)
# exact in float32: 1.5 * 2^23, which leaves no room for a fraction
_ROUND = tl.constexpr(12582912.0)
_C7, _C6, _C5 = tl.constexpr(1 / 5040), tl.constexpr(1 / 720), tl.constexpr(1 / 120)
_C4, _C3 = tl.constexpr(1 / 24), tl.constexpr(1 / 6)
UNIT = tl.constexpr(float(2**42))


class SelectWorkspace(NamedTuple):
    """Scratch memory of one launch sequence; nothing in it needs to be set before.

    Attributes:
        maxima: [R, C] float32, the largest score of each chunk; +inf for a chunk with a score that may not be.
        sums: [R, C] int64, the weight of each chunk.
        bins: [R, BINS] int64, the histogram.
        found: [R] int32, the length of the list.
        list_keys: [R, MAX_LIST] int32, see :func:`key_of`.
        list_weights: [R, MAX_LIST] int64.
        list_ids: [R, MAX_LIST] int32, columns of the row.
    """

    maxima: Tensor
    sums: Tensor
    bins: Tensor
    found: Tensor
    list_keys: Tensor
    list_weights: Tensor
    list_ids: Tensor


def chunk_of(scores: Tensor) -> Chunk:
    """How rows of ``scores`` are cut."""
    return CHUNKS.find(architecture_of(scores), ALL)


def select_workspace(num_rows: int, vocab_size: int, device: torch.device | str) -> SelectWorkspace:
    """Memory for up to ``num_rows`` rows of up to ``vocab_size`` scores: 136 KiB a row and a little.

    Args:
        num_rows: R.
        vocab_size: V.
        device: where the scores are.
    """
    num_chunks = triton.cdiv(vocab_size, CHUNKS.find(architecture_of_device(device), ALL).size)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return SelectWorkspace(
        empty(num_rows, num_chunks, dtype=torch.float32),
        empty(num_rows, num_chunks, dtype=torch.int64),
        empty(num_rows, BINS, dtype=torch.int64),
        empty(num_rows, dtype=torch.int32),
        empty(num_rows, MAX_LIST, dtype=torch.int32),
        empty(num_rows, MAX_LIST, dtype=torch.int64),
        empty(num_rows, MAX_LIST, dtype=torch.int32),
    )


@triton.jit
def weight_of(x):
    """floor(2^42 exp(x)) by the chain of ``sampling_weights_ref``; x float32, at most 0, no NaN."""
    x = tl.maximum(x, -40.0)
    # to nearest, of equals the even one
    n = (x * 1.44269504088896341 + _ROUND) - _ROUND
    r = (x - n * 0.693359375) + n * 2.12194440054690583e-4
    p = r * _C7 + _C6
    p = p * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    units = (p * 16777216.0).to(tl.int32).to(tl.int64) << 18
    return units >> (-n).to(tl.int32).to(tl.int64)


@triton.jit
def key_of(scores):
    """int32 keys in the order of the float32 scores; equal scores, also the two zeros, have equal keys."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def tempered(scores, shift, divisor, HAS_TEMPERATURE: tl.constexpr):
    if HAS_TEMPERATURE:
        scores = tl.div_rn(scores - shift, divisor)
    return scores


@triton.jit
def row_state(maxima_ptr, temperature_ptr, row, num_chunks, HAS_TEMPERATURE: tl.constexpr, CHUNKS: tl.constexpr):
    """(largest score after the temperature, shift, divisor, whether the row can be drawn from)."""
    chunks = tl.arange(0, CHUNKS)
    maxima = tl.load(maxima_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
    largest = tl.max(maxima, 0)
    shift = 0.0
    divisor = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
        # a plain quotient could overflow at a tiny one; below the smallest normal float32 the divisor would vanish
        shift = tl.where(temperature < 1e-4, largest, 0.0)
        divisor = tl.where(temperature < 1e-37, 1e-37, temperature).to(tl.float32)
        largest = tl.div_rn(largest - shift, divisor)
        fine = (temperature > 0.0) & (temperature <= 3.4028234663852886e38)
        fine = fine & (largest > float("-inf")) & (largest < float("inf"))
    else:
        # NaN is neither
        fine = (largest > float("-inf")) & (largest < float("inf"))
    return largest, shift, divisor, fine


@triton.jit
def row_filters(top_k_ptr, top_p_ptr, fixed_k, row, n, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr):
    """(k, 0: off; p, 1: off) of a row; with neither tensor ``fixed_k`` is the k of all rows."""
    k = tl.full([], 0, tl.int64) + fixed_k
    if HAS_TOP_K:
        k = tl.load(top_k_ptr + row)
    p = tl.full([], 1.0, tl.float64)
    if HAS_TOP_P:
        p = tl.load(top_p_ptr + row)
    return tl.where((k > 0) & (k < n), k, 0), p


@triton.jit
def load_scores(scores_ptr, row, stride, cols, n):
    return tl.load(scores_ptr + row * stride + cols, mask=cols < n, other=float("-inf"))


@triton.jit
def _bin_of(x):
    return tl.minimum(-x * _BINS_PER_UNIT, _USED_BINS).to(tl.int32)


@triton.jit
def bin_edge(largest, bin):
    """int64 key of the score at which a bin begins; one bin further and rounding cannot matter."""
    return key_of(largest - tl.maximum(bin, 0).to(tl.float32) * (1.0 / _BINS_PER_UNIT)).to(tl.int64)


@triton.jit(do_not_specialize=["num_chunks"])
def _maxima_kernel(
    scores_ptr,
    maxima_ptr,
    places_ptr,
    bins_ptr,
    found_ptr,
    stride,
    n,
    num_chunks,
    FINITE: tl.constexpr,
    PLACES: tl.constexpr,
    CLEAR: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    scores = load_scores(scores_ptr, row, stride, cols, n)  # [CHUNK]
    bad = (scores != scores) | (scores == float("inf"))
    if FINITE:
        bad = bad | ((scores == float("-inf")) & (cols < n))
    # a maximum may drop NaN; with infinity in its place none is lost
    scores = tl.where(bad, float("inf"), scores)
    largest = tl.max(scores, 0)
    tl.store(maxima_ptr + row * num_chunks + chunk, largest)
    if PLACES:
        tl.store(places_ptr + row * num_chunks + chunk, tl.min(tl.where(scores == largest, cols, 0x7FFFFFFF), 0))
    if CLEAR and chunk == 0:
        bins = tl.arange(0, BINS)
        tl.store(bins_ptr + row * BINS + bins, tl.zeros([BINS], tl.int64))
        tl.store(found_ptr + row, 0)


@triton.jit(do_not_specialize=["num_chunks", "fixed_k"])
def _weigh_kernel(
    scores_ptr,
    maxima_ptr,
    sums_ptr,
    bins_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    stride,
    n,
    num_chunks,
    fixed_k,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    largest, shift, divisor, fine = row_state(maxima_ptr, temperature_ptr, row, num_chunks, HAS_TEMPERATURE, CHUNKS)
    if fine:
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tempered(load_scores(scores_ptr, row, stride, cols, n), shift, divisor, HAS_TEMPERATURE) - largest
        weights = weight_of(x)  # [CHUNK]
        tl.store(sums_ptr + row * num_chunks + chunk, tl.sum(weights, 0))
        if COUNT:
            k, p = row_filters(top_k_ptr, top_p_ptr, fixed_k, row, n, HAS_TOP_K, HAS_TOP_P)
            if (k > 0) | (p < 1.0):
                bins = _bin_of(x)
                measures = tl.where(k > 0, tl.full([CHUNK], 1, tl.int64), weights)
                tl.atomic_add(bins_ptr + row * BINS + bins, measures, mask=bins < _USED_BINS, sem="relaxed")


@triton.jit
def row_total(sums_ptr, row, num_chunks, CHUNKS: tl.constexpr):
    chunks = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(sums_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=0), 0)


@triton.jit
def deciding_bin(bins_ptr, sums_ptr, row, num_chunks, k, p, CHUNKS: tl.constexpr, BINS: tl.constexpr):
    """(the first bin with which the row's target is reached, the measure of the bins before it)."""
    reached = tl.cumsum(tl.load(bins_ptr + row * BINS + tl.arange(0, BINS)), 0)  # [BINS]
    target = p * row_total(sums_ptr, row, num_chunks, CHUNKS).to(tl.float64)
    target = tl.where(k > 0, k.to(tl.float64), target)
    short = reached.to(tl.float64) < target
    # never reached if fewer than k tokens weigh anything: then all of them are before the last bin
    return tl.minimum(tl.sum(short.to(tl.int32), 0), _USED_BINS), tl.max(tl.where(short, reached, 0), 0)


@triton.jit(do_not_specialize=["num_chunks", "fixed_k"])
def _gather_kernel(
    scores_ptr,
    maxima_ptr,
    sums_ptr,
    bins_ptr,
    found_ptr,
    list_keys_ptr,
    list_weights_ptr,
    list_ids_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    stride,
    n,
    num_chunks,
    fixed_k,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS: tl.constexpr,
    MAX_LIST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    largest, shift, divisor, fine = row_state(maxima_ptr, temperature_ptr, row, num_chunks, HAS_TEMPERATURE, CHUNKS)
    k, p = row_filters(top_k_ptr, top_p_ptr, fixed_k, row, n, HAS_TOP_K, HAS_TOP_P)
    if fine & ((k > 0) | (p < 1.0)):
        last, _ = deciding_bin(bins_ptr, sums_ptr, row, num_chunks, k, p, CHUNKS, BINS)
        first = tl.where(k > 0, 0, last)
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        scores = tempered(load_scores(scores_ptr, row, stride, cols, n), shift, divisor, HAS_TEMPERATURE)
        bins = _bin_of(scores - largest)  # [CHUNK]
        kept = (bins >= first) & (bins <= last) & (bins < _USED_BINS)
        count = tl.sum(kept.to(tl.int32), 0)
        if count > 0:
            begin = tl.atomic_add(found_ptr + row, count, sem="relaxed")
            places = begin + tl.cumsum(kept.to(tl.int32), 0) - 1
            kept = kept & (places < MAX_LIST)
            tl.store(list_keys_ptr + row * MAX_LIST + places, key_of(scores), mask=kept)
            tl.store(list_weights_ptr + row * MAX_LIST + places, weight_of(scores - largest), mask=kept)
            tl.store(list_ids_ptr + row * MAX_LIST + places, cols, mask=kept)


def launch_maxima(
    scores: Tensor,
    maxima: Tensor,
    *,
    finite: bool,
    places: Tensor | None = None,
    work: SelectWorkspace | None = None,
) -> None:
    """The largest score of each chunk into ``maxima``, its first column into ``places`` [R, C] int32.

    Args:
        scores: [R, V] float32, rows contiguous.
        maxima: [R, C] float32.
        finite: -inf is as bad as NaN.
        places: where columns go, or None.
        work: its histogram and its lists are emptied.
    """
    num_rows, n = scores.shape
    # where there is nothing to write any tensor serves
    bins, found = (maxima, maxima) if work is None else (work.bins, work.found)
    chunk = chunk_of(scores)
    num_chunks = triton.cdiv(n, chunk.size)
    _maxima_kernel[(num_rows, num_chunks)](
        scores,
        maxima,
        maxima if places is None else places,
        bins,
        found,
        scores.stride(0),
        n,
        num_chunks,
        FINITE=finite,
        PLACES=places is not None,
        CLEAR=work is not None,
        CHUNK=chunk.size,
        BINS=BINS,
        num_warps=chunk.num_warps,
        **EXACT,
    )


def launch_select(
    scores: Tensor,
    work: SelectWorkspace,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    fixed_k: int = 0,
) -> None:
    """After :func:`launch_maxima`: weights of chunks, and the list if there is top_k, top_p or ``fixed_k``."""
    num_rows, n = scores.shape
    chunk = chunk_of(scores)
    num_chunks = triton.cdiv(n, chunk.size)
    lists = top_k is not None or top_p is not None or fixed_k > 0
    # where there is no setting any tensor serves, it is not read
    settings = [scores if setting is None else setting for setting in (temperature, top_k, top_p)]
    rows = (scores.stride(0), n, num_chunks, fixed_k)
    options = {
        "HAS_TEMPERATURE": temperature is not None,
        "HAS_TOP_K": top_k is not None,
        "HAS_TOP_P": top_p is not None,
        "CHUNK": chunk.size,
        "CHUNKS": triton.next_power_of_2(num_chunks),
        "BINS": BINS,
        "num_warps": chunk.num_warps,
        **EXACT,
    }
    grid = (num_rows, num_chunks)
    _weigh_kernel[grid](scores, work.maxima, work.sums, work.bins, *settings, *rows, COUNT=lists, **options)
    if lists:
        _gather_kernel[grid](
            scores,
            work.maxima,
            work.sums,
            work.bins,
            work.found,
            work.list_keys,
            work.list_weights,
            work.list_ids,
            *settings,
            *rows,
            MAX_LIST=MAX_LIST,
            **options,
        )
