"""Merging attention that was split over the context.

Split i of a row gave the softmax average ``v_i`` of its own tokens and ``lse_i``, the logarithm to base 2 of its sum of
weights. One after another, from the first on, with the running maximum m, sum l and total t:

    m' = max(m, lse_i);  l' = l 2^(m - m') + 2^(lse_i - m');  t' = t 2^(m - m') + 2^(lse_i - m') v_i;  y = t / l

Sources: online softmax: Milakov & Gimelshein, arXiv:1805.02867; splits of the context: Dao et al., "Flash-Decoding"
(2023).

Splits hold ``SPLIT`` tokens by absolute position, and a split that has none (lse = -inf) changes no bit of m, l and t:
so a row's result does not depend on how many splits there is room for, which other rows of the batch decide. Every
kernel that merges does so with ``merge_split``, in this order.
"""

import triton
import triton.language as tl
from torch import Tensor

from .config_table import ALL, ConfigTable
from .fusion import let_dependents_start, wait_for_inputs
from .launch import OPTIONS, architecture_of, on_device

# tokens per split; a starting point, not tuned on a device yet. Decides the bits of every row: the same everywhere
SPLIT = 64
# splits whose loads are under way at a time; changes no result
_AT_ONCE = 8
# warps: the splits follow one another, and more warps would wait for the same loads; starting points, not tuned on a
# device yet
WARPS: ConfigTable[int] = ConfigTable("merge_splits", ("head_dim",), {ALL: ((128, 1), (256, 2), (None, 4))})


@triton.jit
def merge_split(total, weight_sum, highest, value, lse):
    """One more split.

    Args:
        total: running total, float32 [..., D].
        weight_sum, highest: running sum of weights and maximum of lse, float32 [..., 1].
        value: [..., D] float32; anything finite where lse is -inf.
        lse: [..., 1] float32; -inf for a split without tokens, which the first must not be.

    Returns:
        The new (total, weight_sum, highest).
    """
    new_highest = tl.maximum(highest, lse)
    decay = tl.exp2(highest - new_highest)
    weight = tl.exp2(lse - new_highest)
    # fma by name: which of two products a compiler fuses with the addition is its choice, and could differ by kernel
    total = tl.fma(total, tl.broadcast_to(decay, total.shape), weight * value)
    weight_sum = tl.fma(weight_sum, decay, weight)
    return total, weight_sum, new_highest


@triton.jit(do_not_specialize=["num_splits", "stride_out"])
def _merge_splits_kernel(
    values_ptr,
    lse_ptr,
    seq_lens_ptr,
    out_ptr,
    num_splits,
    stride_out,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    let_dependents_start(PDL)
    wait_for_inputs(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + sequence)
    used = tl.cdiv(seq_len, SPLIT)
    first_row = (sequence * H + head) * num_splits
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D

    # one split at a time, as a block: the interpreter has no masks for scalars
    highest = tl.full([1], float("-inf"), tl.float32)
    weight_sum = tl.zeros([1], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first_split in range(0, tl.minimum(used, num_splits), AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            split = first_split + i + tl.arange(0, 1)
            there = split < tl.minimum(used, num_splits)
            row = first_row + split  # [1]
            lse = tl.load(lse_ptr + row, mask=there, other=float("-inf"))
            value = tl.load(values_ptr + row * D + dims, mask=there & dim_mask, other=0.0)
            total, weight_sum, highest = merge_split(total, weight_sum, highest, value, lse)

    y = tl.where(seq_len > 0, total / tl.where(seq_len > 0, weight_sum, 1.0), 0.0)
    # tokens that no split holds
    y = tl.where(used > num_splits, float("nan"), y)
    tl.store(out_ptr + sequence * stride_out + head * D + dims, y, mask=dim_mask)


def merge_splits_triton(values: Tensor, lse: Tensor, seq_lens: Tensor, out: Tensor, *, pdl: bool = False) -> None:
    """Merge the splits of ``paged_decode_partials_triton``; launches one kernel and allocates nothing.

    Args:
        values: [S, H, num_splits, D] float32, contiguous; splits from ``ceil(seq_len / SPLIT)`` on are not read.
        lse: [S, H, num_splits] float32, base 2, contiguous.
        seq_lens: [S] int32. A row of length 0 becomes zeros, one with more tokens than the splits hold NaN.
        out: [S, H, D] or [S, H * D] in a storage dtype, all but the first dimension contiguous; written.
        pdl: programmatic dependent launch (fusion.py).
    """
    num_seqs, n_head, num_splits, head_dim = values.shape
    if not out.numel():
        return
    block_d = triton.next_power_of_2(head_dim)
    with on_device(values):
        _merge_splits_kernel[(num_seqs, n_head)](
            values,
            lse,
            seq_lens,
            out,
            num_splits,
            out.stride(0),
            H=n_head,
            D=head_dim,
            SPLIT=SPLIT,
            AT_ONCE=_AT_ONCE,
            BLOCK_D=block_d,
            PDL=pdl,
            num_warps=WARPS.find(architecture_of(values), ALL, head_dim),
            launch_pdl=pdl,
            **OPTIONS,
        )
