"""bitsandbytes' layout of quantised weights, as transformers saves it, read and written.

4 bits, for a matrix [N, K] cut into blocks of B elements in row-major order, which need not end with a row:

    name.weight                                [ceil(N K / 2), 1] uint8, or the same bytes as another dtype
    name.weight.absmax                         [ceil(N K / B)] float32, the blocks' scales
    name.weight.quant_map                      [16] float32, the values of the codes
    name.weight.quant_state.bitsandbytes__nf4  uint8, JSON: quant_type, blocksize B, dtype, shape [N, K]

and with double quantisation (Dettmers et al., "QLoRA", arXiv:2305.14314, section 3), where JSON also holds
nested_blocksize, nested_dtype and nested_offset, scale = nested_quant_map[absmax] * nested_absmax + nested_offset:

    name.weight.absmax                         uint8
    name.weight.nested_absmax                  [ceil(len(absmax) / nested_blocksize)] float32
    name.weight.nested_quant_map               [256] float32

8 bits, with w = weight * SCB / 127:

    name.weight         [N, K] int8
    name.SCB            [N] float32, the largest absolute value of each row
    name.weight_format  scalar uint8, 0: by rows
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from gpt2rt.checkpoint.json_files import no_repeats
from gpt2rt.checkpoint.safetensors_file import TensorInfo
from gpt2rt.checkpoint.weights import Weights
from gpt2rt.errors import CheckpointError

from .blockwise import NESTED_BLOCK_SIZE, NestedScales, from_blocks, to_blocks
from .codebooks import CODEBOOK_SCHEMES, codebook, pack_4bit, unpack_4bit
from .config import BLOCK_SIZES, QuantizationConfig
from .stored import QuantizedCheckpoint, StoredMatrix
from .weight import QuantizedWeight

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_FORMAT = "_format"
# bytes of a quant_state; real ones have 100 to 250
_MAX_STATE_BYTES = 10_000


def _scb_of(name: str) -> str:
    return name.removesuffix("weight") + "SCB"


class FourBitMatrix(StoredMatrix):
    """A matrix in nf4 or fp4."""

    def __init__(self, name: str, infos: dict[str, TensorInfo], state: dict[str, Any], state_name: str) -> None:
        parts = (name, *(f"{name}.{part}" for part in _PARTS), state_name)
        super().__init__(name, infos[name], [part for part in parts if part in infos])
        self._infos = infos
        self._state, self._state_info = state, infos[state_name]

    def _part(self, part: str) -> TensorInfo:
        info = self._infos.get(f"{self.name}.{part}")
        if info is None:
            raise self.wrong(f"has no {part}: {self.info.name + '.' + part!r} is missing; the checkpoint is incomplete")
        return info

    @property
    def block_size(self) -> int:
        """Elements of the flattened matrix that share a scale."""
        return self._state["blocksize"]

    @property
    def _nested(self) -> bool:
        return "nested_offset" in self._state

    def check(self, shape: tuple[int, int], scheme: str) -> None:
        state = self._state
        if state.get("quant_type") != scheme:
            raise self.wrong(f"says {state.get('quant_type')!r}, but config.json says {scheme!r}", self._state_info)
        if state.get("shape") != list(shape):
            raise self.wrong(f"says shape {state.get('shape')}, the model needs {list(shape)}", self._state_info)
        block = state.get("blocksize")
        if type(block) is not int or block not in BLOCK_SIZES:
            raise self.wrong(f"says blocksize {block!r}, expected one of {BLOCK_SIZES}", self._state_info)
        count = math.prod(shape)
        if self.info.nbytes != -(-count // 2):
            raise self.wrong(f"has {self.info.nbytes} bytes, expected {-(-count // 2)}: {count} codes of 4 bits")
        blocks = -(-count // block)
        hint = f": one scale for each block of {block} of {count} weights"
        self.require(self._part("quant_map"), (16,), torch.float32)
        if not self._nested:
            self.require(self._part("absmax"), (blocks,), torch.float32, hint)
            return
        self.require(self._part("absmax"), (blocks,), torch.uint8, hint)
        size, offset = state.get("nested_blocksize"), state["nested_offset"]
        if size != NESTED_BLOCK_SIZE:
            raise self.wrong(f"says nested_blocksize {size!r}, expected {NESTED_BLOCK_SIZE}", self._state_info)
        if type(offset) is not float or not math.isfinite(offset):
            raise self.wrong(f"says nested_offset {offset!r}, expected a finite number such as 0.0", self._state_info)
        self.require(self._part("nested_absmax"), (-(-blocks // size),), torch.float32)
        self.require(self._part("nested_quant_map"), (256,), torch.float32)

    def read(self, weights: Weights, shape: tuple[int, int], scheme: str, check_values: bool) -> QuantizedWeight:
        if not torch.equal(weights.read(f"{self.name}.quant_map"), codebook(scheme)):
            raise self.wrong(f"holds other values than {scheme}'s; such codes are not known", self._part("quant_map"))
        absmax = weights.read(f"{self.name}.absmax")
        if self._nested:
            nested, table = (weights.read(f"{self.name}.{part}") for part in ("nested_absmax", "nested_quant_map"))
            # bitsandbytes computes with the offset in float32
            offset = torch.tensor(self._state["nested_offset"], dtype=torch.float32)
            self.file_scales = NestedScales(absmax.clone(), nested.clone(), table.clone(), offset)
            absmax = self.file_scales.dequantize()
        data = weights.read(self.name).contiguous().view(-1).view(torch.uint8)
        codes = unpack_4bit(data, math.prod(shape))
        return self.checked(from_blocks(codes, absmax, scheme, shape, self.block_size), check_values)


class EightBitMatrix(StoredMatrix):
    """A matrix in int8."""

    def __init__(self, name: str, infos: dict[str, TensorInfo], activations: str) -> None:
        self._scb, self._format = _scb_of(name), name + _FORMAT
        super().__init__(name, infos[name], [part for part in (name, self._scb, self._format) if part in infos])
        self._scb_info = infos.get(self._scb)
        self._format_info = infos.get(self._format)
        self._activations = activations

    def check(self, shape: tuple[int, int], scheme: str) -> None:
        if scheme != "int8":
            raise self.wrong(f"holds int8 without a quant_state, but config.json says {scheme}")
        self.require(self.info, shape, torch.int8)
        if self._scb_info is None:
            raise self.wrong(f"has no scales: {self._scb!r} is missing; the checkpoint is incomplete")
        self.require(self._scb_info, (shape[0],), torch.float32)

    def read(self, weights: Weights, shape: tuple[int, int], scheme: str, check_values: bool) -> QuantizedWeight:
        if self._format_info is not None:
            code = weights.read(self._format)
            if code.numel() != 1 or int(code) != 0:
                raise self.wrong(
                    f"is {code.tolist()}, expected 0: rows in their order; other orders were bitsandbytes' before 0.45",
                    self._format_info,
                )
        codes, largest = weights.read(self.name), weights.read(self._scb)
        if weights.borrowed:
            codes, largest = codes.clone(memory_format=torch.contiguous_format), largest.clone()
        self.file_scales = largest
        weight = QuantizedWeight("int8", shape, shape[1], codes, largest / 127.0, activations=self._activations)
        return self.checked(weight, check_values)


def open_bitsandbytes(weights: Weights, config: QuantizationConfig) -> QuantizedCheckpoint:
    """The quantised weights of a checkpoint that transformers saved with bitsandbytes.

    Raises:
        CheckpointError: a quant_state is missing or cannot be read.
    """
    infos = dict(weights.infos)
    matrices: list[StoredMatrix] = []
    states = {stem: name for name in infos for stem, found, _ in [name.partition(_STATE)] if found}
    for name, info in infos.items():
        if name in states:
            matrices.append(FourBitMatrix(name, infos, _read_state(weights, states[name]), states[name]))
        elif f"{name}.absmax" in infos:
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} has no quant_state: {name + _STATE + 'nf4'!r} (or fp4) is missing; "
                "the checkpoint is incomplete"
            )
        elif name.endswith(".weight") and info.dtype == torch.int8:
            assert config.activations is not None
            matrices.append(EightBitMatrix(name, infos, config.activations))
    return QuantizedCheckpoint(weights, matrices)


def _read_state(weights: Weights, name: str) -> dict[str, Any]:
    info = weights.infos[name]
    where = f"{info.path}: tensor {info.name!r}"
    if info.dtype != torch.uint8 or info.nbytes > _MAX_STATE_BYTES:
        raise CheckpointError(
            f"{where} is {info.dtype} of {info.nbytes} bytes, expected uint8, at most {_MAX_STATE_BYTES}: JSON"
        )
    try:
        state = json.loads(bytes(weights.read(name).reshape(-1).tolist()).decode("utf-8"), object_pairs_hook=no_repeats)
    # RecursionError: brackets nested deeper than the parser's stack
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{where} is a JSON {type(state).__name__}, expected an object")
    return state


def bitsandbytes_tensors(
    name: str,
    weight: QuantizedWeight,
    file_scales: NestedScales | Tensor | None,
    block_size: int,
    dtype: torch.dtype,
    storage: torch.dtype = torch.uint8,
) -> dict[str, Tensor]:
    """The tensors of one weight in bitsandbytes' layout.

    Args:
        name: of the weight, ending with "weight".
        weight: nf4, fp4 or int8.
        file_scales: the scales as a file of bitsandbytes held them; taken where they still give the weight's own.
        block_size: of nf4 and fp4: elements of the flattened matrix that share a scale.
        dtype: that the model computes with.
        storage: of nf4 and fp4: what the bytes of the codes are called.
    Raises:
        ValueError: bitsandbytes has no such format, or scales differ within a block.
    """
    weight = weight.to("cpu")
    if weight.scheme == "int8":
        largest = weight.scales * 127.0
        if isinstance(file_scales, Tensor) and torch.equal(file_scales / 127.0, weight.scales):
            largest = file_scales
        return {name: weight.codes, _scb_of(name): largest, name + _FORMAT: torch.tensor(0, dtype=torch.uint8)}
    if weight.scheme not in CODEBOOK_SCHEMES:
        raise ValueError(f"{name} is {weight.scheme}, but bitsandbytes has nf4, fp4 and int8; use gpt2rt's own layout")
    codes, absmax = to_blocks(weight, block_size)
    data = pack_4bit(codes)
    if data.numel() % storage.itemsize:
        raise ValueError(
            f"{name} has {data.numel()} bytes of codes, which cannot be stored as {storage}; use torch.uint8"
        )
    state: dict[str, Any] = {
        "quant_type": weight.scheme,
        "blocksize": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {
        name: data.view(storage).view(-1, 1),
        f"{name}.absmax": absmax,
        # a tensor of its own, since safetensors writes none twice; fp4 has two zeros, bitsandbytes stores both as +0
        f"{name}.quant_map": codebook(weight.scheme) + 0.0,
    }
    if isinstance(file_scales, NestedScales) and torch.equal(file_scales.dequantize(), absmax):
        tensors |= {
            f"{name}.absmax": file_scales.codes,
            f"{name}.nested_absmax": file_scales.absmax,
            f"{name}.nested_quant_map": file_scales.table.clone(),
        }
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": file_scales.offset.item(),
        }
    text = torch.tensor(list(json.dumps(state).encode("utf-8")), dtype=torch.uint8)
    return {**tensors, name + _STATE + weight.scheme: text}
