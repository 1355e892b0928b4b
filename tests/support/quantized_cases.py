"""Random weights of 8 and 4 bits as the ops take them, and their formats."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

#: format -> (bits, group size, zero points, codebook)
FORMATS = {
    "int8": (8, 0, False, False),
    "int4-g32": (4, 32, False, False),
    "int4-g64": (4, 64, False, False),
    "int4-g128": (4, 128, False, False),
    "int4-g64-zeros": (4, 64, True, False),
    "code4-g64": (4, 64, False, True),
    "code4-g128": (4, 128, False, True),
}


@dataclasses.dataclass
class Case:
    """Arguments of ``quantized_linear`` between x and bias, by name."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    codebook: Tensor | None
    in_features: int
    group_size: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.codes, self.scales, self.zeros, self.codebook

    @property
    def sizes(self) -> dict[str, int]:
        return {"in_features": self.in_features, "group_size": self.group_size}


def random_case(name: str, n: int, k: int, seed: int = 0) -> Case:
    """A weight [n, k] of a format, all its codes in use."""
    bits, group, with_zeros, with_codebook = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    if bits == 8:
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        return Case(codes, torch.rand(n, generator=generator) * 0.01 + 0.001, None, None, k, k)
    groups = -(-k // group)
    codes = torch.randint(0, 256, (n, -(-k // 2)), dtype=torch.uint8, generator=generator)
    scales = torch.rand((n, groups), generator=generator) * 0.01 + 0.001
    zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator) if with_zeros else None
    codebook = torch.linspace(-1.0, 1.0, 16).pow(3) if with_codebook else None
    return Case(codes, scales if with_codebook else scales.half(), zeros, codebook, k, group)
