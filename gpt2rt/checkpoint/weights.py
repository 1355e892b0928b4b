"""The weights of a checkpoint, whatever its files: safetensors, ``.bin``, TensorFlow's or Flax's, one or many."""

import contextlib
import io
import mmap
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from gpt2rt.checkpoint import foreign
from gpt2rt.checkpoint.json_files import MAX_SETTINGS_BYTES, read_json_object
from gpt2rt.checkpoint.resolve import Source
from gpt2rt.checkpoint.safetensors_file import (
    MAX_NAME,
    TensorInfo,
    open_file,
    read_header_and_metadata,
    read_into,
)
from gpt2rt.checkpoint.stored import StoredTensor
from gpt2rt.errors import CheckpointError


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

    def map_files(self) -> None:
        """From now on let tensors be views of the files themselves where the format allows it."""

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors have one shape and the same values."""
        return self.infos[first].shape == self.infos[second].shape and torch.equal(self.read(first), self.read(second))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the files."""


class FileWeights(Weights):
    """Weights that lie in files as plain bytes; each file is opened once, when its first tensor is read."""

    def __init__(self, infos: dict[str, TensorInfo], where: str) -> None:
        super().__init__(infos, where)
        self._files: dict[Path, io.FileIO] = {}
        self._maps: dict[Path, mmap.mmap] | None = None
        self._stamps = {path: _stamp(path) for path in {info.path for info in infos.values()}}

    def map_files(self) -> None:
        self._maps = {}

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        mapped = None if self._maps is None else self._view(info, self._maps)
        if mapped is not None:
            return mapped
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self._read_into(info, tensor)
        return tensor

    def _view(self, info: TensorInfo, maps: dict[Path, mmap.mmap]) -> Tensor | None:
        """The tensor as a view of its file; None if it has no elements or lies at an odd address."""
        if not info.nbytes or info.begin % info.dtype.itemsize:
            return None
        memory = maps.get(info.path)
        if memory is None:
            try:
                # private: writing to a weight changes no file
                memory = mmap.mmap(self._open(info.path).fileno(), 0, access=mmap.ACCESS_COPY)
            # ValueError: the file is empty by now
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{info.path} cannot be mapped: {error}; pass disable_mmap=True") from error
            maps[info.path] = memory
        if info.begin + info.nbytes > len(memory):
            raise CheckpointError(
                f"{info.path} became shorter while it was being read; load it again once it is complete"
            )
        # each tensor has a storage of its own, and keeps the mapping alive
        count = info.nbytes // info.dtype.itemsize
        return torch.frombuffer(memory, dtype=info.dtype, count=count, offset=info.begin).view(info.shape)

    def _open(self, path: Path) -> io.FileIO:
        file = self._files.get(path)
        if file is None:
            try:
                file = self._files[path] = open_file(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be opened: {error}") from error
        return file

    def _read_into(self, info: TensorInfo, out: Tensor) -> None:
        read_into(self._open(info.path), info, out)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file was replaced or written to since its header was read."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise CheckpointError(f"{path} changed while it was being read; load it again once it is complete")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._maps is not None:
            self._maps.clear()
        if kind is None:
            self.check_unchanged()


class ForeignWeights(FileWeights):
    """Weights in files of TensorFlow or Flax, described as the models here have them."""

    def __init__(self, stored: Mapping[str, StoredTensor], where: str) -> None:
        super().__init__({key: _described(one) for key, one in stored.items()}, where)
        self._stored = dict(stored)

    def read(self, name: str) -> Tensor:
        stored = self._stored[name]
        flat = torch.empty(self.infos[name].shape, dtype=stored.dtype).view(-1)
        done = 0
        for piece in stored.pieces:
            count = piece.nbytes // stored.dtype.itemsize
            self._read_into(piece, flat[done : done + count])
            done += count
        tensor = flat.view(stored.shape)
        return tensor.t().contiguous() if stored.transposed else tensor


def _described(stored: StoredTensor) -> TensorInfo:
    """A tensor as :class:`ForeignWeights` gives it, under its name in the file."""
    return stored.pieces[0]._replace(shape=stored.shape[::-1] if stored.transposed else stored.shape)


class RenamedWeights(Weights):
    """Other weights under other names.

    Args:
        weights: the checkpoint.
        mapping: regular expression -> replacement, each applied in turn to every name, as ``re.sub`` does.
    Raises:
        ValueError: a pattern or a replacement is invalid.
        CheckpointError: two names become one, or a name is too long to run a user's expression over it.
    """

    def __init__(self, weights: Weights, mapping: Mapping[str, str]) -> None:
        super().__init__({}, weights.where)
        if not isinstance(mapping, Mapping):
            raise TypeError(f"key_mapping is a {type(mapping).__name__}, expected a dictionary of patterns")
        self._weights, self.borrowed = weights, weights.borrowed
        self._names: dict[str, str] = {}
        for old, info in weights.infos.items():
            if len(old) > MAX_NAME:
                raise CheckpointError(f"{weights.where}: a tensor's name has {len(old)} characters, at most {MAX_NAME}")
            new = old
            for pattern, replacement in mapping.items():
                try:
                    new = re.sub(pattern, replacement, new)
                except (re.error, TypeError) as error:
                    raise ValueError(
                        f"key_mapping: {pattern!r}: {replacement!r} is no regular expression with its replacement: "
                        f"{error}"
                    ) from None
            if new in self._names:
                raise CheckpointError(
                    f"{weights.where}: key_mapping renames both {self._names[new]!r} and {old!r} to {new!r}"
                )
            self._names[new], self.infos[new] = old, info

    def map_files(self) -> None:
        self._weights.map_files()

    def read(self, name: str) -> Tensor:
        return self._weights.read(self._names[name])

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._weights.__exit__(kind, error, trace)


class TensorWeights(Weights):
    """Weights that are tensors already: a state dict, or what a ``.bin`` file held."""

    borrowed = True

    def __init__(self, tensors: Mapping[str, Tensor], where: str, path: Path) -> None:
        super().__init__({}, where)
        if not isinstance(tensors, Mapping):
            raise TypeError(f"{where} is a {type(tensors).__name__}, expected a dictionary of name: tensor")
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


def open_weights(
    source: Source,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    from_tf: bool = False,
    from_flax: bool = False,
    other_names: Iterable[str] = (),
) -> Weights:
    """The weights of a checkpoint, with checked headers; except from ``.bin`` files, no tensor data is read yet.

    The first of these that exists is taken: ``model.safetensors``, its index with shards, ``pytorch_model.bin``, its
    index with shards, ``tf_model.h5``, ``flax_model.msgpack``, each with its index too.

    Args:
        source: the checkpoint.
        use_safetensors: True: only safetensors; False: everything else; None: all, in this order.
        variant: a name between stem and suffix, such as "fp16" in ``model.fp16.safetensors``.
        from_tf, from_flax: only ``tf_model.h5``, only ``flax_model.msgpack``.
        other_names: of safetensors files, tried after ``model.safetensors`` and its shards.
    Raises:
        CheckpointError: no weights, or files that are damaged, unsafe or disagree with each other.
        ValueError: arguments that exclude each other.
        ImportError: the file is TensorFlow's, and h5py is not installed.
    """
    is_foreign = from_tf or from_flax
    if (from_tf and from_flax) or (is_foreign and (use_safetensors or variant)):
        raise ValueError(
            f"from_tf = {from_tf!r}, from_flax = {from_flax!r}, use_safetensors = {use_safetensors!r} and variant = "
            f"{variant!r} exclude each other; pass one of them"
        )
    if variant and os.path.basename(variant) != variant:
        raise ValueError(f"variant = {variant!r}, expected the middle of a file name, such as 'fp16'")
    mark = f".{variant}" if variant else ""
    looked_for = []
    if use_safetensors is not False and not is_foreign:
        looked_for += [f"model{mark}.safetensors", f"model.safetensors.index{mark}.json", *other_names]
    if not use_safetensors and not is_foreign:
        looked_for += [f"pytorch_model{mark}.bin", f"pytorch_model.bin.index{mark}.json"]
    formats: dict[str, foreign.Format] = {}
    for kind, wanted in ((foreign.TENSORFLOW, from_tf), (foreign.FLAX, from_flax)):
        # those classes knew no variants
        if wanted or not (use_safetensors or variant or is_foreign):
            formats |= dict.fromkeys((kind.filename, f"{kind.filename}.index.json"), kind)
    for filename in [*looked_for, *formats]:
        path = source.find(filename)
        if path is None:
            continue
        if filename in formats:
            return _open_foreign(source, path, formats[filename])
        if filename.endswith(".json"):
            return _open_shards(source, path, ".bin" if ".bin." in filename else ".safetensors")
        if filename.endswith(".bin"):
            return TensorWeights(_load_bin(path), str(path), path)
        return _open_safetensors(path)
    raise CheckpointError(
        f"{source.describe()} has no weights: expected {' or '.join([*looked_for, *formats])}"
        f"{source.foreign_hint()}{source.offline_hint()}"
    )


# formats that the metadata of a safetensors file can name: TensorFlow's and Flax's classes wrote those too
_FOREIGN_METADATA = {"tf": foreign.TENSORFLOW, "flax": foreign.FLAX}


def _open_safetensors(path: Path) -> Weights:
    infos, metadata = read_header_and_metadata(path)
    kind = _FOREIGN_METADATA.get(str(metadata.get("format")))
    if kind is None:
        return FileWeights(infos, str(path))
    return ForeignWeights(foreign.convert(_stored(infos), kind.key_of, path), str(path))


def _stored(infos: Mapping[str, TensorInfo]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(info.dtype, info.shape, (info,)) for name, info in infos.items()}


def _open_foreign(source: Source, path: Path, kind: foreign.Format) -> Weights:
    if path.suffix != ".json":
        return ForeignWeights(foreign.convert(kind.read(path), kind.key_of, path), str(path))
    index, weight_map, paths = _read_index(source, path, Path(kind.filename).suffix)
    contents = {shard: kind.read(held) for shard, held in paths.items()}
    return _join_foreign(index, weight_map, paths, path, kind, contents)


def _join_foreign(
    index: Mapping[str, Any],
    weight_map: Mapping[str, str],
    paths: Mapping[str, Path],
    index_path: Path,
    kind: foreign.Format,
    contents: Mapping[str, Mapping[str, StoredTensor]],
) -> Weights:
    converted = {shard: foreign.convert(held, kind.key_of, paths[shard]) for shard, held in contents.items()}
    keys = {foreign.final_key(kind.index_key_of(name)): shard for name, shard in weight_map.items()}
    stored = _join_shards(converted, keys, index_path)
    _check_total(index, {key: _described(one) for key, one in stored.items()}, index_path, paths)
    return ForeignWeights(stored, str(index_path))


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


def _read_index(
    source: Source, index_path: Path, suffix: str
) -> tuple[dict[str, Any], dict[str, str], dict[str, Path]]:
    """An index of shards: its content, tensor -> shard, and shard -> path; all names are checked, all files exist."""
    index = read_json_object(index_path, MAX_SETTINGS_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index_path}: weight_map is {type(weight_map).__name__}, expected a non-empty object of tensor: shard"
        )
    for name, shard in weight_map.items():
        _check_shard_name(shard, name, index_path, suffix)
    shards = sorted(set(weight_map.values()))
    paths = {shard: path for shard in shards if (path := _find_shard(source, shard)) is not None}
    missing = [shard for shard in shards if shard not in paths]
    if missing:
        raise CheckpointError(
            f"{index_path} lists {len(shards)} shards, missing: {', '.join(missing)}; present: "
            f"{', '.join(paths) or 'none'}"
        )
    return index, weight_map, paths


def _open_shards(source: Source, index_path: Path, suffix: str) -> Weights:
    index, weight_map, paths = _read_index(source, index_path, suffix)
    contents: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, Tensor] = {}
    formats = set()
    for shard, path in paths.items():
        if suffix == ".bin":
            held = _load_bin(path)
            contents[shard] = TensorWeights(held, str(path), path).infos
            tensors.update(held)
        else:
            contents[shard], metadata = read_header_and_metadata(path)
            formats.add(_FOREIGN_METADATA.get(str(metadata.get("format"))))
    kind = formats.pop() if len(formats) == 1 else None
    if kind is not None:
        stored = {shard: _stored(infos) for shard, infos in contents.items()}
        return _join_foreign(index, weight_map, paths, index_path, kind, stored)
    infos = _join_shards(contents, weight_map, index_path)
    _check_total(index, infos, index_path, paths)
    if suffix == ".bin":
        return TensorWeights(tensors, str(index_path), index_path)
    return FileWeights(infos, str(index_path))


def _check_total(
    index: Mapping[str, Any], infos: Mapping[str, TensorInfo], index_path: Path, paths: Mapping[str, Path]
) -> None:
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(info.nbytes for info in infos.values())
    if total is not None and total != size:
        raise CheckpointError(
            f"{index_path}: total_size is {total} bytes, but the shards {', '.join(paths)} hold {size}"
        )


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


# what is known of a tensor
_Known = TypeVar("_Known")


def _join_shards(
    contents: Mapping[str, Mapping[str, _Known]], weight_map: Mapping[str, str], index_path: Path
) -> dict[str, _Known]:
    infos: dict[str, _Known] = {}
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
