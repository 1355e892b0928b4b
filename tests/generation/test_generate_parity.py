"""``generate`` against transformers on the same weights."""

import inspect
import warnings

import pytest
import torch

MODELS = {
    "plain": {},
    "one wide head": {"n_embd": 80, "n_head": 1, "n_inner": 50, "n_layer": 1, "seed": 1},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "seed": 2},
    "unscaled, relu": {"scale_attn_weights": False, "activation_function": "relu", "seed": 3},
    "untied": {"tie_word_embeddings": False, "vocab_size": 131, "seed": 4},
}

SETTINGS = {
    "max_new_tokens": {"max_new_tokens": 25},
    "default length": {},
    "max_length": {"max_length": 19},
    "up to the last position": {"max_new_tokens": 40},
    "ends early": {"eos_token_id": list(range(2, 97, 6)), "max_new_tokens": 20},
    "ends early, pad by eos": {"eos_token_id": list(range(2, 97, 6)), "max_new_tokens": 20, "pad_token_id": None},
    "no end token": {"eos_token_id": None, "max_new_tokens": 12},
    "min_new_tokens": {"eos_token_id": list(range(2, 97, 3)), "min_new_tokens": 7, "max_new_tokens": 15},
    "min_length": {"eos_token_id": list(range(2, 97, 3)), "min_length": 14, "max_new_tokens": 15},
    "repetition_penalty": {"repetition_penalty": 1.4, "max_new_tokens": 25},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "max_new_tokens": 25},
    "bad words": {"bad_words_ids": [[5], [7, 8], [40, 41]], "suppress_tokens": [3, 4], "max_new_tokens": 12},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(40)), "max_new_tokens": 5},
    "no cache": {"use_cache": False, "max_new_tokens": 12},
}


#: every setting with the first model, some with the others
CASES = [("plain", setting) for setting in SETTINGS] + [
    (name, setting) for name in list(MODELS)[1:] for setting in ("max_new_tokens", "ends early", "repetition_penalty")
]


@pytest.fixture(scope="module")
def pairs(make_model, hf):
    """Each model in both libraries."""
    models = {name: make_model(**fields) for name, fields in MODELS.items()}
    return {name: (model, hf.copy_of(model)) for name, model in models.items()}


@pytest.fixture
def pair(pairs):
    return pairs["plain"]


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of 9, 6 and 1 tokens, padded on the left, and their mask."""
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :8] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def quietly(generate, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return generate(*args, **kwargs)


@pytest.mark.proves("G2", "G3", "G4", "G5")
@pytest.mark.parametrize(("name", "setting"), CASES)
def test_greedy_tokens_are_equal(pairs, prompts, name, setting):
    ours, theirs = pairs[name]
    ids, mask = prompts
    # a setting of None unsets what the model's own config says
    expected = quietly(theirs.generate, ids, attention_mask=mask, **SETTINGS[setting])
    for executor in ("eager", "cpu"):
        ours.generation_executor(executor)
        assert torch.equal(quietly(ours.generate, ids, attention_mask=mask, **SETTINGS[setting]), expected), executor


@pytest.mark.proves("G8")
def test_mask_is_inferred_from_the_pad_token(pair, prompts):
    ours, theirs = pair
    ids, mask = prompts
    expected = quietly(theirs.generate, ids, max_new_tokens=8)
    assert torch.equal(ours.generate(ids, max_new_tokens=8), expected)
    assert torch.equal(ours.generate(ids, attention_mask=mask, max_new_tokens=8), expected)


def test_padding_inside_a_row_is_dropped_as_transformers_hides_it(pair, prompts):
    ours, theirs = pair
    ids, mask = prompts[0].clamp(min=3), prompts[1].clone()
    mask[0, 4:6] = 0
    expected = quietly(theirs.generate, ids, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(ours.generate(ids, attention_mask=mask, max_new_tokens=8), expected)


@pytest.mark.proves("G9")
def test_no_prompt_starts_from_bos(pair):
    ours, theirs = pair
    assert torch.equal(ours.generate(max_new_tokens=6), quietly(theirs.generate, max_new_tokens=6))


@pytest.mark.proves("G5")
def test_stop_strings(byte_model, tokenizer, hf, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    their_tokenizer = hf.module.AutoTokenizer.from_pretrained(tmp_path)
    theirs = hf.copy_of(byte_model)
    ids = torch.tensor([[40, 41, 42], [70, 71, 72]])
    free = byte_model.generate(ids, max_new_tokens=20, eos_token_id=None, pad_token_id=9)
    # stop texts taken from what the rows say, so that they end at different places
    texts = [tokenizer.decode(row[3:]) for row in free]
    stops = [next(c for c in texts[0][4:] if c.isascii()), next(c for c in texts[1][8:] if c.isascii())]
    settings = {"max_new_tokens": 20, "stop_strings": stops, "pad_token_id": 9}
    expected = quietly(theirs.generate, ids, tokenizer=their_tokenizer, **settings)
    assert expected.size(1) < free.size(1)
    assert torch.equal(byte_model.generate(ids, tokenizer=tokenizer, **settings), expected)
    # their tokenizer works here too
    assert torch.equal(byte_model.generate(ids, tokenizer=their_tokenizer, **settings), expected)


@pytest.mark.proves("G6")
def test_scores_and_logits(pair, prompts):
    ours, theirs = pair
    ids, mask = prompts
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 5,
        "eos_token_id": None,
        "repetition_penalty": 1.3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    mine, other = ours.generate(ids, **settings), quietly(theirs.generate, ids, **settings)
    assert torch.equal(mine.sequences, other.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=2e-4)
    assert mine.keys() == list(other.keys()) == ["sequences", "scores", "logits", "past_key_values"]
    assert torch.equal(mine[0], mine.sequences)
    assert "attentions" not in mine
    assert len(mine.to_tuple()) == 4


@pytest.mark.proves("G3", "G5")
def test_callers_processors_and_criteria_of_both_libraries(pair, prompts, hf):
    ours, theirs = pair
    ids, mask = prompts

    class Forbid:
        def __call__(self, input_ids, scores):
            assert input_ids.shape[0] == scores.shape[0] == 3
            scores = scores.clone()
            # something of its own for each row, so that a mixed-up row shows
            scores[torch.arange(3), [10, 20, 30]] += 5.0
            scores[:, 50:] = -float("inf")
            return scores

    class EndsAt:
        def __call__(self, input_ids, scores, **kwargs):
            return (input_ids[:, -1] % 7 == 0) & torch.tensor([True, False, True])

    modules = hf.module
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 14,
        "logits_processor": modules.LogitsProcessorList([Forbid(), modules.TemperatureLogitsWarper(0.5)]),
        "stopping_criteria": modules.StoppingCriteriaList([EndsAt()]),
    }
    assert torch.equal(ours.generate(ids, **settings), quietly(theirs.generate, ids, **settings))


@pytest.mark.proves("G7")
def test_signatures_are_equal(pair):
    ours, theirs = pair
    for name in ("generate", "compute_transition_scores"):
        mine, other = (inspect.signature(getattr(model, name)).parameters for model in (ours, theirs))
        assert list(mine) == list(other)
        assert [parameter.default for parameter in mine.values()] == [p.default for p in other.values()]


@pytest.mark.proves("G7")
def test_warnings_point_at_the_call(pair):
    ours, _ = pair
    calls = [
        ({"temperature": 0.5}, "temperature only matter"),
        ({"output_scores": True}, "output_scores only matter"),
        ({"max_new_tokens": 500}, "rows end there"),
        ({"max_cache_len": 5}, "max_cache_len only matters"),
        ({"eos_token_id": 5, "pad_token_id": 5}, "pass the tokenizer's attention_mask"),
    ]
    for settings, message in calls:
        with pytest.warns(UserWarning, match=message) as caught:
            ours.generate(torch.tensor([[5, 6], [7, 8]]), **{"max_new_tokens": 1, **settings})
        assert caught[0].filename == __file__


@pytest.mark.proves("G1")
def test_transformers_generation_config_as_the_models_own(make_model, hf):
    model = make_model()
    model.generation_config = hf.module.GenerationConfig(max_new_tokens=6, bos_token_id=1)
    assert model.generate(torch.tensor([[40, 41]])).size(1) == 8
    assert model.score([[40, 41]], add_bos=True).num_scored == [2]
    with pytest.raises(ValueError, match="generation_config must be a GenerationConfig, got dict"):
        model.generation_config = {"max_new_tokens": 6}
    assert model.generation_config.max_new_tokens == 6


@pytest.mark.proves("G11")
def test_transformers_generation_config_and_streamer(pair, tokenizer, hf, capsys):
    ours, _ = pair
    config = hf.module.GenerationConfig(max_new_tokens=6, eos_token_id=None)
    expected = ours.generate(torch.tensor([[40, 41]]), max_new_tokens=6, eos_token_id=None)
    streamer = hf.module.TextStreamer(tokenizer)
    result = ours.generate(torch.tensor([[40, 41]]), generation_config=config, streamer=streamer)
    assert torch.equal(result, expected)
    assert capsys.readouterr().out == tokenizer.decode(expected[0]) + "\n"
