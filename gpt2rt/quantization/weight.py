"""One quantised matrix, in the form that all devices share, and what its numbers are.

    int8:      w[n, k] = codes[n, k] * scales[n]
    int4:      w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g],   g = k // group_size
    nf4, fp4:  w[n, k] = codebook[codes[n, k]] * scales[n, g]

in float32, with one rounding for the product. :meth:`QuantizedWeight.dequantize` is the definition; kernels are tested
against it. Executors pack the tensors as they like.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .codebooks import CODEBOOK_SCHEMES, codebook, unpack_4bit

SCHEMES = ("int8", "int4", "nf4", "fp4")
ACTIVATIONS = ("int8", "float32")
INT4_GROUP_SIZES = (32, 64, 128)

#: elements of K that share a scale of the activations when the weights are int8, whose own scale is the row's
INT8_ACTIVATION_GROUP = 64

_SCALE_DTYPES = {"int8": torch.float32, "int4": torch.float16, "nf4": torch.float32, "fp4": torch.float32}


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantised matrix [out_features, in_features] = [N, K], in ``nn.Linear`` orientation.

    Shapes and dtypes are checked when it is made; :meth:`check` looks at the values too.

    Attributes:
        scheme: "int8", "int4", "nf4" or "fp4".
        shape: (N, K).
        group_size: elements of a row that share a scale: K for int8; 32, 64 or 128 for int4; for nf4 and fp4 the
            block, or the largest part of it that divides K.
        codes: int8: [N, K] int8 in -127..127; else [N, ceil(K / 2)] uint8, two codes to a byte, the first in the high
            bits.
        scales: int8: [N] float32; int4: [N, ceil(K / group_size)] float16; nf4, fp4: [N, K / group_size] float32.
        zeros: int4: [N, ceil(K / group_size)] uint8 in 0..15, or None, which means 8 everywhere; else None.
        activations: "int8" quantises the inputs of the product to int8 as it runs; "float32" leaves them alone.

    Raises:
        ValueError: a tensor has the wrong shape or dtype, or a field a value that the scheme does not have.
    """

    scheme: str
    shape: tuple[int, int]
    group_size: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    activations: str = "int8"

    def __post_init__(self) -> None:
        _check_fields(self)
        rows, columns = self.shape
        groups = -(-columns // self.group_size)
        _check_tensor("codes", self.codes, *code_layout(self.scheme, self.shape))
        scale_shape = (rows,) if self.scheme == "int8" else (rows, groups)
        hint = "" if self.scheme == "int8" else f", one scale for each {self.group_size} of {columns} columns"
        _check_tensor("scales", self.scales, scale_shape, _SCALE_DTYPES[self.scheme], hint)
        if self.zeros is not None:
            if self.scheme != "int4":
                raise ValueError(f"zeros belong to int4 with zero points; {self.scheme} has none, pass zeros=None")
            _check_tensor("zeros", self.zeros, (rows, groups), torch.uint8)

    # ---- what it holds ---------------------------------------------------------------------------------------------

    @property
    def codebook(self) -> Tensor | None:
        """The values of the codes of nf4 and fp4: [16] float32, on the device of the codes; None for the others."""
        return codebook(self.scheme, self.codes.device) if self.scheme in CODEBOOK_SCHEMES else None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(x.nbytes for x in (self.codes, self.scales, self.zeros) if x is not None)

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight takes, its part of scales and zeros included."""
        return 8.0 * self.num_bytes / max(1, self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same matrix on another device; itself if it is there already."""
        if self.device == torch.device(device):
            return self
        zeros = None if self.zeros is None else self.zeros.to(device)
        return dataclasses.replace(self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=zeros)

    def check(self) -> None:
        """Look at the values, at the cost of one pass over memory. Tensors on the meta device have none.

        Raises:
            ValueError: a scale is not finite, or a code or zero point is outside its table.
        """
        if self.codes.device.type == "meta":
            return
        finite = torch.isfinite(self.scales)
        if not bool(finite.all()):
            place = tuple((~finite).nonzero()[0].tolist())
            raise ValueError(
                f"{int((~finite).sum())} of {self.scales.numel()} scales are not finite, the first at {list(place)}: "
                f"{self.scales[place].item()}; the file is damaged, or the weights were not finite when quantised"
            )
        if self.scheme == "int8":
            low = int(self.codes.min()) if self.codes.numel() else 0
            if low < -127:
                raise ValueError(
                    f"int8 codes are -127 to 127, got {int((self.codes < -127).sum())} of -128; quantise again, "
                    "with scale = max|w| / 127"
                )
        if self.zeros is not None and self.zeros.numel() and int(self.zeros.max()) > 15:
            raise ValueError(
                f"zero points of int4 are 0 to 15, got {int(self.zeros.max())}; are they still packed, two to a byte?"
            )

    # ---- the numbers -----------------------------------------------------------------------------------------------

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix: [N, K] in ``dtype``; computed in float32 and rounded once at the end."""
        return self._values(self.codes, self.scales, self.zeros).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of :meth:`dequantize`, as an embedding looks them up: ids [...] of any integers, to [..., K]."""
        flat = ids.reshape(-1)
        zeros = None if self.zeros is None else self.zeros[flat]
        values = self._values(self.codes[flat], self.scales[flat], zeros)
        return values.view(*ids.shape, self.shape[1])

    def _values(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        if self.scheme == "int8":
            return codes.float() * scales.unsqueeze(1)
        columns = self.shape[1]
        flat = unpack_4bit(codes, columns)
        table = self.codebook
        if table is None:
            numbers = flat.float()
            numbers -= 8.0 if zeros is None else self._per_column(zeros.float())
        else:
            numbers = table[flat.int()]
        return numbers.mul_(self._per_column(scales.float()))

    def _per_column(self, per_group: Tensor) -> Tensor:
        """[n, groups] to [n, K]."""
        return per_group.repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]]


def code_layout(scheme: str, shape: tuple[int, int]) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of the codes of a matrix ``shape`` [N, K]."""
    rows, columns = shape
    return ((rows, columns), torch.int8) if scheme == "int8" else ((rows, -(-columns // 2)), torch.uint8)


def scale_layout(scheme: str, shape: tuple[int, int], group_size: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the scales of a matrix ``shape`` [N, K]; zero points have this shape too."""
    rows, columns = shape
    return ((rows,) if scheme == "int8" else (rows, -(-columns // group_size))), _SCALE_DTYPES[scheme]


def _check_fields(weight: QuantizedWeight) -> None:
    scheme, shape, group_size = weight.scheme, weight.shape, weight.group_size
    if scheme not in SCHEMES:
        raise ValueError(f"scheme = {scheme!r}, but the schemes are {', '.join(SCHEMES)}")
    if not isinstance(shape, tuple) or len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape = {shape!r}, expected (out_features, in_features), both at least 1")
    columns = shape[1]
    if weight.activations not in ACTIVATIONS:
        raise ValueError(f"activations = {weight.activations!r}, expected one of {', '.join(ACTIVATIONS)}")
    if scheme == "int8" and group_size != columns:
        raise ValueError(
            f"int8 has one scale a row, so group_size must be the {columns} columns of the matrix, got {group_size}"
        )
    if scheme == "int4" and group_size not in INT4_GROUP_SIZES:
        raise ValueError(f"group_size of int4 must be one of {INT4_GROUP_SIZES}, got {group_size!r}")
    if scheme in CODEBOOK_SCHEMES:
        if weight.activations != "float32":
            raise ValueError(f"{scheme} multiplies float32 activations; pass activations='float32'")
        if type(group_size) is not int or group_size < 1 or columns % group_size:
            raise ValueError(
                f"group_size of {scheme} must divide the {columns} columns, got {group_size!r}; blocks that straddle "
                "rows are written as their largest common part, each with the block's scale"
            )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, hint: str = "") -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} have shape {list(tensor.shape)}, expected {list(shape)}{hint}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} have dtype {tensor.dtype}, expected {dtype}")
