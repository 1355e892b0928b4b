"""Every setting that changes scores, in ``generate``, against transformers' generate."""

import pytest
import torch

from gpt2rt.errors import NumericsError, RequestError
from gpt2rt.generation import GenerationConfig, stopping
from gpt2rt.generation import logits as ours


def allow_some(batch_id, input_ids):
    return [(int(input_ids[-1]) + step) % 97 for step in (1, 5, 8)] + [batch_id, 2]


SETTINGS = {
    "sequence_bias": {"sequence_bias": [[[11], 6.0], [[11, 12], 30.0], [[5], -4.0]]},
    "sequence_bias as dict": {"sequence_bias": {(11,): 6.0, (11, 12): 30.0}},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "encoder_repetition_penalty < 1": {"encoder_repetition_penalty": 0.2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[7], [20, 21], [5, 6, 7]]},
    "min_length": {"min_length": 12, "eos_token_id": list(range(2, 60))},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": list(range(2, 60))},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allow_some},
    "forced_eos_token_id": {"forced_eos_token_id": [9, 10]},
    "remove_invalid_values": {"remove_invalid_values": True, "suppress_tokens": [7]},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": [2, 30]},
    "suppress_tokens": {"suppress_tokens": [7, 8, 9, 10]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(50))},
    "renormalize_logits": {"renormalize_logits": True, "bad_words_ids": [[7]]},
    "guidance_scale": {"guidance_scale": 1.7},
    "guidance_scale < 1": {"guidance_scale": 0.3},
    "all": {
        "sequence_bias": [[[11], 2.0]],
        "encoder_repetition_penalty": 1.4,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 3,
        "bad_words_ids": [[7], [20, 21]],
        "min_new_tokens": 3,
        "exponential_decay_length_penalty": (4, 1.1),
        "forced_eos_token_id": 2,
        "suppress_tokens": [9],
        "begin_suppress_tokens": [50],
        "renormalize_logits": True,
        "guidance_scale": 1.3,
    },
}

PROMPTS = torch.tensor([[5, 6, 7, 5, 6], [40, 41, 5, 6, 20]])


@pytest.fixture(scope="module")
def theirs(model, hf):
    return hf.copy_of(model)


def generate(model, ids, **settings):
    settings = {
        "max_new_tokens": 9,
        "return_dict_in_generate": True,
        "output_scores": True,
        "pad_token_id": 0,
        **settings,
    }
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, **settings)


@pytest.mark.proves("G3", "G4")
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_matches_transformers(name, model, theirs):
    expected = generate(theirs, PROMPTS, **SETTINGS[name])
    result = generate(model, PROMPTS, **SETTINGS[name])
    assert result.sequences.tolist() == expected.sequences.tolist()
    ended = torch.zeros(2, dtype=torch.bool)
    ends = torch.tensor(SETTINGS[name].get("eos_token_id", 2)).reshape(-1)
    for step, (scores, reference) in enumerate(zip(result.scores, expected.scores, strict=True)):
        torch.testing.assert_close(scores[~ended], reference[~ended], rtol=2e-5, atol=2e-5)
        ended |= torch.isin(result.sequences[:, PROMPTS.size(1) + step], ends)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_setting_matters(name, model):
    """Without it the test above would prove nothing."""
    without = {key: value for key, value in SETTINGS[name].items() if key == "eos_token_id"}
    with_it, plain = generate(model, PROMPTS, **SETTINGS[name]), generate(model, PROMPTS, **without)
    same = with_it.sequences.tolist() == plain.sequences.tolist()
    same_scores = same and all(torch.equal(a, b) for a, b in zip(with_it.scores, plain.scores, strict=True))
    assert not same_scores


@pytest.mark.proves("G3")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_padded_batch_gives_what_each_prompt_gives_alone(name, model):
    """Padding counts for nothing, and rows that end early do not disturb the others."""
    settings = dict(SETTINGS[name])
    if name == "prefix_allowed_tokens_fn":
        settings["prefix_allowed_tokens_fn"] = lambda batch_id, ids: allow_some(0, ids[ids != 0])
    if name == "min_length":
        # counts columns, as in transformers
        settings["min_length"] = 0
    prompts = [[5, 6, 7, 5, 6], [40, 41, 5], [33], [60, 5, 6, 7]]
    alone = [model.generate([prompt], max_new_tokens=9, **settings)[0, len(prompt) :].tolist() for prompt in prompts]
    for side in "left", "right":
        longest = max(len(prompt) for prompt in prompts)
        pads = [[0] * (longest - len(prompt)) for prompt in prompts]
        rows = [pad + prompt if side == "left" else prompt + pad for pad, prompt in zip(pads, prompts, strict=True)]
        ones = [[1] * len(prompt) for prompt in prompts]
        mask = [pad + one if side == "left" else one + pad for pad, one in zip(pads, ones, strict=True)]
        together = model.generate(torch.tensor(rows), attention_mask=torch.tensor(mask), max_new_tokens=9, **settings)
        for row, expected in zip(together[:, longest:].tolist(), alone, strict=True):
            assert row == expected + [0] * (len(row) - len(expected))


# transformers lets the unconditional branch of a beam go on with the past of another beam
BEAM_SETTINGS = [name for name in SETTINGS if not name.startswith(("guidance", "all"))]


@pytest.mark.proves("G3")
@pytest.mark.parametrize("name", BEAM_SETTINGS)
def test_beams_match_transformers(name, model, theirs):
    settings = {**SETTINGS[name], "num_beams": 3, "num_return_sequences": 2}
    if name == "prefix_allowed_tokens_fn":
        # batch_id is the number of the prompt, whatever beam asks
        settings["prefix_allowed_tokens_fn"] = lambda batch_id, ids: allow_some(20 + batch_id, ids)
    expected, result = generate(theirs, PROMPTS, **settings), generate(model, PROMPTS, **settings)
    assert result.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(result.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_candidates_change_nothing(name, do_sample, model):
    """Processors see candidates of assisted decoding as if they were there, in whatever order they are looked at."""
    settings = {**SETTINGS[name], "do_sample": do_sample, "seed": 5, "max_new_tokens": 14}
    if not do_sample:
        del settings["seed"]
    prompts = [[5, 6, 7, 5, 6, 7, 5], [40, 41, 40, 41]]
    plain = model.generate(prompts, **settings)
    assert torch.equal(model.generate(prompts, prompt_lookup_num_tokens=4, **settings), plain)
    assert torch.equal(model.generate(prompts, assistant_early_exit=1, **settings), plain)


def test_forced_bos_after_one_token(model, theirs):
    ids = torch.tensor([[5], [40]])
    settings = {"forced_bos_token_id": 33, "begin_suppress_tokens": [50]}
    result = generate(model, ids, **settings).sequences
    assert result[:, 1].tolist() == [33, 33]
    assert torch.equal(result, generate(theirs, ids, **settings).sequences)


def test_forced_eos_at_the_end_of_each_row(model):
    """Rows that the model's positions cut short end with the forced token too."""
    prompts = [[5] * 45, [6] * 3]
    with pytest.warns(UserWarning, match="room for 4"):
        result = model.generate(prompts, max_new_tokens=10, forced_eos_token_id=33, eos_token_id=33, pad_token_id=0)
    # position 47 is the last, and the token after it needs none
    assert result[0, 45:].tolist() == [*result[0, 45:48].tolist(), 33, *[0] * 6]
    assert result[1, -1] == 33


def test_prefix_function_sees_the_callers_rows(model):
    seen = []

    def allow(batch_id, ids):
        seen.append((batch_id, ids.tolist()))
        # row 1 ends first
        return [2] if batch_id == 1 else [8]

    rows, mask = torch.tensor([[0, 5], [6, 7], [0, 9]]), torch.tensor([[0, 1], [1, 1], [0, 1]])
    result = model.generate(rows, attention_mask=mask, max_new_tokens=2, prefix_allowed_tokens_fn=allow)
    assert result.tolist() == [[0, 5, 8, 8], [6, 7, 2, 0], [0, 9, 8, 8]]
    assert seen == [(0, [0, 5]), (1, [6, 7]), (2, [0, 9]), (0, [0, 5, 8]), (2, [0, 9, 8])]


@pytest.mark.proves("G3")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_invalid_logits_raise_unless_they_are_removed(make_model, value):
    damaged = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        damaged.lm_head.weight[7] = value
    with pytest.raises(NumericsError, match="row 0"):
        damaged.generate([[5, 6]], max_new_tokens=2)
    result = damaged.generate([[5, 6]], max_new_tokens=3, remove_invalid_values=True)
    assert result.shape[1] <= 5


def test_processors_of_both_libraries_inside_both(model, theirs, hf):
    ids = PROMPTS[:1]
    for name, arguments in [
        ("RepetitionPenaltyLogitsProcessor", (1.8,)),
        ("SequenceBiasLogitsProcessor", ([[[11], 6.0], [[11, 12], 30.0]],)),
        ("NoRepeatNGramLogitsProcessor", (2,)),
    ]:
        plain = generate(theirs, ids, logits_processor=[getattr(hf.module, name)(*arguments)]).sequences
        assert torch.equal(generate(theirs, ids, logits_processor=[getattr(ours, name)(*arguments)]).sequences, plain)
        assert torch.equal(
            generate(model, ids, logits_processor=[getattr(hf.module, name)(*arguments)]).sequences, plain
        )
        assert torch.equal(generate(model, ids, logits_processor=[getattr(ours, name)(*arguments)]).sequences, plain)


def test_criteria_of_both_libraries_inside_both(model, theirs, hf):
    ids = PROMPTS[:1]
    plain = generate(theirs, ids, max_new_tokens=4).sequences
    end = int(plain[0, 7])
    for name, argument, length in (
        ("MaxLengthCriteria", 8, 8),
        ("EosTokenCriteria", end, 8),
        ("MaxTimeCriteria", 0.0, 6),
    ):
        for module in hf.module, stopping:
            for where in model, theirs:
                criterion = getattr(module.generation if module is hf.module else module, name)(argument)
                result = generate(where, ids, stopping_criteria=hf.module.StoppingCriteriaList([criterion]))
                assert result.sequences.shape[1] == length, (name, module, where)


@pytest.mark.proves("G5")
def test_a_callers_criteria_take_the_place_of_settings(model, theirs, hf):
    ids = PROMPTS
    plain = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, eos_token_id=None)
    end = int(plain[0, 9])
    cases = [
        (("MaxLengthCriteria", 33), {"eos_token_id": None}),
        (("MaxLengthCriteria", 9), {"max_new_tokens": 25}),
        (("MaxTimeCriteria", 1e6), {"max_time": 1e-9}),
        (("EosTokenCriteria", end), {"eos_token_id": int(plain[0, 7])}),
    ]
    for (name, argument), settings in cases:
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            stopping_criteria=hf.module.StoppingCriteriaList([getattr(hf.module.generation, name)(argument)]),
            **settings,
        )
        for criterion in getattr(hf.module.generation, name)(argument), getattr(stopping, name)(argument):
            assert torch.equal(model.generate(ids, stopping_criteria=[criterion], **settings), expected), name


def test_an_assistant_ends_when_it_is_unsure(model, theirs):
    settings = {"is_assistant": True, "assistant_confidence_threshold": 0.5, "eos_token_id": None, "max_new_tokens": 20}
    expected = generate(theirs, PROMPTS[:1], **settings).sequences
    assert expected.size(1) < 25
    assert torch.equal(generate(model, PROMPTS[:1], **settings).sequences, expected)
    assert generate(model, PROMPTS[:1], **settings | {"assistant_confidence_threshold": 0.0}).sequences.size(1) == 25
    with pytest.raises(RequestError, match="looks at scores"):
        model.generate(PROMPTS[:1], is_assistant=True)


REFUSED = {
    "bias": ({"sequence_bias": [[[5, 97], 1.0]]}, "sequence_bias holds 97"),
    "forced bos": ({"forced_bos_token_id": 97}, "forced_bos_token_id holds 97"),
    "forced eos": ({"forced_eos_token_id": [5, 97]}, "forced_eos_token_id holds 97"),
    "decay": ({"exponential_decay_length_penalty": (1, 1.1), "eos_token_id": None}, "set eos_token_id"),
    "prefix": ({"prefix_allowed_tokens_fn": [5]}, "must be a function"),
    "healing": ({"token_healing": True}, "token_healing needs the tokenizer"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "does not support penalty_alpha=0.6: contrastive"),
    "groups": ({"num_beams": 4, "num_beam_groups": 2}, "does not support num_beam_groups=2: diverse"),
    "words": ({"force_words_ids": [[5]]}, "does not support force_words_ids"),
    "dola": ({"dola_layers": "low"}, "does not support dola_layers='low'"),
    "watermark": ({"watermarking_config": {"bias": 2.5}}, "does not support watermarking_config"),
}


@pytest.mark.proves("G13", "fault:F40")
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, model):
    settings, message = REFUSED[name]
    with pytest.raises(RequestError, match=message):
        model.generate(PROMPTS, **settings)


@pytest.mark.proves("D10")
def test_default_end_tokens_past_a_small_vocabulary(make_model):
    """GPT2Config's default bos and eos are 50256; transformers fails inside the embedding of a smaller model."""
    small = make_model(bos_token_id=50256, eos_token_id=50256, pad_token_id=None)
    with pytest.raises(RequestError, match="`bos_token_id` has to be defined"):
        small.generate()
    # as a generation_config.json may have them
    with pytest.raises(
        RequestError,
        match="bos_token_id=50256 is where a call without input_ids starts, but the vocabulary has ids 0 to 96",
    ):
        small.generate(generation_config=GenerationConfig(bos_token_id=50256))
    small.generation_config.eos_token_id = 50256
    # an end token that cannot be drawn ends nothing
    assert small.generate([[5]], max_new_tokens=4).shape == (1, 5)
