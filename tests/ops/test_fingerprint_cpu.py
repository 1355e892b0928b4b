"""The fingerprint against its definition in Python's integers, and what it must tell apart."""

import hashlib

import pytest
import torch

from gpt2rt import ops

BLOCK = 4096


def new_key(seed=0):
    return torch.randint(0, 256, (BLOCK,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def words(data):
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


def expected(data, key):
    """Restated from the paper: NH over 64-bit words, a block at a time, and SHA-256 over length and sums."""
    k = words(bytes(key.tolist()))
    digest = hashlib.sha256(len(data).to_bytes(8, "little"))
    for start in range(0, len(data), BLOCK):
        m = words(data[start : start + BLOCK].ljust(BLOCK, b"\0"))
        total = sum(((m[i] + k[i]) % 2**64) * ((m[i + 1] + k[i + 1]) % 2**64) for i in range(0, BLOCK // 8, 2))
        digest.update((total % 2**128).to_bytes(16, "little"))
    return digest.digest()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 129])
def test_the_definition(size):
    data = torch.randint(0, 256, (size + 3,), dtype=torch.uint8)[3:]
    assert ops.fingerprint(data, new_key()) == expected(bytes(data.tolist()), new_key())


def test_large_words_carry_into_the_upper_half():
    data = torch.full((2 * BLOCK,), 255, dtype=torch.uint8)
    key = torch.full((BLOCK,), 254, dtype=torch.uint8)
    assert ops.fingerprint(data, key) == expected(b"\xff" * 2 * BLOCK, key)


def test_any_dtype_counts_as_its_bytes():
    floats = torch.randn(33, 65)
    assert ops.fingerprint(floats, new_key()) == ops.fingerprint(floats.view(torch.uint8), new_key())
    assert ops.fingerprint(torch.randn(2, 3, requires_grad=True), new_key())


@pytest.mark.parametrize("place", [0, 5000, 3 * BLOCK - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_bit_changes_it(place, bit):
    data = torch.randint(0, 256, (3 * BLOCK,), dtype=torch.uint8)
    before = ops.fingerprint(data, new_key())
    data[place] ^= 1 << bit
    assert ops.fingerprint(data, new_key()) != before


def test_order_length_and_key_count():
    rows = torch.randn(4, 1024)
    whole = ops.fingerprint(rows, new_key())
    assert ops.fingerprint(rows.flip(0), new_key()) != whole
    assert ops.fingerprint(rows, new_key(1)) != whole
    zeros = torch.zeros(100, dtype=torch.uint8)
    assert ops.fingerprint(zeros, new_key()) != ops.fingerprint(zeros[:99], new_key())


def test_threads_do_not_change_it(monkeypatch):
    data = torch.randint(0, 256, (300 * BLOCK + 5,), dtype=torch.uint8)
    results = set()
    for count in ("1", "2", "5"):
        monkeypatch.setenv("GPT2RT_NUM_THREADS", count)
        results.add(ops.fingerprint(data, new_key()))
    assert len(results) == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"must be contiguous.*pass data\.contiguous\(\)"):
        ops.fingerprint(torch.randn(4, 6)[:, :3], new_key())
    with pytest.raises(ValueError, match=r"key must be \[4096\] uint8"):
        ops.fingerprint(torch.randn(4), torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="key"):
        torch.ops.gpt2rt.fingerprint_blocks(torch.zeros(9, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        torch.ops.gpt2rt.fingerprint_blocks(torch.zeros(9), new_key())
