"""The safetensors format: reading a header without trusting it, and reading tensors straight into their own memory.

    8 bytes   N, length of the header, little-endian
    N bytes   JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__": strings
    the rest  the tensors' data; offsets count from here, without gaps or overlaps

Source: the format's description at github.com/huggingface/safetensors. Data is read, not mapped, unless the caller of
``from_pretrained`` asks for that: a mapped file that shrinks while a model uses it kills the process, and reading into
the parameter's memory needs no second copy either.
"""

import io
import json
import math
import os
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2rt.checkpoint.json_files import no_repeats
from gpt2rt.errors import CheckpointError

# a header of 48 blocks has 60 kB; parsing takes up to 20 times its size, so the library's limit of 100 MB is too much
MAX_HEADER_BYTES = 10_000_000
# characters of a tensor's name
MAX_NAME = 1024

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint, as its file describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path  # the file
    begin: int  # byte offset in the file

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_file(path: Path) -> io.FileIO:
    """Open a checkpoint file for reading, without a buffer of its own."""
    return open(path, "rb", buffering=0)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> tensor of one file, fully checked; no tensor data is read.

    Args:
        path: the file.
    Raises:
        CheckpointError: the file is missing, cut off, too long, or its header is not what the format asks for.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """The tensors as :func:`read_header` gives them, and the file's metadata, whose ``format`` names the framework."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or not a regular file; the checkpoint is incomplete")
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise CheckpointError(f"{path} has {size} bytes, expected at least 8: the file is empty or cut off")
            length = int.from_bytes(_read(file, 8, path), "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} claims a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed: is it "
                    "a safetensors file?"
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} has {size} bytes, expected at least {8 + length} for its header alone: the file is cut off"
                )
            raw = _read(file, length, path)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return _parse_header(raw, path, size)


def _read(file: io.FileIO, count: int, path: Path) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = file.read(count - len(data))
        if not part:
            raise CheckpointError(f"{path} ended after {len(data)} of {count} bytes: did it change while being read?")
        data += part
    return bytes(data)


def _parse_header(raw: bytes, path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_repeats)
    # RecursionError: brackets nested deeper than the parser's stack
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}): no safetensors file") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is a JSON {type(metadata).__name__}, expected an object")
    start = 8 + len(raw)
    infos: dict[str, TensorInfo] = {}
    ends: dict[str, int] = {}
    for name, entry in header.items():
        infos[name], ends[name] = _parse_entry(name, entry, path, start)
    position, previous = start, "the header"
    for info in sorted(infos.values(), key=lambda info: (info.begin, ends[info.name])):
        if info.begin != position:
            kind = "overlaps" if info.begin < position else "leaves a gap after"
            raise CheckpointError(
                f"{path}: tensor {info.name!r} starts at byte {info.begin}, expected {position}: it {kind} {previous}"
            )
        position, previous = ends[info.name], repr(info.name)
    if position != size:
        problem = "cut off" if size < position else "longer than its header says"
        raise CheckpointError(f"{path} has {size} bytes, expected {position}: the file is {problem}")
    return infos, metadata


def _parse_entry(name: str, entry: Any, path: Path, start: int) -> tuple[TensorInfo, int]:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r} {what}")

    if len(name) > MAX_NAME:
        raise CheckpointError(f"{path}: the name of a tensor has {len(name)} characters, expected at most {MAX_NAME}")
    if not isinstance(entry, dict):
        raise wrong(f"is described by {reprlib.repr(entry)}, expected an object")
    dtype = DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise wrong(f"has dtype {reprlib.repr(entry.get('dtype'))}, expected one of {', '.join(DTYPES)}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise wrong(f"has shape {reprlib.repr(shape)}, expected a list of integers >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise wrong(f"has data_offsets {reprlib.repr(offsets)}, expected [begin, end]")
    # python's integers do not overflow
    needed, given = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if needed != given:
        raise wrong(
            f"of shape {reprlib.repr(shape)} and dtype {entry['dtype']} has {given} bytes of data, expected {needed}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0]), start + offsets[1]


def read_into(file: io.FileIO, info: TensorInfo, out: Tensor) -> None:
    """Fill a contiguous CPU tensor with the bytes of ``info``.

    Args:
        file: ``info.path``, open.
        info: what to read.
        out: any shape with ``info.nbytes`` bytes, in the dtype of ``info``.
    Raises:
        CheckpointError: the file ends early or cannot be read.
    """
    if info.nbytes == 0:
        return
    # an array offers the buffer protocol, which its type hints leave out
    view = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    try:
        file.seek(info.begin)
        while done < info.nbytes:
            # one call moves at most 2 GiB on Linux
            count = file.readinto(view[done : done + 2**30])
            if not count:
                break
            done += count
    except OSError as error:
        raise CheckpointError(f"{info.path}: reading tensor {info.name!r} failed: {error}") from error
    if done != info.nbytes:
        raise CheckpointError(
            f"{info.path}: tensor {info.name!r} ended after {done} of {info.nbytes} bytes: did the file change while "
            "it was being read?"
        )
