"""Quantised weights that an earlier process made of the same floats, so that a second start does not round again.

They are kept where packed weights are (graph/packed_cache.py, which says what is trusted and when something is
removed), under a key over the bytes of all floats, the config and the quantisers' own source. Finding the key takes one
pass over the checkpoint; GPT-2 124M is rounded to int4 in 2.4 s and found again in 0.3 s (EPYC Zen 4, one thread).

    8 bytes      length of the header, little-endian
    header       JSON: key -> scheme, shape, group_size, activations and {"codes"|"scales"|"zeros": offset}
    tensors      each at a multiple of 64 bytes
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

import gpt2rt.quantization
from gpt2rt.checkpoint.weights import Weights
from gpt2rt.graph.packed_cache import PackedCache, open_cache
from gpt2rt.quantization.config import QuantizationConfig
from gpt2rt.quantization.weight import QuantizedWeight, code_layout, scale_layout

_PARTS = ("codes", "scales", "zeros")


class RoundedWeights:
    """The quantised weights of one checkpoint.

    Attributes:
        found: key of the state dict -> the weight from an earlier process; empty if there was none.
    """

    def __init__(self, cache: PackedCache, key: bytes) -> None:
        self._cache, self._key = cache, key
        self._made: dict[str, QuantizedWeight] = {}
        entry = cache.load(key, None)
        self.found = {} if entry is None else dict(_unpack(entry))

    @classmethod
    def open(
        cls, weights: Weights, forms: Mapping[str, tuple[str, str, bool]], config: QuantizationConfig
    ) -> Self | None:
        """What is kept for some weights of a checkpoint; None if nothing is to be kept of it.

        Args:
            weights: the floats; all that ``forms`` names are read.
            forms: key -> (name in ``weights``, scheme, whether it lies [in, out]).
            config: how they are quantised.
        Raises:
            CheckpointError: reading failed.
        """
        infos = [(weights.infos[name], form) for name, form, _ in forms.values()]
        sizes = [info.nbytes // info.dtype.itemsize // (1 if form == "int8" else 2) for info, form in infos]
        cache = open_cache(sum(sizes))
        if cache is None:
            return None
        recipe = repr((config, list(forms.items()))).encode() + _quantisers()
        return cls(cache, cache.key(recipe, (weights.read(name) for name, _, _ in forms.values())))

    def add(self, key: str, weight: QuantizedWeight) -> None:
        """Note a weight that was made now."""
        self._made[key] = weight

    def store(self) -> None:
        """Keep what was made, for later processes."""
        if self._made:
            self._cache.store_soon(self._key, _pack(self._made))


@functools.cache
def _quantisers() -> bytes:
    """A digest of the code that decides codes and scales."""
    digest = hashlib.sha256()
    for path in sorted(Path(path) for folder in gpt2rt.quantization.__path__ for path in Path(folder).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _pack(weights: Mapping[str, QuantizedWeight]) -> Tensor:
    """Weights as one tensor of bytes."""
    header, tensors, end = {}, [], 0
    for key, weight in weights.items():
        places = {}
        for part in _PARTS:
            tensor = getattr(weight, part)
            if tensor is not None:
                places[part] = end
                tensors.append((end, tensor.contiguous()))
                end += -(-tensor.nbytes // 64) * 64
        header[key] = [weight.scheme, weight.shape, weight.group_size, weight.activations, places]
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    start = 8 + len(text)
    packed = torch.zeros(start + end, dtype=torch.uint8)
    packed[:start] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    for offset, tensor in tensors:
        packed[start + offset : start + offset + tensor.nbytes] = tensor.view(-1).view(torch.uint8)
    return packed


def _unpack(packed: Tensor) -> Iterator[tuple[str, QuantizedWeight]]:
    """What :func:`_pack` was given; the tensors share the memory of ``packed``, each with a storage of its own."""
    # an array offers the buffer protocol, which its type hints leave out
    view = memoryview(packed.numpy())  # type: ignore[arg-type]
    start = 8 + int.from_bytes(view[:8], "little")
    for key, (scheme, shape, group_size, activations, places) in json.loads(bytes(view[8:start])).items():
        rows_and_columns = (shape[0], shape[1])
        scales = scale_layout(scheme, rows_and_columns, group_size)
        layouts = {
            "codes": code_layout(scheme, rows_and_columns),
            "scales": scales,
            "zeros": (scales[0], torch.uint8),
        }
        tensors = {}
        for part, offset in places.items():
            sizes, dtype = layouts[part]
            count = torch.Size(sizes).numel()
            tensors[part] = torch.frombuffer(view, dtype=dtype, count=count, offset=start + offset).view(sizes)
        yield key, QuantizedWeight(scheme, rows_and_columns, group_size, activations=activations, **tensors)
