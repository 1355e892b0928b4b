"""Headers that lie (faults F01-F10): each is a CheckpointError with path and sizes, before any data is read."""

import json
import os
import struct
import tracemalloc

import pytest
import torch
from checkpoints import safetensors_bytes
from safetensors.torch import load_file, save_file

from gpt2rt.checkpoint.safetensors_file import DTYPES, open_file, read_header, read_into
from gpt2rt.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def refused(path, data, message):
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_reads_what_the_library_writes_in_every_dtype(path):
    torch.manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 5)).to(dtype) if dtype == torch.bool else torch.randn(3, 5).abs().to(dtype)
        for name, dtype in DTYPES.items()
    }
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "odd": torch.randn(7)}
    save_file(tensors, path, metadata={"format": "pt"})
    infos = read_header(path)
    assert infos.keys() == tensors.keys()
    reference = load_file(path)
    with open_file(path) as file:
        for name, info in infos.items():
            out = torch.empty(info.shape, dtype=info.dtype)
            read_into(file, info, out)
            assert info.shape == tuple(reference[name].shape)
            assert torch.equal(
                out.view(torch.uint8) if out.dim() else out,
                reference[name].view(torch.uint8) if out.dim() else reference[name],
            )


@pytest.mark.proves("fault:F01")
def test_f01_empty_file(path):
    refused(path, b"", r"has 0 bytes, expected at least 8")
    refused(path, b"1234567", r"has 7 bytes, expected at least 8")


@pytest.mark.proves("fault:F02", "fault:F03", "fault:F04")
def test_f02_f03_f04_wrong_length(path):
    good = safetensors_bytes({"a": F32}, bytes(24))
    size = len(good)
    for data, problem in ((good[: size // 2], "cut off"), (good[:-1], "cut off"), (good + b"\0", "longer")):
        text = refused(path, data, problem)
        assert f"has {len(data)} bytes" in text
    assert f"expected {size}" in refused(path, good[:-1], "cut off")
    path.write_bytes(good)
    assert read_header(path)["a"].shape == (2, 3)


@pytest.mark.proves("fault:F05")
def test_f05_header_of_2_to_the_63_bytes(path):
    refused(path, struct.pack("<Q", 2**63) + bytes(100), r"claims a header of 9223372036854775808 bytes")
    refused(path, struct.pack("<Q", 2**20) + bytes(100), r"has 108 bytes, expected at least 1048584")


@pytest.mark.proves("fault:F06")
def test_f06_huge_header_is_not_read(path):
    # a sparse file: 101 MB that take no room on the disk
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 101_000_000))
        file.truncate(8 + 101_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"claims a header of 101000000 bytes"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.proves("fault:F07")
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{" + b" " * 20, r"not valid JSON"),
        (b"\xff\xfe\x00\x00", r"not valid JSON"),
        (b"[1, 2]", r"a JSON list, expected an object"),
        (b"[" * 100_000, r"not valid JSON"),
        (b'{"a": 1, "a": 2}', r"'a' occurs twice"),
        (b'{"__metadata__": [1]}', r"__metadata__ is a JSON list"),
    ],
    ids=["cut", "utf16", "list", "deep", "repeated", "metadata"],
)
def test_f07_header_is_no_json_object(path, raw, message):
    refused(path, safetensors_bytes(raw), message)


@pytest.mark.proves("fault:F08")
def test_f08_overlaps_and_gaps(path):
    overlap = {"a": F32, "b": {"dtype": "F32", "shape": [2], "data_offsets": [20, 28]}}
    refused(
        path, safetensors_bytes(overlap, bytes(28)), r"tensor 'b' starts at byte \d+, expected \d+: it overlaps 'a'"
    )
    gap = {"a": F32, "b": {"dtype": "F32", "shape": [2], "data_offsets": [28, 36]}}
    refused(path, safetensors_bytes(gap, bytes(36)), r"tensor 'b' .* leaves a gap after 'a'")
    late = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}
    refused(path, safetensors_bytes(late, bytes(8)), r"tensor 'a' .* leaves a gap after the header")


@pytest.mark.proves("fault:F09")
def test_f09_shape_whose_size_overflows(path):
    entry = {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}
    refused(
        path,
        safetensors_bytes({"a": entry}),
        r"tensor 'a' of shape .* has 0 bytes of data, expected 73786976294838206464",
    )


@pytest.mark.proves("fault:F10")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F31"}, r"tensor 'a' has dtype 'F31', expected one of F64, F32"),
        ({"dtype": None}, r"has dtype None"),
        ({"dtype": ["F32"]}, r"has dtype \['F32'\]"),
        ({"shape": [2, -3]}, r"has shape \[2, -3\]"),
        ({"shape": [2, 3.0]}, r"has shape \[2, 3.0\]"),
        ({"shape": 6}, r"has shape 6"),
        ({"data_offsets": [0]}, r"has data_offsets \[0\]"),
        ({"data_offsets": [24, 0]}, r"has -24 bytes of data, expected 24"),
        ({"data_offsets": [-24, 0]}, r"has data_offsets \[-24, 0\]"),
        ({"shape": [2, 4]}, r"has 24 bytes of data, expected 32"),
    ],
    ids=str,
)
def test_f10_entries_that_make_no_sense(path, change, message):
    refused(path, safetensors_bytes({"a": {**F32, **change}}, bytes(24)), message)


def test_an_entry_that_is_no_object(path):
    refused(path, safetensors_bytes({"a": [1]}, bytes(24)), r"tensor 'a' is described by \[1\]")


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is missing or not a regular file"):
        read_header(tmp_path / "model.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    # opening a pipe would wait for a writer forever
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "pipe")


def test_headers_cut_and_flipped_anywhere_never_crash(path):
    """Any damage is either refused with our error, or the file still describes exactly its own bytes."""
    good = safetensors_bytes({"a": F32, "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}}, bytes(32))
    generator = torch.Generator().manual_seed(0)
    refused_count = 0
    for _ in range(300):
        data = bytearray(good)
        at = int(torch.randint(len(data), (1,), generator=generator))
        if torch.rand(1, generator=generator) < 0.3:
            del data[at:]
        else:
            data[at] = int(torch.randint(256, (1,), generator=generator))
        path.write_bytes(data)
        try:
            infos = read_header(path)
        except CheckpointError:
            refused_count += 1
        else:
            held = sum(info.nbytes for info in infos.values())
            header = int.from_bytes(data[:8], "little")
            assert 8 + header + held == len(data)
            assert json.loads(bytes(data[8 : 8 + header])) is not None
    assert refused_count > 100
