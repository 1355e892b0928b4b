"""tf_model.h5 and flax_model.msgpack from hostile hands: refused with file, tensor and reason, taking no memory."""

import random
import tracemalloc
import warnings

import foreign_files as files
import h5py
import msgpack
import numpy as np
import pytest
import torch
from checkpoints import small_config

from gpt2rt import GPT2LMHeadModel
from gpt2rt.checkpoint.hdf5_file import read_hdf5
from gpt2rt.checkpoint.msgpack_file import read_msgpack
from gpt2rt.errors import CheckpointError

# plain arrays for a test to spoil
WPE = "transformer/tfgpt2lm_head_model/transformer/wpe/embeddings:0"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(small_config()).eval()


@pytest.fixture
def folder(model, tmp_path):
    folder = tmp_path / "hostile"
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return folder


def refused(folder, name, match, megabytes=4):
    """Loading fails with the file's name and the reason, without taking memory for what the file claims."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=match) as caught:
            GPT2LMHeadModel.from_pretrained(folder)
        assert name in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()


def attempt(read, path):
    """What a reader finds, or the sentence with which it refuses; any other exception fails the test."""
    try:
        return read(path), ""
    except CheckpointError as error:
        return {}, str(error)


# ---- HDF5 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def h5(folder, model):
    files.write_h5(folder / "tf_model.h5", model)
    return folder / "tf_model.h5"


def replace(h5, change):
    """Take the positions' array out of the file and let ``change`` put something else in its place."""
    with h5py.File(h5, "r+") as file:
        value = file[WPE][...]
        del file[WPE]
        change(file, value)
    return h5.parent


@pytest.mark.proves("fault:F24", "fault:F25")
def test_links_out_of_the_file_are_not_followed(h5, tmp_path):
    elsewhere = tmp_path / "elsewhere.h5"
    with h5py.File(elsewhere, "w") as file:
        file["secret"] = np.ones((16, 24), np.float32)
    for link, kind in ((h5py.ExternalLink(str(elsewhere), "/secret"), "ExternalLink"), (h5py.SoftLink("/x"), "Soft")):
        folder = replace(h5, lambda file, value, link=link: file.__setitem__(WPE, link))
        refused(folder, "tf_model.h5", rf"{WPE}' is a link \({kind}")
        with h5py.File(h5, "r+") as file:
            del file[WPE]
            file[WPE] = np.zeros((16, 24), np.float32)


@pytest.mark.proves("fault:F24", "fault:F25")
def test_data_in_other_files_is_not_read(h5, tmp_path):
    raw = tmp_path / "raw.bin"
    raw.write_bytes(b"\0" * 1536)

    def external(file, value):
        file.create_dataset(WPE, (16, 24), dtype="<f4", external=[(str(raw), 0, 1536)])

    refused(replace(h5, external), "tf_model.h5", r"keeps its data in another file or behind a filter")

    def virtual(file, value):
        layout = h5py.VirtualLayout((16, 24), dtype="<f4")
        layout[...] = h5py.VirtualSource(str(tmp_path / "elsewhere.h5"), "secret", shape=(16, 24))
        del file[WPE]
        file.create_virtual_dataset(WPE, layout)

    refused(
        replace(h5, lambda file, value: (file.__setitem__(WPE, value), virtual(file, value))),
        "tf_model.h5",
        "data in other datasets",
    )


@pytest.mark.proves("fault:F10", "fault:F20")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shape": (10**6, 10**6), "dtype": "<f4", "chunks": (1000, 1000), "compression": "gzip"}, r"data in chunks"),
        ({"shape": (16, 24), "dtype": "<f4", "chunks": (4, 4)}, r"data in chunks"),
        # a contiguous array that was never written has no bytes, whatever its shape
        ({"shape": (10**6, 10**6), "dtype": "<f4"}, r"needs 4000000000000 bytes, but 0 are stored"),
        ({"shape": (16, 24), "dtype": h5py.string_dtype()}, r"dtype object, expected a little-endian number"),
        ({"shape": (16, 24), "dtype": h5py.vlen_dtype(np.float32)}, r"dtype object, expected"),
        ({"shape": (16, 24), "dtype": h5py.ref_dtype}, r"dtype object, expected"),
        ({"shape": (16, 24), "dtype": ">f4"}, r"dtype >f4, expected"),
        ({"shape": (16, 24), "dtype": "<c8"}, r"dtype complex64, expected"),
        ({"shape": (16, 24), "dtype": np.dtype([("a", "<f4")])}, r"expected a little-endian number"),
        ({"shape": (16, 24), "dtype": h5py.enum_dtype({"A": 1}, basetype="i4")}, r"expected a little-endian number"),
    ],
    ids=["bomb", "chunks", "huge", "strings", "vlen", "references", "big-endian", "complex", "compound", "enum"],
)
def test_arrays_of_other_kinds(h5, options, match):
    folder = replace(h5, lambda file, value: file.create_dataset(WPE, **options))
    refused(folder, "tf_model.h5", match)


@pytest.mark.proves("fault:F16")
def test_integers_are_no_weights(h5):
    folder = replace(h5, lambda file, value: file.create_dataset(WPE, data=value.astype("<i4")))
    refused(folder, "tf_model.h5", r"transformer.wpe.weight' has dtype torch.int32, expected float32")


def test_groups_in_circles_and_too_deep(h5):
    with h5py.File(h5, "r+") as file:
        file["transformer/again"] = file["transformer"]
    refused(h5.parent, "tf_model.h5", r"is nested deeper than 16 groups")


def test_a_named_type_is_no_array(h5):
    with h5py.File(h5, "r+") as file:
        file["kind"] = np.dtype("<f4")
    refused(h5.parent, "tf_model.h5", r"'kind' is a Datatype")


def test_two_names_for_one_weight(h5):
    with h5py.File(h5, "r+") as file:
        file["transformer/m/transformer/wpe/weight:0"] = file[WPE][...]
    refused(h5.parent, "tf_model.h5", r"holds both .* and .*embeddings:0', which are the same weight")


def test_a_user_block(h5, folder):
    h5.unlink()
    with h5py.File(h5, "w", userblock_size=512) as file:
        file["x"] = np.ones(3, np.float32)
    refused(folder, "tf_model.h5", r"starts with a user block of 512 bytes")


@pytest.mark.proves("fault:F01", "fault:F02", "fault:F03")
def test_cut_and_damaged_hdf5_files(h5, folder):
    """Cut anywhere, or with bytes changed in its head: refused, or loaded with exactly the bytes that are there."""
    whole = h5.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        h5.write_bytes(whole[:size])
        refused(folder, "tf_model.h5", r"is not a valid HDF5 file|bytes")
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(4096)] = rng.randrange(256)
        h5.write_bytes(damaged)
        found, error = attempt(read_hdf5, h5)
        assert not error or "tf_model.h5" in error
        assert all(p.begin + p.nbytes <= len(whole) for stored in found.values() for p in stored.pieces)


# ---- MessagePack -----------------------------------------------------------------------------------------------------


def pack(value):
    return msgpack.packb(value, use_bin_type=True)


ARRAY = files.flax_array(torch.ones(2, 3))
DEEP = b"\x81\xa1a" * 5000 + b"\xc0"
MESSAGES = {
    "empty": (b"", r"it ends at byte 0"),
    "a list": (pack([1]), r"it holds array, expected a map"),
    "nil": (pack({"wte": None}), r"tensor 'wte' is nil, expected an array"),
    "a number": (pack({"wte": 5}), r"tensor 'wte' is int, expected an array"),
    "a float": (pack({"wte": 0.5}), r"tensor 'wte' is a float"),
    "text": (pack({"wte": "x"}), r"tensor 'wte' is str"),
    "list": (pack({"wte": [1]}), r"tensor 'wte' is array"),
    "no name": (pack({5: ARRAY}), r"a name in '' is int"),
    "long name": (pack({"x" * 5000: ARRAY}), r"is str of 5000 bytes, expected a string of at most 1024"),
    "not UTF-8": (b"\x81\xa1\xff\xc0", r"is not UTF-8"),
    "repeated": (b"\x82" + 2 * (pack("a") + pack(ARRAY)), r"the name 'a' occurs twice"),
    "deep": (DEEP, r"nested deeper than 16"),
    "other extension": (pack({"a": msgpack.ExtType(2, b"abc")}), r"extension type 2, expected an array"),
    "scalar": (pack({"a": files.flax_array(torch.ones(1), code=3)}), r"extension type 3, expected an array"),
    "huge map": (b"\xdf\xff\xff\xff\xff", r"it ends at byte 5"),
    "huge text": (b"\x81\xdb\xff\xff\xff\xff", r"str of 4294967295 bytes"),
    "huge array": (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", r"claims 4294967295 bytes, more than the file has left"),
    "trailing": (pack({"a": ARRAY}) + b"\0", r"the value ends at byte \d+, but the file has \d+"),
    "wrong size": (pack({"a": files.flax_array(torch.ones(5), shape=(2, 3))}), r"has 20 bytes of bin, expected 24"),
    "overflow": (
        pack({"a": files.flax_array(torch.ones(1), shape=(2**62, 4))}),
        r"expected 73786976294838206464 bytes",
    ),
    "dtype": (pack({"a": files.flax_array(torch.ones(3), dtype="object")}), r"has dtype 'object', expected one of"),
    "negative": (
        pack({"a": files.flax_array(torch.ones(3), shape=(-3,))}),
        r"is a signed integer, expected an integer",
    ),
    "ext is no list": (pack({"a": msgpack.ExtType(1, pack({"b": 1}))}), r"is map of 1 entries, expected \(shape"),
    "ext is short": (pack({"a": msgpack.ExtType(1, pack(((1,), "float32", b"abcd"))[:-1])}), r"'a'|it ends"),
    "many dimensions": (pack({"a": files.flax_array(torch.ones(1), shape=(1,) * 100)}), r"is array of 100 entries"),
}


@pytest.mark.proves("fault:F01", "fault:F04", "fault:F05", "fault:F07", "fault:F09", "fault:F10")
@pytest.mark.parametrize("name", MESSAGES)
def test_what_flax_never_writes(folder, name):
    data, match = MESSAGES[name]
    (folder / "flax_model.msgpack").write_bytes(data)
    refused(folder, "flax_model.msgpack", match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": {"0": 7}}, r"do not make up shape \[7\]"),
        ({"shape": {"1": 6}}, r"is not numbered from 0"),
        ({"shape": 6}, r"without shape"),
        ({"chunks": {}}, r"the 0 pieces of tensor 'wpe/embedding' do not make up"),
        ({"chunks": {"0": files.flax_array(torch.ones(2, 3))}}, r"do not make up"),
        ({"chunks": {"0": files.flax_array(torch.ones(3)), "1": files.flax_array(torch.ones(3).half())}}, r"make up"),
        ({"__msgpack_chunked_array__": 1}, r"is an array in pieces, but not as Flax writes them"),
        ({"more": 1}, r"is an array in pieces, but not as Flax writes them"),
    ],
    ids=str,
)
def test_arrays_in_pieces_that_do_not_fit(folder, change, match):
    whole = {**files.flax_chunks(torch.ones(6), 3), **change}
    (folder / "flax_model.msgpack").write_bytes(pack({"wpe": {"embedding": whole}}))
    refused(folder, "flax_model.msgpack", match)


@pytest.mark.proves("fault:F02", "fault:F03")
def test_cut_and_damaged_msgpack_files(folder, model):
    path = folder / "flax_model.msgpack"
    files.write_msgpack(path, model)
    whole = path.read_bytes()
    rng = random.Random(0)
    for size in (1, 10, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, "flax_model.msgpack", r"ends at byte|claims|bytes")
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.choice((rng.randrange(300), rng.randrange(len(whole))))] = rng.randrange(256)
        path.write_bytes(damaged)
        found, error = attempt(read_msgpack, path)
        assert not error or "flax_model.msgpack" in error
        assert all(p.begin + p.nbytes <= len(whole) for stored in found.values() for p in stored.pieces)


def test_the_undamaged_files_do_load(folder, model):
    """So that the refusals above mean something."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.write_h5(folder / "tf_model.h5", model)
        GPT2LMHeadModel.from_pretrained(folder)
        files.write_msgpack(folder / "flax_model.msgpack", model)
        GPT2LMHeadModel.from_pretrained(folder, from_flax=True)
