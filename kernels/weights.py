"""One weight in the form that the fused GPU kernels read, and how it is packed.

Four formats, all of a matrix [N, K] (out, in):

- ``dense``: float16, bfloat16 or float32, rows contiguous.
- ``int8``: codes [N, K] int8, a float32 scale a row.
- ``int4``: words [N, 8 * ceil(K / 64)] int32. In each chunk of 64 elements, word w of 8 holds in its bits 4j to 4j + 3
  the code of element 8j + w. A float16 scale, and perhaps a zero point (else 8), for each group of 32, 64 or 128
  elements.
- ``code4`` (NF4, FP4): words as in int4, codes of a table of 16 float32 values, a float32 scale for each group.

Why this order of the 4-bit codes: a tile of words [n, 8] shifted by 0, 4, ..., 28 along a new middle dimension gives
[n, 8, 8], which reshapes to the 64 elements in their natural order, for tensor cores; and where one thread multiplies
and adds, plane j of four neighbouring words meets four neighbouring elements of the activation, one 16-byte load.

Imports torch alone.
"""

import dataclasses

import torch
from torch import Tensor

FORMATS = ("dense", "int8", "int4", "code4")
#: elements of a row that eight words of 4-bit codes hold
CHUNK = 64
#: groups that the kernels have for 4-bit codes
GROUP_SIZES = (32, 64, 128)


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceWeight:
    """A weight as the kernels read it; see the module's text for the formats.

    Attributes:
        format: one of ``FORMATS``.
        shape: (N, K).
        data: dense [N, K]; int8 [N, K]; words [N, 8 * ceil(K / 64)] int32.
        compute_dtype: in which tensor cores multiply: that of a dense weight; for the others what the activations have.
        scales: int8: [N] float32; int4: [N, ceil(K / group_size)] float16; code4: the same in float32; dense: None.
        zeros: int4: [N, ceil(K / group_size)] uint8, or None for 8; else None.
        codebook: code4: [16] float32; else None.
        group_size: elements that share a scale; 0 for dense and int8.
    """

    format: str
    shape: tuple[int, int]
    data: Tensor
    compute_dtype: torch.dtype
    scales: Tensor | None = None
    zeros: Tensor | None = None
    codebook: Tensor | None = None
    group_size: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that a kernel reads to see all of it."""
        parts = (self.data, self.scales, self.zeros)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the kernels multiply by: [N, K] in ``dtype``, computed in float32 (float64 for float64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        k = self.shape[1]
        if self.format == "dense":
            return self.data.to(dtype)
        assert self.scales is not None
        if self.format == "int8":
            return (self.data.to(wide) * self.scales.to(wide)[:, None]).to(dtype)
        codes = unpack_words(self.data)[:, :k]

        def each(per_group: Tensor) -> Tensor:
            return per_group.repeat_interleave(self.group_size, dim=1)[:, :k]

        if self.codebook is not None:
            values = self.codebook.to(wide)[codes]
        else:
            values = (codes - (8 if self.zeros is None else each(self.zeros).long())).to(wide)
        return (values * each(self.scales).to(wide)).to(dtype)


def pack_dense(weight: Tensor) -> DeviceWeight:
    """A float weight [N, K] with any strides; copied unless its rows are contiguous already."""
    data = weight if weight.stride(1) == 1 else weight.contiguous()
    return DeviceWeight("dense", (weight.size(0), weight.size(1)), data, weight.dtype)


def pack_quantized(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    *,
    in_features: int,
    group_size: int,
    compute_dtype: torch.dtype,
) -> DeviceWeight:
    """A quantised weight, from the tensors that ``gpt2rt.quantization.QuantizedWeight`` holds.

    Args:
        codes: [N, K] int8, or [N, ceil(K / 2)] uint8 with two 4-bit codes a byte, the first in the high half.
        scales: [N] float32 for int8; else [N, ceil(K / group_size)], float16, or float32 with a codebook.
        zeros: [N, ceil(K / group_size)] uint8, or None.
        codebook: [16] float32, or None: the codes are integers.
        in_features: K.
        group_size: elements of a row that share a scale; of no meaning for int8.
        compute_dtype: float16, bfloat16 or float32, in which tensor cores multiply.

    Returns:
        The weight on the device of ``codes``; dense in ``compute_dtype`` where the kernels do not have the group size.
    """
    shape = (codes.size(0), in_features)
    if codes.dtype == torch.int8:
        return DeviceWeight("int8", shape, codes.contiguous(), compute_dtype, scales.contiguous())
    padded = -(-in_features // CHUNK) * CHUNK
    flat = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1)[:, :in_features]
    words = pack_words(torch.nn.functional.pad(flat, (0, padded - in_features)))
    weight = DeviceWeight(
        "int4" if codebook is None else "code4",
        shape,
        words,
        compute_dtype,
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        codebook,
        group_size,
    )
    if group_size in GROUP_SIZES:
        return weight
    return pack_dense(weight.dequantize(compute_dtype))


def pack_words(codes: Tensor) -> Tensor:
    """4-bit codes [N, K] of any integers, K a multiple of 64, to words [N, K / 8] int32."""
    n, k = codes.shape
    planes = codes.long().view(n, k // CHUNK, 8, 8)  # [n, chunk, plane j, word w]
    shifts = torch.arange(0, 32, 4, device=codes.device)
    words = (planes << shifts[:, None]).sum(dim=2).flatten(1)
    # the highest bit of a word is the sign of an int32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of :func:`pack_words`: [N, K] int64."""
    n, count = words.shape
    shifts = torch.arange(0, 32, 4, device=words.device)
    planes = (words.long().view(n, count // 8, 1, 8) >> shifts[:, None]) & 15
    return planes.reshape(n, 8 * count)
