"""Random numbers that are a pure function of where they are used.

Philox4x32-10 turns a counter of four 32-bit words and a key of two into four random words by ten rounds of
multiplications; there is no state, so the number for token 17 of a request is the same whether it is drawn alone, in
a batch, after a restart or out of order.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11, section 3.3; its published
known-answer vectors are among the tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
# the golden ratio and sqrt(3) - 1: what the key grows by each round
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random words in [0, 2**32) for a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> 32) ^ c1 ^ k0,
            product_1 & _MASK,
            (product_0 >> 32) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, request: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same for the same arguments everywhere.

    Args:
        seed: the caller's seed, any integer of 64 bits (negative ones count from the top).
        request: which request, 64 bits; :func:`request_key` gives one for a prompt.
        choice: which of several continuations of the request, 32 bits.
        position: the index in its sequence of the token that is drawn, 32 bits.
    """
    counter = (position & _MASK, choice & _MASK, request & _MASK, (request >> 32) & _MASK)
    high, low, _, _ = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return ((high >> 5) * 67108864 + (low >> 6)) * (1.0 / 9007199254740992.0)


def request_key(prompt_ids: Sequence[int]) -> int:
    """64 bits that name a prompt: equal prompts share a key, others in practice never do.

    Sampling one prompt alone or among others then draws the same numbers, and different prompts draw independent ones.
    """
    digest = hashlib.blake2b(b"".join(token.to_bytes(8, "little") for token in prompt_ids), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
