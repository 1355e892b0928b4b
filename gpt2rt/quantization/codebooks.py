"""The value tables of the 4-bit floating formats, and how two 4-bit codes share a byte.

nf4 ("normal float") holds quantiles of the normal distribution, scaled to [-1, 1], with an exact zero: Dettmers et al.,
"QLoRA", arXiv:2305.14314, section 3 and appendix E. fp4 is a sign bit and eight magnitudes, twelfths of
0, 1/16, 8, 12, 4, 6, 2, 3 in the order of their codes; it has two zeros, codes 0 and 8. Both are bitsandbytes' tables.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# appendix E of the paper; all are exact float32 values
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

#: schemes whose codes are looked up in a table
CODEBOOK_SCHEMES = ("nf4", "fp4")


@functools.cache
def _codebook(scheme: str, device: torch.device) -> Tensor:
    if scheme == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32, device=device)
    twelfths = torch.tensor(_FP4_TWELFTHS, dtype=torch.float32, device=device)
    return torch.cat([twelfths, -twelfths]) / 12.0


def codebook(scheme: str, device: torch.device | str = "cpu") -> Tensor:
    """The values of the codes 0 to 15: [16], float32. One tensor serves all callers: do not write to it.

    Raises:
        ValueError: ``scheme`` is neither "nf4" nor "fp4".
    """
    if scheme not in CODEBOOK_SCHEMES:
        raise ValueError(f"{scheme!r} has no codebook; the schemes that have one are {', '.join(CODEBOOK_SCHEMES)}")
    return _codebook(scheme, torch.device(device))


def pack_4bit(codes: Tensor) -> Tensor:
    """Two codes to a byte, the first of a pair in the high bits: [..., K], uint8 below 16, to [..., ceil(K / 2)].

    The last byte of an odd row has zeros in its low bits.

    Raises:
        ValueError: another dtype, or a code above 15.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"4-bit codes to pack must be uint8, got {codes.dtype}")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"4-bit codes are 0 to 15, got {int(codes.max())}")
    if codes.size(-1) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def unpack_4bit(packed: Tensor, in_features: int) -> Tensor:
    """The codes of :func:`pack_4bit`: [..., ceil(K / 2)] uint8 to [..., K] uint8, where K is ``in_features``.

    Raises:
        ValueError: another dtype, or another number of bytes.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed 4-bit codes must be uint8, got {packed.dtype}")
    if packed.size(-1) != -(-in_features // 2):
        raise ValueError(
            f"{in_features} 4-bit codes take {-(-in_features // 2)} bytes, but the rows have {packed.size(-1)}"
        )
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2)[..., :in_features]
