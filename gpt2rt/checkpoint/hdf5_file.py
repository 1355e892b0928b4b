"""Keras' ``tf_model.h5``: where each array lies in the file, found with h5py, which reads no data.

Keras writes every weight as a plain contiguous dataset in nested groups. Everything else that HDF5 offers (links,
external and virtual data, chunks, compression, filters, object types) is refused: then the data is ``nbytes`` bytes at
an offset, and the same code reads it as reads safetensors, without the HDF5 library and its plug-ins.

Source: the HDF5 File Format Specification 3.0 and ``hdf5_format.py`` of Keras 2 (groups ``<layer>/<weight name>``).
"""

import os
from pathlib import Path
from typing import Any, Never

import torch

from gpt2rt.checkpoint.safetensors_file import MAX_NAME, TensorInfo
from gpt2rt.checkpoint.stored import MAX_DEPTH, MAX_TENSORS, StoredTensor
from gpt2rt.errors import CheckpointError

# numpy's name of a little-endian type -> dtype
DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16}
DTYPES |= {"<i8": torch.int64, "<i4": torch.int32, "<i2": torch.int16, "|i1": torch.int8}
DTYPES |= {"<u8": torch.uint64, "<u4": torch.uint32, "<u2": torch.uint16, "|u1": torch.uint8}


def read_hdf5(path: Path) -> dict[str, StoredTensor]:
    """Name (levels joined by "/") -> array of a file that Keras wrote; no array data is read.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but plain arrays; the message names file and
            tensor.
        ImportError: h5py is not installed.
    """
    try:
        # it has no type hints
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package h5py ({error}): pip install 'gpt2rt[importers]'") from None
    if not path.is_file():
        raise CheckpointError(f"{path} is missing or not a regular file; the checkpoint is incomplete")
    try:
        # no lock: nothing is written, and network file systems and read-only caches have none
        with h5py.File(path, "r", locking=False) as file:
            walker = _Walker(h5py, path, os.stat(path).st_size)
            if file.userblock_size:
                walker.fail("", f"it starts with a user block of {file.userblock_size} bytes")
            walker.walk(file, "", 1)
            return walker.found
    except CheckpointError:
        raise
    # h5py raises OSError, KeyError, RuntimeError, TypeError or ValueError for a damaged file, depending on where
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is not a valid HDF5 file ({type(error).__name__}: {text})") from None


class _Walker:
    def __init__(self, h5py: Any, path: Path, size: int) -> None:
        self._h5py, self._path, self._size = h5py, path, size
        self._seen = 0
        self.found: dict[str, StoredTensor] = {}

    def fail(self, name: str, what: str) -> Never:
        where = f"{self._path}: tensor {name!r}" if name else f"{self._path}:"
        raise CheckpointError(f"{where} {what}; Keras writes plain contiguous arrays, and gpt2rt reads nothing else")

    def walk(self, group: Any, prefix: str, depth: int) -> None:
        """Collect the datasets of a group, following hard links only."""
        if depth > MAX_DEPTH:
            self.fail(prefix, f"is nested deeper than {MAX_DEPTH} groups")
        for key in group:
            name = f"{prefix}/{key}" if prefix else key
            self._seen += 1
            if self._seen > MAX_TENSORS or len(name) > MAX_NAME:
                self.fail(
                    name[:100], f"is too much: at most {MAX_TENSORS} names of at most {MAX_NAME} characters are read"
                )
            # the kind of link first: asking for the object would follow it, into another file if it says so
            link = group.get(key, getlink=True)
            if not isinstance(link, self._h5py.HardLink):
                self.fail(name, f"is a link ({type(link).__name__})")
            child = group[key]
            if isinstance(child, self._h5py.Group):
                self.walk(child, name, depth + 1)
            elif isinstance(child, self._h5py.Dataset):
                self.found[name] = self._describe(child, name)
            else:
                self.fail(name, f"is a {type(child).__name__}")

    def _describe(self, dataset: Any, name: str) -> StoredTensor:
        h5d = self._h5py.h5d
        properties = dataset.id.get_create_plist()
        layout = properties.get_layout()
        if layout != h5d.CONTIGUOUS:
            kinds = {h5d.CHUNKED: "chunks", h5d.COMPACT: "its header", h5d.VIRTUAL: "other datasets"}
            self.fail(name, f"keeps its data in {kinds.get(layout, 'an unknown layout')}")
        if properties.get_external_count() or properties.get_nfilters():
            self.fail(name, "keeps its data in another file or behind a filter")
        kind = dataset.dtype
        dtype = DTYPES.get(kind.str)
        # h5py gives types that numpy lacks as their nearest relative
        if dtype is None or not dataset.id.get_type().equal(self._h5py.h5t.py_create(kind)):
            self.fail(name, f"has dtype {kind}, expected a little-endian number")
        shape = tuple(int(n) for n in dataset.shape or ())
        info = TensorInfo(name, dtype, shape, self._path, dataset.id.get_offset() or 0)
        stored = dataset.id.get_storage_size()
        if info.begin == 0 or stored != info.nbytes or info.begin + info.nbytes > self._size:
            self.fail(
                name,
                f"of shape {list(shape)} needs {info.nbytes} bytes, but {stored} are stored at byte {info.begin} of a "
                f"file of {self._size}",
            )
        return StoredTensor(dtype, shape, (info,))
