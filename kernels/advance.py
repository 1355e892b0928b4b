"""From a step's tokens to the next step's inputs, on the device: so that a decode loop need not wait for the host.

For each row: the chosen token becomes its input, its position and length grow by one, its slot is looked up in its
block table, and the token is kept in a ring of the last ``R`` steps for the host to fetch. A row whose next position
reaches ``limits`` becomes a padding row (length 0, slot -1), and so does one whose token is negative, which is what the
sampler gives where there is nothing to choose; both stay so.

Shapes: chosen, input_ids, position_ids, slot_mapping [B] int64; seq_lens, limits [B] int32; block_table [B, max_blocks]
int32; ring [R, B] int64; step [1] int64. One program: B is a batch, not a prompt.
"""

import triton
import triton.language as tl
from torch import Tensor

from .fusion import let_dependents_start, wait_for_inputs
from .launch import OPTIONS, on_device

__all__ = ["advance_ref", "advance_triton"]


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
) -> None:
    """The definition, in place."""
    ring[int(step) % ring.size(0)] = chosen
    step += 1
    positions = position_ids + 1
    alive = (seq_lens > 0) & (chosen >= 0) & (positions < limits) & (positions < block_table.size(1) * block_size)
    blocks = block_table.gather(1, (positions // block_size).where(alive, 0)[:, None]).squeeze(1).long()
    input_ids.copy_(chosen.where(alive, 0))
    position_ids.copy_(positions.where(alive, 0))
    slot_mapping.copy_((blocks * block_size + positions % block_size).where(alive & (blocks >= 0), -1))
    seq_lens.copy_((positions + 1).where(alive, 0))


@triton.jit
def _advance_kernel(
    chosen_ptr,
    input_ids_ptr,
    position_ids_ptr,
    slot_mapping_ptr,
    seq_lens_ptr,
    limits_ptr,
    block_table_ptr,
    ring_ptr,
    step_ptr,
    stride_table,
    B: tl.constexpr,
    R: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_dependents_start(PDL)
    wait_for_inputs(PDL)
    rows = tl.arange(0, BLOCK)
    mask = rows < B
    chosen = tl.load(chosen_ptr + rows, mask=mask, other=-1)
    step = tl.load(step_ptr)
    positions = tl.load(position_ids_ptr + rows, mask=mask, other=0) + 1
    seq_lens = tl.load(seq_lens_ptr + rows, mask=mask, other=0)
    limits = tl.load(limits_ptr + rows, mask=mask, other=0)
    tl.store(ring_ptr + step % R * B + rows, chosen, mask=mask)
    alive = (seq_lens > 0) & (chosen >= 0) & (positions < limits) & (positions < MAX_BLOCKS * BLOCK_SIZE)
    block = tl.load(block_table_ptr + rows * stride_table + positions // BLOCK_SIZE, mask=mask & alive, other=-1)
    slots = block.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    tl.store(input_ids_ptr + rows, tl.where(alive, chosen, 0), mask=mask)
    tl.store(position_ids_ptr + rows, tl.where(alive, positions, 0), mask=mask)
    tl.store(slot_mapping_ptr + rows, tl.where(alive & (block >= 0), slots, -1), mask=mask)
    tl.store(seq_lens_ptr + rows, tl.where(alive, positions + 1, 0).to(tl.int32), mask=mask)
    # after every lane has read it
    tl.debug_barrier()
    tl.store(step_ptr, step + 1)


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
    pdl: bool = False,
) -> None:
    """Launch, in place; nothing is allocated. All tensors are contiguous, rows of ``block_table`` may be apart."""
    with on_device(chosen):
        _advance_kernel[(1,)](
            chosen,
            input_ids,
            position_ids,
            slot_mapping,
            seq_lens,
            limits,
            block_table,
            ring,
            step,
            block_table.stride(0),
            B=chosen.size(0),
            R=ring.size(0),
            MAX_BLOCKS=block_table.size(1),
            BLOCK_SIZE=block_size,
            BLOCK=max(32, triton.next_power_of_2(chosen.size(0))),
            PDL=pdl,
            num_warps=1,
            **({"launch_pdl": True} if pdl else {}),
            **OPTIONS,
        )
