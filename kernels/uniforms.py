"""Random numbers on the device that a host can compute as well: Philox4x32-10, keyed by what a token is drawn for.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11, section 3.3.
Shapes: seeds, requests, choices, positions [R] int64; numbers [R] float64. All arithmetic is of integers, but for the
last product, which is exact: the numbers have the bits of ``uniforms_ref``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device
from .sampling_refs import uniforms_ref
from .sampling_select import EXACT

__all__ = ["uniforms_into_triton", "uniforms_ref", "uniforms_triton"]

BLOCK = 128


@triton.jit
def _low(words):
    return words & 0xFFFFFFFF


@triton.jit(do_not_specialize=["n", "advance"])
def _uniforms_kernel(
    seeds_ptr, requests_ptr, choices_ptr, positions_ptr, out_ptr, n, advance, ADVANCE: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < n
    seeds = tl.load(seeds_ptr + rows, mask=mask, other=0)
    requests = tl.load(requests_ptr + rows, mask=mask, other=0)
    positions = tl.load(positions_ptr + rows, mask=mask, other=0)
    # words of 32 bits in 64, where their products fit
    c0 = _low(positions).to(tl.uint64)
    c1 = _low(tl.load(choices_ptr + rows, mask=mask, other=0)).to(tl.uint64)
    c2, c3 = _low(requests).to(tl.uint64), _low(requests >> 32).to(tl.uint64)
    k0, k1 = _low(seeds).to(tl.uint64), _low(seeds >> 32).to(tl.uint64)
    for _ in tl.static_range(10):
        first = c0 * 0xD2511F53
        second = c2 * 0xCD9E8D57
        c0 = (second >> 32) ^ c1 ^ k0
        c2 = (first >> 32) ^ c3 ^ k1
        c1 = _low(second)
        c3 = _low(first)
        k0 = _low(k0 + 0x9E3779B9)
        k1 = _low(k1 + 0xBB67AE85)
    bits = (((c0 >> 5) << 26) + (c1 >> 6)).to(tl.int64)
    tl.store(out_ptr + rows, bits.to(tl.float64) * (1.0 / 9007199254740992.0), mask=mask)
    if ADVANCE:
        tl.store(positions_ptr + rows, positions + advance, mask=mask)


def uniforms_triton(seeds: Tensor, requests: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    """Launch ``uniforms``. Shapes and dtypes were checked by ``gpt2rt.ops``."""
    out = torch.empty((seeds.size(0),), dtype=torch.float64, device=seeds.device)
    uniforms_into_triton(seeds, requests, choices, positions, out)
    return out


def uniforms_into_triton(
    seeds: Tensor, requests: Tensor, choices: Tensor, positions: Tensor, out: Tensor, *, advance: int = 0
) -> None:
    """Numbers in [0, 1), see ``uniforms_ref``; without allocation.

    Args:
        seeds: [R] int64.
        requests: [R] int64.
        choices: [R] int64.
        positions: [R] int64.
        out: [R] float64, is written.
        advance: what is added to ``positions`` afterwards: 1 makes a captured step draw for the next token each time.
    """
    n = seeds.size(0)
    if n:
        with on_device(seeds):
            _uniforms_kernel[(triton.cdiv(n, BLOCK),)](
                seeds,
                requests,
                choices,
                positions,
                out,
                n,
                advance,
                ADVANCE=advance != 0,
                BLOCK=BLOCK,
                num_warps=BLOCK // 32,
                **EXACT,
            )
