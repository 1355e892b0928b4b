"""A keyed fingerprint of a tensor's bytes, as fast as memory is read."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ._library import define

#: bytes of the key; also of the blocks that are hashed with it (csrc/fingerprint.cpp)
FINGERPRINT_KEY_BYTES = 4096


def _fingerprint_blocks_fake(data: Tensor, key: Tensor) -> Tensor:
    return data.new_empty((-(-data.numel() // FINGERPRINT_KEY_BYTES), 16))


_fingerprint_blocks = define(
    "fingerprint_blocks", "(Tensor data, Tensor key) -> Tensor", reference=None, fake=_fingerprint_blocks_fake
)


def fingerprint(data: Tensor, key: Tensor) -> bytes:
    """32 bytes that tell different contents apart.

    The key must be random, secret and the same for all that is compared: then nobody, whatever he puts into a
    checkpoint, makes two contents with one fingerprint, but for a chance of 2^-64 a pair (csrc/fingerprint.cpp).

    Args:
        data: any dtype, on CPU, contiguous; its bytes count and their number, neither dtype nor shape.
        key: [FINGERPRINT_KEY_BYTES] uint8 on CPU.

    Returns:
        SHA-256 of the length and of the keyed sums of all blocks.

    Raises:
        ValueError: ``data`` is not contiguous or not on CPU, or ``key`` is no such tensor.
        NotImplementedError: the extension is missing.
    """
    if data.device.type != "cpu" or not data.is_contiguous():
        raise ValueError(
            f"fingerprint: data must be contiguous on the CPU, got strides {list(data.stride())} on {data.device}; "
            "pass data.contiguous()"
        )
    if key.shape != (FINGERPRINT_KEY_BYTES,) or key.dtype != torch.uint8 or key.device.type != "cpu":
        raise ValueError(
            f"fingerprint: key must be [{FINGERPRINT_KEY_BYTES}] uint8 on the CPU, got {list(key.shape)} {key.dtype} "
            f"on {key.device}"
        )
    flat = data.detach().view(-1).view(torch.uint8)
    digest = hashlib.sha256(flat.numel().to_bytes(8, "little"))
    digest.update(_fingerprint_blocks(flat, key).numpy())
    return digest.digest()
