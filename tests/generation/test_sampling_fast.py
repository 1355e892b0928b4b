"""Tokens chosen in one op, or from the best logits alone, are those of the processors and warpers one by one."""

import pytest
import torch

from gpt2rt import ops
from gpt2rt.errors import NumericsError, RequestError
from gpt2rt.generation import GenerationConfig, choice
from gpt2rt.generation.batch import CachedRows
from gpt2rt.generation.logits import build_processors
from gpt2rt.generation.random import uniform
from gpt2rt.generation.sampling import sample
from gpt2rt.generation.scores import NO_IDS

pytestmark = pytest.mark.skipif(not ops.extension_status().loaded, reason="the fast way is C++")

PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43, 44, 45, 46]]

SETTINGS = {
    "greedy": {},
    "greedy, penalty": {"repetition_penalty": 1.4},
    "greedy, ngrams": {"no_repeat_ngram_size": 2, "bad_words_ids": [[7], [3, 4]]},
    "default": {"do_sample": True},
    "plain": {"do_sample": True, "top_k": 0},
    "temperature": {"do_sample": True, "top_k": 0, "temperature": 0.6},
    "hot": {"do_sample": True, "temperature": 2.5, "top_k": 7},
    "nearly greedy": {"do_sample": True, "temperature": 1e-6},
    "top_k 1": {"do_sample": True, "top_k": 1},
    "top_k of everything": {"do_sample": True, "top_k": 97},
    "top_k beyond": {"do_sample": True, "top_k": 1000},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.8},
    "min_p": {"do_sample": True, "top_k": 0, "min_p": 0.1},
    "all": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "all, processors": {"do_sample": True, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "min_new_tokens": 9},
    "several rows": {"do_sample": True, "top_k": 30, "num_return_sequences": 3},
}


def without_sampler(monkeypatch):
    monkeypatch.setattr(choice, "make_sampler", lambda plan: None)


@pytest.fixture
def ways(monkeypatch):
    """How tokens were chosen: "best", "best, then all", "all", in order of the steps; small vocabularies too."""
    monkeypatch.setattr(choice, "_WORTHWHILE", 1)
    taken = []
    best, every = choice.Sampler.choose_best, choice.Sampler.choose

    def choose_best(self, *args):
        tokens = best(self, *args)
        taken.append("best" if tokens is not None else "best, then all")
        return tokens

    def choose(self, *args, **kwargs):
        if taken[-1:] != ["best, then all"]:
            taken.append("all")
        return every(self, *args, **kwargs)

    monkeypatch.setattr(choice.Sampler, "choose_best", choose_best)
    monkeypatch.setattr(choice.Sampler, "choose", choose)
    return taken


@pytest.mark.proves("G2")
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_the_warpers(name, model, monkeypatch, ways):
    settings = {"max_new_tokens": 24, "eos_token_id": None, **SETTINGS[name]}
    if settings.get("do_sample"):
        settings["seed"] = 11
    fast = [model.generate(PROMPTS[:count], **settings) for count in (1, 3)]
    assert ways
    used = len(ways)
    without_sampler(monkeypatch)
    assert all(
        torch.equal(tokens, model.generate(PROMPTS[:count], **settings))
        for tokens, count in zip(fast, (1, 3), strict=True)
    )
    assert len(ways) == used
    if settings.get("do_sample") and name not in ("nearly greedy", "top_k 1"):
        # the negative control
        assert not torch.equal(fast[1], model.generate(PROMPTS, **{**settings, "seed": 12}))


@pytest.mark.parametrize("name", ["default", "plain", "all", "top_p", "min_p", "temperature"])
def test_draws_are_those_of_the_warpers(name, make_model):
    """Rows of a real vocabulary's size, without a model."""
    config = GenerationConfig(**SETTINGS[name])
    _, warpers = build_processors(config, 4, [])
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    given = {key: SETTINGS[name].get(key) for key in names}
    given["top_k"] = SETTINGS[name].get("top_k", 50)
    sampler = choice.Sampler(6, do_sample=True, **given)
    for round_ in range(4):
        generator = torch.Generator().manual_seed(round_)
        scores = (1 + 2 * round_) * torch.randn(6, 50257, generator=generator)
        numbers = [uniform(1, 2, row, round_) for row in range(6)]
        assert sampler.choose(scores, numbers, finite=True) == sample(warpers(NO_IDS, scores), numbers)


def test_which_way_is_taken(model, ways, monkeypatch):
    def taken(**settings):
        ways.clear()
        model.generate(PROMPTS[:1], max_new_tokens=4, eos_token_id=None, **settings)
        return ways.copy()

    # by name: another test may have chosen the other one for this model
    model.generation_executor("cpu")
    from_best = ["all", "best", "best", "best"]
    assert taken() == from_best
    assert taken(do_sample=True) == from_best
    assert taken(do_sample=True, top_p=0.5, temperature=0.5, min_p=0.1) == from_best
    assert taken(do_sample=True, top_k=0) == ["all"] * 4
    assert taken(repetition_penalty=1.2) == ["all"] * 4
    assert taken(output_logits=True, return_dict_in_generate=True) == ["all"] * 4
    # nobody but the warpers themselves can do these
    assert taken(do_sample=True, typical_p=0.9) == []
    assert taken(do_sample=True, renormalize_logits=True) == []
    assert taken(do_sample=True, output_scores=True, return_dict_in_generate=True) == []
    monkeypatch.setattr(choice, "_MOST_BEST", 49)
    assert taken(do_sample=True) == ["all"] * 4
    monkeypatch.setattr(choice, "_MOST_BEST", 50)
    monkeypatch.setattr(choice, "_WORTHWHILE", 2)
    assert taken(do_sample=True) == ["all"] * 4
    assert taken() == from_best


def test_scores_are_recorded_with_the_same_tokens(model):
    settings = {"max_new_tokens": 12, "do_sample": True, "seed": 4, "eos_token_id": None}
    expected = model.generate(PROMPTS, **settings)
    output = model.generate(PROMPTS, output_scores=True, output_logits=True, return_dict_in_generate=True, **settings)
    assert torch.equal(output.sequences, expected)
    chosen = output.scores[3].gather(1, output.sequences[:, -9:-8])
    assert chosen.isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True, "seed": 3, "top_k": 3}, {"do_sample": True, "seed": 3, "top_k": 3, "top_p": 0.7}],
)
def test_ties_at_the_end_of_the_best_are_looked_into(settings, make_model, ways, monkeypatch):
    """A model that knows nothing: all tokens tie, so the best 19 of 97 logits do not tell what top_k keeps."""
    model = make_model()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    settings = {"max_new_tokens": 6, "eos_token_id": None, **settings}
    fast = model.generate(PROMPTS, **settings)
    if settings.get("do_sample"):
        assert ways == ["all", *["best, then all"] * 5]
        assert len(set(fast[:, 7:].flatten().tolist())) > 3
    else:
        assert ways == ["all", *["best"] * 5]
    without_sampler(monkeypatch)
    assert torch.equal(model.generate(PROMPTS, **settings), fast)


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"do_sample": True, "top_k": 0}])
def test_damage_in_a_decode_step_names_its_row(settings, make_model, monkeypatch):
    """Logits that are fine after the prompt, and not after the next token."""
    model = make_model()
    original = CachedRows.prefill

    def prefill(self, *args, **kwargs):
        logits = original(self, *args, **kwargs)
        # what the next step of the second prompt will read
        self.cache.data[:, :, self.sequence(1).blocks[0]] = float("nan")
        return logits

    monkeypatch.setattr(CachedRows, "prefill", prefill)
    with pytest.raises(NumericsError, match="row 1: 97 of 97 logits are NaN"):
        model.generate(PROMPTS, max_new_tokens=5, **settings)


def test_a_row_without_tokens_is_refused(model):
    everything = [[token] for token in range(97)]
    for do_sample in (False, True):
        with pytest.raises(RequestError, match="row 0: every token is excluded"):
            model.generate(PROMPTS, max_new_tokens=5, bad_words_ids=everything, do_sample=do_sample, eos_token_id=None)


def test_a_temperature_that_overflows_is_named(make_model):
    model = make_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e30)
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 0, "temperature": 2e-4}
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e6)
    with pytest.raises(NumericsError, match="overflow float32 after the temperature"):
        model.generate(PROMPTS, **settings)
    # below 1e-4 only differences count
    assert model.generate(PROMPTS, **{**settings, "temperature": 1e-5}).size(1) == 10
