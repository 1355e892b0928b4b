"""What the ahead-of-time check compiles of the ops that are no attention: norms, embeddings, weights of Conv1D."""

import torch
from spec import Spec
from torch import Tensor

from gpt2rt.kernels.advance import Embedding, advance_triton
from gpt2rt.kernels.bias_gelu_new import bias_gelu_new_triton
from gpt2rt.kernels.embedding import embedding_triton
from gpt2rt.kernels.embedding_rows import embedding_rows_triton
from gpt2rt.kernels.fused_linear import Norm
from gpt2rt.kernels.layer_norm import add_layer_norm_triton, layer_norm_triton
from gpt2rt.kernels.linear import linear_triton
from gpt2rt.kernels.norm_rows import norm_rows_triton
from gpt2rt.kernels.weights import DeviceWeight

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {F32: "f32", F16: "f16", BF16: "bf16"}


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


def _embedding_rows(n: int, dtype: torch.dtype, kind: str, wide_loads: int) -> Spec:
    ids, wpe, out = _empty(8, dtype=torch.int64), _empty(1024, n, dtype=dtype), _empty(8, n, dtype=F32)
    wte = _table(n, dtype, kind)
    name = f"embedding_rows n={n} {NAMES[dtype]} {kind}"
    return Spec(name, lambda: embedding_rows_triton(ids, ids, wte, wpe, out), (wide_loads,))


def _table(n: int, dtype: torch.dtype, kind: str) -> DeviceWeight:
    if kind == "dense":
        return DeviceWeight("dense", (50257, n), _empty(50257, n, dtype=dtype), dtype)
    if kind == "int8":
        return DeviceWeight("int8", (50257, n), _empty(50257, n, dtype=torch.int8), dtype, _empty(50257, dtype=F32))
    words, scales = _empty(50257, n // 8, dtype=torch.int32), _empty(50257, -(-n // 64), dtype=F16)
    return DeviceWeight("int4", (50257, n), words, dtype, scales, group_size=64)


def _norm_rows(n: int, dtype: torch.dtype, wide_loads: int, *, pdl: bool = False) -> Spec:
    x, rows, out = _empty(64, n, dtype=F32), _empty(64, dtype=torch.int64), _empty(64, n, dtype=dtype)
    norm = Norm(_empty(n, dtype=dtype), _empty(n, dtype=dtype), 1e-5)
    name = f"norm_rows n={n} {NAMES[dtype]}{' pdl' if pdl else ''}"
    chosen = None if pdl else rows
    return Spec(name, lambda: norm_rows_triton(x, norm, out, rows=chosen, pdl=pdl), (wide_loads,), pdl=pdl)


def _advance(num_rows: int, n: int = 0, kind: str = "", wide_loads: int = 0) -> Spec:
    """With ``n``: as a decode loop launches it, with the head's keys and the next step's rows."""
    ids, lens = _empty(num_rows, dtype=torch.int64), _empty(num_rows, dtype=torch.int32)
    table, ring = _empty(num_rows, 64, dtype=torch.int32), _empty(4, num_rows, dtype=torch.int64)
    state = ids, ids, ids, lens, lens, table, ring, ids
    if not n:
        return Spec(f"advance {num_rows}", lambda: advance_triton(ids, *state, 16), (0,))
    embedding = Embedding(_table(n, F16, kind), _empty(1024, n, dtype=F16), _empty(num_rows, n, dtype=F32))
    keys = _empty(num_rows, 3142, dtype=torch.int64)
    return Spec(
        f"advance {num_rows} n={n} {kind} pdl",
        lambda: advance_triton(ids, *state, 16, keys=keys, embedding=embedding, pdl=True),
        (wide_loads,),
        pdl=True,
    )


SPECS = [
    _layer_norm(768, BF16, 3),
    _layer_norm(1600, F16, 3),
    _layer_norm(768, F32, 6),
    _add_layer_norm(768, F16, 4),
    _add_layer_norm(768, F32, 8),
    _bias_gelu_new(3072, F16, 2),
    _embedding(768, BF16, 2),
    # 10 where the loop is unrolled, which it is not on sm_120
    _linear(4, 2304, 768, F16, 2, conv1d=True),
    _linear(128, 2304, 768, F16, 24, conv1d=True, mma=True),
    _linear(512, 6400, 1600, F16, 20, conv1d=True, mma=True),
    _embedding_rows(768, F16, "dense", 1),
    _embedding_rows(1600, F16, "int8", 0),
    _embedding_rows(768, BF16, "int4", 0),
    _norm_rows(1600, F16, 1),
    _norm_rows(768, BF16, 1, pdl=True),
    _advance(8),
    _advance(1, 768, "dense", 1),
    _advance(8, 1600, "int8", 0),
]
