"""Quantised weights in a checkpoint's files: what a reader of one layout looks like, and gpt2rt's own layout.

A layout keeps one matrix as several tensors. A reader finds those that belong together, checks names, shapes and dtypes
against the headers before anything is allocated, and reads one matrix at a time. gpt2rt's own layout is

    name.weight         the codes, as QuantizedWeight.codes
    name.weight_scales  as QuantizedWeight.scales
    name.weight_zeros   as QuantizedWeight.zeros, where there are zero points

in safetensors, and ``quantization_config`` in config.json is :meth:`QuantizationConfig.to_dict`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gpt2rt.checkpoint.safetensors_file import TensorInfo
from gpt2rt.checkpoint.weights import Weights
from gpt2rt.errors import CheckpointError

from .config import QuantizationConfig
from .weight import QuantizedWeight, code_layout, scale_layout

#: what a module's names in a checkpoint end with, behind the name of its weight
SCALES, ZEROS = "_scales", "_zeros"

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


class StoredMatrix(ABC):
    """One quantised matrix of a checkpoint, known from its headers.

    Args:
        name: of the weight, as a float checkpoint would call it.
        info: of the tensor with the codes.
        parts: names of all its tensors, in an order that is the same for all matrices of a layout.
    """

    #: after reading: the scales as the file holds them, where they are not those of the weight
    file_scales: Any = None

    def __init__(self, name: str, info: TensorInfo, parts: Iterable[str]) -> None:
        self.name = name
        self.info = info
        self.parts = tuple(parts)

    @abstractmethod
    def check(self, shape: tuple[int, int], scheme: str) -> None:
        """Check the headers.

        Args:
            shape: (out_features, in_features) that the model has.
            scheme: that the quantization_config gives this matrix.
        Raises:
            CheckpointError: they do not describe such a matrix.
        """

    @abstractmethod
    def read(
        self, weights: Weights, shape: tuple[int, int], scheme: str, check_values: bool
    ) -> QuantizedWeight | Tensor:
        """The matrix, on the CPU; [out_features, in_features] float32 if no format here can hold it exactly.

        Raises:
            CheckpointError: reading failed, or a value is outside its table or, if ``check_values``, not finite.
        """

    def wrong(self, what: str, info: TensorInfo | None = None) -> CheckpointError:
        """The error for one of its tensors, by default the codes."""
        info = info or self.info
        return CheckpointError(f"{info.path}: tensor {info.name!r} {what}")

    def require(self, info: TensorInfo, shape: tuple[int, ...], dtype: torch.dtype, hint: str = "") -> None:
        """Raise CheckpointError unless a tensor has this shape and dtype."""
        if info.dtype != dtype:
            raise self.wrong(f"has dtype {info.dtype}, expected {dtype}{hint}", info)
        if info.shape != shape:
            raise self.wrong(f"has shape {list(info.shape)}, expected {list(shape)}{hint}", info)

    def checked(self, weight: QuantizedWeight, check_values: bool) -> QuantizedWeight:
        """``weight``, its values checked if asked."""
        if check_values:
            try:
                weight.check()
            except ValueError as error:
                raise self.wrong(f"cannot be used: {error}") from None
        return weight


class QuantizedCheckpoint(Weights):
    """The weights of a quantised checkpoint: each matrix is one name, whatever tensors it is kept in.

    Args:
        weights: the checkpoint.
        matrices: those of its layout; their tensors disappear from ``infos``, and in their place is
            :attr:`StoredMatrix.info` under the name of the weight.
    """

    def __init__(self, weights: Weights, matrices: Iterable[StoredMatrix]) -> None:
        self.matrices = {matrix.name: matrix for matrix in matrices}
        hidden = {part for matrix in self.matrices.values() for part in matrix.parts}
        infos = {name: info for name, info in weights.infos.items() if name not in hidden}
        for matrix in self.matrices.values():
            if matrix.name in infos:
                raise matrix.wrong(
                    f"is the quantised form of {matrix.name!r}, which the checkpoint holds as floats too"
                )
            infos[matrix.name] = matrix.info
        super().__init__(infos, weights.where)
        self.plain = weights
        self.borrowed = weights.borrowed

    def read(self, name: str) -> Tensor:
        return self.plain.read(name)

    def same(self, first: str, second: str) -> bool:
        one, other = self.matrices.get(first), self.matrices.get(second)
        if one is None and other is None:
            return self.plain.same(first, second)
        if one is None or other is None or len(one.parts) != len(other.parts):
            return False
        return all(self.plain.same(a, b) for a, b in zip(one.parts, other.parts, strict=True))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.plain.__exit__(kind, error, trace)


class OwnMatrix(StoredMatrix):
    """A matrix in gpt2rt's own layout."""

    def __init__(self, name: str, infos: Mapping[str, TensorInfo], config: QuantizationConfig) -> None:
        keys = (name, name + SCALES, name + ZEROS)
        super().__init__(name, infos[name], [key for key in keys if key in infos])
        self._scales, self._zeros = infos.get(keys[1]), infos.get(keys[2])
        self._config = config

    def check(self, shape: tuple[int, int], scheme: str) -> None:
        code_shape, code_dtype = code_layout(scheme, shape)
        said = f": config.json says {scheme} for it"
        self.require(self.info, code_shape, code_dtype, said)
        if self._scales is None:
            raise self.wrong(
                f"has no scales: {self.info.name + SCALES!r} is missing; the checkpoint is incomplete, save it again"
            )
        group_size = self._config.group_size_of(shape[1], scheme)
        scale_shape, scale_dtype = scale_layout(scheme, shape, group_size)
        hint = said if scheme == "int8" else f"{said} with group_size = {group_size}"
        self.require(self._scales, scale_shape, scale_dtype, hint)
        if self._zeros is None:
            if scheme == "int4" and not self._config.symmetric:
                raise self.wrong(
                    f"has no zero points: {self.info.name + ZEROS!r} is missing, but config.json says symmetric = false"
                )
            return
        if scheme != "int4" or self._config.symmetric:
            raise self.wrong(
                "holds zero points, but config.json says symmetric = true or a scheme without", self._zeros
            )
        self.require(self._zeros, scale_shape, torch.uint8, hint)

    def read(self, weights: Weights, shape: tuple[int, int], scheme: str, check_values: bool) -> QuantizedWeight:
        tensors = [weights.read(part) for part in self.parts]
        if weights.borrowed:
            # they stay their owner's
            tensors = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        codes, scales, zeros = (*tensors, None)[:3]
        assert codes is not None
        assert scales is not None
        assert self._config.activations is not None
        group_size = self._config.group_size_of(shape[1], scheme)
        weight = QuantizedWeight(scheme, shape, group_size, codes, scales, zeros, self._config.activations)
        return self.checked(weight, check_values)


def open_own(weights: Weights, config: QuantizationConfig) -> QuantizedCheckpoint:
    """The quantised weights of a checkpoint in gpt2rt's own layout."""
    infos = weights.infos
    names = [
        name
        for name, info in infos.items()
        if name.endswith(".weight") and (name + SCALES in infos or info.dtype in INTEGERS)
    ]
    return QuantizedCheckpoint(weights, [OwnMatrix(name, infos, config) for name in names])
