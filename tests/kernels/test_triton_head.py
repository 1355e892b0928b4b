"""Final norm, lm_head and argmax in triton's interpreter, against the definition in float64."""

import math
import os
import struct

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from kernel_weights import make_weight

from gpt2rt.kernels.fused_linear import Norm
from gpt2rt.kernels.head import (
    KEYS,
    LINES,
    _largest_key_kernel,
    head_argmax_ref,
    head_argmax_triton,
    head_workspace_bytes,
)
from gpt2rt.kernels.linear_rows import MAX_WHOLE_K
from gpt2rt.kernels.sampling_refs import argmax_ref
from gpt2rt.kernels.weights import pack_dense

pytestmark = pytest.mark.kernel


def run(x, weight, norm=None, indices=None, *, rows=None, with_logits=True, finite=False):
    """(ids, largest, logits) of the kernels, each in memory that held something else."""
    n = weight.shape[0]
    rows = rows if rows is not None else len(x) if indices is None else len(indices)
    ids, best = torch.full((rows,), -7), torch.empty(rows, dtype=torch.float32)
    logits = torch.empty(rows, n, dtype=torch.float32) if with_logits else None
    needed = head_workspace_bytes(weight, rows)
    workspace = torch.full((needed + 64,), 0x7F, dtype=torch.uint8)
    head_argmax_triton(x, weight, norm, indices, ids, best, workspace, logits_out=logits, finite=finite)
    assert (workspace[needed:] == 0x7F).all(), "a kernel wrote past its workspace"
    return ids, best, logits


def make_norm(k):
    return Norm(1 + 0.1 * torch.randn(k), 0.1 * torch.randn(k), 1e-5)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "int8", "int4 g64", "int4z g32", "table g128"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 37, 63), (2, 40, 768), (2, 19, 1600)])
def test_matches_definition(m, n, k, kind, cut_rows):
    x, weight, norm = cut_rows(torch.randn(m, k)), make_weight(kind, n, k), make_norm(k)
    ids, best, logits = run(x, weight, norm)
    _, _, definition = head_argmax_ref(x.double(), weight, norm, None)
    torch.testing.assert_close(logits.double(), definition, rtol=1e-5, atol=1e-5)
    # the choice is exactly that of the logits the kernel has
    assert torch.equal(ids, argmax_ref(logits, False))
    assert torch.equal(best, logits.amax(dim=-1))
    again = run(x, weight, norm, with_logits=False)
    assert torch.equal(again[0], ids)
    assert torch.equal(again[1], best)


@pytest.mark.parametrize("k", [*(most - 3 for most, _ in LINES), MAX_WHOLE_K + 3])
def test_every_tile(k):
    x, weight, norm = torch.randn(1, k), make_weight("bf16", 9, k), make_norm(k)
    ids, best, logits = run(x, weight, norm)
    definition = head_argmax_ref(x.double(), weight, norm, None)
    assert torch.equal(ids, definition[0])
    torch.testing.assert_close(best.double(), definition[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), definition[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_are_picked_by_index(dtype):
    x, weight, norm = torch.randn(7, 40), make_weight("f16", 50, 40), make_norm(40)
    indices = torch.tensor([6, 0, 3, 3], dtype=dtype)
    everything, picked = run(x, weight, norm), run(x, weight, norm, indices)
    for all_rows, rows in zip(everything, picked, strict=True):
        assert torch.equal(all_rows[indices.long()], rows)


def test_an_index_outside_x_gives_no_token():
    x, weight = torch.randn(3, 40), make_weight("f16", 50, 40)
    ids, best, logits = run(x, weight, None, torch.tensor([1, -1, 3, 2]))
    assert ids[[1, 2]].tolist() == [-1, -1]
    assert best[[1, 2]].isnan().all()
    assert logits[[1, 2]].isnan().all()
    whole = run(x, weight)
    assert torch.equal(ids[[0, 3]], whole[0][[1, 2]])


def test_only_as_many_rows_as_asked_for():
    x, weight = torch.randn(5, 40), make_weight("f16", 50, 40)
    assert torch.equal(run(x, weight, rows=2)[0], run(x, weight)[0][:2])


def test_the_first_of_equal_logits_wins():
    # as many columns as several programs own
    n = 50
    for equal in ([0, 49], [15, 16, 17], [48, 49]):
        weight = torch.full((n, 1), -2.0)
        weight[equal] = 1.5
        ids, best, _ = run(torch.tensor([[1.0], [-1.0]]), pack_dense(weight))
        assert ids[0] == equal[0]
        assert best[0] == 1.5
        # negative floats order the other way round
        assert ids[1] == next(i for i in range(n) if i not in equal)
        assert best[1] == 2.0


def test_negative_logits_and_zeros_are_ordered():
    weight = torch.full((40, 1), -3.0)
    weight[21] = -1.0
    ids, best, _ = run(torch.ones(1, 1), pack_dense(weight))
    assert (ids[0], best[0]) == (21, -1.0)
    weight[7], weight[30] = -0.0, 0.0
    assert run(torch.ones(1, 1), pack_dense(weight))[0][0] == 7
    weight[7], weight[30] = 0.0, -0.0
    assert run(torch.ones(1, 1), pack_dense(weight))[0][0] == 7


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 39])
def test_nan_or_infinity_among_the_logits_gives_no_token(bad, place):
    weight = torch.randn(40, 1)
    weight[place] = bad
    ids, best, logits = run(torch.ones(2, 1), pack_dense(weight))
    assert ids.tolist() == [-1, -1]
    assert best.isnan().all()
    assert torch.equal(ids, argmax_ref(logits, False))


def test_minus_infinity_excludes_a_token_and_all_of_them_leave_none():
    weight = torch.full((40, 1), -math.inf)
    assert run(torch.ones(1, 1), pack_dense(weight))[0].tolist() == [-1]
    weight[33] = -5.0
    ids, best, _ = run(torch.ones(1, 1), pack_dense(weight))
    assert (ids[0], best[0]) == (33, -5.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 38])
def test_finite_takes_nothing_else(bad, place):
    weight = torch.randn(39, 1)
    for value in (bad, 0.0):
        weight[place] = value
        ids, best, logits = run(torch.ones(2, 1), pack_dense(weight), finite=True)
        assert torch.equal(ids, argmax_ref(logits, True))
        assert (ids[0] < 0, bool(best[0].isnan())) == (value != 0.0, value != 0.0)


def key_of(value, token):
    """The key of a logit, after the kernels' text: a float's order in the high half, its id backwards in the low."""
    bits = struct.unpack("<i", struct.pack("<f", value + 0.0))[0]
    ordered = bits if bits >= 0 else bits ^ 0x7FFFFFFF
    return (ordered << 32) + (0x7FFFFFFF - token)


def test_more_keys_than_one_block():
    # by hand, for thousands of programs of the first kernel would take minutes in the interpreter
    num_keys = 2 * KEYS + 40
    values = torch.full((3, num_keys), -1.0)
    values[0, num_keys - 1] = -0.5
    values[1, [KEYS - 1, KEYS + 3, num_keys - 1]] = 7.0
    keys = torch.tensor([[key_of(v, token) for token, v in enumerate(row)] for row in values.tolist()])
    ids, best = torch.full((3,), -7), torch.empty(3, dtype=torch.float32)
    _largest_key_kernel[(3,)](keys, ids, best, num_keys, BLOCK=KEYS, PDL=False)
    assert ids.tolist() == [num_keys - 1, KEYS - 1, 0]
    assert best.tolist() == [-0.5, 7.0, -1.0]


@pytest.mark.parametrize("kind", ["f16", "int4z g64", "table g32"])
def test_bits_of_a_row_do_not_depend_on_the_other_rows(kind):
    x, weight, norm = torch.randn(8, 100), make_weight(kind, 30, 100), make_norm(100)
    together = run(x, weight, norm)
    for i in (0, 5, 7):
        for alone, row in zip(run(x[i : i + 1], weight, norm), together, strict=True):
            assert torch.equal(alone[0], row[i])


def test_no_rows():
    x, weight = torch.ones(0, 4), make_weight("f32", 3, 4)
    none = torch.empty(0, dtype=torch.float32)
    head_argmax_triton(
        x, weight, None, None, torch.empty(0, dtype=torch.int64), none, torch.empty(0, dtype=torch.uint8)
    )


def test_sizes_that_contradict_each_other_are_refused():
    x, weight = torch.ones(2, 4), make_weight("f32", 12, 4)
    ids, best = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    workspace = torch.zeros(head_workspace_bytes(weight, 2), dtype=torch.uint8)

    def refused(message, x=x, indices=None, ids=ids, best=best, workspace=workspace, logits=None):
        with pytest.raises(ValueError, match=message):
            head_argmax_triton(x, weight, None, indices, ids, best, workspace, logits_out=logits)

    refused(r"x is \[2, 5\].*expected \[T, 4\]", x=torch.ones(2, 5))
    refused("2 rows are wanted of the 1", indices=torch.zeros(1, dtype=torch.int64))
    refused("best_out 1", best=best[:1])
    refused("the workspace has 8 bytes", workspace=workspace[:8])
    refused(r"logits_out is \[2, 11\]", logits=torch.zeros(2, 11))
