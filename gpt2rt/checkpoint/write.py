"""Writing checkpoints: safetensors, in shards when large, all files replaced together or not at all."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from gpt2rt.checkpoint.atomic import AtomicFiles, make_folder
from gpt2rt.errors import CheckpointError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Z]*)")


def parse_size(size: int | str) -> int:
    """Bytes meant by ``5_000_000``, ``"5GB"``, ``"200 KB"`` (powers of 1000) or ``"1GiB"`` (powers of 1024).

    Raises:
        ValueError: it is no size, or not positive.
    """
    if type(size) is int:
        result = size
    else:
        found = _SIZE.fullmatch(size.strip().upper()) if isinstance(size, str) else None
        if found is None or found.group(2) not in _UNITS:
            raise ValueError(
                f"max_shard_size = {size!r}, expected bytes as an integer or a size such as '5GB' or '200MB'"
            )
        result = int(float(found.group(1)) * _UNITS[found.group(2)])
    if result <= 0:
        raise ValueError(f"max_shard_size = {size!r}, but it must be positive")
    return result


def plan_shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in their order, cut into shards of at most ``max_bytes`` each (one larger tensor stands alone)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def save_checkpoint(
    save_directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    texts: Mapping[str, str],
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
) -> list[str]:
    """Write weights and small text files into a folder, all of them or none.

    Args:
        save_directory: made if needed.
        tensors: name -> tensor; tensors that share memory must be listed once.
        texts: file name -> content, such as ``config.json``.
        max_shard_size: largest weight file; beyond it ``model-00001-of-0000N.safetensors`` and an index are written.
        variant: a name between stem and suffix, as in ``model.fp16.safetensors``.
    Returns:
        the names of the files written.
    Raises:
        CheckpointError: writing failed; the older files are as they were.
        ValueError: ``max_shard_size`` is no size, or ``variant`` no plain name.
    """
    from safetensors.torch import save_file

    limit = parse_size(max_shard_size)
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", variant):
        raise ValueError(f"variant = {variant!r}, expected letters, digits, '-' and '_'")
    mark = f".{variant}" if variant else ""
    host = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    shards = plan_shards(host, limit)
    folder = make_folder(save_directory)
    written: list[str] = []

    def writer(names: list[str]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            try:
                save_file({name: host[name] for name in names}, path, metadata={"format": "pt"})
            # the library reports a full disk with an exception of its own
            except Exception as error:
                raise CheckpointError(f"{error}") from error

        return write

    def text_writer(text: str) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.write_bytes(text.encode("utf-8"))

        return write

    with AtomicFiles() as files:
        if len(shards) == 1:
            written.append(f"model{mark}.safetensors")
            files.add(folder / written[-1], writer(shards[0]))
        else:
            weight_map = {}
            for number, names in enumerate(shards, start=1):
                written.append(f"model{mark}-{number:05d}-of-{len(shards):05d}.safetensors")
                files.add(folder / written[-1], writer(names))
                weight_map.update(dict.fromkeys(names, written[-1]))
            total = sum(tensor.nbytes for tensor in host.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            written.append(f"model.safetensors.index{mark}.json")
            files.add(folder / written[-1], text_writer(json.dumps(index, indent=2) + "\n"))
        for name, text in texts.items():
            written.append(name)
            files.add(folder / name, text_writer(text))
    _remove_stale(folder, set(written), mark)
    return written


def _remove_stale(folder: Path, written: set[str], mark: str) -> None:
    """Delete weight files of an older save, which a reader might prefer to the new ones."""
    own = re.escape(mark)
    stale = re.compile(
        rf"(model{own}|pytorch_model{own})(-\d{{5}}-of-\d{{5}})?\.(safetensors|bin)"
        rf"|(model\.safetensors|pytorch_model\.bin)\.index{own}\.json"
    )
    for path in folder.iterdir():
        if path.name not in written and stale.fullmatch(path.name):
            try:
                path.unlink()
            except OSError as error:
                raise CheckpointError(f"the older weight file {path} cannot be removed: {error}") from error


def unique_tensors(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """A state dict without the second names of tied weights that do share memory.

    Args:
        state: the state dict.
        tied: key of a tied weight -> key whose tensor it shares.
    """
    out = {}
    for key, tensor in state.items():
        source = state.get(tied.get(key, ""))
        if source is not None and _same_memory(source, tensor):
            continue
        out[key] = tensor
    return out


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.device == b.device
