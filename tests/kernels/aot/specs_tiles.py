"""Launches of the fused linear layer on tensor cores that the ahead-of-time check compiles (joined in specs.py)."""

import torch
from spec import Spec
from torch import Tensor

from gpt2rt.kernels.fused_linear import Append, Norm
from gpt2rt.kernels.linear_tiles import fused_linear_tiles_triton, workspace_bytes
from gpt2rt.kernels.quantized_linear_triton import quantized_linear_triton
from gpt2rt.kernels.weights import DeviceWeight

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {F32: "f32", F16: "f16", BF16: "bf16"}


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _weight(kind: str, n: int, k: int, dtype: torch.dtype) -> DeviceWeight:
    """A weight of a format ("dense", "int8", "int4 g64", "int4z g32", "nf4 g64") with no memory."""
    if kind == "dense":
        return DeviceWeight("dense", (n, k), _empty(n, k, dtype=dtype), dtype)
    if kind == "int8":
        return DeviceWeight("int8", (n, k), _empty(n, k, dtype=torch.int8), dtype, _empty(n, dtype=F32))
    name, group = kind.split(" g")
    group_size = int(group)
    groups = -(-k // group_size)
    words = _empty(n, -(-k // 64) * 8, dtype=torch.int32)
    if name == "nf4":
        scales, codebook = _empty(n, groups, dtype=F32), _empty(16, dtype=F32)
        return DeviceWeight("code4", (n, k), words, dtype, scales, None, codebook, group_size)
    zeros = _empty(n, groups, dtype=torch.uint8) if name == "int4z" else None
    return DeviceWeight("int4", (n, k), words, dtype, _empty(n, groups, dtype=F16), zeros, None, group_size)


def _tiles(
    m: int,
    n: int,
    k: int,
    kind: str,
    dtype: torch.dtype,
    wide_loads: tuple[int, ...],
    *,
    norm: bool = False,
    activation: str = "linear",
    residual: bool = False,
    append: bool = False,
    pdl: bool = False,
    batch_invariant: bool = False,
) -> Spec:
    """A layer of ``m`` rows; with ``norm`` or ``residual`` the residual stream is float32, as in the executor."""
    weight = _weight(kind, n, k, dtype)
    x = _empty(m, k, dtype=F32 if norm else dtype)
    out = _empty(m, n // 3 if append else n, dtype=F32 if residual else dtype)
    parameters = _empty(k, dtype=dtype)
    cache = _empty(64, n // 192, 16, 64, dtype=dtype)
    options = {
        "workspace": _empty(workspace_bytes(weight, m, batch_invariant=batch_invariant), dtype=torch.uint8),
        "norm": Norm(parameters, parameters, 1e-5) if norm else None,
        "activation": activation,
        "residual": out if residual else None,
        "append": Append(cache, cache, _empty(m, dtype=torch.int64)) if append else None,
        "pdl": pdl,
        "batch_invariant": batch_invariant,
    }
    ends = {"norm": norm, activation: activation != "linear", "residual": residual, "append": append, "pdl": pdl}
    marks = " ".join(mark for mark, there in {**ends, "invariant": batch_invariant}.items() if there)
    return Spec(
        f"tiles {m}x{n}x{k} {kind} {NAMES[dtype]} {marks}".rstrip(),
        lambda: fused_linear_tiles_triton(x, weight, _empty(n, dtype=dtype), out, **options),
        wide_loads,
        # the second kernel adds what the first one multiplied; float32 has no exact tensor cores
        mma=dtype != F32 and len(wide_loads) == 1 and ("HMMA" if m <= 64 else "HGMMA"),
        # the weights are asked for ahead of the loop that loads them
        wait_after_loads=int(pdl),
    )


def _op(m: int, n: int, k: int, group_size: int, dtype: torch.dtype, wide_loads: tuple[int, ...]) -> Spec:
    """``ops.quantized_linear`` on its storage layout, int4."""
    codes = _empty(n, k // 2, dtype=torch.uint8)
    scales = _empty(n, k // group_size, dtype=F16)
    x, bias = _empty(m, k, dtype=dtype), _empty(n, dtype=dtype)
    return Spec(
        f"quantized_linear {m}x{n}x{k} g{group_size} {NAMES[dtype]}",
        lambda: quantized_linear_triton(x, codes, scales, None, None, bias, k, group_size, False),
        wide_loads,
        mma="HMMA",
    )


# a product of few rows is two kernels where K is split (768 columns), and one where the columns are many
SPECS = [
    _tiles(16, 2304, 768, "dense", F16, (20, 2), norm=True, append=True),
    _tiles(64, 768, 3072, "dense", BF16, (30, 6), residual=True),
    _tiles(64, 6400, 1600, "dense", BF16, (30,), norm=True, activation="gelu_new"),
    _tiles(512, 768, 3072, "dense", F16, (40,), residual=True),
    _tiles(2048, 6400, 1600, "dense", BF16, (20,), activation="gelu_new"),
    _tiles(16, 6400, 1600, "int8", F16, (20,), norm=True, activation="gelu_new", pdl=True),
    _tiles(512, 2304, 768, "int8", BF16, (14,), append=True),
    _tiles(16, 768, 3072, "int4 g64", F16, (10, 6), residual=True),
    _tiles(2048, 6400, 1600, "int4z g32", BF16, (10,), activation="gelu_new"),
    _tiles(32, 6400, 1600, "nf4 g64", BF16, (24,), norm=True, activation="gelu_new"),
    _tiles(1, 2304, 768, "dense", F16, (30, 3), norm=True, append=True, batch_invariant=True),
    _tiles(16, 768, 768, "dense", F32, (14, 5), norm=True),
    _tiles(128, 3072, 768, "dense", F32, (4,)),
    _op(16, 6400, 1600, 64, F16, (10,)),
]
