"""The weights of a checkpoint, whatever their files: safetensors or ``.bin``, one file or many."""

import contextlib
import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from gpt2rt.checkpoint.json_files import read_json_object
from gpt2rt.checkpoint.resolve import Source
from gpt2rt.checkpoint.safetensors_file import TensorInfo, open_file, read_header, read_into
from gpt2rt.errors import CheckpointError

# formats that are recognised by name to say that they are not read
FOREIGN_FILES = ("tf_model.h5", "flax_model.msgpack", "model.ckpt.index", "model.onnx", "adapter_model.safetensors")


class Weights:
    """Named tensors that can be described without being read, as a context manager.

    ``infos`` maps name -> :class:`TensorInfo`; ``borrowed`` says that tensors read belong to somebody else.
    """

    borrowed = False

    def __init__(self, infos: dict[str, TensorInfo], where: str) -> None:
        self.infos = infos
        self.where = where

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU, in its stored dtype.

        Raises:
            CheckpointError: the file cannot be read or has changed.
        """
        raise NotImplementedError(f"{type(self).__name__} must define read(name)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the files."""


class SafetensorsWeights(Weights):
    """Weights in safetensors files; each file is opened once, when its first tensor is read."""

    def __init__(self, infos: dict[str, TensorInfo], where: str) -> None:
        super().__init__(infos, where)
        self._files: dict[Path, io.FileIO] = {}
        self._stamps = {path: _stamp(path) for path in {info.path for info in infos.values()}}

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        file = self._files.get(info.path)
        if file is None:
            try:
                file = self._files[info.path] = open_file(info.path)
            except OSError as error:
                raise CheckpointError(f"{info.path} cannot be opened: {error}") from error
        tensor = torch.empty(info.shape, dtype=info.dtype)
        read_into(file, info, tensor)
        return tensor

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file was replaced or written to since its header was read."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise CheckpointError(f"{path} changed while it was being read; load it again once it is complete")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        if kind is None:
            self.check_unchanged()


class TensorWeights(Weights):
    """Weights that are tensors already: a state dict, or what a ``.bin`` file held."""

    borrowed = True

    def __init__(self, tensors: Mapping[str, Tensor], where: str, path: Path) -> None:
        super().__init__({}, where)
        self._tensors = dict(tensors)
        for name, tensor in self._tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{where}: entry {name!r} is {type(tensor).__name__}, expected a tensor; is this a state dict?"
                )
            if tensor.layout != torch.strided or tensor.is_quantized:
                raise CheckpointError(f"{where}: tensor {name!r} is not a plain dense tensor ({tensor.layout})")
            self.infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), path, 0)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def open_weights(source: Source, use_safetensors: bool | None = None, variant: str | None = None) -> Weights:
    """The weights of a checkpoint, with checked headers; no tensor data is read from safetensors yet.

    The first of these that exists is taken: ``model.safetensors``, its index with shards, ``pytorch_model.bin``, its
    index with shards.

    Args:
        source: the checkpoint.
        use_safetensors: True: only safetensors; False: only ``.bin``; None: both, in this order.
        variant: a name between stem and suffix, such as "fp16" in ``model.fp16.safetensors``.
    Raises:
        CheckpointError: no weights, or files that are damaged, unsafe or disagree with each other.
    """
    mark = f".{variant}" if variant else ""
    looked_for = []
    if use_safetensors is not False:
        looked_for += [f"model{mark}.safetensors", f"model.safetensors.index{mark}.json"]
    if not use_safetensors:
        looked_for += [f"pytorch_model{mark}.bin", f"pytorch_model.bin.index{mark}.json"]
    for filename in looked_for:
        path = source.find(filename)
        if path is None:
            continue
        if filename.endswith(".json"):
            return _open_shards(source, path, ".bin" if ".bin." in filename else ".safetensors")
        if filename.endswith(".bin"):
            return TensorWeights(_load_bin(path), str(path), path)
        return SafetensorsWeights(read_header(path), str(path))
    foreign = [name for name in FOREIGN_FILES if source.find(name)]
    found = f"; found {', '.join(foreign)}, which gpt2rt does not read" if foreign else ""
    raise CheckpointError(
        f"{source.describe()} has no weights: expected {' or '.join(looked_for)}{found}{source.offline_hint()}"
    )


def _load_bin(path: Path) -> dict[str, Tensor]:
    """A pickled state dict, through torch's restricted unpickler only; there is no less strict second try."""
    try:
        # files of torch < 1.6 are no zip archives and cannot be mapped
        data: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # the unpickler of a damaged file can raise nearly anything
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be loaded as plain tensors ({first_line[:200]}); it is damaged or holds code. Ask for the "
            "checkpoint as safetensors"
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a state dict")
    return data


def _open_shards(source: Source, index_path: Path, suffix: str) -> Weights:
    index = read_json_object(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index_path}: weight_map is {type(weight_map).__name__}, expected a non-empty object of tensor: shard"
        )
    for name, shard in weight_map.items():
        _check_shard_name(shard, name, index_path, suffix)
    shards = sorted(set(weight_map.values()))
    paths = {shard: _find_shard(source, shard) for shard in shards}
    missing = [shard for shard, path in paths.items() if path is None]
    if missing:
        raise CheckpointError(
            f"{index_path} lists {len(shards)} shards, missing: {', '.join(missing)}; present: "
            f"{', '.join(sorted(set(shards) - set(missing))) or 'none'}"
        )
    contents: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, Tensor] = {}
    for shard, path in paths.items():
        assert path is not None
        if suffix == ".bin":
            held = _load_bin(path)
            contents[shard] = TensorWeights(held, str(path), path).infos
            tensors.update(held)
        else:
            contents[shard] = read_header(path)
    infos = _join_shards(contents, weight_map, index_path)
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(info.nbytes for info in infos.values())
    if total is not None and total != size:
        raise CheckpointError(
            f"{index_path}: total_size is {total} bytes, but the shards {', '.join(shards)} hold {size}"
        )
    if suffix == ".bin":
        return TensorWeights(tensors, str(index_path), index_path)
    return SafetensorsWeights(infos, str(index_path))


def _check_shard_name(shard: Any, tensor: str, index_path: Path, suffix: str) -> None:
    plain = isinstance(shard, str) and shard == os.path.basename(shard) and shard not in ("", ".", "..")
    if not plain or "\\" in shard or "\0" in shard or not shard.endswith(suffix):
        raise CheckpointError(
            f"{index_path}: tensor {tensor!r} is said to be in {shard!r}, expected the plain name of a {suffix} file "
            "in the same folder"
        )


def _find_shard(source: Source, shard: str) -> Path | None:
    path = source.find(shard)
    if path is None or source.is_hub:
        return path
    assert source.folder is not None
    home = source.folder.resolve()
    target = path.resolve()
    allowed = [home]
    # the hub cache keeps snapshots/<commit>/<file> as links to blobs/<hash> beside them
    for parent in home.parents:
        if parent.name == "snapshots":
            allowed.append(parent.parent / "blobs")
            break
    if target.parent not in allowed:
        raise CheckpointError(
            f"{path} is a link to {target}, outside the checkpoint's folder; put the file itself there"
        )
    return path


def _join_shards(
    contents: dict[str, dict[str, TensorInfo]], weight_map: dict[str, str], index_path: Path
) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    home: dict[str, str] = {}
    for shard, held in contents.items():
        for name, info in held.items():
            if name in home:
                raise CheckpointError(f"{index_path}: tensor {name!r} is in two shards, {home[name]} and {shard}")
            home[name], infos[name] = shard, info
    wrong = [name for name, shard in weight_map.items() if home.get(name) != shard]
    unlisted = [name for name in home if name not in weight_map]
    if wrong or unlisted:
        raise CheckpointError(
            f"{index_path} and its shards {', '.join(contents)} disagree: "
            + "; ".join(
                f"{len(names)} tensors {what}, such as {names[0]!r}"
                for names, what in ((wrong, "are not in the shard listed"), (unlisted, "are not listed"))
                if names
            )
        )
    return infos


def _stamp(path: Path) -> tuple[int, ...]:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns
    return ()


def progress(names: list[str], total_bytes: int) -> Iterator[str]:
    """Go through names with a progress bar on stderr, if that is a terminal and loading takes a while.

    Args:
        names: what to go through.
        total_bytes: of small checkpoints no bar is shown.
    """
    if total_bytes < 64 * 2**20:
        yield from names
        return
    from huggingface_hub.utils import tqdm

    yield from tqdm(names, desc="Loading weights", unit="tensor", disable=None, leave=False)
