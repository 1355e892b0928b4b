"""Matrix multiplication with packed weights of every format: the products of ``cpu_step`` by themselves.

For tests and measurements of single products; a model runs them inside ``cpu_step``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_like, check_rows
from ._library import define

#: format of a packed weight -> its code in csrc/cpu/packed.h
WEIGHT_FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "code4": 5}


def _packed_linear_fake(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    weight_format: int,
    group_size: int,
    has_zeros: bool,
    fast: bool,
    num_threads: int,
    out: Tensor,
) -> None:
    return None


def _unpack_linear_fake(
    packed: Tensor, codebook: Tensor | None, weight_format: int, group_size: int, has_zeros: bool, out: Tensor
) -> None:
    return None


_packed_linear = define(
    "packed_linear",
    "(Tensor x, Tensor packed, Tensor? codebook, Tensor? bias, int out_features, int weight_format, int group_size, "
    "bool has_zeros, bool fast, int num_threads, Tensor(a!) out) -> ()",
    reference=None,
    fake=_packed_linear_fake,
)
_unpack_linear = define(
    "unpack_linear",
    "(Tensor packed, Tensor? codebook, int weight_format, int group_size, bool has_zeros, Tensor(a!) out) -> ()",
    reference=None,
    fake=_unpack_linear_fake,
)


def _code(op: str, weight_format: str) -> int:
    if weight_format not in WEIGHT_FORMATS:
        raise ValueError(f"{op}: weight_format is {weight_format!r}, expected one of {', '.join(WEIGHT_FORMATS)}")
    return WEIGHT_FORMATS[weight_format]


def packed_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    weight_format: str,
    group_size: int = 0,
    has_zeros: bool = False,
    codebook: Tensor | None = None,
    fast: bool = True,
    num_threads: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """``x @ w.t() + bias`` with a weight that ``pack_linear`` or ``pack_quantized`` wrote.

    Args:
        x: [num_tokens, K] float32 on CPU, rows contiguous.
        packed: bytes of the packed [out_features, K] weight, aligned to 64 bytes.
        bias: [out_features] float32, or None.
        out_features: N.
        weight_format: a key of :data:`WEIGHT_FORMATS`; "code4" is NF4 and FP4.
        group_size: elements of K that share a scale, for int4 and code4.
        has_zeros: int4 with zero points.
        codebook: [16] float32, the values of code4.
        fast: the arithmetic of the format, as in ``cpu_step``: int8 rows for int8 and int4, bfloat16 rows for
            bfloat16 where there is the instruction. False: float32 rows.
        num_threads: 0 means the default.
        out: [num_tokens, N] float32 with contiguous rows, to be overwritten; None: a new tensor.

    Returns:
        [num_tokens, N] float32.

    Raises:
        ValueError: a shape, a size or the format does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: the extension is missing.
    """
    op = "packed_linear"
    check_rows(op, "x", x)
    if x.dtype != torch.float32:
        raise TypeError(f"{op}: x has dtype {x.dtype}, expected float32; convert it with .float()")
    code = _code(op, weight_format)
    shape = (x.size(0), out_features)
    if out is None:
        out = x.new_empty(shape)
    else:
        check_like(op, "out", out, shape, x)
    _packed_linear(x, packed, codebook, bias, out_features, code, group_size, has_zeros, fast, num_threads, out)
    return out


def unpack_linear(
    packed: Tensor,
    out_features: int,
    in_features: int,
    *,
    weight_format: str,
    group_size: int = 0,
    has_zeros: bool = False,
    codebook: Tensor | None = None,
) -> Tensor:
    """The weight that ``packed`` holds: [out_features, in_features] float32. Arguments as in :func:`packed_linear`."""
    out = torch.empty((out_features, in_features), dtype=torch.float32)
    _unpack_linear(packed, codebook, _code("unpack_linear", weight_format), group_size, has_zeros, out)
    return out
