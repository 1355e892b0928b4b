"""How an importer describes a tensor of a file that is not safetensors."""

from typing import NamedTuple

import torch

from gpt2rt.checkpoint.safetensors_file import TensorInfo

# bounds on what a hostile file can make an importer keep; a checkpoint of 48 blocks has 580 tensors in 8 levels
MAX_TENSORS = 100_000
MAX_DEPTH = 16


class StoredTensor(NamedTuple):
    """One tensor and where its bytes lie.

    Attributes:
        dtype: as stored.
        shape: as stored, before any transposition.
        pieces: the places of its row-major little-endian data, in order; nearly always one.
        transposed: its two dimensions are swapped when it is read.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[TensorInfo, ...]
    transposed: bool = False
