"""Processors and warpers against transformers' own."""

import pytest
import torch

from gpt2rt.errors import RequestError
from gpt2rt.generation import GenerationConfig
from gpt2rt.generation import logits as ours
from gpt2rt.generation.logits import LogitsProcessor, LogitsProcessorList, build_processors
from gpt2rt.generation.warpers import largest

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
    "top_h 0.3": ("TopHLogitsWarper", (0.3,)),
    "top_h 0.9": ("TopHLogitsWarper", (0.9,)),
    "typical 0.2": ("TypicalLogitsWarper", (0.2,)),
    "typical 0.9, at least 3": ("TypicalLogitsWarper", (0.9, -9.0, 3)),
    "epsilon": ("EpsilonLogitsWarper", (0.01,)),
    "epsilon above all, at least 4": ("EpsilonLogitsWarper", (0.9999, -9.0, 4)),
    "eta": ("EtaLogitsWarper", (0.3,)),
    "eta, at least 4": ("EtaLogitsWarper", (0.9, -9.0, 4)),
    "normalization": ("LogitNormalization", ()),
    "bias, list": ("SequenceBiasLogitsProcessor", ([[[3], 1.5], [[1, 4], -2.0], [[5, 6, 4], 0.5], [[6, 4], 7.0]],)),
    "bias, dict": ("SequenceBiasLogitsProcessor", ({(3,): 1.5, (2, 4): -2.0, (9, 4): float("-inf")},)),
    "forced bos, later": ("ForcedBOSTokenLogitsProcessor", (5,)),
    "forced eos, now": ("ForcedEOSTokenLogitsProcessor", (21, [5, 7])),
    "forced eos, later": ("ForcedEOSTokenLogitsProcessor", (22, 5)),
    "decay": ("ExponentialDecayLengthPenalty", ((3, 1.1), [2, 3], 12)),
    "decay, later": ("ExponentialDecayLengthPenalty", ((8, 1.1), 2, 12)),
    "repetition, ignored prompt": ("RepetitionPenaltyLogitsProcessor", (1.3, 15)),
    "min new tokens reached": ("MinNewTokensLengthLogitsProcessor", (5, 15, 2)),
}


@pytest.mark.proves("G3")
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


PROMPTS = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(9))

PROMPT_CASES = {
    "encoder repetition": ("EncoderRepetitionPenaltyLogitsProcessor", (1.5, PROMPTS)),
    "encoder repetition < 1": ("EncoderRepetitionPenaltyLogitsProcessor", (0.5, PROMPTS)),
    "encoder ngram 1": ("EncoderNoRepeatNGramLogitsProcessor", (1, PROMPTS)),
    "encoder ngram 2": ("EncoderNoRepeatNGramLogitsProcessor", (2, PROMPTS)),
    "encoder ngram 3": ("EncoderNoRepeatNGramLogitsProcessor", (3, PROMPTS)),
    "repetition by row": ("RepetitionPenaltyLogitsProcessor", (1.3, torch.tensor([0, 3, 5, 12, 19, 20]))),
    "prefix": ("PrefixConstrainedLogitsProcessor", (lambda batch, ids: [batch, int(ids[-1])], 2)),
}


@pytest.mark.proves("G3")
@pytest.mark.parametrize("name", PROMPT_CASES)
def test_processors_that_know_their_rows_match_transformers(name, hf):
    class_name, arguments = PROMPT_CASES[name]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (6, 20), generator=generator)
    scores = 4 * torch.randn(6, 13, generator=generator)
    # in every row a bigram of its prompt is about to be repeated
    ids[:, -2:] = PROMPTS.repeat_interleave(3, dim=0)[:, 3:5]
    reference = getattr(hf.module, class_name)(*arguments)(ids, scores.clone())
    result = getattr(ours, class_name)(*arguments)(ids, scores.clone())
    torch.testing.assert_close(result, reference, rtol=0, atol=0)
    assert not torch.equal(result, scores)


def test_forced_bos_matches_transformers(hf):
    ids, scores = torch.tensor([[4], [5]]), torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    reference = hf.module.ForcedBOSTokenLogitsProcessor(3)(ids, scores)
    assert torch.equal(ours.ForcedBOSTokenLogitsProcessor(3)(ids, scores), reference)
    assert torch.isfinite(reference).sum() == 2


def test_invalid_values_match_transformers(hf):
    scores = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf, -3.0]])
    ids = torch.zeros((1, 1), dtype=torch.int64)
    reference = hf.module.InfNanRemoveLogitsProcessor()(ids, scores)
    assert torch.equal(ours.InfNanRemoveLogitsProcessor()(ids, scores), reference)
    assert reference.isfinite().all()


@pytest.mark.proves("G3")
@pytest.mark.parametrize("seed", range(40))
def test_random_warpers_match_transformers(seed, hf):
    """Random thresholds on scores of every sharpness, some of them excluded before."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return float(torch.rand((), generator=generator))

    vocab_size = 20 + int(400 * draw())
    scores = (0.1 + 8 * draw()) * torch.randn(3, vocab_size, generator=generator)
    scores[torch.rand(scores.shape, generator=generator) < 0.3 * draw()] = -torch.inf
    ids = torch.randint(0, vocab_size, (3, 6), generator=generator)
    least = 1 + int(4 * draw())
    cases = [
        ("TopHLogitsWarper", (0.01 + 0.98 * draw(),)),
        ("TypicalLogitsWarper", (0.01 + 0.98 * draw(), -torch.inf, least)),
        ("EpsilonLogitsWarper", (0.2 * draw() + 1e-6, -torch.inf, least)),
        ("EtaLogitsWarper", (0.5 * draw() + 1e-6, -torch.inf, least)),
        ("MinPLogitsWarper", (draw(), -torch.inf, least)),
        ("TopKLogitsWarper", (1 + int(30 * draw()), -torch.inf, least)),
    ]
    for name, arguments in cases:
        reference = getattr(hf.module, name)(*arguments)(ids, scores.clone())
        result = getattr(ours, name)(*arguments)(ids, scores)
        assert torch.equal(result, reference), name


@pytest.mark.proves("G3")
@pytest.mark.parametrize("seed", range(40))
def test_random_histories_match_transformers(seed, hf):
    """Few different tokens, so that everything repeats."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    vocab_size = int(integers(3, 12))
    prompt_length, length = int(integers(1, 8)), int(integers(8, 16))
    ids = integers(0, vocab_size, 4, length)
    prompts = ids[::2, :prompt_length]
    scores = 3 * torch.randn(4, vocab_size, generator=generator)
    scores[integers(0, 6, 4, vocab_size) == 0] = -torch.inf
    sequences = [integers(0, vocab_size, int(integers(1, 4))).tolist() for _ in range(12)]
    unique = [list(key) for key in dict.fromkeys(map(tuple, sequences))]
    penalty = 0.3 + 2 * float(torch.rand((), generator=generator))
    cases = [
        ("RepetitionPenaltyLogitsProcessor", (penalty,)),
        ("RepetitionPenaltyLogitsProcessor", (penalty, integers(0, length, 4))),
        ("EncoderRepetitionPenaltyLogitsProcessor", (penalty, prompts)),
        ("NoRepeatNGramLogitsProcessor", (int(integers(1, 5)),)),
        ("EncoderNoRepeatNGramLogitsProcessor", (int(integers(1, 5)), prompts)),
        ("SequenceBiasLogitsProcessor", ([[ids, float(place) - 5] for place, ids in enumerate(unique)],)),
        ("NoBadWordsLogitsProcessor", (sequences, [0, 1])),
        ("ExponentialDecayLengthPenalty", ((int(integers(0, 6)), penalty), [0, 1], prompt_length)),
    ]
    for name, arguments in cases:
        reference = getattr(hf.module, name)(*arguments)(ids, scores.clone())
        result = getattr(ours, name)(*arguments)(ids, scores)
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("TopHLogitsWarper", (0,)),
        ("TopHLogitsWarper", (1.1,)),
        ("TypicalLogitsWarper", (1.0,)),
        ("TypicalLogitsWarper", (0.5, -1.0, 0)),
        ("EpsilonLogitsWarper", (0,)),
        ("EtaLogitsWarper", (1,)),
        ("EncoderRepetitionPenaltyLogitsProcessor", (0, PROMPTS)),
        ("EncoderNoRepeatNGramLogitsProcessor", (0, PROMPTS)),
        ("SequenceBiasLogitsProcessor", ([],)),
        ("SequenceBiasLogitsProcessor", ({5: 1.0},)),
        ("SequenceBiasLogitsProcessor", ([[[5], float("nan")]],)),
        ("RepetitionPenaltyLogitsProcessor", (1.2, -1)),
        ("MinNewTokensLengthLogitsProcessor", (-1, 2, 3)),
        ("ForcedEOSTokenLogitsProcessor", (5, [-1])),
        ("PrefixConstrainedLogitsProcessor", ([5], 1)),
    ],
)
def test_wrong_arguments_are_refused(name, arguments):
    with pytest.raises(RequestError, match=r"must|expected"):
        getattr(ours, name)(*arguments)


@pytest.mark.proves("fault:F40")
def test_what_an_allowing_function_may_return():
    ids, scores = torch.tensor([[1, 2], [3, 4]]), torch.zeros(2, 9)
    for answer, message in ([], "no token for batch ID 0"), ([9], "returned 9"), ([-1], "returned -1"):
        with pytest.raises(RequestError, match=message):
            ours.PrefixConstrainedLogitsProcessor(lambda batch, text, answer=answer: answer, 1)(ids, scores)


def test_a_list_tells_which_rows_are_left():
    seen = []

    def allow(batch_id, ids):
        seen.append((batch_id, ids.tolist()))
        return [0]

    processors = LogitsProcessorList(
        [
            ours.PrefixConstrainedLogitsProcessor(allow, 2, pad_token_id=7),
            ours.ForcedEOSTokenLogitsProcessor([9] * 5 + [3], 4),
        ]
    )
    scores = processors(torch.tensor([[-1, 2], [3, 4]]), torch.zeros(2, 6), rows=[1, 5])
    assert seen == [(0, [7, 2]), (2, [3, 4])]
    assert scores.isfinite().tolist() == [[True, *[False] * 5], [False] * 4 + [True, False]]


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
        ours.SequenceBiasLogitsProcessor([[[1, 2], 3.0], [[4, 1, 2], 5.0]]),
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
        # in float64: a float32 softmax is itself off by more than the last token's share
        probabilities = torch.softmax(scores[row].double(), dim=-1)
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


EVERYTHING = {
    "do_sample": True,
    "temperature": 0.8,
    "top_h": 0.9,
    "top_k": 9,
    "top_p": 0.9,
    "min_p": 0.02,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "guidance_scale": 1.5,
    "sequence_bias": [[[3], 1.0]],
    "encoder_repetition_penalty": 1.1,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[5, 6], [7]],
    "min_new_tokens": 4,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (3, 1.1),
    "suppress_tokens": [8],
    "begin_suppress_tokens": [9],
    "renormalize_logits": True,
    "eos_token_id": 2,
    "max_length": 20,
}


@pytest.mark.proves("G3")
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("eos", [[2], [2, 3, 4]])
def test_order_is_transformers(hf, num_beams, do_sample, eos):
    config = {**EVERYTHING, "num_beams": num_beams, "do_sample": do_sample, "eos_token_id": eos}
    guidance = ours.LogitsProcessor()
    processors, warpers = build_processors(
        GenerationConfig(**config), 5, eos, prefix_allowed_tokens_fn=lambda batch, ids: [1], guidance=guidance
    )
    assert processors[0] is guidance
    names = [type(p).__name__ for p in [*processors, *warpers]]
    theirs = hf.module.GenerationConfig(**config)
    theirs._eos_token_tensor = torch.tensor(eos)
    model = hf.module.GPT2LMHeadModel(hf.module.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20))
    reference = model._get_logits_processor(
        theirs,
        input_ids_seq_length=5,
        encoder_input_ids=torch.tensor([[1, 2, 3, 4, 5]]),
        prefix_allowed_tokens_fn=lambda batch, ids: [1],
    )
    # min_length and min_new_tokens are one rule here
    expected = [type(p).__name__.replace("MinNewTokensLength", "MinLength") for p in reference]
    assert names == ["LogitsProcessor", *expected[1:]]
    least = {type(p).__name__: getattr(p, "min_tokens_to_keep", None) for p in warpers}
    assert least == {type(p).__name__: getattr(p, "min_tokens_to_keep", None) for p in reference[len(processors) :]}


@pytest.mark.proves("G3")
@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("seed", range(4))
def test_everything_together_matches_transformers(hf, columns, seed):
    """The whole chain, at the beginning, in the middle and at the last place of a row."""
    settings = {name: value for name, value in EVERYTHING.items() if name != "guidance_scale"} | {"num_beams": 1}

    def allow(batch, ids):
        return list(range(1, 18))

    model = hf.module.GPT2LMHeadModel(hf.module.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20))
    theirs = hf.module.GenerationConfig(**settings)
    theirs._eos_token_tensor = torch.tensor([2])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (3, 20), generator=generator)
    reference = model._get_logits_processor(
        theirs, columns, encoder_input_ids=ids[:, :columns], prefix_allowed_tokens_fn=allow
    )
    processors, warpers = build_processors(
        GenerationConfig(**settings), columns, [2], prefix_allowed_tokens_fn=allow, max_length=20
    )
    for length in range(columns, 20):
        scores = 3 * torch.randn(3, 20, generator=generator)
        result = warpers(ids[:, :length], processors(ids[:, :length], scores))
        # top_p sums in another order
        torch.testing.assert_close(result, reference(ids[:, :length], scores), rtol=1e-6, atol=1e-6)


def test_a_callers_processor_takes_the_place_of_ours(hf):
    config = GenerationConfig(repetition_penalty=1.2, suppress_tokens=[3])
    for own in ours.RepetitionPenaltyLogitsProcessor(1.5), hf.module.RepetitionPenaltyLogitsProcessor(1.5):
        with pytest.warns(UserWarning, match="RepetitionPenaltyLogitsProcessor"):
            processors, _ = build_processors(config, 5, [2], user_processors=[own])
        assert [type(p).__name__ for p in processors] == ["SuppressTokensLogitsProcessor"]


def test_settings_that_cannot_work():
    with pytest.raises(RequestError, match="set eos_token_id"):
        build_processors(GenerationConfig(exponential_decay_length_penalty=(1, 1.1)), 5, [])
    with pytest.warns(UserWarning, match="do nothing here"):
        build_processors(GenerationConfig(encoder_repetition_penalty=1.1), 0, [2])


def test_lists_work_both_ways(hf):
    ids = torch.tensor([[1, 2, 3]])
    scores = torch.randn(1, 10, generator=torch.Generator().manual_seed(3))
    mixed = [ours.TemperatureLogitsWarper(0.5), hf.module.TopKLogitsWarper(3), ours.ForcedEOSTokenLogitsProcessor(9, 2)]
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
