"""Beams are forks of the paged cache: what is shared, what is computed, and that all of it is given back."""

import pytest
import torch
from scipy.stats import chisquare

from gpt2rt.errors import NumericsError, RequestError
from gpt2rt.generation import beams
from gpt2rt.generation.draw import sample_without_replacement
from gpt2rt.generation.prepare import prepare
from gpt2rt.generation.random import uniform

PROMPTS = [[5, 6, 7, 8, 9], [40], list(range(10, 44)), [60, 61]]
PLAIN = {"eos_token_id": None, "pad_token_id": 0}


def decoder_for(model, prompts, **settings):
    return prepare(model, prompts, None, None, None, {**PLAIN, **settings})[0]


@pytest.mark.proves("G2", "I25")
@pytest.mark.parametrize("executor", ["cpu", "eager"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "seed": 3, "top_p": 0.9},
        {"repetition_penalty": 1.3, "eos_token_id": list(range(2, 97, 5)), "early_stopping": True},
        {"use_cache": False, "do_sample": True, "seed": 1},
    ],
    ids=["search", "sample", "ends early", "no cache"],
)
def test_a_prompt_alone_is_the_prompt_in_a_batch(model, executor, settings):
    model.generation_executor(executor)
    asked = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12, **PLAIN, **settings}
    recorded = {"return_dict_in_generate": True, "output_scores": True}
    together = model.generate(PROMPTS, **asked, **recorded)
    width = max(map(len, PROMPTS))
    exact = executor == "cpu"
    for index, prompt in enumerate(PROMPTS):
        alone = model.generate([prompt], **asked, **recorded)
        rows = slice(2 * index, 2 * index + 2)
        new = alone.sequences[:, len(prompt) :]
        assert torch.equal(together.sequences[rows, width : width + new.size(1)], new)
        if exact:
            assert torch.equal(together.sequences_scores[rows], alone.sequences_scores)
            for mine, all_rows in zip(alone.scores, together.scores, strict=False):
                assert torch.equal(all_rows[3 * index : 3 * index + 3], mine)


def test_padding_side_does_not_matter(model):
    width = max(map(len, PROMPTS))
    left = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    right = torch.tensor([p + [0] * (width - len(p)) for p in PROMPTS])
    asked = {"num_beams": 3, "max_new_tokens": 10, "repetition_penalty": 1.2, **PLAIN}
    expected = model.generate(PROMPTS, **asked)[:, width:]
    for ids in (left, right):
        assert torch.equal(model.generate(ids, attention_mask=(ids != 0).long(), **asked)[:, width:], expected)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str)
def test_cache_and_recomputation_and_chunks_are_bit_equal(model, settings):
    model.generation_executor("cpu")
    asked = {"num_beams": 3, "max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True, **PLAIN}
    expected, found = model.generate(PROMPTS, **asked), model.generate(PROMPTS, **asked, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))


@pytest.mark.proves("I25")
def test_a_prompt_is_computed_once_and_a_beam_one_token_a_step(model, monkeypatch):
    executor = model.generation_executor("eager")
    sizes = []
    step = executor.step

    def watched(batch, cache, **kwargs):
        sizes.append((batch.input_ids.numel(), batch.seq_lens.numel()))
        return step(batch, cache, **kwargs)

    monkeypatch.setattr(executor, "step", watched)
    model.generate(PROMPTS, num_beams=4, max_new_tokens=4, **PLAIN)
    assert sizes == [(sum(map(len, PROMPTS)), 4), (16, 16), (16, 16), (16, 16)]


def test_prompts_that_are_done_leave_the_batch(model, monkeypatch):
    executor = model.generation_executor("eager")
    sizes = []
    step = executor.step
    monkeypatch.setattr(
        executor, "step", lambda batch, cache, **kw: (sizes.append(batch.seq_lens.numel()), step(batch, cache, **kw))[1]
    )
    asked = {"num_beams": 2, "max_new_tokens": 13, "eos_token_id": list(range(2, 97, 13)), "early_stopping": True}
    rows = model.generate(PROMPTS, pad_token_id=0, **asked)
    assert sizes[1] == 8
    assert sorted(sizes[1:], reverse=True) == sizes[1:]
    assert sizes[-1] < 8
    assert rows.shape[0] == 4


@pytest.mark.proves("I24", "I25")
def test_beams_share_blocks_and_all_are_given_back(model):
    prompt = list(range(10, 44))
    decoder = decoder_for(model, [prompt], num_beams=4, max_new_tokens=14, repetition_penalty=5.0)
    pool = decoder.cache.pool
    # two full blocks of the prompt are shared; each beam has a third of its own, for 34 + 13 tokens
    assert pool.num_blocks == 2 + 4
    fewest = pool.num_blocks
    for _ in decoder.steps():
        fewest = min(fewest, pool.num_free)
        tables = [sequence.blocks for sequence in decoder.cached.sequences if sequence is not None]
        assert len({tuple(blocks[:2]) for blocks in tables}) <= 1
        assert all(len(blocks) == len(set(blocks)) for blocks in tables)
    # not a block more than needed
    assert fewest == 0
    assert pool.num_free == pool.num_blocks


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_pool_is_never_too_small(model, length, use_cache):
    prompts = [[(7 * i + length) % 90 + 3 for i in range(length)], [5]]
    for num_beams in (2, 5):
        decoder = decoder_for(model, prompts, num_beams=num_beams, max_new_tokens=15, use_cache=use_cache)
        assert len(list(decoder.steps())) == 15
        assert decoder.cache.pool.num_free == decoder.cache.pool.num_blocks


def test_blocks_are_given_back_when_something_fails(model):
    calls = []

    def fails(ids, scores):
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("mine")
        return scores

    decoder = prepare(model, PROMPTS, None, [fails], None, {"num_beams": 3, "max_new_tokens": 9, **PLAIN})[0]
    with pytest.raises(KeyError, match="mine"):
        list(decoder.steps())
    assert len(calls) == 4
    assert decoder.cache.pool.num_free == decoder.cache.pool.num_blocks

    decoder = decoder_for(model, PROMPTS, num_beams=3, max_new_tokens=9)
    steps = decoder.steps()
    next(steps), next(steps)
    assert decoder.cache.pool.num_free < decoder.cache.pool.num_blocks
    steps.close()
    assert decoder.cache.pool.num_free == decoder.cache.pool.num_blocks


def test_demands_beyond_the_machine(model):
    with pytest.raises(RequestError, match=r"1 prompts with num_beams=\d+ need up to .* GB of KV cache"):
        decoder_for(model, [[5]], num_beams=10**9, max_new_tokens=40)


def test_no_token_left(model):
    with pytest.raises(RequestError, match="prompt 0: every token of every beam is excluded"):
        model.generate(
            [[5]], num_beams=2, max_new_tokens=3, logits_processor=[lambda ids, s: s.fill_(-torch.inf)], **PLAIN
        )


@pytest.mark.proves("G5")
def test_max_time_ends_all_beams(model):
    rows = model.generate(PROMPTS, num_beams=3, max_new_tokens=15, max_time=1e-9, **PLAIN)
    assert rows.size(1) == max(map(len, PROMPTS)) + 1


# ---- beam sampling -------------------------------------------------------------------------------------------------


@pytest.mark.proves("G2")
def test_seed_fixes_a_beam_sample(model):
    asked = {"num_beams": 3, "do_sample": True, "max_new_tokens": 12, **PLAIN}
    once = model.generate(PROMPTS, seed=4, **asked)
    assert torch.equal(model.generate(PROMPTS, seed=4, **asked), once)
    assert not torch.equal(model.generate(PROMPTS, seed=5, **asked), once)
    torch.manual_seed(7)
    drawn = model.generate(PROMPTS, **asked)
    torch.manual_seed(7)
    assert torch.equal(model.generate(PROMPTS, **asked), drawn)


def test_draws_have_the_law_of_drawing_without_replacement():
    scores = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 0.0])
    mass = torch.softmax(scores, 0).double().tolist()
    count = 4000
    seen: dict[tuple[int, int], int] = {}
    for seed in range(count):
        pair = tuple(sample_without_replacement(scores, [uniform(seed, 7, draw, 3) for draw in range(2)]).tolist())
        seen[pair] = seen.get(pair, 0) + 1
    pairs = [(a, b) for a in (0, 1, 2, 4) for b in (0, 1, 2, 4) if a != b]
    expected = [count * mass[a] * mass[b] / (1 - mass[a]) for a, b in pairs]
    assert set(seen) <= set(pairs)
    assert chisquare([seen.get(pair, 0) for pair in pairs], expected, sum_check=False).pvalue > 1e-3


def test_where_mass_ends_the_best_of_the_rest_fill_up():
    scores = torch.tensor([-torch.inf, 0.0, -2e9, -1e9, -torch.inf])
    assert sample_without_replacement(scores, [0.3, 0.9, 0.1, 0.5, 0.5]).tolist()[:3] == [1, 3, 2]
    # a number just below 1 stays inside
    assert sample_without_replacement(torch.zeros(3), [1 - 2**-53] * 3).tolist() == [2, 1, 0]


@pytest.mark.proves("G2", "G4")
def test_beam_samples_are_distributed_as_in_transformers(model):
    """One step of two beams draws four tokens; the first two drawn end, and the likelier of them is returned."""
    prompt, top_k, calls = [11, 12, 13], 6, 1500
    # equal prompts draw different numbers
    rows = model.generate([prompt] * calls, num_beams=2, do_sample=True, top_k=top_k, seed=9, max_new_tokens=1, **PLAIN)
    logits = model(torch.tensor([prompt])).logits[0, -1]
    best = logits.topk(top_k)
    mass = torch.softmax(best.values, 0).double().tolist()
    first_of_two = [0.0] * top_k
    for a in range(top_k):
        for b in range(top_k):
            if a != b:
                first_of_two[min(a, b)] += mass[a] * mass[b] / (1 - mass[a])
    tokens = best.indices.tolist()
    counts = [int((rows[:, -1] == token).sum()) for token in tokens]
    assert sum(counts) == calls
    # the least likely of all is never the likelier of two
    assert counts[-1] == 0
    expected = [calls * p for p in first_of_two[:-1]]
    assert chisquare(counts[:-1], expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("length_penalty", [-1000.0, 1000.0])
def test_a_length_penalty_beyond_all_numbers_still_ends(model, length_penalty):
    rows = model.generate(
        PROMPTS, num_beams=3, max_new_tokens=8, length_penalty=length_penalty, eos_token_id=[2, 9, 40], pad_token_id=0
    )
    assert rows.size(1) <= 34 + 8


def test_nan_in_the_logits_is_an_error_unless_it_is_taken_out(make_model):
    model = make_model(seed=1)
    with torch.no_grad():
        model.transformer.wte.weight[50] = torch.nan
    with pytest.raises(NumericsError, match="row 0: 1 of 97 logits are NaN"):
        model.generate([[5, 6]], num_beams=2, max_new_tokens=3, **PLAIN)
    rows = model.generate([[5, 6]], num_beams=2, max_new_tokens=3, remove_invalid_values=True, **PLAIN)
    assert rows.shape == (1, 5)


def test_the_search_itself(model):
    """Two steps by hand: the rules of BeamSearch, without a model."""
    plan = decoder_for(model, [[5]], num_beams=2, max_new_tokens=3, length_penalty=1.0, early_stopping=False).plan
    search = beams.BeamSearch(0, [5], 3, plan)

    def found(scores, places, tokens, ended):
        candidates = beams.Candidates(torch.tensor(scores).numpy(), places, tokens, ended, [None] * len(tokens))
        search.advance(candidates)

    found([-1.0, -2.0, -3.0, -4.0], [0, 0, 0, 0], [10, 11, 12, 13], [False, True, False, True])
    # the fourth ends too, but only the first two can be finished
    assert [beam.ids for beam in search.running] == [[5, 10], [5, 12]]
    assert [(beam.ids, beam.score) for beam in search.finished if beam.finished] == [([5, 11], -2.0)]
    assert not search.done
    found([-1.5, -4.0, -4.5, -5.0], [0, 1, 0, 1], [20, 21, 22, 23], [True, False, False, False])
    assert [(beam.ids, beam.score) for beam in search.finished] == [([5, 10, 20], -0.75), ([5, 11], -2.0)]
    assert [beam.origins for beam in search.finished] == [[0, 0], [0]]
    # the best that runs has -4 after two tokens: no better than the worst that is finished
    assert [beam.ids for beam in search.running] == [[5, 12, 21], [5, 10, 22]]
    assert search.done
