"""cpu_step checks every index and offset before any work."""

import math

import pytest
import torch
from cpu_step_model import Config, StepModel, double_bits

import gpt2rt.ops as ops


@pytest.fixture(scope="module")
def model():
    return StepModel(Config())


@pytest.fixture
def arguments(model):
    """Good arguments: 20 tokens of one sequence and 3 of another."""
    model.reset_cache()
    return model.arguments(model.batch([(list(range(20)), 0), ([1, 2, 3], 16)], [[4, 7], [0, 47]]), hidden=True)


def assert_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.cpu_step(*arguments.values())
    for name in ("kv_cache", "workspace", "logits", "hidden"):
        assert arguments[name].isnan().all(), f"{name} was written"


def test_good_arguments_pass(model, arguments):
    model.kv_cache[:, :, 0] = 0.0  # the 16 earlier tokens of the second sequence
    ops.cpu_step(*arguments.values())
    assert arguments["logits"].isfinite().all()


@pytest.mark.parametrize(
    ("name", "index", "value", "error", "message"),
    [
        ("input_ids", 22, 97, IndexError, r"input_ids\[22\] is 97, expected 0 to 96"),
        ("input_ids", 0, -1, IndexError, r"input_ids\[0\] is -1"),
        ("position_ids", 3, 600, IndexError, r"position_ids\[3\] is 600, expected 0 to 599"),
        ("slot_mapping", 5, 48 * 16, IndexError, r"slot_mapping\[5\] is 768, expected -1 to 767"),
        ("slot_mapping", 5, -2, IndexError, r"slot_mapping\[5\] is -2"),
        ("slot_mapping", 5, 2**63 - 1, IndexError, r"slot_mapping\[5\] is 9223372036854775807"),
        ("logits_indices", 0, 23, IndexError, r"logits_indices\[0\] is 23, expected 0 to 22"),
        ("logits_indices", 0, -1, IndexError, r"logits_indices\[0\] is -1"),
        ("block_table", (1, 1), 48, IndexError, r"block_table\[1, 1\] is 48, but the cache has 48 blocks"),
        ("block_table", (0, 0), -1, IndexError, r"block_table\[0, 0\] is -1"),
        ("seq_lens", 0, 33, ValueError, r"seq_lens\[0\] is 33, which needs 3 blocks of 16"),
        ("seq_lens", 0, 19, ValueError, r"seq_lens\[0\] is 19, expected at least 20"),
        ("seq_lens", 0, -5, ValueError, r"seq_lens\[0\] is -5"),
        ("query_start_loc", 1, -1, ValueError, r"query_start_loc falls from 0 to -1 at sequence 0"),
        ("query_start_loc", 2, 22, ValueError, "query_start_loc ends with 22, expected 23"),
    ],
)
def test_bad_index(arguments, name, index, value, error, message):
    arguments[name][index] = value
    assert_refused(arguments, error, message)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("input_ids", lambda t: t.int(), "input_ids is int32, expected int64"),
        ("position_ids", lambda t: t[:-1], r"position_ids has shape \[22\], expected 23"),
        ("seq_lens", lambda t: t.long(), "seq_lens is int64, expected int32"),
        ("query_start_loc", lambda t: t[:-1], r"query_start_loc has shape \[2\], expected 3"),
        ("block_table", lambda t: t[:1], r"block_table has shape \[1, 2\], expected 2"),
        ("wte", lambda t: t[:-1], r"wte has shape \[96, 60\], expected 97"),
        ("wpe", lambda t: t.double(), "wpe (is|has dtype) float64"),
        ("arena", lambda t: t[4:], "arena must start at a multiple of 64 bytes"),
        ("arena", lambda t: t[:-64], "outside the arena"),
        ("plan", lambda t: t[:, :15].contiguous(), r"plan has shape \[12, 15\]"),
        ("plan", lambda t: t.int(), "plan is int32"),
        ("plan", lambda t: t[:0], "plan has no rows"),
        ("plan", lambda t: t[1:], "EMBED .* must be the first row"),
        ("kv_cache", lambda t: t[:1], r"the plan has a layer 1, but kv_cache .* has 1 layers"),
        ("kv_cache", lambda t: t.transpose(4, 5).contiguous(), "heads of"),
        ("kv_cache", lambda t: t.transpose(4, 5), "kv_cache must be contiguous"),
        ("kv_cache", lambda t: t.double(), "kv_cache is float64"),
        (
            "workspace",
            lambda t: t[:-1],
            r"workspace has \d+ bytes, expected at least \d+; ask cpu_step_workspace_bytes",
        ),
        ("logits", lambda t: t[:-1], r"logits has shape \[22, 97\], expected 23"),
        ("logits", lambda t: t[:, :-1].contiguous(), r"logits has shape \[23, 96\], expected 97"),
        ("logits", lambda t: t.double(), "logits is float64"),
        ("hidden", lambda t: t[:, 1:].contiguous(), r"hidden has shape \[23, 59\], expected 60"),
        ("num_threads", lambda n: -1, "num_threads is -1, expected 1 to 1024"),
        ("num_threads", lambda n: 2**40, "num_threads is 1099511627776"),
    ],
)
def test_bad_tensor(arguments, name, change, message):
    arguments[name] = change(arguments[name])
    assert_refused(arguments, ValueError, message)


@pytest.mark.parametrize(
    ("row", "field", "value", "message"),
    [
        (0, 0, 7, "EMBED"),
        (3, 0, 7, "plan row 3: opcode is 7, expected 0 to 6"),
        (3, 0, -1, "opcode is -1"),
        (2, 0, 0, "EMBED .* no other"),
        (0, 1, 0, "V is 0"),
        (0, 3, 2**40, "E is 1099511627776"),
        (1, 3, -1, "the packed weight lies at bytes -1"),
        (1, 3, 2**62, "outside the arena"),
        (1, 3, 2**63 - 64, "outside the arena"),
        (1, 3, 4, "the packed weight lies at byte 4, expected a multiple of 64"),
        (1, 1, 2, "the norm's weight lies at byte 2, expected a multiple of 4"),
        (1, 2, -1, "the norm's bias lies at bytes -1"),
        (1, 4, 2**40, "the bias lies at bytes"),
        (1, 5, 61, "K is 61, expected 60, n_embd of EMBED"),
        (1, 6, 181, "N is 181, expected 180, 3 n_embd"),
        (1, 7, 6, "weight format is 6"),
        (1, 8, -1, "layer is -1"),
        (1, 9, double_bits(math.nan), "eps is nan"),
        (1, 9, double_bits(-1.0), "eps is -1"),
        (2, 1, 1, "layer is 1, expected 0, the layer of the NORM_QKV before it"),
        (2, 2, 4, r"H \* D is 80, expected 60"),
        (2, 4, double_bits(math.inf), "scale is inf"),
        (3, 5, 59, "K is 59, expected 60, the width of the ATTENTION"),
        (4, 6, 0, "N is 0"),
        (4, 6, 2**31 - 1, "outside the arena"),
        (4, 10, 7, "activation is 7, expected 0 to 6"),
        (11, 5, 59, "E is 59, expected 60"),
        (11, 6, 98, r"logits has shape \[23, 97\], expected 98"),
    ],
)
def test_bad_plan(arguments, row, field, value, message):
    arguments["plan"] = arguments["plan"].clone()
    arguments["plan"][row, field] = value
    assert_refused(arguments, ValueError, message)


def test_rows_of_logits_need_a_head():
    model = StepModel(Config(head=False))
    arguments = model.arguments(model.batch([([1, 2], 0)], [[0]]), hidden=True)
    arguments["logits"] = torch.full((2, 97), math.nan)
    assert_refused(arguments, ValueError, "logits has 2 rows, but the plan has no head")


def test_workspace_bytes_refuses(model):
    for tokens, logits, message in [
        (-1, 0, "num_tokens is -1"),
        (0, -1, "num_logits is -1"),
        (2**62, 1, r"more than 2\^63"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.cpu_step_workspace_bytes(model.plan, tokens, logits)


def test_workspace_grows_with_tokens(model):
    one, many = (ops.cpu_step_workspace_bytes(model.plan, n, 1) for n in (1, 100))
    # x, norm, qkv and the wider of attention and fc, in float32
    per_token = 4 * (60 + 60 + 180 + 60)
    assert 99 * per_token <= many - one <= 99 * per_token * 1.2
