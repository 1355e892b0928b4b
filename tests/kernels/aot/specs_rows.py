"""What the ahead-of-time check compiles of the kernels for few rows: linear_rows and head."""

import torch
from spec import Spec
from torch import Tensor

from gpt2rt.kernels.fused_linear import Append, Norm, Partials
from gpt2rt.kernels.head import head_argmax_triton, head_workspace_bytes
from gpt2rt.kernels.linear_rows import fused_linear_rows_triton
from gpt2rt.kernels.weights import DeviceWeight

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _weight(kind: str, n: int, k: int) -> DeviceWeight:
    """A weight with no memory: "f16", "bf16", "f32", "int8", or "int4", "int4z" (zero points), "nf4" and a group."""
    dense = {"f16": F16, "bf16": BF16, "f32": F32}.get(kind)
    if dense is not None:
        return DeviceWeight("dense", (n, k), _empty(n, k, dtype=dense), dense)
    if kind == "int8":
        return DeviceWeight("int8", (n, k), _empty(n, k, dtype=torch.int8), F16, _empty(n, dtype=F32))
    name, _, group_size = kind.partition(" g")
    words, groups = _empty(n, -(-k // 64) * 8, dtype=torch.int32), (n, -(-k // int(group_size)))
    zeros = _empty(*groups, dtype=torch.uint8) if name == "int4z" else None
    codebook = _empty(16, dtype=F32) if name == "nf4" else None
    scales = _empty(*groups, dtype=F16 if codebook is None else F32)
    return DeviceWeight(
        "int4" if codebook is None else "code4", (n, k), words, F16, scales, zeros, codebook, int(group_size)
    )


def _small_dtype(kind: str) -> torch.dtype:
    """Dtype of the biases and norm parameters that go with a weight."""
    return {"bf16": BF16, "f32": F32}.get(kind, F16)


def _norm(kind: str, k: int) -> Norm:
    parameter = _empty(k, dtype=_small_dtype(kind))
    return Norm(parameter, parameter, 1e-5)


def _rows(
    kind: str,
    n: int,
    k: int,
    wide_loads: int,
    wait_after_loads: int,
    *,
    norm: bool = False,
    append: bool = False,
    residual: bool = False,
    splits: int = 0,
    activation: str = "linear",
) -> Spec:
    """A launch for four rows of float32 x; ``splits``: x is the merge of so many splits of attention."""
    m, n_head = 4, k // 64
    x: Tensor | None = _empty(m, k, dtype=F32)
    out, appended, partials = _empty(m, n, dtype=F32 if residual else F16), None, None
    if append:
        cache = _empty(1024, n // 192, 16, 64, dtype=F16)
        appended = Append(cache, cache, _empty(m, dtype=torch.int64))
        out = _empty(m, n // 3, dtype=F16)
    if splits:
        values, lse = _empty(m, n_head, splits, 64, dtype=F32), _empty(m, n_head, splits, dtype=F32)
        x, partials = None, Partials(values, lse, _empty(m, dtype=torch.int32))
    weight, bias = _weight(kind, n, k), _empty(n, dtype=_small_dtype(kind))
    parts = {
        "norm": norm,
        "append": append,
        "residual": residual,
        f"{splits} splits": splits,
        activation: activation != "linear",
    }
    return Spec(
        " ".join(["rows", f"{n}x{k}", kind, *(name for name, there in parts.items() if there)]),
        lambda: fused_linear_rows_triton(
            x,
            weight,
            bias,
            out,
            norm=_norm(kind, k) if norm else None,
            activation=activation,
            residual=out if residual else None,
            append=appended,
            partials=partials,
            pdl=wait_after_loads > 0,
        ),
        (wide_loads,),
        wait_after_loads=wait_after_loads,
    )


def _head(kind: str, k: int, wide_loads: int) -> Spec:
    x, weight, norm = _empty(4, k, dtype=F32), _weight(kind, 50257, k), _norm(kind, k)
    indices, ids, best = _empty(4, dtype=torch.int64), _empty(4, dtype=torch.int64), _empty(4, dtype=F32)

    def call() -> None:
        # the size depends on the tile, and so on the target
        workspace = _empty(head_workspace_bytes(weight, 4), dtype=torch.uint8)
        head_argmax_triton(x, weight, norm, indices, ids, best, workspace, finite=True)

    return Spec(f"head {k} {kind}", call, (wide_loads, 0))


# the 124M model has n_embd 768, the 1.5B model 1600; with wait_after_loads the launch is a programmatic dependent one
SPECS = [
    _rows("f16", 2304, 768, 5, 3, norm=True, append=True),
    _rows("bf16", 768, 768, 5, 3, residual=True, splits=4),
    _rows("f16", 6400, 1600, 9, 7, norm=True, activation="gelu_new"),
    _rows("f16", 1600, 6400, 9, 0, residual=True),
    _rows("f32", 2304, 768, 9, 0, norm=True),
    _rows("int8", 2304, 768, 4, 4, norm=True, append=True),
    _rows("int4 g64", 2304, 768, 3, 2, norm=True, append=True),
    _rows("int4z g32", 768, 3072, 3, 2, residual=True),
    _rows("int4 g128", 6400, 1600, 3, 0, norm=True, activation="gelu_new"),
    _rows("nf4 g64", 2304, 768, 3, 2, norm=True),
    _head("f16", 768, 7),
    _head("int8", 1600, 5),
]
