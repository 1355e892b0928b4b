"""What the ahead-of-time check compiles of attention and the KV cache: write_kv, decode, prefill, in every format."""

import torch
from spec import Spec
from torch import Tensor

from gpt2rt.kernels.paged_decode_attention import merge_splits_triton, paged_decode_partials_triton
from gpt2rt.kernels.paged_prefill_attention import paged_prefill_into_triton
from gpt2rt.kernels.write_kv import write_kv_triton

F32, F16, BF16, INT8, FLOAT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn
NAMES = {F32: "f32", F16: "f16", BF16: "bf16", INT8: "int8", FLOAT8: "float8"}


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _cache(n_head: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Keys or values, and their scales."""
    scales = _empty(1024, n_head, 16, dtype=F32) if dtype in (INT8, FLOAT8) else None
    return _empty(1024, n_head, 16, head_dim, dtype=dtype), scales


def _qkv(num_tokens: int, n_head: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Views into a qkv matrix, as the model passes them."""
    qkv = _empty(num_tokens, 3, n_head, head_dim, dtype=dtype)
    return qkv[:, 0], qkv[:, 1], qkv[:, 2]


def _write_kv(n_head: int, dtype: torch.dtype, wide_loads: int, stored: torch.dtype | None = None) -> Spec:
    _, key, value = _qkv(64, n_head, 64, dtype)
    cache, scales = _cache(n_head, 64, stored or dtype)
    slots = _empty(64, dtype=torch.int64)
    return Spec(
        f"write_kv H={n_head} D=64 {NAMES[dtype]}{f' as {NAMES[stored]}' if stored else ''}",
        lambda: write_kv_triton(key, value, cache, cache, slots, scales, scales),
        (wide_loads,),
    )


def _prefill(
    n_head: int,
    head_dim: int,
    dtype: torch.dtype,
    wide_loads: int,
    *,
    stored: torch.dtype | None = None,
    mma: bool = True,
    batch_invariant: bool = False,
    max_query_len: int = 512,
) -> Spec:
    query, _, _ = _qkv(max_query_len, n_head, head_dim, dtype)
    cache, scales = _cache(n_head, head_dim, stored or dtype)
    table, lens, starts = (_empty(*shape, dtype=torch.int32) for shape in ((4, 64), (4,), (5,)))
    out = _empty(max_query_len, n_head, head_dim, dtype=dtype)
    return Spec(
        f"prefill H={n_head} D={head_dim} {NAMES[dtype]}{f' of {NAMES[stored]}' if stored else ''}"
        f"{' invariant' if batch_invariant else ''}{f' {max_query_len} queries' if max_query_len != 512 else ''}",
        lambda: paged_prefill_into_triton(
            query,
            cache,
            cache,
            table,
            lens,
            starts,
            max_query_len,
            out,
            head_dim**-0.5,
            scales,
            scales,
            batch_invariant=batch_invariant,
        ),
        (wide_loads,),
        mma,
    )


def _decode(
    n_head: int,
    head_dim: int,
    dtype: torch.dtype,
    wide_loads: int,
    *,
    stored: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> Spec:
    query, _, _ = _qkv(4, n_head, head_dim, dtype)
    cache, scales = _cache(n_head, head_dim, stored or dtype)
    table, lens = _empty(4, 64, dtype=torch.int32), _empty(4, dtype=torch.int32)
    values, lse = _empty(4, n_head, 16, head_dim, dtype=F32), _empty(4, n_head, 16, dtype=F32)
    return Spec(
        f"decode H={n_head} D={head_dim} {NAMES[dtype]}{f' of {NAMES[stored]}' if stored else ''}"
        f"{' invariant' if batch_invariant else ''}",
        lambda: paged_decode_partials_triton(
            query,
            cache,
            cache,
            table,
            lens,
            values,
            lse,
            head_dim**-0.5,
            scales,
            scales,
            batch_invariant=batch_invariant,
        ),
        (wide_loads,),
        mma=batch_invariant,
    )


def _merge(n_head: int, head_dim: int, dtype: torch.dtype) -> Spec:
    values, lse = _empty(4, n_head, 16, head_dim, dtype=F32), _empty(4, n_head, 16, dtype=F32)
    lens, out = _empty(4, dtype=torch.int32), _empty(4, n_head, head_dim, dtype=dtype)
    # a thread reads two elements of each of eight splits
    return Spec(f"merge D={head_dim} {NAMES[dtype]}", lambda: merge_splits_triton(values, lse, lens, out), (0,))


# loops are unrolled differently by version and target, so their bounds leave some room; a kernel that fell back to
# narrow loads has none at all. GPT-2 124M has 12 heads, the 1.5B model 25; head_dim is 64 everywhere
SPECS = [
    _write_kv(12, F16, 2),
    _write_kv(25, F16, 2, INT8),
    _write_kv(25, F32, 4, FLOAT8),
    _prefill(25, 64, BF16, 16),
    _prefill(8, 80, BF16, 20),
    _prefill(8, 256, F16, 20),
    _prefill(12, 64, F32, 10, mma=False),
    _prefill(12, 64, F16, 6, stored=INT8),
    _prefill(12, 64, BF16, 6, stored=FLOAT8),
    # tiles of 128 queries
    _prefill(25, 64, BF16, 8, max_query_len=1024),
    _prefill(12, 64, F16, 8, batch_invariant=True),
    _decode(12, 64, F16, 12),
    _decode(12, 64, F32, 12),
    _decode(8, 80, BF16, 12),
    _decode(25, 64, F16, 6, stored=INT8),
    _decode(12, 64, BF16, 6, stored=FLOAT8),
    _decode(12, 64, F16, 8, batch_invariant=True),
    _merge(12, 64, F16),
]
