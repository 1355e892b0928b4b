"""Files that appear whole or not at all: written beside their place, synced, then renamed over the old ones."""

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from gpt2rt.errors import CheckpointError


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder ``path``, made with its parents if needed.

    Raises:
        CheckpointError: ``path`` is a file, or the folder cannot be made.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot save to {folder}: it is a file, expected a folder or a free name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error}") from error
    return folder


# a temporary file this old belongs to a save that was killed
STALE_SECONDS = 3600


class AtomicFiles:
    """A group of files that replace older ones together, as a context manager.

    :meth:`add` writes a temporary file in the target's folder and syncs it; only when the ``with`` block ends without
    an exception are all of them renamed into place, in the order added. On any exception the temporary files are
    removed and the older files stand untouched. Only a crash between two renames leaves a mixture of whole files.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Path, Path]] = []

    def add(self, path: Path, write: Callable[[Path], None]) -> None:
        """Have ``write`` fill a temporary file that becomes ``path`` at the end.

        Raises:
            CheckpointError: writing or syncing failed (full or read-only disk, ...).
        """
        if path.is_dir():
            # found out before any file is replaced
            raise CheckpointError(f"cannot write {path}: it is a folder; move it away")
        _remove_left_overs(path)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        self._pending.append((temporary, path))
        try:
            # made by open(), so that the umask decides who may read it, whatever the writer does
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode & 0o777
            write(temporary)
            temporary.chmod(mode)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error}; the older file, if any, is unchanged") from error

    def __enter__(self) -> "AtomicFiles":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            for temporary, _path in self._pending:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def _publish(self) -> None:
        try:
            for temporary, path in self._pending:
                os.replace(temporary, path)
            for folder in {path.parent for _, path in self._pending}:
                _sync_folder(folder)
        except OSError as error:
            raise CheckpointError(f"cannot put the new files into place: {error}") from error


def _sync_folder(folder: Path) -> None:
    # the rename itself survives a power cut only when the folder is synced too
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write one UTF-8 text file atomically.

    Raises:
        CheckpointError: writing failed; an older file is unchanged.
    """
    with AtomicFiles() as files:
        files.add(path, lambda temporary: _write(temporary, text.encode("utf-8")))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _remove_left_overs(path: Path) -> None:
    """Delete what a killed save of the same file left behind."""
    for old in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                old.unlink()
