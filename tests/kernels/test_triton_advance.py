"""The next step's inputs, made on the device: the kernel in triton's interpreter against its definition."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from kernel_weights import make_weight

from gpt2rt.kernels.advance import Embedding, advance_ref, advance_triton
from gpt2rt.kernels.fused_linear import Norm
from gpt2rt.kernels.head import head_argmax_ref, head_keys_triton, head_workspace_bytes
from gpt2rt.kernels.weights import pack_dense

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
        "step": torch.full((num_rows,), 5),
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
    assert values["step"].tolist() == [9] * num_rows
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


@pytest.mark.parametrize("width", [64, 100, 1152])
@pytest.mark.parametrize("name", ["f32", "f16", "int8", "int4 g64", "int4z g32", "table g64"])
def test_the_next_rows_are_embedded(name, width, cut_rows):
    values = state(5)
    values["limits"][4] = int(values["position_ids"][4]) + 1
    wte, wpe = make_weight(name, 99, width), cut_rows(torch.randn(60, width))
    x = cut_rows(torch.full((5, width), torch.nan))
    chosen = torch.tensor([3, 98, -1, 0, 7])
    expected = {key: value.clone() for key, value in values.items()}
    wanted = torch.empty(5, width, dtype=torch.float64)
    for _ in range(2):
        advance_triton(chosen, **values, block_size=BLOCK_SIZE, embedding=Embedding(wte, wpe, x))
        advance_ref(chosen, **expected, block_size=BLOCK_SIZE, embedding=Embedding(wte, wpe.double(), wanted))
        for key, value in expected.items():
            assert torch.equal(values[key], value), key
        torch.testing.assert_close(x.double(), wanted, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("vocab", [61, 5000])
def test_the_largest_of_the_heads_keys_is_the_token(vocab):
    width, rows = 48, 4
    x, weight = torch.randn(rows, width), pack_dense(torch.randn(vocab, width))
    norm = Norm(torch.ones(width), torch.zeros(width), 1e-5)
    x[2, 5] = torch.inf
    workspace = torch.full((head_workspace_bytes(weight, rows),), 255, dtype=torch.uint8)
    keys = head_keys_triton(x, weight, norm, None, rows, workspace, finite=True)
    expected, _, _ = head_argmax_ref(x.double(), weight, norm, None, finite=True)
    assert expected.tolist()[2] == -1
    values = state(rows)
    chosen = torch.full((rows,), -9)
    advance_triton(chosen, **values, block_size=BLOCK_SIZE, keys=keys)
    assert torch.equal(chosen, expected)
    assert torch.equal(values["ring"][5 % 3], expected)
    assert torch.equal(values["input_ids"], expected.clamp(min=0))
    assert values["seq_lens"][2] == 0
