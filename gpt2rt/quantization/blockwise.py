"""nf4 and fp4: blocks of the flattened matrix, each scaled by its largest magnitude, as bitsandbytes stores them.

    absmax[b] = max |w| of block b           code = the nearest entry of the codebook to w / absmax[b]

Source: Dettmers et al., "QLoRA", arXiv:2305.14314, section 3. Between two entries the midpoint belongs to the lower.
The blocks run over the flattened [N, K]; the last one may be short. Double quantisation stores absmax as

    absmax[b] = table[code[b]] * nested_absmax[b // 256] + offset

where offset is the mean of all absmax, and the table the 8-bit dynamic map of Dettmers, arXiv:1511.04561, section 2: a
sign, a decimal exponent in unary, and the rest of the bits linear between 0.1 and 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .codebooks import codebook, pack_4bit, unpack_4bit
from .weight import QuantizedWeight

#: scales that share a scale of their own
NESTED_BLOCK_SIZE = 256

# blocks of which no weight is as large are divided by this
_TINY = 1e-38

# elements that are worked on at a time
_CHUNK = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class NestedScales:
    """The scales of blocks, quantised themselves.

    Attributes:
        codes: [num_blocks] uint8.
        absmax: [ceil(num_blocks / 256)] float32, the scale of each 256 codes.
        table: [256] float32, the values of the codes.
        offset: [] float32, added to all of them.
    """

    codes: Tensor
    absmax: Tensor
    table: Tensor
    offset: Tensor

    def dequantize(self) -> Tensor:
        """The scales of the blocks: [num_blocks] float32."""
        scales = self.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: self.codes.numel()]
        return self.table[self.codes.int()] * scales + self.offset


@functools.cache
def dynamic_map() -> Tensor:
    """The 8-bit dynamic map, sorted: [256] float32.

    For the exponents e = 0, -1, ..., -6 there are 2**(6 + e) values of each sign, 10**e times the middles of as many
    equal parts of [0.1, 1]; then 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(-6, 1):
        edges = torch.linspace(0.1, 1.0, 2 ** (6 + exponent) + 1, dtype=torch.float32)
        middles = 10.0**exponent * ((edges[:-1] + edges[1:]) / 2.0)
        values += [middles, -middles]
    return torch.cat(values).sort().values


def nest_scales(scales: Tensor) -> NestedScales:
    """Quantise the scales of blocks, [num_blocks] float32, each to the nearest value.

    bitsandbytes' CPU code rounds ``(scale - offset) / absmax`` to one of 65536 steps first, so where that lies next to
    the midpoint of two values its code may be the other one.
    """
    offset = scales.mean()
    table = dynamic_map().to(scales.device)
    count = scales.numel()
    blocks = F.pad(scales - offset, (0, -count % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks / absmax.clamp(min=_TINY).unsqueeze(1)).view(-1)[:count]
    codes = torch.bucketize(scaled, _middles(table), out_int32=True)
    return NestedScales(codes.to(torch.uint8), absmax, table, offset)


def _middles(table: Tensor) -> Tensor:
    return (table[:-1] + table[1:]) / 2


def quantize_blocks(
    weight: Tensor, scheme: str, block_size: int, *, double_quant: bool = False
) -> tuple[QuantizedWeight, NestedScales | None]:
    """A matrix in nf4 or fp4, and with ``double_quant`` its scales as they are stored.

    Args:
        weight: [N, K], finite, any floating dtype and strides.
        scheme: "nf4" or "fp4".
        block_size: elements of the flattened matrix that share a scale.
        double_quant: round the scales as :func:`nest_scales` does.
    """
    rows, columns = weight.shape
    codes, absmax = quantize_flat(weight.reshape(-1), scheme, block_size)
    nested = nest_scales(absmax) if double_quant else None
    scales = absmax if nested is None else nested.dequantize()
    return from_blocks(codes, scales, scheme, (rows, columns), block_size), nested


def quantize_flat(values: Tensor, scheme: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes [n] uint8 below 16 and absmax [ceil(n / block_size)] float32 of values [n] of a floating dtype."""
    table = codebook(scheme, values.device)
    # fp4's table is not sorted, and it has two zeros: zero and what lies just below it get code 0, what lies just
    # above it gets code 8
    order = torch.argsort(table, stable=True)
    middles, sorted_codes = _middles(table[order]), order.to(torch.uint8)
    step = max(1, _CHUNK // block_size) * block_size
    codes, scales = [], []
    for start in range(0, values.numel(), step):
        part = values[start : start + step].float()
        rest = part.numel() % block_size
        blocks = part[: part.numel() - rest].view(-1, block_size)
        absmax = blocks.abs().amax(dim=1)
        scaled = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).view(-1)
        if rest:
            # bitsandbytes divides in the short last block, and keeps its scale above zero
            last = part[-rest:].abs().amax(dim=0, keepdim=True).clamp(min=_TINY)
            absmax, scaled = torch.cat([absmax, last]), torch.cat([scaled, part[-rest:] / last])
        places = torch.bucketize(scaled.clamp_(-1.0, 1.0), middles, out_int32=True)
        codes.append(sorted_codes[places])
        scales.append(absmax)
    return torch.cat(codes), torch.cat(scales)


def from_blocks(codes: Tensor, absmax: Tensor, scheme: str, shape: tuple[int, int], block_size: int) -> QuantizedWeight:
    """The matrix of codes and scales of the flattened weight.

    Where K is no multiple of the block, the scales stand once for each part of gcd(K, block_size) columns, so that no
    part straddles a row; the numbers are the same.

    Args:
        codes: [N * K] uint8 below 16.
        absmax: [ceil(N * K / block_size)] float32.
        scheme: "nf4" or "fp4".
        shape: (N, K).
        block_size: as the codes were made.

    Raises:
        ValueError: the number of codes or scales does not fit ``shape``.
    """
    rows, columns = shape
    if codes.numel() != rows * columns or absmax.numel() != -(-rows * columns // block_size):
        raise ValueError(
            f"{codes.numel()} codes and {absmax.numel()} scales, but [{rows}, {columns}] in blocks of {block_size} has "
            f"{rows * columns} and {-(-rows * columns // block_size)}"
        )
    part = math.gcd(columns, block_size)
    scales = absmax.float().repeat_interleave(block_size // part)[: rows * columns // part]
    return QuantizedWeight(
        scheme, shape, part, pack_4bit(codes.view(rows, columns)), scales.view(rows, -1), activations="float32"
    )


def to_blocks(weight: QuantizedWeight, block_size: int) -> tuple[Tensor, Tensor]:
    """The codes [N * K] uint8 below 16 and absmax [ceil(N * K / block_size)] that :func:`from_blocks` was given.

    Raises:
        ValueError: the scales are not the same all over some block.
    """
    rows, columns = weight.shape
    codes = unpack_4bit(weight.codes, columns).reshape(-1)
    parts, rest = divmod(block_size, weight.group_size)
    if rest:
        raise ValueError(f"groups of {weight.group_size} columns do not make blocks of {block_size}")
    scales = weight.scales.reshape(-1)
    absmax = scales[::parts]
    if not torch.equal(absmax.repeat_interleave(parts)[: scales.numel()], scales):
        raise ValueError(
            f"the scales of the [{rows}, {columns}] matrix differ inside blocks of {block_size}; it was quantised in "
            "smaller ones"
        )
    return codes, absmax.contiguous()
