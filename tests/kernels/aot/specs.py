"""What the ahead-of-time check compiles: launcher calls at real shapes, and what their machine code must show.

A spec calls a launcher with tensors that have shapes and strides but no memory (device "meta"). The check takes the
kernels and arguments from that call, so what it compiles is what the launcher would launch, configuration included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2rt.kernels.bias_gelu_new import bias_gelu_new_triton
from gpt2rt.kernels.embedding import embedding_triton
from gpt2rt.kernels.layer_norm import add_layer_norm_triton, layer_norm_triton
from gpt2rt.kernels.linear import linear_triton
from gpt2rt.kernels.paged_decode_attention import paged_decode_attention_triton
from gpt2rt.kernels.paged_prefill_attention import paged_prefill_attention_triton
from gpt2rt.kernels.write_kv import write_kv_triton

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {F32: "f32", F16: "f16", BF16: "bf16"}


@dataclass(frozen=True)
class Spec:
    """One launcher call.

    Attributes:
        name: unique label, the first column of the table.
        call: launches on meta tensors.
        wide_loads: for each kernel of the call, in order: the least number of 128-bit loads in its machine code.
        mma: whether the kernels must use tensor cores.
    """

    name: str
    call: Callable[[], object]
    wide_loads: tuple[int, ...]
    mma: bool = False


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _layer_norm(n: int, dtype: torch.dtype, wide_loads: int) -> Spec:
    x, w = _empty(64, n, dtype=dtype), _empty(n, dtype=dtype)
    return Spec(f"layer_norm n={n} {NAMES[dtype]}", lambda: layer_norm_triton(x, w, w, 1e-5), (wide_loads,))


def _add_layer_norm(n: int, dtype: torch.dtype, wide_loads: int) -> Spec:
    x, w = _empty(64, n, dtype=dtype), _empty(n, dtype=dtype)
    return Spec(f"add_layer_norm n={n} {NAMES[dtype]}", lambda: add_layer_norm_triton(x, x, w, w, 1e-5), (wide_loads,))


def _bias_gelu_new(n: int, dtype: torch.dtype, wide_loads: int) -> Spec:
    x, b = _empty(64, n, dtype=dtype), _empty(n, dtype=dtype)
    return Spec(f"bias_gelu_new n={n} {NAMES[dtype]}", lambda: bias_gelu_new_triton(x, b), (wide_loads,))


def _embedding(n: int, dtype: torch.dtype, wide_loads: int) -> Spec:
    ids = _empty(64, dtype=torch.int64)
    wte, wpe = _empty(50257, n, dtype=dtype), _empty(1024, n, dtype=dtype)
    return Spec(f"embedding n={n} {NAMES[dtype]}", lambda: embedding_triton(ids, ids, wte, wpe), (wide_loads,))


def _linear(
    m: int, n: int, k: int, dtype: torch.dtype, wide_loads: int, *, conv1d: bool = False, mma: bool = False
) -> Spec:
    x, b = _empty(m, k, dtype=dtype), _empty(n, dtype=dtype)
    w = _empty(k, n, dtype=dtype).t() if conv1d else _empty(n, k, dtype=dtype)
    name = f"linear {m}x{n}x{k} {NAMES[dtype]}{' conv1d' if conv1d else ''}"
    return Spec(name, lambda: linear_triton(x, w, b), (wide_loads,), mma)


def _qkv(num_tokens: int, n_head: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Views into a qkv matrix, as the model passes them."""
    qkv = _empty(num_tokens, 3, n_head, head_dim, dtype=dtype)
    return qkv[:, 0], qkv[:, 1], qkv[:, 2]


def _write_kv(n_head: int, dtype: torch.dtype, wide_loads: int) -> Spec:
    _, key, value = _qkv(64, n_head, 64, dtype)
    cache = _empty(1024, n_head, 16, 64, dtype=dtype)
    slots = _empty(64, dtype=torch.int64)
    return Spec(
        f"write_kv H={n_head} D=64 {NAMES[dtype]}",
        lambda: write_kv_triton(key, value, cache, cache, slots),
        (wide_loads,),
    )


def _prefill(n_head: int, head_dim: int, dtype: torch.dtype, wide_loads: int, *, mma: bool = True) -> Spec:
    query = _qkv(512, n_head, head_dim, dtype)[0]
    cache = _empty(1024, n_head, 16, head_dim, dtype=dtype)
    table, lens, starts = (_empty(*shape, dtype=torch.int32) for shape in ((4, 64), (4,), (5,)))
    return Spec(
        f"prefill H={n_head} D={head_dim} {NAMES[dtype]}",
        lambda: paged_prefill_attention_triton(query, cache, cache, table, lens, starts, 512, head_dim**-0.5),
        (wide_loads,),
        mma,
    )


def _decode(n_head: int, head_dim: int, dtype: torch.dtype, wide_loads: tuple[int, int]) -> Spec:
    query = _qkv(4, n_head, head_dim, dtype)[0]
    cache = _empty(1024, n_head, 16, head_dim, dtype=dtype)
    table, lens = _empty(4, 64, dtype=torch.int32), _empty(4, dtype=torch.int32)
    return Spec(
        f"decode H={n_head} D={head_dim} {NAMES[dtype]}",
        lambda: paged_decode_attention_triton(query, cache, cache, table, lens, 1024, head_dim**-0.5),
        wide_loads,
    )


# loops are unrolled differently by version and target, so their bounds leave some room; a kernel that fell back to
# narrow loads has none at all. GPT-2 124M has n_embd 768 and 12 heads, the 1.5B model 1600 and 25; head_dim is 64
# everywhere
SPECS = [
    _layer_norm(768, BF16, 3),
    _layer_norm(1600, F16, 3),
    _layer_norm(768, F32, 6),
    _add_layer_norm(768, F16, 4),
    _add_layer_norm(1600, BF16, 4),
    _add_layer_norm(768, F32, 8),
    _bias_gelu_new(3072, F16, 2),
    _bias_gelu_new(6400, F32, 4),
    _embedding(768, BF16, 2),
    _embedding(1600, F32, 4),
    _write_kv(12, F16, 2),
    _write_kv(25, F32, 4),
    _linear(1, 2304, 768, BF16, 5),
    _linear(1, 50257, 1600, F16, 8),
    _linear(8, 768, 3072, F16, 5),
    _linear(8, 768, 3072, F32, 8),
    _linear(4, 1600, 6400, BF16, 10),
    _linear(4, 2304, 768, F16, 10, conv1d=True),
    _linear(4, 2304, 768, F32, 10, conv1d=True),
    _linear(16, 2304, 768, BF16, 16, mma=True),
    _linear(64, 768, 3072, F16, 20, mma=True),
    _linear(128, 2304, 768, F16, 24, conv1d=True, mma=True),
    _linear(256, 768, 768, BF16, 24, mma=True),
    _linear(512, 2304, 768, BF16, 20, mma=True),
    _linear(512, 6400, 1600, F16, 20, conv1d=True, mma=True),
    _linear(16, 768, 768, F32, 5),
    _linear(128, 768, 768, F32, 4),
    _prefill(12, 64, F16, 16),
    _prefill(25, 64, BF16, 16),
    _prefill(8, 80, BF16, 20),
    _prefill(8, 128, F16, 20),
    _prefill(8, 256, F16, 20),
    _prefill(12, 64, F32, 10, mma=False),
    _decode(12, 64, F16, (8, 6)),
    _decode(25, 64, BF16, (8, 6)),
    _decode(12, 64, F32, (16, 6)),
    _decode(8, 80, BF16, (8, 12)),
    _decode(8, 256, F16, (8, 12)),
]
