"""The layout in which AutoGPTQ and GPTQModel save 4-bit weights, read.

For a linear layer with K inputs and N outputs, in groups of G inputs (G = K if group_size is -1):

    name.qweight  [K / 8, N] int32: codes of 8 inputs, the first in the lowest 4 bits
    name.qzeros   [ceil(K / G), N / 8] int32: zero points of 8 outputs likewise; "gptq" stores them less 1
    name.scales   [ceil(K / G), N] float16
    name.g_idx    [K] int32, the group of each input; it may be absent: k // G

    w[k, n] = (code[k, n] - zero[g, n]) * scale[g, n],   g = g_idx[k]

Layout: the packing of AutoGPTQ's ``QuantLinear`` and the formats of GPTQModel's documentation; the method is Frantar et
al., arXiv:2210.17323. In "gptq" a zero point of 0 is stored as 15 and understood as such.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2rt.checkpoint.safetensors_file import TensorInfo
from gpt2rt.checkpoint.weights import Weights

from .codebooks import pack_4bit
from .stored import QuantizedCheckpoint, StoredMatrix
from .weight import INT4_GROUP_SIZES, QuantizedWeight

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def unpack_int32(packed: Tensor) -> Tensor:
    """The 8 codes of 4 bits in each int32, lowest first: [n, m] to [n, m, 8] uint8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    # an arithmetic shift repeats the sign, and the mask cuts that off
    return ((packed.unsqueeze(-1) >> shifts) & 15).to(torch.uint8)


class GPTQMatrix(StoredMatrix):
    """A matrix in this layout.

    Args:
        stem: name of the layer.
        infos: the tensors of the checkpoint.
        group_size: of quantization_config, -1 for one group.
        zero_offset: what was subtracted from zero points before they were stored.
        activations: of the weights read.
    """

    def __init__(
        self, stem: str, infos: dict[str, TensorInfo], group_size: int, zero_offset: int, activations: str
    ) -> None:
        present = [f"{stem}.{part}" for part in _PARTS if f"{stem}.{part}" in infos]
        super().__init__(f"{stem}.weight", infos[f"{stem}.qweight"], present)
        self._infos = {part: infos.get(f"{stem}.{part}") for part in _PARTS}
        self._stem, self._group_size, self._zero_offset = stem, group_size, zero_offset
        self._activations = activations
        #: after reading: whether the inputs of a group stand apart, so that the weight came out as floats
        self.is_reordered = False

    def _groups_of(self, columns: int) -> tuple[int, int]:
        """(group size, number of groups)."""
        size = columns if self._group_size == -1 else self._group_size
        return size, -(-columns // size)

    def check(self, shape: tuple[int, int], scheme: str) -> None:
        rows, columns = shape
        if rows % 8 or columns % 8:
            raise self.wrong(
                f"is for a layer of {columns} inputs and {rows} outputs, which 8 codes a number cannot hold"
            )
        _, groups = self._groups_of(columns)
        hint = f" for a layer of {columns} inputs and {rows} outputs with group_size = {self._group_size}"
        self.require(self.info, (columns // 8, rows), torch.int32, hint)
        for part, part_shape, dtype in (
            ("qzeros", (groups, rows // 8), torch.int32),
            ("scales", (groups, rows), torch.float16),
            ("g_idx", (columns,), torch.int32),
        ):
            info = self._infos[part]
            if info is not None:
                self.require(info, part_shape, dtype, hint)
            elif part != "g_idx":
                raise self.wrong(f"has no {part}: '{self._stem}.{part}' is missing; the checkpoint is incomplete")

    def read(
        self, weights: Weights, shape: tuple[int, int], scheme: str, check_values: bool
    ) -> QuantizedWeight | Tensor:
        rows, columns = shape
        size, groups = self._groups_of(columns)
        # [K / 8, N, 8] to [N, K]
        codes = unpack_int32(weights.read(f"{self._stem}.qweight")).permute(1, 0, 2).reshape(rows, columns)
        zeros = unpack_int32(weights.read(f"{self._stem}.qzeros")).reshape(groups, rows)
        zeros = ((zeros + self._zero_offset) & 15).t()
        scales = weights.read(f"{self._stem}.scales").t()
        index = torch.arange(columns) // size
        order = self._infos["g_idx"]
        if order is not None:
            stored = weights.read(f"{self._stem}.g_idx").long()
            if int(stored.min()) < 0 or int(stored.max()) >= groups:
                raise self.wrong(
                    f"holds {int(stored.min())} to {int(stored.max())}, expected groups 0 to {groups - 1}", order
                )
            self.is_reordered = not torch.equal(stored, index)
            index = stored
        if self.is_reordered:
            if check_values and not bool(torch.isfinite(scales).all()):
                raise self.wrong("holds scales that are not finite; the checkpoint is damaged", self._infos["scales"])
            return (codes.float() - zeros[:, index].float()) * scales[:, index].float()
        # a format here has groups of at most 128: longer ones repeat their scale
        part = next((g for g in reversed(INT4_GROUP_SIZES) if size % g == 0 or size == columns), 0)
        assert part
        places = torch.arange(0, columns, part) // size
        # 8 everywhere is what None means
        points = None if bool((zeros == 8).all()) else zeros[:, places].contiguous()
        packed, factors = pack_4bit(codes), scales[:, places].contiguous()
        weight = QuantizedWeight("int4", shape, part, packed, factors, points, self._activations)
        return self.checked(weight, check_values)


def open_gptq(weights: Weights, group_size: int, zero_offset: int, activations: str) -> QuantizedCheckpoint:
    """The quantised weights of a checkpoint of AutoGPTQ or GPTQModel; arguments as of :class:`GPTQMatrix`."""
    infos = dict(weights.infos)
    stems = [name.removesuffix(".qweight") for name in infos if name.endswith(".qweight")]
    matrices = [GPTQMatrix(stem, infos, group_size, zero_offset, activations) for stem in stems]
    return QuantizedCheckpoint(weights, matrices)
