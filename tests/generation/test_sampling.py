import math

import pytest
import torch

from gpt2rt.errors import NumericsError, RequestError
from gpt2rt.generation.random import uniform
from gpt2rt.generation.sampling import check_logits, check_scores, greedy, sample


def test_greedy_takes_the_lowest_id_of_equals():
    assert greedy(torch.tensor([[1.0, 5.0, 5.0, 0.0], [2.0, 2.0, 2.0, 2.0]])) == [1, 0]


def test_sample_inverts_the_cumulative_distribution_in_vocabulary_order():
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    for number, token in [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.6001, 3), (1 - 2**-53, 3)]:
        assert sample(scores, [number]) == [token], number


def test_sample_never_takes_an_excluded_token():
    scores = torch.tensor([[-math.inf, 1.0, -math.inf, 1.0, -math.inf]])
    drawn = {sample(scores, [number])[0] for number in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53)}
    assert drawn == {1, 3}


def test_sample_follows_the_distribution():
    generator = torch.Generator().manual_seed(4)
    scores = 2 * torch.randn(1, 40, generator=generator)
    scores[0, ::7] = -math.inf
    draws = 20000
    counts = torch.zeros(40)
    for position in range(draws):
        counts[sample(scores, [uniform(5, 6, 7, position)])[0]] += 1
    expected = torch.softmax(scores[0], dim=-1) * draws
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    # mean = degrees of freedom, variance = twice that; five deviations either way
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocab_size", [5, 97, 50257])
def test_a_row_is_drawn_as_if_alone(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    scores = 5 * torch.randn(6, vocab_size, generator=generator)
    scores[2, 3:] = -math.inf
    numbers = [uniform(0, 0, 0, row) for row in range(6)]
    together = sample(scores, numbers)
    assert together == [sample(scores[row : row + 1].clone(), [numbers[row]])[0] for row in range(6)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_logits_name_their_row(bad):
    logits = torch.zeros(3, 7)
    logits[1, 4] = bad
    with pytest.raises(NumericsError, match=r"row 12: 1 of 7 logits"):
        check_logits(logits, [10, 12, 14])
    check_logits(logits[::2], [10, 14])


def test_large_finite_logits_are_fine():
    check_logits(torch.full((1, 9), 3e38), [0])


def test_scores_need_a_token():
    scores = torch.zeros(2, 3)
    scores[1] = -math.inf
    with pytest.raises(RequestError, match="row 8: every token is excluded"):
        check_scores(scores, [7, 8])
    scores[1, 0] = math.nan
    with pytest.raises(NumericsError, match="row 8"):
        check_scores(scores, [7, 8])
