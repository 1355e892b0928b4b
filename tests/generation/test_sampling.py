import math

import pytest
import scipy.stats
import torch

from gpt2rt.errors import NumericsError, RequestError
from gpt2rt.generation import GenerationConfig
from gpt2rt.generation.logits import build_processors
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


# ---- the distribution that is drawn from, against transformers ------------------------------------------------------

WARPED = {
    "plain": {"top_k": 0},
    "default": {},
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top_k": {"top_k": 6},
    "top_p": {"top_p": 0.8, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_k": 0},
    "top_h": {"top_h": 0.6, "top_k": 0},
    "typical_p": {"typical_p": 0.6, "top_k": 0},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02, "top_k": 0},
    "eta_cutoff": {"eta_cutoff": 0.3, "top_k": 0},
    "several": {
        "temperature": 1.3,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "typical_p": 0.95,
        "renormalize_logits": True,
    },
    "with processors": {"repetition_penalty": 1.4, "bad_words_ids": [[7]], "sequence_bias": [[[6], 1.0]], "top_k": 12},
}


def chi_square(counts, probabilities):
    """The p-value of counts [n] under probabilities [n]; tokens that are expected less than 5 times count as one."""
    expected = probabilities.double() * counts.sum()
    assert counts[probabilities == 0].sum() == 0, "a token was drawn that should have been excluded"
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    observed, expected = observed[keep].double(), expected[keep]
    assert observed.numel() > 1
    return float(scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


@pytest.mark.proves("G4")
@pytest.mark.parametrize("name", WARPED)
def test_sampler_follows_the_scores_that_transformers_warps(name, hf):
    generator = torch.Generator().manual_seed(7)
    logits = 2.5 * torch.randn(1, 60, generator=generator)
    ids = torch.tensor([[3, 6, 9, 6]])
    settings = {"do_sample": True, **WARPED[name]}
    model = hf.module.GPT2LMHeadModel(hf.module.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=60))
    theirs = hf.module.GenerationConfig(**{"num_beams": 1, "top_k": 50, **settings})
    theirs._eos_token_tensor = None
    probabilities = torch.softmax(model._get_logits_processor(theirs, 4)(ids, logits), dim=-1)[0]
    processors, warpers = build_processors(GenerationConfig(**settings), 4, [])
    scores = warpers(ids, processors(ids, logits))
    draws = sample(scores.expand(6000, -1), [uniform(11, 0, choice, 4) for choice in range(6000)])
    counts = torch.bincount(torch.tensor(draws), minlength=60)
    # the numbers drawn are fixed by the seed, so this is no matter of luck
    assert chi_square(counts, probabilities) > 0.01


@pytest.mark.proves("G4")
@pytest.mark.parametrize("name", ["default", "several"])
def test_generate_draws_from_the_distribution_of_transformers(name, model, hf):
    ids = torch.tensor([[5, 6, 7, 9]])
    theirs = hf.copy_of(model)
    settings = {"do_sample": True, "max_new_tokens": 1, **WARPED[name]}
    reference = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **{"top_k": 50, **settings},
    )
    probabilities = torch.softmax(reference.scores[0][0], dim=-1)
    drawn = torch.cat([model.generate(ids, num_return_sequences=1000, seed=seed, **settings) for seed in range(5)])
    counts = torch.bincount(drawn[:, 4], minlength=97)
    assert chi_square(counts, probabilities) > 0.01


def test_the_chi_square_test_notices_a_wrong_distribution():
    """A temperature of 0.85 instead of 1 over 6000 draws is noticed."""
    scores = 2.5 * torch.randn(1, 60, generator=torch.Generator().manual_seed(7))
    draws = sample((scores / 0.85).expand(6000, -1), [uniform(11, 0, choice, 4) for choice in range(6000)])
    counts = torch.bincount(torch.tensor(draws), minlength=60)
    assert chi_square(counts, torch.softmax(scores, dim=-1)[0]) < 0.001
