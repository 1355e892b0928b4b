"""Flax's ``flax_model.msgpack``: where each array lies in the file, found without reading the arrays.

The file is one MessagePack value: maps within maps, whose leaves are extension values of type 1, which hold a
MessagePack array (shape, dtype name, row-major bytes). An array beyond 1 GiB is a map
``{"__msgpack_chunked_array__": true, "shape": {"0": ...}, "chunks": {"0": array, ...}}`` of flat pieces.

Source: the MessagePack specification (github.com/msgpack/msgpack/blob/master/spec.md) and ``flax/serialization.py``.
Nothing is built from the file but names, shapes and offsets, so neither a claimed length nor deep nesting costs memory.
"""

import io
import math
from pathlib import Path
from typing import Any, NamedTuple, Never

import torch

from gpt2rt.checkpoint.safetensors_file import MAX_NAME, TensorInfo, open_file
from gpt2rt.checkpoint.stored import MAX_DEPTH, MAX_TENSORS, StoredTensor
from gpt2rt.errors import CheckpointError

# extension type of an array in flax.serialization
NDARRAY = 1
CHUNKED = "__msgpack_chunked_array__"

# an array of GPT-2 has at most 4 dimensions, and numpy's limit is 64
_MAX_DIMS = 64

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}


class _Token(NamedTuple):
    """The head of one MessagePack value; ``size`` counts entries (map, array) or bytes (str, bin, ext)."""

    kind: str
    size: int = 0
    value: Any = None


# first byte -> (kind, bytes of the big-endian length that follows)
_SIZED = {0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4)}
_SIZED |= {0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4), 0xDC: ("array", 2), 0xDD: ("array", 4)}
_SIZED |= {0xDE: ("map", 2), 0xDF: ("map", 4)}
_UNSIGNED = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
# what a file of arrays has no use for, by name for the message
_OTHER = {0xC0: "nil", 0xC1: "an unused code", 0xCA: "a float", 0xCB: "a float"}
_OTHER |= dict.fromkeys((0xD0, 0xD1, 0xD2, 0xD3), "a signed integer")


class _Scanner:
    def __init__(self, file: "io.BufferedReader[io.FileIO]", path: Path, size: int) -> None:
        self._file, self._path, self._size = file, path, size
        # names and pieces seen; empty maps count too, since each name is kept while its map is read
        self._seen = 0
        self.found: dict[str, StoredTensor] = {}

    # ---- MessagePack -----------------------------------------------------------------------------------------------

    def _fail(self, what: str) -> Never:
        raise CheckpointError(f"{self._path}: {what}; the file is damaged or was not written by Flax")

    def _bytes(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            self._fail(f"it ends at byte {self._size}, in the middle of a value")
        return data

    def _token(self) -> _Token:
        first = self._bytes(1)[0]
        if first <= 0x7F:
            return _Token("int", value=first)
        if first <= 0x8F:
            return _Token("map", first & 0x0F)
        if first <= 0x9F:
            return _Token("array", first & 0x0F)
        if first <= 0xBF:
            return _Token("str", first & 0x1F)
        if first in _SIZED:
            kind, width = _SIZED[first]
            size = int.from_bytes(self._bytes(width), "big")
            return _Token(kind, size, self._bytes(1)[0] if kind == "ext" else None)
        if 0xD4 <= first <= 0xD8:
            return _Token("ext", 1 << (first - 0xD4), self._bytes(1)[0])
        if first in _UNSIGNED:
            return _Token("int", value=int.from_bytes(self._bytes(_UNSIGNED[first]), "big"))
        if first in (0xC2, 0xC3):
            return _Token("bool", value=first == 0xC3)
        return _Token(_OTHER.get(first, "a signed integer"))

    def _text(self, what: str) -> str:
        token = self._token()
        if token.kind != "str" or token.size > MAX_NAME:
            self._fail(f"{what} is {token.kind} of {token.size} bytes, expected a string of at most {MAX_NAME}")
        try:
            return self._bytes(token.size).decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what} is not UTF-8")

    def _integer(self, what: str) -> int:
        token = self._token()
        if token.kind != "int":
            self._fail(f"{what} is {token.kind}, expected an integer >= 0")
        return int(token.value)

    # ---- the tree --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        token = self._token()
        if token.kind != "map":
            self._fail(f"it holds {token.kind}, expected a map of names")
        self._map(token.size, "", 1)
        if self._file.tell() != self._size:
            self._fail(f"the value ends at byte {self._file.tell()}, but the file has {self._size} bytes")

    def _map(self, size: int, prefix: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            self._fail(f"names are nested deeper than {MAX_DEPTH}, at {prefix!r}")
        seen = set()
        for _ in range(size):
            self._count()
            key = self._text(f"a name in {prefix!r}")
            name = f"{prefix}/{key}" if prefix else key
            if key in seen:
                self._fail(f"the name {name!r} occurs twice")
            seen.add(key)
            if key == CHUNKED:
                if len(seen) != 1 or not prefix or self._token() != _Token("bool", value=True) or size != 3:
                    self._fail(f"tensor {prefix!r} is an array in pieces, but not as Flax writes them")
                self._chunked(prefix)
                return
            token = self._token()
            if token.kind == "map":
                self._map(token.size, name, depth + 1)
            else:
                info = self._array(token, name)
                self.found[name] = StoredTensor(info.dtype, info.shape, (info,))

    def _count(self) -> None:
        self._seen += 1
        if self._seen > MAX_TENSORS:
            self._fail(f"it holds more than {MAX_TENSORS} names or pieces of tensors")

    def _array(self, token: _Token, name: str) -> TensorInfo:
        if token.kind != "ext" or token.value != NDARRAY:
            what = f"extension type {token.value}" if token.kind == "ext" else token.kind
            self._fail(f"tensor {name!r} is {what}, expected an array (extension type {NDARRAY})")
        end = self._file.tell() + token.size
        if end > self._size:
            self._fail(f"tensor {name!r} claims {token.size} bytes, more than the file has left")
        if (head := self._token()) != _Token("array", 3):
            self._fail(f"tensor {name!r} is {head.kind} of {head.size} entries, expected (shape, dtype, bytes)")
        dims = self._token()
        if dims.kind != "array" or dims.size > _MAX_DIMS:
            self._fail(f"the shape of tensor {name!r} is {dims.kind} of {dims.size} entries, expected a list")
        shape = tuple(self._integer(f"the shape of tensor {name!r}") for _ in range(dims.size))
        dtype_name = self._text(f"the dtype of tensor {name!r}")
        if dtype_name not in DTYPES:
            self._fail(f"tensor {name!r} has dtype {dtype_name!r}, expected one of {', '.join(DTYPES)}")
        data, begin = self._token(), self._file.tell()
        needed = math.prod(shape) * DTYPES[dtype_name].itemsize
        if data.kind != "bin" or data.size != needed or begin + needed != end:
            self._fail(
                f"tensor {name!r} of shape {list(shape)} and dtype {dtype_name} has {data.size} bytes of {data.kind}, "
                f"expected {needed} bytes"
            )
        self._file.seek(end)
        return TensorInfo(name, DTYPES[dtype_name], shape, self._path, begin)

    def _chunked(self, name: str) -> None:
        """The rest of a map that began with the mark of an array in pieces."""
        lists: list[list[Any]] = []
        for key in ("shape", "chunks"):
            what = f"the {key} of tensor {name!r}"
            if self._text(what) != key or (token := self._token()).kind != "map":
                self._fail(f"tensor {name!r} is an array in pieces without {key}")
            entries: list[Any] = []
            for number in range(token.size):
                self._count()
                if self._text(what) != str(number):
                    self._fail(f"{what} is not numbered from 0")
                entries.append(self._integer(what) if key == "shape" else self._array(self._token(), name))
            lists.append(entries)
        shape, pieces = tuple(lists[0]), tuple(lists[1])
        dtypes = {piece.dtype for piece in pieces}
        flat = all(len(piece.shape) == 1 for piece in pieces)
        if len(dtypes) != 1 or not flat or sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
            self._fail(f"the {len(pieces)} pieces of tensor {name!r} do not make up shape {list(shape)}")
        self.found[name] = StoredTensor(dtypes.pop(), shape, pieces)


def read_msgpack(path: Path) -> dict[str, StoredTensor]:
    """Name (levels joined by "/") -> array of a file that Flax wrote; no array data is read.

    Raises:
        CheckpointError: the file is missing, cut off, or not what Flax writes; the message names file and tensor.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or not a regular file; the checkpoint is incomplete")
        with io.BufferedReader(open_file(path)) as file:
            scanner = _Scanner(file, path, path.stat().st_size)
            scanner.run()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return scanner.found
