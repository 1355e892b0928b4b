"""The next step's inputs, made on the device: the kernel in triton's interpreter against its definition."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.advance import advance_ref, advance_triton

pytestmark = pytest.mark.kernel

BLOCK_SIZE = 16


def state(num_rows):
    """Rows at different positions; the last ones: at its limit, at the table's end, without a token, padding."""
    positions = torch.arange(num_rows) * 7 % 40
    return {
        "input_ids": torch.randint(0, 99, (num_rows,)),
        "position_ids": positions,
        "slot_mapping": torch.arange(num_rows),
        "seq_lens": (positions + 1).int(),
        "limits": torch.full((num_rows,), 60, dtype=torch.int32),
        "block_table": torch.randperm(num_rows * 4).view(num_rows, 4).int(),
        "ring": torch.full((3, num_rows), -7),
        "step": torch.tensor([5]),
    }


@pytest.mark.parametrize("num_rows", [1, 5, 32, 70])
def test_matches_definition(num_rows):
    values = state(num_rows)
    chosen = torch.randint(0, 99, (num_rows,))
    if num_rows > 4:
        values["limits"][-1] = int(values["position_ids"][-1]) + 1
        values["position_ids"][-2], values["seq_lens"][-2] = 63, 64
        values["limits"][-2] = 1000
        chosen[-3] = -1
        values["seq_lens"][-4] = 0
        values["block_table"][0] = -1
    expected = {name: value.clone() for name, value in values.items()}
    for _ in range(4):
        advance_triton(chosen, **values, block_size=BLOCK_SIZE)
        advance_ref(chosen, **expected, block_size=BLOCK_SIZE)
        for name, value in expected.items():
            assert torch.equal(values[name], value), name
    if num_rows > 4:
        assert values["seq_lens"][-4:].tolist() == [0, 0, 0, 0]
        assert values["slot_mapping"][-4:].tolist() == [-1, -1, -1, -1]
        assert values["slot_mapping"][0] == -1
    assert values["step"].item() == 9
    assert torch.equal(values["ring"], chosen.expand(3, num_rows))


def test_slots_follow_the_block_table():
    values = state(1)
    values["position_ids"][0], values["seq_lens"][0] = 30, 31
    values["block_table"] = torch.tensor([[9, 4, 7, 2]], dtype=torch.int32)
    slots = []
    for token in (5, 6, 7):
        advance_triton(torch.tensor([token]), **values, block_size=BLOCK_SIZE)
        slots.append(int(values["slot_mapping"]))
        assert int(values["input_ids"]) == token
    assert slots == [4 * 16 + 15, 7 * 16, 7 * 16 + 1]
