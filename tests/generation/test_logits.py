"""Processors and warpers against transformers' own."""

import pytest
import torch

from gpt2rt.errors import RequestError
from gpt2rt.generation import GenerationConfig
from gpt2rt.generation import logits as ours
from gpt2rt.generation.logits import LogitsProcessor, LogitsProcessorList, build_processors, largest

CASES = {
    "temperature": ("TemperatureLogitsWarper", (0.7,)),
    "top_k 1": ("TopKLogitsWarper", (1,)),
    "top_k 7": ("TopKLogitsWarper", (7,)),
    "top_k all": ("TopKLogitsWarper", (10**6,)),
    "top_p 0.1": ("TopPLogitsWarper", (0.1,)),
    "top_p 0.9": ("TopPLogitsWarper", (0.9,)),
    "top_p 0.99": ("TopPLogitsWarper", (0.99,)),
    "min_p": ("MinPLogitsWarper", (0.1,)),
    "repetition": ("RepetitionPenaltyLogitsProcessor", (1.3,)),
    "repetition < 1": ("RepetitionPenaltyLogitsProcessor", (0.5,)),
    "ngram 1": ("NoRepeatNGramLogitsProcessor", (1,)),
    "ngram 2": ("NoRepeatNGramLogitsProcessor", (2,)),
    "ngram 3": ("NoRepeatNGramLogitsProcessor", (3,)),
    "ngram longer than text": ("NoRepeatNGramLogitsProcessor", (99,)),
    "bad words": ("NoBadWordsLogitsProcessor", ([[3], [1, 4], [5, 6, 7], [2]], 2)),
    "min length reached": ("MinLengthLogitsProcessor", (5, [2, 3])),
    "min length": ("MinLengthLogitsProcessor", (50, [2, 3])),
    "min new tokens": ("MinNewTokensLengthLogitsProcessor", (5, 50, 2)),
    "suppress": ("SuppressTokensLogitsProcessor", ([1, 5, 9],)),
    "begin suppress, now": ("SuppressTokensAtBeginLogitsProcessor", ([1, 5], 20)),
    "begin suppress, later": ("SuppressTokensAtBeginLogitsProcessor", ([1, 5], 21)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("vocab_size", [11, 5003])
def test_matches_transformers(name, vocab_size, hf):
    class_name, arguments = CASES[name]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (5, 20), generator=generator)
    scores = 4 * torch.randn(5, vocab_size, generator=generator)
    reference = getattr(hf.module, class_name)(*arguments)(ids, scores.clone())
    before = scores.clone()
    result = getattr(ours, class_name)(*arguments)(ids, scores)
    torch.testing.assert_close(result, reference, rtol=0, atol=0)
    assert torch.equal(scores, before), "the scores given must not be changed"


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_computed_as_if_alone(name):
    class_name, arguments = CASES[name]
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 11, (5, 20), generator=generator)
    scores = 4 * torch.randn(5, 5003, generator=generator)
    processor = getattr(ours, class_name)(*arguments)
    together = processor(ids, scores)
    for row in range(5):
        assert torch.equal(processor(ids[row : row + 1], scores[row : row + 1])[0], together[row])


@pytest.mark.parametrize(
    "processor",
    [
        ours.RepetitionPenaltyLogitsProcessor(1.5),
        ours.NoRepeatNGramLogitsProcessor(2),
        ours.NoBadWordsLogitsProcessor([[1, 2], [0, 1]]),
    ],
)
def test_padding_is_no_token(processor):
    text = torch.tensor([[4, 1, 5, 4, 1]])
    padded = torch.cat([torch.full((1, 3), -1), text], dim=1)
    scores = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(processor(padded, scores), processor(text, scores))


def test_top_k_and_top_p_keep_ties():
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    ids = torch.zeros((1, 1), dtype=torch.int64)
    assert (ours.TopKLogitsWarper(2)(ids, scores) > -torch.inf).tolist() == [[False, True, True, True, False]]
    assert (ours.TopPLogitsWarper(0.4)(ids, scores) > -torch.inf).tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("top_p", [0.5, 0.9999, 0.999999])
def test_top_p_keeps_the_fewest_tokens(top_p):
    # transformers sums in float32 and is off by some tokens here
    scores = 4 * torch.randn(3, 5003, generator=torch.Generator().manual_seed(5))
    kept = ours.TopPLogitsWarper(top_p)(torch.zeros((3, 1), dtype=torch.int64), scores) > -torch.inf
    for row in range(3):
        probabilities = torch.softmax(scores[row], dim=-1).double()
        assert kept[row].any()
        assert probabilities[kept[row]].sum() >= top_p
        assert probabilities[kept[row]].sum() - probabilities[kept[row]].min() < top_p
        assert probabilities[kept[row]].min() > probabilities[~kept[row]].max()


def test_tiny_temperature_is_greedy_and_finite():
    scores = torch.tensor([[1.0, 3.0, 2.999, -50.0]])
    ids = torch.zeros((1, 1), dtype=torch.int64)
    for temperature in (1e-6, 1e-30, 1e-300):
        result = ours.TemperatureLogitsWarper(temperature)(ids, scores)
        probabilities = torch.softmax(result, dim=-1)
        assert torch.equal(probabilities, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("n", [7, 5003, 50257])
@pytest.mark.parametrize("count", [1, 5, 7])
def test_largest_is_topk(n, count):
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(3, n, generator=generator)
    # many equal values, and a row where almost all are excluded
    values[1] = values[1].round()
    values[2, 7:] = -torch.inf
    assert torch.equal(largest(values, count), torch.topk(values, count).values)


def test_order_is_transformers(hf):
    config = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[5, 6], [7]],
        "min_new_tokens": 4,
        "suppress_tokens": [8],
        "begin_suppress_tokens": [9],
        "eos_token_id": 2,
    }
    processors, warpers = build_processors(GenerationConfig(**config), 5, [2])
    names = [type(p).__name__ for p in [*processors, *warpers]]
    theirs = hf.module.GenerationConfig(**config)
    theirs._eos_token_tensor = torch.tensor([2])
    model = hf.module.GPT2LMHeadModel(hf.module.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20))
    reference = [type(p).__name__ for p in model._get_logits_processor(theirs, input_ids_seq_length=5)]
    # min_length and min_new_tokens are one rule here
    assert names == [name.replace("MinNewTokensLength", "MinLength") for name in reference]


def test_lists_work_both_ways(hf):
    ids = torch.tensor([[1, 2, 3]])
    scores = torch.randn(1, 10, generator=torch.Generator().manual_seed(3))
    mixed = [ours.TemperatureLogitsWarper(0.5), hf.module.TopKLogitsWarper(3)]
    expected = hf.module.LogitsProcessorList(mixed)(ids, scores)
    assert torch.equal(LogitsProcessorList(mixed)(ids, scores), expected)


def test_list_passes_further_arguments():
    class NeedsMore(LogitsProcessor):
        def __call__(self, input_ids, scores, offset):
            return scores + offset

    scores = torch.zeros(1, 2)
    assert LogitsProcessorList([NeedsMore()])(None, scores, offset=2.0).tolist() == [[2.0, 2.0]]
    with pytest.raises(RequestError, match="offset"):
        LogitsProcessorList([NeedsMore()])(None, scores, other=1)


def test_nothing_is_built_for_neutral_settings():
    config = GenerationConfig(do_sample=True, top_k=0, suppress_tokens=[], min_length=9)
    assert build_processors(config, 5, []) == ([], [])
