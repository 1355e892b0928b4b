"""Writes the keys and values of a step's tokens to their slots of the paged cache.

    key_cache[slot // block_size, :, slot % block_size, :] = key[t]      with slot = slot_mapping[t]
    value_cache[...] = value[t]

Paging: Kwon et al., arXiv:2309.06180. Shapes: key, value [num_tokens, n_head, head_dim], views into a qkv matrix with
contiguous head rows; caches [num_blocks, n_head, block_size, head_dim] in a format of kv_formats.py, 8-bit ones with
scales [num_blocks, n_head, block_size] float32; slot_mapping [num_tokens] int64, -1 = skip. A slot outside the cache
cannot raise on a device without waiting for it: it is skipped, and nothing is written outside the cache. Copies are
exact, a cache of another float dtype gets one rounding, and 8-bit codes and scales are those of the definition,
``refs.quantize_heads_ref``, to the bit.
"""

import triton
import triton.language as tl
from torch import Tensor

from .config_table import ALL, Chunk, ConfigTable
from .fusion import let_dependents_start, wait_for_inputs
from .kv_formats import cache_format, encoded, stored
from .launch import OPTIONS, architecture_of, on_device
from .refs import write_kv_ref

__all__ = ["write_kv_ref", "write_kv_triton"]

# elements of key (and of value) that a program copies, in whole heads: one 16-byte load a thread in float16; a starting
# point, not tuned on a device yet
CHUNKS: ConfigTable[Chunk] = ConfigTable("write_kv", (), {ALL: ((Chunk(1024, 4),),)})


@triton.jit
def _store_heads(x, cache_ptr, scales_ptr, rows, dims, mask, D: tl.constexpr, FORMAT: tl.constexpr):
    """Heads [BLOCK_H, BLOCK_D] of a token to rows [BLOCK_H] of a cache; ``mask`` [BLOCK_H, BLOCK_D]."""
    target = rows[:, None] * D + dims[None, :]
    if FORMAT == "float":
        tl.store(cache_ptr + target, x, mask=mask)
    else:
        codes, scales = encoded(x.to(tl.float32), FORMAT)
        tl.store(cache_ptr + target, codes, mask=mask)
        tl.store(scales_ptr + rows, scales, mask=tl.max(mask.to(tl.int32), 1) == 1)


@triton.jit(do_not_specialize=["num_slots"])
def _write_kv_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slot_mapping_ptr,
    num_slots,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    let_dependents_start(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)  # int64, so the cache offsets are int64 as well
    if (slot >= 0) & (slot < num_slots):
        heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        dims = tl.arange(0, BLOCK_D)
        mask = (heads < H)[:, None] & (dims < D)[None, :]
        rows = ((slot // BLOCK_SIZE) * H + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
        key = tl.load(key_ptr + token * stride_kt + heads[:, None] * stride_kh + dims[None, :], mask=mask, other=0.0)
        value = tl.load(
            value_ptr + token * stride_vt + heads[:, None] * stride_vh + dims[None, :], mask=mask, other=0.0
        )
        _store_heads(key, key_cache_ptr, key_scales_ptr, rows, dims, mask, D, FORMAT)
        _store_heads(value, value_cache_ptr, value_scales_ptr, rows, dims, mask, D, FORMAT)


def write_kv_triton(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Launch ``write_kv``, in place. Shapes and dtypes were checked by ``gpt2rt.ops``.

    Args:
        key, value: [T, H, D], a storage dtype, last dimension contiguous.
        key_cache, value_cache: [num_blocks, H, block_size, D], any format of kv_formats.py; changed in place.
        slot_mapping: [T] int64; a slot outside the cache, such as -1, is skipped.
        key_scales, value_scales: [num_blocks, H, block_size] float32 of an 8-bit cache, changed in place; else None.
        pdl: programmatic dependent launch (fusion.py).
    """
    num_tokens, n_head, head_dim = key.shape
    num_blocks, _, block_size, _ = key_cache.shape
    block_d = triton.next_power_of_2(head_dim)
    size, num_warps = CHUNKS.find(architecture_of(key), ALL)
    block_h = min(triton.next_power_of_2(n_head), max(1, size // block_d))
    if key.numel():
        with on_device(key):
            _write_kv_kernel[(num_tokens, triton.cdiv(n_head, block_h))](
                key,
                value,
                stored(key_cache),
                stored(value_cache),
                key_scales,
                value_scales,
                slot_mapping,
                num_blocks * block_size,
                key.stride(0),
                key.stride(1),
                value.stride(0),
                value.stride(1),
                H=n_head,
                D=head_dim,
                BLOCK_SIZE=block_size,
                BLOCK_H=block_h,
                BLOCK_D=block_d,
                FORMAT=cache_format(key_cache),
                PDL=pdl,
                num_warps=num_warps,
                launch_pdl=pdl,
                **OPTIONS,
            )
