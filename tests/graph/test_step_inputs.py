"""A step's inputs: the same from a batch on the host and from one on the device, padding included."""

import pytest
import torch

from gpt2rt.graph import StepBatch
from gpt2rt.graph.inputs import StepInputs, StepSize

CPU = torch.device("cpu")
PADDING = {
    "input_ids": 0,
    "position_ids": 0,
    "slot_mapping": -1,
    "seq_lens": 0,
    "query_start_loc": 5,
    "logits_indices": 0,
}


def batch_of(tokens, seqs, logits, columns):
    numbers = torch.Generator().manual_seed(tokens)

    def some(*shape, dtype=torch.int64):
        return torch.randint(1, 99, shape, generator=numbers).to(dtype)

    return StepBatch(
        input_ids=some(tokens),
        position_ids=some(tokens),
        query_start_loc=some(seqs + 1, dtype=torch.int32),
        seq_lens=some(seqs, dtype=torch.int32),
        block_table=some(seqs, columns, dtype=torch.int32),
        slot_mapping=some(tokens),
        logits_indices=some(logits),
        max_query_len=1,
        max_seq_len=1,
    )


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("size", [StepSize(8, 4, 4, 3, 4), StepSize(16, 3, 5, 3, 0)], ids=["decode", "prompts"])
@pytest.mark.parametrize("way", ["load", "_load_from_device"])
def test_what_is_not_filled_is_padding(size, columns, way):
    inputs = StepInputs(size, CPU)
    for tensor in inputs.tensors.values():
        assert tensor.data_ptr() % 16 == 0
        tensor.fill_(77)
    batch = batch_of(5, 2, 2, columns)
    getattr(inputs, way)(batch)
    constant = {"query_start_loc", "logits_indices"} if size.num_splits else set()
    assert set(inputs.tensors) == {*PADDING, "block_table"} - constant
    for name, tensor in inputs.tensors.items():
        values = getattr(batch, name)
        if name == "block_table":
            most = min(columns, size.max_blocks)
            assert torch.equal(tensor[:2, :most], values[:, :most])
            continue
        assert torch.equal(tensor[: len(values)], values)
        assert (tensor[len(values) :] == PADDING[name]).all()
        assert len(tensor) > len(values)


def test_what_is_full_has_no_padding():
    inputs = StepInputs(StepSize(4, 4, 4, 2, 4), CPU)
    batch = batch_of(4, 4, 4, 2)
    inputs.load(batch)
    for name, tensor in inputs.tensors.items():
        assert torch.equal(tensor, getattr(batch, name))
