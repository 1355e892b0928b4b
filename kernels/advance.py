"""From a step's results to the next step's inputs, on the device: so that a decode loop need not wait for the host.

For each row: the chosen token becomes its input, its position and length grow by one, its slot is looked up in its
block table, and the token is kept in a ring of the last ``R`` steps for the host to fetch. A row whose next position
reaches ``limits`` becomes a padding row (length 0, slot -1), and so does one whose token is negative, which is what the
sampler gives where there is nothing to choose; both stay so.

Two neighbours of this kernel in a step are part of it where they can be, which saves their launches: before it the
choice of the largest of the head's keys (``head.py``), after it the embedding of the token (``embedding_rows.py``).

Shapes: chosen, input_ids, position_ids, slot_mapping, step [B] int64; seq_lens, limits [B] int32; block_table
[B, max_blocks] int32; ring [R, B] int64. A program for each row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .embedding_rows import embedded, embedding_rows_ref
from .fusion import let_dependents_start, wait_for_inputs
from .head import KEYS, largest_of
from .launch import OPTIONS, on_device
from .weights import DeviceWeight

__all__ = ["Embedding", "advance_ref", "advance_triton"]

# columns of an embedded row that a program makes at a time, and its warps; starting points, not tuned on a device yet
COLUMNS, WARPS = 1024, 4


class Embedding(NamedTuple):
    """Where the rows of the next step's tokens come from and go to.

    Attributes:
        wte: (V, E).
        wpe: [P, E], contiguous rows.
        x: [B, E], contiguous rows, a storage dtype; written.
    """

    wte: DeviceWeight
    wpe: Tensor
    x: Tensor


def advance_ref(
    chosen: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    slot_mapping: Tensor,
    seq_lens: Tensor,
    limits: Tensor,
    block_table: Tensor,
    ring: Tensor,
    step: Tensor,
    block_size: int,
    *,
    embedding: Embedding | None = None,
) -> None:
    """The definition, in place."""
    ring[step % ring.size(0), torch.arange(len(chosen), device=ring.device)] = chosen
    step += 1
    positions = position_ids + 1
    alive = (seq_lens > 0) & (chosen >= 0) & (positions < limits) & (positions < block_table.size(1) * block_size)
    blocks = block_table.gather(1, (positions // block_size).where(alive, 0)[:, None]).squeeze(1).long()
    input_ids.copy_(chosen.where(alive, 0))
    position_ids.copy_(positions.where(alive, 0))
    slot_mapping.copy_((blocks * block_size + positions % block_size).where(alive & (blocks >= 0), -1))
    seq_lens.copy_((positions + 1).where(alive, 0))
    if embedding is not None:
        embedding.x.copy_(embedding_rows_ref(input_ids, position_ids, embedding.wte, embedding.wpe))


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def _advance_kernel(
    chosen_ptr,
    keys_ptr,
    input_ids_ptr,
    position_ids_ptr,
    slot_mapping_ptr,
    seq_lens_ptr,
    limits_ptr,
    block_table_ptr,
    ring_ptr,
    step_ptr,
    table_ptr,
    scales_ptr,
    zeros_ptr,
    codebook_ptr,
    wpe_ptr,
    x_ptr,
    num_rows,
    num_keys,
    stride_table,
    stride_wte,
    stride_wpe,
    stride_x,
    R: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    E: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    let_dependents_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    if keys_ptr is None:
        chosen = tl.load(chosen_ptr + row)
    else:
        chosen, _ = largest_of(keys_ptr, row, num_keys, KEYS)
    step = tl.load(step_ptr + row)
    position = tl.load(position_ids_ptr + row) + 1
    seq_len = tl.load(seq_lens_ptr + row)
    limit = tl.load(limits_ptr + row)
    alive = (seq_len > 0) & (chosen >= 0) & (position < limit) & (position < MAX_BLOCKS * BLOCK_SIZE)
    block = tl.load(block_table_ptr + row * stride_table + position // BLOCK_SIZE, mask=alive, other=-1)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    token = tl.where(alive, chosen, 0)
    position = tl.where(alive, position, 0)
    # every thread has read what one of them writes now
    tl.debug_barrier()
    if keys_ptr is not None:
        tl.store(chosen_ptr + row, chosen)
    tl.store(ring_ptr + step % R * num_rows + row, chosen)
    tl.store(step_ptr + row, step + 1)
    tl.store(input_ids_ptr + row, token)
    tl.store(position_ids_ptr + row, position)
    tl.store(slot_mapping_ptr + row, tl.where(alive & (block >= 0), slot, -1))
    tl.store(seq_lens_ptr + row, tl.where(alive, position + 1, 0).to(tl.int32))
    if x_ptr is not None:
        for first in range(0, E, COLUMNS):
            cols = first + tl.arange(0, COLUMNS)
            x = embedded(
                token,
                position,
                table_ptr,
                scales_ptr,
                zeros_ptr,
                codebook_ptr,
                wpe_ptr,
                stride_wte,
                stride_wpe,
                cols,
                V,
                P,
                E,
                FORMAT,
                GROUP,
                HAS_ZEROS,
                COLUMNS,
            )
            tl.store(x_ptr + row * stride_x + cols, x, mask=cols < E)


def advance_triton(
    chosen: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    slot_mapping: Tensor,
    seq_lens: Tensor,
    limits: Tensor,
    block_table: Tensor,
    ring: Tensor,
    step: Tensor,
    block_size: int,
    *,
    keys: Tensor | None = None,
    embedding: Embedding | None = None,
    pdl: bool = False,
) -> None:
    """Launch, in place; nothing is allocated. All tensors are contiguous, rows of ``block_table`` may be apart.

    Args:
        keys: [B, any] int64 of ``head_keys_triton``; then ``chosen`` is written, not read. Or None.
        embedding: the next step's rows are written as well. Or None.
        pdl: programmatic dependent launch; the kernel before this one in the stream must follow its rules (fusion.py).
    """
    wte = None if embedding is None else embedding.wte
    unused = chosen if wte is None else wte.data
    with on_device(chosen):
        _advance_kernel[(chosen.size(0),)](
            chosen,
            keys,
            input_ids,
            position_ids,
            slot_mapping,
            seq_lens,
            limits,
            block_table,
            ring,
            step,
            unused,
            unused if wte is None or wte.scales is None else wte.scales,
            unused if wte is None or wte.zeros is None else wte.zeros,
            unused if wte is None or wte.codebook is None else wte.codebook,
            unused if embedding is None else embedding.wpe,
            None if embedding is None else embedding.x,
            chosen.size(0),
            0 if keys is None else keys.size(1),
            block_table.stride(0),
            0 if wte is None else wte.data.stride(0),
            0 if embedding is None else embedding.wpe.stride(0),
            0 if embedding is None else embedding.x.stride(0),
            R=ring.size(0),
            MAX_BLOCKS=block_table.size(1),
            BLOCK_SIZE=block_size,
            KEYS=KEYS,
            V=0 if wte is None else wte.shape[0],
            P=0 if embedding is None else embedding.wpe.size(0),
            E=0 if wte is None else wte.shape[1],
            FORMAT="dense" if wte is None else wte.format,
            GROUP=0 if wte is None else wte.group_size,
            HAS_ZEROS=wte is not None and wte.zeros is not None,
            COLUMNS=COLUMNS if wte is None else min(COLUMNS, triton.next_power_of_2(wte.shape[1])),
            PDL=pdl,
            num_warps=1 if keys is None and embedding is None else WARPS,
            **({"launch_pdl": True} if pdl else {}),
            **OPTIONS,
        )
