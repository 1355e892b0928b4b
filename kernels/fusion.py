"""Device functions that the fused kernels share: programmatic dependent launch, norm, activations, the QKV store.

Programmatic dependent launch (PDL; CUDA programming guide, "Programmatic Dependent Launch and Synchronization"): a
kernel launched with it may start while the one before it still runs. Until ``wait_for_inputs`` a kernel may read only
what no kernel of the chain writes (weights, scales, biases, norm parameters) and may write nothing at all. The
interpreter has no PDL, and targets before sm_90 have none either: with PDL = False both functions are nothing.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: activations that the kernels have; :func:`activated` computes them
ACTIVATIONS = ("linear", "gelu_new", "gelu", "relu", "silu", "tanh", "quick_gelu")

SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def let_dependents_start(PDL: tl.constexpr):
    """The next kernel of the stream may start; it waits for this one's end before it reads what this one writes."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """All kernels before this one have ended and what they wrote is visible."""
    if PDL:
        gdc_wait()


@triton.jit
def normalised(x, weight, bias, mask, eps, K: tl.constexpr):
    """Layer norm of one row [BLOCK], float32, zero where ``mask`` is False; the variance in a second pass."""
    mean = tl.sum(x, 0) / K
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / K
    return centred * tl.rsqrt(variance + eps) * weight + bias


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """An activation of float32 values of any shape; ``ACTIVATION`` is one of ``ACTIVATIONS``."""
    if ACTIVATION == "gelu_new":
        # sigmoid instead of tanh: runs on every target and in the interpreter, and keeps the digits of small results
        # that 1 + tanh(z) cancels for negative z
        y = y * tl.sigmoid((y + 0.044715 * y * y * y) * (2.0 * SQRT_2_OVER_PI))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * SQRT_HALF))
    elif ACTIVATION == "relu":
        # not maximum: NaN must stay NaN
        y = tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "tanh":
        y = 2.0 * tl.sigmoid(2.0 * y) - 1.0
    elif ACTIVATION == "quick_gelu":
        y = y * tl.sigmoid(1.702 * y)
    else:
        tl.static_assert(ACTIVATION == "linear", "unknown activation")
    return y


@triton.jit
def store_qkv(
    y,
    out_ptr,
    key_cache_ptr,
    value_cache_ptr,
    row,
    slot,
    column,
    mask,
    num_slots,
    stride_out,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Columns [0, E) of a row go to ``out``, [E, 2E) to its slot of the key cache, [2E, 3E) to that of the value cache.

    ``y``, ``row``, ``slot`` (int64), ``column`` and ``mask`` broadcast against each other: [BLOCK_N] of one token, or
    [BLOCK_M, BLOCK_N] with row and slot [BLOCK_M, 1] and column [1, BLOCK_N]. A slot outside the caches is skipped.
    """
    tl.store(out_ptr + row * stride_out + column, y, mask=mask & (column < E))
    # the interpreter cannot combine the comparison of a scalar with a mask
    slot = slot + tl.zeros_like(column)
    within = column % E
    # caches are [num_blocks, E // D, BLOCK_SIZE, D]
    target = (slot // BLOCK_SIZE) * (E * BLOCK_SIZE) + (within // D) * (BLOCK_SIZE * D) + (slot % BLOCK_SIZE) * D
    target += within % D
    placed = mask & (slot >= 0) & (slot < num_slots)
    tl.store(key_cache_ptr + target, y, mask=placed & (column >= E) & (column < 2 * E))
    tl.store(value_cache_ptr + target, y, mask=placed & (column >= 2 * E))
