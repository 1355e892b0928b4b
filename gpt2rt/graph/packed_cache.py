"""Packed weights kept in files, so that a second start does not pack again.

What is kept is a function of what is packed, nothing else: the key is a hash over the bytes of every source tensor and
over the plan, the packing code and the instruction set. So it does not matter where weights came from or whether they
were changed since: other weights have another key. No path, date or size of a checkpoint's file is trusted, and no
entry can be stale.

Key. SHA-256 over: the version of gpt2rt and the bytes of the extension, which hold the layout of panels; the
instruction set; the plan's table, which holds every offset, format and arithmetic; dtype, shape, orientation and
fingerprint of each source. The fingerprints are keyed with a secret of the folder (see ``ops.fingerprint``): a
checkpoint made to collide with another would poison that one's entry. They cost one pass over the weights: 28 ms for
470 MiB (EPYC Zen 4, one thread), which take 1.1 s and more to pack.

Trust. Entries lie in a folder of the user's own with mode 0700. Folder and files are used only if they belong to this
user and nobody else may write to them. Every byte is checked against the entry's fingerprint before use. A file that
fails is ignored and written anew; a full, read-only or missing disk means packing as ever. None of it is an error: the
log (logger ``gpt2rt``, level DEBUG) says what happened.

When. Entries are written for arenas of at least 32 MiB (smaller ones are packed in the time that opening a file takes)
whose plan says that its weights are those of a checkpoint's files: weights that change from step to step are not worth
a file each. A thread of low priority writes them after packing, so that the first answer does not wait for it; a
process that ends waits for the rest, one that is killed leaves the work to the next. Written under another name and
renamed: processes that start together write the same bytes, and each reads a whole file or none.

Where: ``$GPT2RT_CACHE/packed``, by default ``$XDG_CACHE_HOME/gpt2rt/packed`` or ``~/.cache/gpt2rt/packed``.
``GPT2RT_PACKED_CACHE=0`` turns it off. ``GPT2RT_PACKED_CACHE_BYTES`` bounds the folder, 10 GiB by default; the entry
used longest ago goes first.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.env import version

from . import packed_file
from .packed_file import UnusableFileError, check_owned

_LOG = logging.getLogger(__name__)

# arenas below this are not worth a file
MIN_BYTES = 32 * 2**20
DEFAULT_LIMIT = 10 * 2**30
SECRET_BYTES = 32
# a temporary file this old belongs to a process that was killed
_STALE_SECONDS = 3600

_writing: set[threading.Thread] = set()
# two that make room at once would both count on the same
_one_writes = threading.Lock()


class PackedCache:
    """A folder of packed weights.

    Args:
        folder: where they lie; made if needed.
        limit: the most bytes of all entries together.
    Raises:
        OSError: the folder cannot be made or written to.
        UnusableFileError: it is not this user's own.
    """

    def __init__(self, folder: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_owned(os.lstat(folder), stat.S_ISDIR)
        seed = hashlib.shake_256(b"gpt2rt packed cache" + self._secret()).digest(ops.FINGERPRINT_KEY_BYTES)
        self._key = torch.frombuffer(bytearray(seed), dtype=torch.uint8)

    def _secret(self) -> bytes:
        """The folder's secret; drawn by whoever comes first."""
        path = self.folder / "secret"
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(path)
                check_owned(status, stat.S_ISREG)
                secret = path.read_bytes()
                if len(secret) == SECRET_BYTES and not status.st_mode & 0o077:
                    return secret
                # entries of a lost secret are never found again, and go with time
                path.unlink()
            new = self._temporary("secret")
            try:
                new.touch(mode=0o600, exist_ok=False)
                new.write_bytes(secrets.token_bytes(SECRET_BYTES))
                # unlike a rename, a link does not replace the secret of a process that was faster
                with contextlib.suppress(FileExistsError):
                    os.link(new, path)
            finally:
                new.unlink(missing_ok=True)
        raise UnusableFileError("its secret changes while it is read")

    def _temporary(self, name: str) -> Path:
        return self.folder / f".{name}.{secrets.token_hex(6)}.tmp"

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}.pack"

    def key(self, recipe: bytes, sources: Iterable[Tensor]) -> bytes:
        """32 bytes that stand for what is made from some tensors.

        Args:
            recipe: how it is made: for an arena the plan's table, which says where each source goes and in which
                format.
            sources: in an order that the recipe decides; on CPU.
        """
        digest = hashlib.sha256(repr((1, version(), ops.cpu_isa(), len(recipe))).encode())
        digest.update(_extension_digest() + recipe)
        for source in sources:
            # the bytes as they lie in memory, whichever dimension is contiguous
            transposed = source.dim() == 2 and not source.is_contiguous() and source.t().is_contiguous()
            plain = source.t() if transposed else source.contiguous()
            digest.update(repr((str(source.dtype), list(source.shape), transposed)).encode())
            digest.update(ops.fingerprint(plain, self._key))
        return digest.digest()

    def load(self, key: bytes, num_bytes: int | None) -> Tensor | None:
        """The entry of a key: [num_bytes] uint8, aligned to 64 bytes; None if there is none that can be used.

        ``num_bytes`` is None where only the entry itself tells.
        """
        path = self._path(key)
        try:
            payload = packed_file.read(path, num_bytes, key, self._key)
        except FileNotFoundError:
            return None
        except (OSError, UnusableFileError) as error:
            _LOG.debug("%s is not used: %s", path, error)
            return None
        with contextlib.suppress(OSError):
            # used just now: it goes last
            os.utime(path)
        return payload

    def store(self, key: bytes, payload: Tensor, fingerprint: bytes | None = None) -> bool:
        """Keep a payload [num_bytes] uint8 under a key; whether it was possible. ``fingerprint``: if it is known."""
        temporary = self._temporary(key.hex())
        try:
            self._make_room(payload.numel() + packed_file.TRAILER_BYTES)
            try:
                packed_file.write(temporary, payload, key, fingerprint or ops.fingerprint(payload, self._key))
                os.replace(temporary, self._path(key))
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            _LOG.debug("packed weights are not kept in %s: %s", self.folder, error)
            return False
        return True

    def store_soon(self, key: bytes, payload: Tensor) -> None:
        """Keep a payload as :meth:`store` does, in a thread of its own; the payload must not change any more."""

        def write() -> None:
            try:
                # may start threads that compute, which would inherit a low priority
                fingerprint = ops.fingerprint(payload, self._key)
                if sys.platform == "linux":
                    # of this thread alone
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
                with _one_writes:
                    self.store(key, payload, fingerprint)
            finally:
                _writing.discard(thread)

        # a thread that is not a daemon would be waited for before the process's own handlers of its end run
        thread = threading.Thread(target=write, name="gpt2rt packed weights", daemon=True)
        _writing.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            _writing.discard(thread)
            _LOG.debug("packed weights are not kept: %s", error)

    def _make_room(self, num_bytes: int) -> None:
        """Remove entries until there is room for a new one.

        Raises:
            OSError: it is larger than the limit, or the disk has too little room.
        """
        if num_bytes > self.limit:
            raise OSError(f"{num_bytes} bytes are more than the cache's limit of {self.limit} bytes")
        entries = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(".pack"):
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
                elif entry.name.endswith(".tmp") and time.time() - status.st_mtime > _STALE_SECONDS:
                    os.unlink(entry.path)
        total = sum(size for _, size, _ in entries) + num_bytes
        for _, size, path in sorted(entries):
            if total <= self.limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        disk = os.statvfs(self.folder)
        # never the disk's last room
        if disk.f_bavail * disk.f_frsize < 2 * num_bytes:
            raise OSError(f"the disk has {disk.f_bavail * disk.f_frsize} bytes left, expected at least {2 * num_bytes}")


@atexit.register
def wait_for_writes() -> None:
    """Wait until everything that :meth:`PackedCache.store_soon` was given is written."""
    for thread in tuple(_writing):
        thread.join()


def _forget_writes() -> None:
    """In a forked process, which has none of the threads."""
    global _one_writes
    _one_writes = threading.Lock()
    _writing.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_writes)


def _extension_digest() -> bytes:
    path = ops.extension_status().path
    assert path is not None
    return hashlib.sha256(Path(path).read_bytes()).digest()


def cache_folder() -> Path:
    """Where packed weights are kept, by the environment.

    Raises:
        RuntimeError: this user has no home folder.
    """
    root = os.environ.get("GPT2RT_CACHE")
    if root:
        return Path(root) / "packed"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gpt2rt" / "packed"


def cache_limit() -> int:
    """``GPT2RT_PACKED_CACHE_BYTES``, or the default.

    Raises:
        ValueError: it is no whole number of at least 0.
    """
    text = os.environ.get("GPT2RT_PACKED_CACHE_BYTES")
    if not text:
        return DEFAULT_LIMIT
    if not text.isdecimal():
        raise ValueError(
            f"GPT2RT_PACKED_CACHE_BYTES is {text!r}, expected a whole number of bytes; unset it for {DEFAULT_LIMIT}"
        )
    return int(text)


def open_cache(num_bytes: int) -> PackedCache | None:
    """The user's cache, for an arena of this size; None if it is off, not worth it, or there is no place for it.

    Raises:
        ValueError: ``GPT2RT_PACKED_CACHE`` or ``GPT2RT_PACKED_CACHE_BYTES`` has an invalid value.
    """
    switch = os.environ.get("GPT2RT_PACKED_CACHE") or "1"
    if switch not in ("0", "1"):
        raise ValueError(f"GPT2RT_PACKED_CACHE is {switch!r}, expected 0 (off) or 1 (on, the default)")
    limit = cache_limit()
    if switch == "0" or num_bytes < MIN_BYTES or num_bytes > limit:
        return None
    try:
        return PackedCache(cache_folder(), limit)
    # RuntimeError: no home folder
    except (OSError, UnusableFileError, RuntimeError) as error:
        _LOG.debug("there is no cache of packed weights: %s", error)
        return None
