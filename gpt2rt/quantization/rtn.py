"""Quantising a matrix by rounding each weight to the nearest code.

int8, one scale a row (n), as LLM.int8() does (Dettmers et al., arXiv:2208.07339, section 2.2):

    scale[n] = max_k |w[n, k]| / 127          code = round(w * (127 / max))

int4, in groups of a row. The scale is rounded to float16 first and the codes are chosen for the rounded one:

    symmetric:   code = clamp(round(w / scale) + 8, 0, 15)
    zero points: scale = c * (hi - lo) / 15, zero = round(-c * lo / scale), code = clamp(round(w / scale) + zero, 0, 15)

with lo = min(w, 0), hi = max(w, 0). The symmetric codes -8..7 are lopsided, so the scale has a sign: s = -m / 8, where
m is the weight of largest magnitude with its sign, gives that weight the end of the range that is one code longer.
Cutting off the largest weights makes the steps between the others smaller, so each group tries the factors ``CLIPS``
(times s, or as c) and keeps the one with the smallest sum of squared errors, the first of equals.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockwise import quantize_blocks
from .codebooks import pack_4bit
from .config import QuantizationConfig
from .weight import SCHEMES, QuantizedWeight

#: factors on the full range that int4 tries for each group
CLIPS = (1.0, 0.93, 0.86, 0.79, 0.72)

# rows of which no weight is as large become zero: 127 / max would overflow
_TINY = 1e-36

# elements that are worked on at a time, so that the temporaries stay in the processor's cache
_CHUNK = 2**18


@torch.no_grad()
def quantize_rtn(weight: Tensor, config: QuantizationConfig, *, scheme: str | None = None) -> QuantizedWeight:
    """A matrix, quantised as ``config`` says, each weight on its own.

    Args:
        weight: [N, K], any floating dtype and strides.
        config: how; its ``method`` is not looked at.
        scheme: another than the config's: the format of the embedding.

    Raises:
        ValueError: ``weight`` is no finite floating matrix, or too large for float16 scales.
    """
    scheme = config.scheme if scheme is None else scheme
    check_weight(weight)
    if scheme in ("nf4", "fp4"):
        assert config.group_size is not None
        return quantize_blocks(weight, scheme, config.group_size, double_quant=config.double_quant)[0]
    shape, activations = (weight.size(0), weight.size(1)), config.activations
    assert activations is not None
    if scheme == "int8":
        parts = [_quantize_int8(rows) for rows in _row_chunks(weight)]
        codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return QuantizedWeight("int8", shape, shape[1], codes, scales, activations=activations)
    if scheme != "int4":
        raise ValueError(f"scheme = {scheme!r}, but the schemes are {', '.join(SCHEMES)}")
    group_size = config.group_size_of(shape[1], "int4")
    results = [_quantize_int4(rows, group_size, config.symmetric) for rows in _row_chunks(weight)]
    codes = torch.cat([codes for codes, _, _ in results])
    scales = torch.cat([scales for _, scales, _ in results])
    zeros = None if config.symmetric else torch.cat([zeros for _, _, zeros in results if zeros is not None])
    return QuantizedWeight("int4", shape, group_size, codes, scales, zeros, activations)


def check_weight(weight: Tensor) -> None:
    """Raise ValueError unless ``weight`` is a floating matrix [N, K] with at least one element, all finite."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            f"expected a weight [out_features, in_features] of floating dtype, got {list(weight.shape)} {weight.dtype}"
        )
    for rows in _row_chunks(weight):
        if not bool(torch.isfinite(rows).all()):
            bad = ~torch.isfinite(weight)
            place = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{int(bad.sum())} of {weight.numel()} weights are NaN or infinite, the first at {place}; such a "
                "matrix cannot be quantised"
            )


def _row_chunks(weight: Tensor) -> Iterator[Tensor]:
    """Some rows at a time, as contiguous float32."""
    count = max(1, _CHUNK // weight.size(1))
    for start in range(0, weight.size(0), count):
        yield weight[start : start + count].float().contiguous()


# ---- int8 ----------------------------------------------------------------------------------------------------------


def int8_scales(weight: Tensor) -> Tensor:
    """The largest magnitude of each row over 127: [N, K] float32 to [N] float32; 0 where a row is (nearly) zero."""
    largest = weight.abs().amax(dim=1)
    return torch.where(largest < _TINY, 0.0, largest / 127.0)


def int8_codes(column: Tensor, scales: Tensor) -> Tensor:
    """The nearest codes of weights [N] for given ``scales`` [N]: [N] float32 with values -127 to 127."""
    return (column / torch.where(scales == 0, torch.inf, scales)).round_().clamp_(-127, 127)


def _quantize_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, K] int8 and scales [n] float32 of rows [n, K] float32."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    inverse = torch.where(largest < _TINY, 0.0, 127.0 / largest)
    return (rows * inverse).round_().clamp_(-127, 127).to(torch.int8), int8_scales(rows)


# ---- int4 ----------------------------------------------------------------------------------------------------------


def _quantize_int4(rows: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed codes [n, ceil(K / 2)], scales and zeros [n, groups] of rows [n, K] float32."""
    groups = as_groups(rows, group_size)
    scales, zeros = int4_scales(groups, symmetric)
    codes = int4_codes(groups, scales, zeros).flatten(1)[:, : rows.size(1)]
    return pack_4bit(codes.to(torch.uint8)), scales, None if symmetric else zeros.to(torch.uint8)


def as_groups(rows: Tensor, group_size: int) -> Tensor:
    """[n, K] to [n, groups, group_size]; a short last group is filled with zeros."""
    short = -rows.size(1) % group_size
    return F.pad(rows, (0, short)).unflatten(1, (-1, group_size))


def int4_scales(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The scales [...] float16 and zero points [...] float32 that suit groups [..., group_size] float32 best.

    Raises:
        ValueError: a scale is beyond float16.
    """
    best_error: Tensor | None = None
    for clip in CLIPS:
        scales, zeros = _symmetric_range(groups, clip) if symmetric else _zero_point_range(groups, clip)
        codes = int4_codes(groups, scales, zeros)
        # (code - zero) * scale - w, in place: a pass over memory costs more than the arithmetic
        error = codes.sub_(zeros.unsqueeze(-1)).mul_(scales.float().unsqueeze(-1)).sub_(groups).square_().sum(dim=-1)
        if best_error is None:
            best_error, best_scales, best_zeros = error, scales, zeros
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scales = torch.where(better, scales, best_scales)
            best_zeros = torch.where(better, zeros, best_zeros)
    if not bool(torch.isfinite(best_scales).all()):
        raise ValueError(
            f"the largest weight is {groups.abs().max().item():.4g}, which needs a scale beyond float16; int4 holds "
            "weights up to about 5e5, int8 any"
        )
    return best_scales, best_zeros


def int4_codes(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The nearest codes: [..., group_size] float32 with values 0 to 15; the zero point where the scale is 0.

    Args:
        groups: [..., group_size] float32.
        scales: [...] float16.
        zeros: [...] float32.
    """
    steps = scales.float().unsqueeze(-1)
    steps = torch.where(steps == 0, torch.inf, steps)
    return (groups / steps).round_().add_(zeros.unsqueeze(-1)).clamp_(0, 15)


def _symmetric_range(groups: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    scales = (largest * (clip / -8.0)).half()
    return scales, torch.full_like(largest, 8.0)


def _zero_point_range(groups: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(dim=-1).clamp_(max=0) * clip, groups.amax(dim=-1).clamp_(min=0) * clip
    scales = ((high - low) / 15.0).half()
    zeros = (-low / torch.where(scales == 0, torch.inf, scales.float())).round_().clamp_(0, 15)
    return scales, zeros
