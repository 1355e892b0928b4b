"""A file of packed weights: both ways of reading it, and everything it can be besides what it should be."""

import errno
import os
import pathlib
import stat

import pytest
import torch

from gpt2rt import ops
from gpt2rt.graph import packed_file
from gpt2rt.graph.packed_file import TRAILER_BYTES, UnusableFileError
from gpt2rt.ops.arena import allocate_arena

pytestmark = pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")

KEY = bytes(range(32))
SECRET = torch.arange(4096).to(torch.uint8)
MAPPED = 6 * 2**20 + 4097


def new_payload(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def write(path, payload, key, secret):
    packed_file.write(path, payload, key, ops.fingerprint(payload, secret))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "one.pack"


@pytest.mark.parametrize("size", [1, 64, 4096, 5000, 2**21 - 1, MAPPED, 17 * 2**20 + 3])
@pytest.mark.parametrize("local", [True, False], ids=["may be mapped", "read"])
def test_round_trip(path, monkeypatch, size, local):
    monkeypatch.setattr(packed_file, "_is_local", lambda device: local)
    payload = new_payload(size)
    write(path, payload, KEY, SECRET)
    assert path.stat().st_size == size + TRAILER_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    result = packed_file.read(path, size, KEY, SECRET)
    assert torch.equal(result, payload)
    assert result.data_ptr() % 64 == 0


@pytest.mark.parametrize("huge", [True, False], ids=["2 MiB pages", "4 KiB pages"])
def test_the_kernel_decides_whether_it_is_mapped(path, monkeypatch, huge):
    monkeypatch.setattr(packed_file, "_is_local", lambda device: True)
    monkeypatch.setattr(packed_file, "_huge_bytes", lambda memory: memory.numel() if huge else 0)
    read = []
    plain = packed_file._read
    monkeypatch.setattr(packed_file, "_read", lambda *args: read.append(args) or plain(*args))
    payload = new_payload(MAPPED)
    write(path, payload, KEY, SECRET)
    result = packed_file.read(path, MAPPED, KEY, SECRET)
    assert torch.equal(result, payload)
    assert len(read) == (0 if huge else 1)
    # the file is nobody's to write to, even where it is mapped; and it may be removed
    result.zero_()
    assert torch.equal(packed_file.read(path, MAPPED, KEY, SECRET), payload)
    path.unlink()
    assert not result.any()


def test_pages_are_counted_by_the_kernel():
    small = torch.ones(3 * 4096, dtype=torch.uint8)
    start = -small.data_ptr() % 4096
    assert packed_file._huge_bytes(small[start : start + 4096]) in (0, 4096)
    arena = allocate_arena(8 * 2**20)
    assert packed_file._huge_bytes(arena) == 0
    arena.fill_(1)
    assert 0 <= packed_file._huge_bytes(arena) <= arena.numel()


def test_a_local_file_system_is_known_by_its_number(monkeypatch, tmp_path):
    assert packed_file._is_local(os.makedev(4095, 12345)) is False
    table = tmp_path / "mountinfo"
    table.write_text(
        "36 35 98:0 /a /b rw,noatime master:1 - ext4 /dev/root rw\n40 35 0:52 / /home rw shared:3 - nfs4 host:/ rw\n"
    )
    plain = open
    monkeypatch.setattr(
        "builtins.open", lambda path, *a, **k: plain(table if "mountinfo" in str(path) else path, *a, **k)
    )
    assert packed_file._is_local(os.makedev(98, 0)) is True
    assert packed_file._is_local(os.makedev(0, 52)) is False


def flip(offset):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)

    return damage


def resize(change):
    def damage(path):
        os.truncate(path, path.stat().st_size + change)

    return damage


def rewrite(**fields):
    """The same payload with other fields and a trailer that fits them."""

    def damage(path):
        path.unlink()
        write(path, new_payload(5000), fields.get("key", KEY), fields.get("secret", SECRET))

    return damage


def replace_by(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


DAMAGE = {
    "first byte": (flip(0), "its payload fails"),
    "last byte of the payload": (flip(4999), "its payload fails"),
    "magic": (flip(5000), "last bytes fail"),
    "fingerprint": (flip(5000 + 60), "last bytes fail"),
    "check": (flip(-1), "last bytes fail"),
    "a byte short": (resize(-1), "bytes, expected"),
    "a byte long": (resize(1), "bytes, expected"),
    "empty": (resize(-5000 - TRAILER_BYTES), "has 0 bytes"),
    "zeros": (lambda path: path.write_bytes(bytes(5000 + TRAILER_BYTES)), "last bytes fail"),
    "another key": (rewrite(key=bytes(32)), "another version or holds something else"),
    "another secret": (rewrite(secret=SECRET.flip(0)), "its payload fails"),
    "a folder": (replace_by(pathlib.Path.mkdir), "of another kind"),
    "a pipe": (replace_by(os.mkfifo), "of another kind"),
    "writable for the group": (lambda path: path.chmod(0o620), "others may write"),
    "writable for all": (lambda path: path.chmod(0o602), "others may write"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_anything_else_is_refused(path, damage):
    write(path, new_payload(5000), KEY, SECRET)
    assert packed_file.read(path, 5000, KEY, SECRET).numel() == 5000
    change, message = DAMAGE[damage]
    change(path)
    with pytest.raises(UnusableFileError, match=message):
        packed_file.read(path, 5000, KEY, SECRET)


def test_a_damaged_mapping_is_refused(path, monkeypatch):
    monkeypatch.setattr(packed_file, "_is_local", lambda device: True)
    monkeypatch.setattr(packed_file, "_huge_bytes", lambda memory: memory.numel())
    write(path, new_payload(MAPPED), KEY, SECRET)
    flip(3 * 2**20)(path)
    with pytest.raises(UnusableFileError, match="its payload fails"):
        packed_file.read(path, MAPPED, KEY, SECRET)


def test_another_version_is_refused(path, monkeypatch):
    monkeypatch.setattr(packed_file, "_FORMAT", 2)
    write(path, new_payload(5000), KEY, SECRET)
    monkeypatch.undo()
    with pytest.raises(UnusableFileError, match="another version"):
        packed_file.read(path, 5000, KEY, SECRET)


def test_another_users_file_is_refused(path, monkeypatch):
    write(path, new_payload(5000), KEY, SECRET)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(UnusableFileError, match=f"belongs to user {other - 1}, this process runs as {other}"):
        packed_file.read(path, 5000, KEY, SECRET)


def test_a_link_is_not_followed(path):
    write(path, new_payload(5000), KEY, SECRET)
    link = path.with_name("link.pack")
    link.symlink_to(path)
    with pytest.raises(OSError) as caught:
        packed_file.read(link, 5000, KEY, SECRET)
    assert caught.value.errno == errno.ELOOP


def test_a_file_that_shrinks_while_it_is_read(path, monkeypatch):
    write(path, new_payload(20 * 2**20), KEY, SECRET)
    plain = packed_file.allocate_arena

    def shrink(size):
        os.truncate(path, 9 * 2**20)
        return plain(size)

    monkeypatch.setattr(packed_file, "_is_local", lambda device: False)
    monkeypatch.setattr(packed_file, "allocate_arena", shrink)
    with pytest.raises(UnusableFileError, match="became shorter"):
        packed_file.read(path, 20 * 2**20, KEY, SECRET)


def test_an_existing_file_is_never_written_to(path):
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write(path, new_payload(100), KEY, SECRET)
    assert path.read_bytes() == b"mine"
