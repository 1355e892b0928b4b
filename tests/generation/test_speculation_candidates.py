"""Where candidates come from, and how many there are."""

import copy

import pytest
import torch
from assisted import PROMPTS, counted, noisy, run

from gpt2rt.errors import RequestError
from gpt2rt.generation import candidates


@pytest.fixture(scope="module")
def draft(model):
    """A model that is right often, but not always."""
    return noisy(model)


# ---- how many candidates -------------------------------------------------------------------------------------------


def test_schedules(model, monkeypatch):
    asked = counted(monkeypatch, candidates.Draft)
    common = {"assistant_early_exit": 2, "num_assistant_tokens": 2, "assistant_confidence_threshold": 0.0}
    run(model, [PROMPTS[0]], max_new_tokens=30, **common)
    assert [counts[0] for counts in asked[:4]] == [2, 2, 2, 2]
    asked.clear()
    # always right: two more each time
    run(model, [PROMPTS[0]], max_new_tokens=30, num_assistant_tokens_schedule="heuristic_transient", **common)
    assert [counts[0] for counts in asked] == [2, 4, 6, 8, 4]


def test_useless_candidates_become_fewer_and_rest(model, make_model, monkeypatch):
    asked = counted(monkeypatch, candidates.Draft)
    other = make_model(seed=8)
    common = {"assistant_model": other, "num_assistant_tokens": 3, "assistant_confidence_threshold": 0.0}
    decoder, _ = run(model, [[5]], max_new_tokens=40, num_assistant_tokens_schedule="heuristic_transient", **common)
    assert decoder.statistics.accepted == 0
    # four rounds, sixteen without, four more; the 40th token needs no round
    assert [counts[0] for counts in asked] == [3, 2, 1, 1] + [1] * 4
    assert decoder.statistics.steps == 39


def test_the_heuristic_number_is_remembered_for_the_assistant(model, make_model, monkeypatch):
    asked = counted(monkeypatch, candidates.Draft)
    assistant = make_model()
    settings = {
        "assistant_model": assistant,
        "num_assistant_tokens": 2,
        "num_assistant_tokens_schedule": "heuristic",
        "assistant_confidence_threshold": 0.0,
    }
    before = copy.deepcopy(assistant.generation_config)
    run(model, [PROMPTS[0]], max_new_tokens=16, **settings)
    ended = asked[-1][0]
    asked.clear()
    run(model, [PROMPTS[0]], max_new_tokens=30, **settings)
    assert asked[0][0] > ended >= 2
    assert assistant.generation_config == before


def test_settings_of_the_assistant_count_after_the_callers(model, make_model, monkeypatch):
    asked = counted(monkeypatch, candidates.Draft)
    assistant = make_model(seed=1)
    assistant.generation_config.num_assistant_tokens = 7
    run(model, [[5]], assistant_model=assistant)
    run(model, [[5]], assistant_model=assistant, num_assistant_tokens=3)
    run(model, [[5]], assistant_model=make_model(seed=1), max_new_tokens=30)
    assert [asked[0][0], next(c for c in asked if c[0] == 3)[0]] == [7, 3]
    assert max(counts[0] for counts in asked) == 20, "the default"


def test_confidence_ends_a_draft(model, draft):
    def proposed(threshold):
        return run(model, assistant_model=draft, assistant_confidence_threshold=threshold)[0].statistics.proposed

    def per_step(threshold):
        statistics = run(model, assistant_model=draft, assistant_confidence_threshold=threshold)[0].statistics
        return statistics.proposed / statistics.steps

    # a draft that is never sure proposes one token at a time: at most one a row and step
    assert per_step(1.0) <= 4
    assert per_step(0.0) > per_step(0.5) > per_step(1.0)


def test_prompt_lookup_finds_what_followed():
    class Row:
        def __init__(self, ids):
            self.ids = ids

    def proposed(ids, count=3, ngram=2):
        return candidates.PromptLookup([Row(ids)], ngram).propose({0: count})[0]

    assert proposed([1, 2, 3, 4, 5, 1, 2]) == [3, 4, 5]
    assert proposed([1, 2, 3, 9, 2, 7, 1, 2]) == [3, 9, 2], "two tokens go before one"
    assert proposed([1, 2, 3, 9, 2]) == [3, 9, 2], "one, where two are new"
    assert proposed([9, 2, 7, 1, 2], ngram=1) == [7, 1, 2]
    assert proposed([4, 4, 4]) == [4]
    assert proposed([1, 2, 3]) == []
    assert proposed([1]) == []
    row = Row([1, 2, 3])
    lookup = candidates.PromptLookup([row], 2)
    assert lookup.propose({0: 2}) == {0: []}
    row.ids += [1, 2]
    assert lookup.propose({0: 2}) == {0: [3, 1]}, "what the row has said since counts too"


# ---- early exit ----------------------------------------------------------------------------------------------------


@pytest.mark.proves("D6")
def test_early_exit_leaves_the_model_alone(make_model):
    model = make_model(n_layer=3)
    config = copy.deepcopy(model.config)
    expected = model.generate(PROMPTS, max_new_tokens=10, eos_token_id=None)
    logits = model(torch.tensor([[5, 6]])).logits
    for layers in (1, 2, 3):
        result = model.generate(PROMPTS, max_new_tokens=10, eos_token_id=None, assistant_early_exit=layers)
        assert torch.equal(result, expected)
        assert model.config == config
        assert model.config.n_layer == 3
    assert torch.equal(model(torch.tensor([[5, 6]])).logits, logits)
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=10, eos_token_id=None), expected)


def test_early_exit_is_the_first_layers(make_model):
    """Its draft is what a model of as many layers with the same weights says."""
    model, shallow = make_model(n_layer=3), make_model(n_layer=2)
    shallow.load_state_dict({name: value for name, value in model.state_dict().items() if ".h.2." not in name})
    executor = candidates.early_exit(model.generation_executor(), 2)
    assert executor.plan.n_layer == 2
    assert candidates.early_exit(model.generation_executor(), 2) is executor
    common = {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0}
    one, _ = run(model, assistant_early_exit=2, **common)
    other, _ = run(model, assistant_model=shallow, **common)
    assert one.statistics == other.statistics
    assert 0 < one.statistics.accepted < one.statistics.proposed


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_refusals(model, make_model, hf, draft):
    cases = [
        ({"assistant_model": hf.copy_of(model)}, "assistant_model is a transformers.*, expected a language model"),
        ({"assistant_model": model.transformer}, "without an output layer"),
        ({"assistant_model": make_model(vocab_size=50)}, "the model has 97 tokens and assistant_model 50"),
        ({"assistant_model": draft, "assistant_tokenizer": object()}, "`assistant_tokenizer` is not required"),
        ({"assistant_tokenizer": object()}, "assistant_tokenizer was given without assistant_model"),
        ({"assistant_model": draft, "prompt_lookup_num_tokens": 3}, "choose one of them"),
        ({"assistant_early_exit": 3}, "assistant_early_exit=3, expected a number of layers from 1 to 2"),
        ({"assistant_model": draft, "use_cache": False}, "requires `use_cache=True`"),
        ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, "does not go with num_beams=2"),
        ({"prompt_lookup_num_tokens": 3, "context_policy": "sliding"}, "does not go with context_policy='sliding'"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens"),
        ({"assistant_model": draft, "num_assistant_tokens": 0}, "num_assistant_tokens"),
    ]
    for settings, message in cases:
        with pytest.raises(RequestError, match=message):
            model.generate([[5, 6]], **settings)
    embeds = model.transformer.wte(torch.tensor([[5, 6]]))
    for source in ({"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"assistant_model": draft}):
        with pytest.raises(RequestError, match=r"needs? the ids of (the )?whole prompts?"):
            model.generate(inputs_embeds=embeds, **source)
