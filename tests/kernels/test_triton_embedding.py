"""embedding in triton's interpreter, against its definition."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels.embedding import embedding_ref, embedding_triton

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "vocab", "positions", "n"), [(1, 1, 1, 1), (7, 97, 11, 63), (3, 50, 8, 1600)])
def test_matches_definition(num_tokens, vocab, positions, n, dtype, cut_rows):
    wte, wpe = cut_rows(torch.randn(vocab, n, dtype=dtype)), cut_rows(torch.randn(positions, n, dtype=dtype))
    input_ids, position_ids = torch.randint(vocab, (num_tokens,)), torch.randint(positions, (num_tokens,))
    # the last rows as well
    input_ids[-1], position_ids[-1] = vocab - 1, positions - 1
    y = embedding_triton(input_ids, position_ids, wte, wpe)
    # one addition, rounded once on both sides
    assert torch.equal(y, embedding_ref(input_ids, position_ids, wte, wpe))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("token", "position"), [(-1, 0), (5, 0), (0, -1), (0, 4), (2**40, 0), (0, -(2**40)), (-(2**63), 2**63 - 1)]
)
def test_an_unknown_id_gives_a_row_of_nan(token, position, dtype):
    wte, wpe = torch.randn(5, 33, dtype=dtype), torch.randn(4, 33, dtype=dtype)
    y = embedding_triton(torch.tensor([1, token, 4]), torch.tensor([3, position, 0]), wte, wpe)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], embedding_ref(torch.tensor([1, 4]), torch.tensor([3, 0]), wte, wpe))


def test_no_tokens():
    none = torch.ones(0, dtype=torch.int64)
    assert embedding_triton(none, none, torch.ones(3, 8), torch.ones(3, 8)).shape == (0, 8)
