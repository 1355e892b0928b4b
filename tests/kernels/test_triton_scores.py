"""uniforms, penalties, their counts and log_probabilities in triton's interpreter, against their definitions."""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.generation.random import request_key, uniform
from gpt2rt.kernels import log_probabilities
from gpt2rt.kernels.config_table import ALL
from gpt2rt.kernels.log_probabilities import log_probabilities_ref, log_probabilities_triton
from gpt2rt.kernels.penalties import (
    count_tokens_ref,
    count_tokens_triton,
    penalties_into_triton,
    penalties_ref,
    penalties_triton,
    reset_counts_ref,
    reset_counts_triton,
)
from gpt2rt.kernels.sampling_select import CHUNKS, MAX_LIST, select_workspace
from gpt2rt.kernels.uniforms import uniforms_into_triton, uniforms_triton

pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

INF = math.inf
CHUNK = CHUNKS.find(0, ALL).size


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- uniforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 127, 300])
def test_uniforms_are_the_hosts(num_rows):
    words = torch.randint(-(2**63), 2**63 - 1, (4, num_rows))
    words[:, 0] = torch.tensor([-1, request_key([1, 2, 3]) - 2**64, 3, 0])
    numbers = uniforms_triton(*words)
    assert numbers.tolist() == [uniform(*word) for word in words.T.tolist()]
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_positions_advance():
    words = torch.tensor([[5, 6, 7], [1, 2, 3], [0, 0, 1], [10, 20, 2**32 - 1]])
    expected = [uniform(s, r, c, p + 1) for s, r, c, p in words.T.tolist()]
    out = torch.full((3,), math.nan, dtype=torch.float64)
    for _ in range(2):
        uniforms_into_triton(*words, out, advance=1)
    assert out.tolist() == expected
    assert words[3].tolist() == [12, 22, 2**32 + 1]


# ---- penalties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 50, 2049])
def test_penalties_are_the_definition_bit_for_bit(vocab_size, cut_rows):
    scores = 5 * torch.randn(5, vocab_size)
    scores[0, torch.rand(vocab_size) < 0.3] = -INF
    scores[1, 0] = 0.0
    scores = cut_rows(scores)
    counts = torch.randint(0, 9, (4, vocab_size), dtype=torch.int32)
    slots = torch.tensor([3, 0, 0, -1, 1])
    given = doubles(1.3, 0.7, 1.0, 2.0, 1.1), doubles(0.1, -0.3, 0.0, 1.0, 2.0), doubles(0.6, 0.0, -1.5, 1.0, 0.1)
    for wanted in (0b111, 0b100, 0b010, 0b001, 0b000):
        settings = [value if wanted >> i & 1 else None for i, value in enumerate(given)]
        expected = penalties_ref(scores, counts, slots, *settings)
        penalised = penalties_triton(scores, counts, slots, *settings)
        assert torch.equal(penalised, expected)
        assert torch.equal(penalised[3], scores[3])
        assert torch.equal(penalised, scores) == (wanted == 0) or vocab_size == 1


def test_penalties_in_place(cut_rows):
    scores = torch.randn(2, 300)
    counts, slots = torch.randint(0, 9, (2, 300), dtype=torch.int32), torch.tensor([1, 0])
    expected = penalties_ref(scores, counts, slots, None, doubles(0.5, 0.7), None)
    view = cut_rows(scores)
    penalties_into_triton(view, counts, slots, view, frequency=doubles(0.5, 0.7))
    assert torch.equal(view, expected)


def test_counts_are_made_anew_and_go_on():
    vocab_size, guard = 600, 4096
    ids = torch.randint(-1, 40, (705,))
    ids[3] = vocab_size
    lengths = [300, 0, 405]
    starts = torch.tensor([0, 300, 300, 705])
    slots, prompt_lens = torch.tensor([2, 0, 4]), torch.tensor([300, 0, 7])
    buffer = torch.full((guard + 5 * vocab_size + guard,), 111, dtype=torch.int32)
    counts = buffer[guard:-guard].view(5, vocab_size)
    expected = counts.clone()
    reset_counts_ref(expected, slots, ids, starts, prompt_lens, max(lengths))
    reset_counts_triton(counts, slots, ids, starts, prompt_lens, max(lengths))
    assert torch.equal(counts, expected)
    # slots of other sequences stay; a prompt is marked, an output counted
    assert (counts[[1, 3]] == 111).all()
    assert counts[0].sum() == 0
    assert counts[2].max() == 1
    assert (counts[4] >> 1).sum() == (ids[307:] >= 0).sum()

    slots, tokens = torch.tensor([2, 2, 4, -1, 0, 0, 1]), torch.tensor([5, 5, 599, 3, -1, vocab_size, 0])
    count_tokens_ref(expected, slots, tokens)
    before = counts.clone()
    count_tokens_triton(counts, slots, tokens)
    assert torch.equal(counts, expected)
    assert (counts - before)[2, 5] == 4
    assert (counts - before).sum() == 8
    assert (buffer[:guard] == 111).all()
    assert (buffer[-guard:] == 111).all()


def test_a_slot_that_is_not_used_is_not_counted():
    counts = torch.full((2, 30), 9, dtype=torch.int32)
    starts, prompt_lens = torch.tensor([0, 3, 5]), torch.tensor([1, 1])
    reset_counts_triton(counts, torch.tensor([-1, 1]), torch.tensor([1, 2, 3, 4, 4]), starts, prompt_lens, 3)
    assert (counts[0] == 9).all()
    assert counts[1].tolist() == [0] * 4 + [3] + [0] * 25


def test_counts_of_one_step_at_a_time_are_those_of_the_whole():
    ids = torch.randint(0, 20, (50,))
    whole, stepped = torch.zeros(1, 20, dtype=torch.int32), torch.zeros(1, 20, dtype=torch.int32)
    one = torch.tensor([0])
    reset_counts_triton(whole, one, ids, torch.tensor([0, 50]), torch.tensor([30]), 50)
    reset_counts_triton(stepped, one, ids[:30], torch.tensor([0, 30]), torch.tensor([30]), 30)
    for token in ids[30:]:
        count_tokens_triton(stepped, one, token[None])
    assert torch.equal(stepped, whole)


# ---- log_probabilities ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def used_memory(monkeypatch):
    """The list of a sequence that ran before has better tokens than any."""

    def workspace(*arguments):
        work = select_workspace(*arguments)
        for tensor in work:
            tensor.fill_(0x7F000000)
        return work

    monkeypatch.setattr(log_probabilities, "select_workspace", workspace)


def compare(scores, token_ids, k):
    """The kernels' results, after comparing them with the definition's."""
    chosen, ranks, best, best_ids = log_probabilities_triton(scores, token_ids, k)
    expected = log_probabilities_ref(scores, token_ids, k)
    assert ranks.tolist() == expected[1].tolist()
    assert best_ids.tolist() == expected[3].tolist()
    for result, definition in ((chosen, expected[0]), (best, expected[2])):
        torch.testing.assert_close(result, definition, rtol=1e-6, atol=1e-5, equal_nan=True)
    return chosen, ranks, best, best_ids


@pytest.mark.parametrize(("vocab_size", "k"), [(1, 1), (7, 0), (7, 7), (1000, 1), (CHUNK + 1, 20), (600, 128)])
def test_log_probabilities_match_the_definition(vocab_size, k, cut_rows):
    scores = 4 * torch.randn(4, vocab_size)
    scores[1] = scores[1].round()
    scores[2] = 100 * scores[2]
    scores[3, torch.rand(vocab_size) < 0.7] = -INF
    # one token at least
    scores[3, -1] = 1.0
    token_ids = torch.tensor([vocab_size - 1, 0, scores[2].argmax(), -1])
    chosen, ranks, best, best_ids = compare(cut_rows(scores), token_ids, k)
    assert ranks[2] == 1
    assert math.isnan(chosen[3])
    if k:
        assert best_ids[2, 0] == token_ids[2]
        assert best[2, 0] == chosen[2]


def test_bad_rows_have_no_log_probabilities():
    scores = torch.randn(4, 40)
    scores[0, 3], scores[1, 39], scores[2] = math.nan, INF, -INF
    chosen, ranks, best, best_ids = compare(scores, torch.tensor([1, 1, 1, 1]), 3)
    assert chosen.isnan().tolist() == [True, True, True, False]
    assert best.isnan().all(dim=1).tolist() == [True, True, True, False]
    assert ranks[:3].tolist() == [-1, -1, -1]
    assert (best_ids[:3] == -1).all()


def test_fewer_tokens_than_k_weigh_anything():
    scores = torch.full((1, 500), -200.0)
    scores[0, 100], scores[0, 400] = 3.0, 2.0
    best_ids = compare(scores, torch.tensor([7]), 5)[3]
    assert best_ids.tolist() == [[100, 400, 0, 1, 2]]


def test_more_ties_than_a_list_holds():
    scores = torch.zeros(1, MAX_LIST + 100)
    scores[0, 5000:] = 1.0
    scores[0, :4900] = 1.0
    best_ids = compare(scores, torch.tensor([4950]), 3)[3]
    assert best_ids.tolist() == [[0, 1, 2]]


def test_an_excluded_token_and_one_outside_the_vocabulary():
    scores = torch.randn(3, 30)
    scores[0, 4] = -INF
    chosen, ranks, _, _ = compare(scores, torch.tensor([4, 30, 2**40]), 0)
    assert chosen[0] == -INF
    assert ranks.tolist() == [30, -1, -1]


def test_no_rows():
    none, ids = torch.ones(0, 7), torch.ones(0, dtype=torch.int64)
    assert [t.shape for t in log_probabilities_triton(none, ids, 3)] == [(0,), (0,), (0, 3), (0, 3)]
    assert uniforms_triton(ids, ids, ids, ids).shape == (0,)
    assert penalties_triton(none, torch.ones(2, 7, dtype=torch.int32), ids, None, None, None).shape == (0, 7)
