"""OpenAI GPT's ``generate``: transformers' tokens, without computing the text again for each of them."""

import warnings

import pytest
import torch
from openai_gpt_models import copy_of, left_padded, make, random_ids

from gpt2rt import (
    OpenAIGPTDoubleHeadsModel,
    OpenAIGPTForSequenceClassification,
    OpenAIGPTLMHeadModel,
    OpenAIGPTModel,
    ops,
)
from gpt2rt.errors import RequestError

needs_cpp = pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")
EXECUTORS = ["eager", pytest.param("cpu", marks=needs_cpp)]
PROMPTS = [[5, 6, 7, 8, 9], [40], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [60, 61]]

MODELS = {
    "plain": {},
    "one wide head": {"n_embd": 40, "n_head": 1, "n_layer": 1, "seed": 1},
    "untied, relu": {"tie_word_embeddings": False, "afn": "relu", "vocab_size": 131, "seed": 2},
    "three layers, silu": {"n_layer": 3, "afn": "silu", "seed": 3},
}

SETTINGS = {
    "max_new_tokens": {"max_new_tokens": 25},
    "default length": {},
    "max_length": {"max_length": 19},
    "up to the last position": {"max_new_tokens": 55},
    "an end token given": {"eos_token_id": list(range(2, 97, 6)), "max_new_tokens": 20},
    "min_new_tokens": {"eos_token_id": list(range(2, 97, 3)), "min_new_tokens": 7, "max_new_tokens": 15},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "max_new_tokens": 25},
    "no cache": {"use_cache": False, "max_new_tokens": 12},
}


@pytest.fixture(scope="module")
def pairs(hf):
    """Each model in both libraries."""
    models = {name: make(**fields) for name, fields in MODELS.items()}
    return {name: (model, copy_of(hf, model)) for name, model in models.items()}


@pytest.fixture(scope="module")
def model():
    return make()


def quietly(generate, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return generate(*args, **kwargs)


@pytest.mark.proves("O3", "O7")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("name", "setting"),
    [("plain", setting) for setting in SETTINGS] + [(name, "max_new_tokens") for name in list(MODELS)[1:]],
)
def test_greedy_tokens_are_equal_with_padding_on_the_left(pairs, name, setting, executor):
    ours, theirs = pairs[name]
    mask = left_padded([9, 6, 1], 9)
    ids = random_ids(3, 9).masked_fill(mask == 0, 0)
    given = {"attention_mask": mask, "pad_token_id": 0, **SETTINGS[setting]}
    ours.generation_executor(executor)
    assert torch.equal(quietly(ours.generate, ids, **given), quietly(theirs.generate, ids, **given))


@pytest.mark.proves("O3")
def test_scores_and_logits_are_transformers(pairs):
    ours, theirs = pairs["plain"]
    mask = left_padded([9, 6, 1], 9)
    ids = random_ids(3, 9).masked_fill(mask == 0, 0)
    given = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 6, "return_dict_in_generate": True}
    given |= {"output_logits": True, "output_scores": True, "repetition_penalty": 1.3}
    got, want = quietly(ours.generate, ids, **given), quietly(theirs.generate, ids, **given)
    assert torch.equal(got.sequences, want.sequences)
    for name in ("logits", "scores"):
        torch.testing.assert_close(torch.stack(got[name]), torch.stack(want[name]), rtol=0.0, atol=5e-5)


@pytest.mark.proves("O3")
def test_beams_are_transformers(pairs):
    ours, theirs = pairs["plain"]
    mask = left_padded([9, 6, 1], 9)
    ids = random_ids(3, 9).masked_fill(mask == 0, 0)
    given = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 12, "num_beams": 3}
    for more in ({}, {"num_return_sequences": 2}, {"eos_token_id": list(range(2, 97, 9))}):
        expected = quietly(theirs.generate, ids, **given, **more)
        assert torch.equal(quietly(ours.generate, ids, **given, **more), expected)


@pytest.mark.proves("O3")
@pytest.mark.parametrize("executor", EXECUTORS)
def test_each_step_computes_one_token_a_row(model, monkeypatch, executor):
    """transformers computes the whole text again: 5 + 6 + ... + 16 tokens here."""
    chosen = model.generation_executor(executor)
    step, sizes = chosen.step, []

    def watched(batch, cache, **kwargs):
        sizes.append(batch.input_ids.numel())
        return step(batch, cache, **kwargs)

    monkeypatch.setattr(chosen, "step", watched)
    model.generate([PROMPTS[0]], max_new_tokens=12)
    assert sizes == [5] + [1] * 11


@needs_cpp
@pytest.mark.proves("O7")
def test_a_row_is_bit_equal_alone_padded_and_without_a_cache(model):
    model.generation_executor("cpu")
    given = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(PROMPTS, **given)
    recomputed = model.generate(PROMPTS, use_cache=False, **given)
    for row, ids in enumerate(PROMPTS):
        alone = model.generate([ids], **given)
        assert torch.equal(together.sequences[row, -6:], alone.sequences[0, -6:])
        for a, t, r in zip(alone.logits, together.logits, recomputed.logits, strict=True):
            assert torch.equal(a[0], t[row])
            assert torch.equal(a[0], r[row])


def test_generated_logits_are_those_of_forward(model):
    given = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate([PROMPTS[0]], **given)
    with torch.no_grad():
        want = model(out.sequences[:, :-1]).logits[0, len(PROMPTS[0]) - 1 :]
    torch.testing.assert_close(torch.cat(out.logits), want, rtol=0.0, atol=2e-5)


def test_sampling(model):
    given = {"do_sample": True, "seed": 3, "top_p": 0.9, "max_new_tokens": 8}
    rows = model.generate(PROMPTS, num_return_sequences=3, **given)
    assert rows.shape == (12, 20)
    assert torch.equal(rows, model.generate(PROMPTS, num_return_sequences=3, **given))
    assert torch.equal(rows[::3], model.generate(PROMPTS, **given))
    assert len({tuple(row) for row in rows[:3].tolist()}) == 3
    assert not torch.equal(rows, model.generate(PROMPTS, num_return_sequences=3, **{**given, "seed": 4}))


def test_the_sampled_distribution_is_the_models(model):
    """Chi-square over the 8 likeliest first tokens and the rest, 2000 draws, at p = 0.001."""
    from scipy.stats import chisquare

    with torch.no_grad():
        probs = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(-1)
    drawn = model.generate([PROMPTS[0]], do_sample=True, seed=0, top_k=0, max_new_tokens=1, num_return_sequences=2000)
    counts = drawn[:, -1].bincount(minlength=100)
    top = probs.topk(8).indices
    expected = torch.cat([probs[top], 1 - probs[top].sum(dim=0, keepdim=True)]) * 2000
    observed = torch.cat([counts[top], 2000 - counts[top].sum(dim=0, keepdim=True)])
    assert expected.min() > 5
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.proves("O8")
def test_without_special_ids_a_text_goes_on_to_its_full_length(model):
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    ids = random_ids(2, 4)
    # 20 new tokens by default; nothing has to be padded, so no pad token is asked for
    assert model.generate(ids).shape == (2, 24)
    assert model.generate(ids, max_new_tokens=30).shape == (2, 34)
    # rows of unequal length get their pads on the left, and end together
    assert model.generate(PROMPTS, max_new_tokens=3).shape == (4, 15)
    with pytest.warns(UserWarning, match="room for 61 in the model's n_positions=64"):
        assert model.generate(ids, max_new_tokens=1000).shape == (2, 65)


@pytest.mark.proves("O8")
def test_what_needs_a_special_id_says_so(model):
    with pytest.raises(RequestError, match="bos_token_id"):
        model.generate()
    assert model.generate(bos_token_id=7, max_new_tokens=3)[0, 0] == 7
    stop_early = [lambda ids, scores: torch.tensor([True, False])]
    with pytest.raises(RequestError, match="pad_token_id"):
        model.generate(random_ids(2, 4), stopping_criteria=stop_early, max_new_tokens=5)
    rows = model.generate(random_ids(2, 4), stopping_criteria=stop_early, max_new_tokens=5, pad_token_id=99)
    assert rows[0, 5:].tolist() == [99] * 4


@pytest.mark.proves("O5")
def test_the_double_heads_model_generates_too():
    """transformers' has no generate."""
    double = make(OpenAIGPTDoubleHeadsModel)
    language_model = make()
    language_model.transformer.load_state_dict(double.transformer.state_dict())
    assert torch.equal(double.generate(PROMPTS, max_new_tokens=9), language_model.generate(PROMPTS, max_new_tokens=9))
    assert double.can_generate()
    assert not any(kind.can_generate() for kind in (OpenAIGPTModel, OpenAIGPTForSequenceClassification))


@pytest.mark.parametrize("kind", [OpenAIGPTLMHeadModel, OpenAIGPTDoubleHeadsModel])
def test_a_text_goes_on_from_a_cache_or_from_embeddings(kind):
    model = make(kind)
    ids = random_ids(2, 9)
    given = {"max_new_tokens": 7, "return_dict_in_generate": True}
    want = model.generate(ids, **given)
    past = model(ids[:, :6], use_cache=True).past_key_values
    got = model.generate(ids, past_key_values=past, **given)
    assert torch.equal(got.sequences, want.sequences)
    assert got.past_key_values is past
    # the last token was shown, but nothing was computed from it
    assert past.get_seq_length() == 15
    embeds = model.get_input_embeddings()(ids).detach()
    from_embeds = model.generate(inputs_embeds=embeds, max_new_tokens=7)
    assert torch.equal(from_embeds, want.sequences[:, 9:])


def test_attentions_and_hidden_states_of_each_step(model):
    ids = random_ids(2, 9)
    wanted = {"output_attentions": True, "output_hidden_states": True}
    out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **wanted)
    with torch.no_grad():
        full = model(out.sequences[:, :-1], **wanted)
    assert len(out.attentions) == len(out.hidden_states) == 3
    # transformers' class has no cache, so each of its steps holds the whole row
    for step, stop in enumerate((9, 10, 11)):
        for layer in range(2):
            want = full.attentions[layer][:, :, :stop, :stop]
            torch.testing.assert_close(out.attentions[step][layer], want, rtol=0.0, atol=2e-5)
        for layer in range(3):
            want = full.hidden_states[layer][:, :stop]
            torch.testing.assert_close(out.hidden_states[step][layer], want, rtol=0.0, atol=2e-5)


def test_drafts_change_no_token(model):
    want = model.generate(PROMPTS, max_new_tokens=20)
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=20, prompt_lookup_num_tokens=3), want)
    draft = make(n_layer=1)
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=20, assistant_model=draft), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """What the executor computes from rounded weights is what the same weights give in float32, within rounding."""
    low = make(initializer_range=0.1).to(dtype)
    exact = make(initializer_range=0.1)
    exact.load_state_dict(low.state_dict())
    given = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    out = low.generate([PROMPTS[2]], **given)
    with torch.no_grad():
        want = exact(out.sequences[:, :-1]).logits[0, len(PROMPTS[2]) - 1 :]
    torch.testing.assert_close(torch.cat(out.logits).float(), want, rtol=0.0, atol=2e-2)


def test_changed_weights_are_seen():
    model = make()
    before = model.generate([PROMPTS[0]], max_new_tokens=8)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(-1.0)
    assert not torch.equal(model.generate([PROMPTS[0]], max_new_tokens=8), before)
