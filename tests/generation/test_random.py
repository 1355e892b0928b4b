import math

import pytest

from gpt2rt.generation.random import philox4x32, request_key, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # the known-answer vectors published with the paper's Random123 library
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert philox4x32(counter, key) == expected


def test_uniform_is_a_pure_function_of_all_four_arguments():
    base = (7, 11, 13, 17)
    assert uniform(*base) == uniform(*base)
    for index in range(4):
        changed = list(base)
        changed[index] += 1
        assert uniform(*changed) != uniform(*base)
    # the upper halves of seed and request count too
    assert uniform(7 + 2**32, 11, 13, 17) != uniform(*base)
    assert uniform(7, 11 + 2**32, 13, 17) != uniform(*base)
    assert uniform(-1, 0, 0, 0) == uniform(2**64 - 1, 0, 0, 0)


def test_uniform_is_uniform():
    draws = [uniform(1, 2, 3, position) for position in range(20000)]
    assert min(draws) >= 0.0
    assert max(draws) < 1.0
    counts = [0] * 64
    for draw in draws:
        counts[int(draw * 64)] += 1
    expected = len(draws) / 64
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    # 63 degrees of freedom: mean 63, deviation 11.2; five deviations either way
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)
    # 53 bits: the low half of the mantissa varies
    assert len({int(draw * 2**53) % 1024 for draw in draws}) == 1024


def test_request_key_tells_prompts_apart():
    prompts = [[1], [1, 2], [2, 1], [], [0], [0, 0], [256], [1, 0]]
    keys = [request_key(prompt) for prompt in prompts]
    assert len(set(keys)) == len(prompts)
    assert all(0 <= key < 2**64 for key in keys)
    assert request_key((1, 2)) == request_key([1, 2])
