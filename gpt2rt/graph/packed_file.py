"""One file of packed weights: written whole, checked whole, and read in the way that is soonest ready and fastest.

    the payload   from byte 0, so that 2 MiB pages of the file and of memory begin together
    120 bytes     "gpt2rtpk", format (uint32), 0 (uint32), length of the payload (uint64), key (32 bytes), fingerprint
                  of the payload (32 bytes), SHA-256 of these 88 bytes; numbers little-endian

A payload comes into memory in one of two ways. If the kernel maps the file with 2 MiB pages, the mapping itself is the
arena: nothing is copied or allocated, processes share it, and steps read it as fast as memory of their own. Else it is
read into an arena of anonymous 2 MiB pages: mapped with 4 KiB pages it would be there sooner, but every later step
would pay for the address translation. Which of the two it is the kernel says (Linux 6.7 and later; an older one is
taken not to). Linux gives a file such pages if its file system has large folios (ext4 since 6.16, xfs, btrfs) and the
file was written in large pieces or read under ``MADV_HUGEPAGE``; both are done here.

Measured with 472 MiB of fp32 weights, in the page cache, on ext4 and Linux 6.18, EPYC Zen 4 virtual machine: mapping
0.4 ms, 23 ms for the check included; reading 60 to 800 ms, the more the less of its memory the host had at hand. A
decode step of GPT-2 124M on 2 threads took 14.6 ms from the mapping, 14.6 ms from an arena, 15.0 ms from a mapping with
4 KiB pages. From the disk, either took 0.2 s.

A mapped file that shrinks kills the process that reads it. These files never do: they are written under another name
and renamed, and removed only as a whole, which leaves mappings alone. On network file systems another machine's removal
does take them away, so there they are read.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os
import stat
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.ops.arena import allocate_arena

_MAGIC, _FORMAT = b"gpt2rtpk", 1
_FIELDS = struct.Struct("<8sIIQ32s32s")
TRAILER_BYTES = _FIELDS.size + hashlib.sha256().digest_size

# pieces of a write or read: whole 2 MiB pages
_PIECE = 8 * 2**20
_PAGE = 2 * 2**20

# linux/mman.h; Python 3.11 does not name it
_MADV_POPULATE_READ = 22
# linux/fs.h, struct pm_scan_arg: PAGEMAP_SCAN and the category of pages that one entry of 2 MiB maps
_PAGEMAP_SCAN, _PAGE_IS_HUGE = 0xC0606610, 1 << 6

# file systems of this machine alone
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "tmpfs"})


class UnusableFileError(Exception):
    """A file is not what it should be; its text says how."""


def write(path: Path, payload: Tensor, key: bytes, fingerprint: bytes) -> None:
    """Write a payload to a new file.

    It is not synced: a file that a crash left half written fails its check and is made again, while syncing makes the
    first start wait for the disk.

    Args:
        path: does not exist yet.
        payload: [num_bytes] uint8, on CPU, contiguous.
        key: 32 bytes, what the payload is.
        fingerprint: of the payload, under the folder's secret.
    Raises:
        OSError: the file cannot be written; what there is of it is left.
    """
    view = _bytes_of(payload)
    fields = _FIELDS.pack(_MAGIC, _FORMAT, 0, len(view), key, fingerprint)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        for part in (view, memoryview(fields + hashlib.sha256(fields).digest())):
            done = 0
            while done < len(part):
                done += os.write(descriptor, part[done : done + _PIECE])
    finally:
        os.close(descriptor)


def read(path: Path, num_bytes: int | None, key: bytes, secret: Tensor) -> Tensor:
    """The payload of a file, every byte of it checked.

    Args:
        path: where it is.
        num_bytes: expected length of the payload; None: as long as it is.
        key: 32 bytes, what the payload should be.
        secret: key of the fingerprint.
    Returns:
        [num_bytes] uint8, aligned to 64 bytes; writing to it changes no file.
    Raises:
        FileNotFoundError: there is none.
        UnusableFileError: it is damaged, another's, or something else.
        OSError: it cannot be read, or there is not enough memory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        check_owned(status, stat.S_ISREG)
        if num_bytes is None:
            num_bytes = status.st_size - TRAILER_BYTES
        if num_bytes < 1 or status.st_size != num_bytes + TRAILER_BYTES:
            raise UnusableFileError(f"it has {status.st_size} bytes, expected {max(num_bytes, 1) + TRAILER_BYTES}")
        trailer = os.pread(descriptor, TRAILER_BYTES, num_bytes)
        fields, digest = trailer[: _FIELDS.size], trailer[_FIELDS.size :]
        if hashlib.sha256(fields).digest() != digest:
            raise UnusableFileError("its last bytes fail their check")
        *others, fingerprint = _FIELDS.unpack(fields)
        if others != [_MAGIC, _FORMAT, 0, num_bytes, key]:
            raise UnusableFileError("it is of another version or holds something else")
        payload = _map(descriptor, num_bytes, status.st_dev)
        if payload is None:
            payload = _read(descriptor, num_bytes)
    finally:
        os.close(descriptor)
    if ops.fingerprint(payload, secret) != fingerprint:
        raise UnusableFileError("its payload fails its check")
    return payload


def check_owned(status: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    """Check that a file or folder is this user's, and nobody else may write to it.

    Raises:
        UnusableFileError: it is another's, or of another kind.
    """
    if not is_kind(status.st_mode):
        raise UnusableFileError(f"it is of another kind (mode {status.st_mode:o})")
    if status.st_uid != os.geteuid():
        raise UnusableFileError(f"it belongs to user {status.st_uid}, this process runs as {os.geteuid()}")
    if status.st_mode & 0o022:
        raise UnusableFileError(f"others may write to it (mode {status.st_mode & 0o7777:o})")


def _bytes_of(tensor: Tensor) -> memoryview:
    # an array offers the buffer protocol, which its type hints leave out
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


def _map(descriptor: int, num_bytes: int, device: int) -> Tensor | None:
    """The payload as a private mapping of the file, or None unless the kernel maps it with 2 MiB pages."""
    if sys.platform != "linux" or num_bytes < _PAGE or not _is_local(device):
        return None
    memory = mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_COPY)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        # reads the file where it is not in memory; an input error is an exception here, not a signal later
        memory.madvise(_MADV_POPULATE_READ)
    except OSError:
        return None
    # the tensor keeps the mapping alive
    payload = torch.frombuffer(memory, dtype=torch.uint8)
    # the end is rarely a whole page, and what was read again after memory was short is in smaller ones
    return payload if 2 * _huge_bytes(payload) >= num_bytes else None


def _huge_bytes(memory: Tensor) -> int:
    """How much of some memory is mapped with 2 MiB pages; 0 where the kernel does not say."""
    start, page = memory.data_ptr(), mmap.PAGESIZE
    end = start + -(-memory.numel() // page) * page
    # begin, end and category of each stretch of such pages; one stretch is the rule
    found = (ctypes.c_uint64 * (3 * 16))()
    ask = struct.pack("12Q", 96, 0, start, end, 0, ctypes.addressof(found), 16, 0, 0, _PAGE_IS_HUGE, 0, _PAGE_IS_HUGE)
    try:
        with open("/proc/self/pagemap", "rb") as pagemap:
            count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, bytearray(ask))
    except OSError:
        return 0
    return sum(found[3 * i + 1] - found[3 * i] for i in range(count))


def _is_local(device: int) -> bool:
    """Whether a file system (``st_dev``) is of a kind that no other machine writes to."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
        for line in mounts:
            place, _, kind = line.partition(" - ")
            if place.split()[2:3] == [number]:
                return kind.split()[:1] != [] and kind.split()[0] in _LOCAL
    return False


def _read(descriptor: int, num_bytes: int) -> Tensor:
    """The payload in memory of its own, read by as many threads as there are processors, four at most.

    Copying from the page cache and clearing fresh pages is processor's work: 470 MiB took 810 ms on one thread and 59
    to 546 ms on two (EPYC Zen 4 virtual machine, the less the more of its memory the host had at hand).
    """
    payload = allocate_arena(num_bytes)
    view = _bytes_of(payload)
    failures: list[BaseException] = []

    def part(begin: int, end: int) -> None:
        try:
            while begin < end:
                count = os.preadv(descriptor, [view[begin : min(end, begin + _PIECE)]], begin)
                if not count:
                    raise UnusableFileError("it became shorter while it was read")
                begin += count
        except BaseException as error:
            failures.append(error)

    count = min(4, os.cpu_count() or 1, -(-num_bytes // _PIECE))
    size = -(-num_bytes // (count * _PAGE)) * _PAGE
    threads = [threading.Thread(target=part, args=(i * size, min(num_bytes, (i + 1) * size))) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return payload
