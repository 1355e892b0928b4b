"""Prompts that are more than ids: a filled cache, or embeddings; and what may be said about the cache."""

import copy
import warnings

import pytest
import torch

from gpt2rt import DynamicCache, OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gpt2rt.errors import RequestError
from gpt2rt.generation import LogitsProcessorList, StoppingCriteriaList

PLAIN = {"eos_token_id": None, "pad_token_id": 0}


def quietly(generate, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return generate(*args, **kwargs)


@pytest.fixture(scope="module")
def pair(make_model, hf):
    model = make_model()
    return model, hf.copy_of(model)


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of 7, 4 and 7 tokens, padded on the left, and their mask."""
    ids = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.fixture(scope="module")
def talk(pair, prompts):
    """A first turn in both libraries, then all ids and the mask of the second."""
    ours, theirs = pair
    ids, mask = prompts
    settings = {"attention_mask": mask, "max_new_tokens": 6, "return_dict_in_generate": True, **PLAIN}
    mine, other = ours.generate(ids, **settings), quietly(theirs.generate, ids, **settings)
    assert torch.equal(mine.sequences, other.sequences)
    said = torch.randint(3, 97, (3, 4), generator=torch.Generator().manual_seed(9))
    whole = torch.cat([mine.sequences, said], dim=1)
    return mine.past_key_values, other.past_key_values, whole, torch.cat([mask, torch.ones_like(whole[:, 7:])], dim=1)


def spellings(talk):
    """The cache of the first turn: ours, transformers', from either model, and as tuples."""
    mine, other, _, _ = talk
    return {
        "ours": copy.deepcopy(mine),
        "transformers'": copy.deepcopy(other),
        "tuples": tuple((keys, values) for keys, values, *_ in other),
        "our tuples": mine.to_legacy_cache(),
    }


@pytest.mark.proves("G9")
@pytest.mark.parametrize("spelling", ["ours", "transformers'", "tuples", "our tuples"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 2, "num_return_sequences": 2}])
def test_the_whole_sequence_again(pair, talk, spelling, settings):
    ours, _ = pair
    _, _, whole, mask = talk
    asked = {"attention_mask": mask, "max_new_tokens": 6, **PLAIN, **settings}
    expected = ours.generate(whole, **asked)
    found = ours.generate(whole, past_key_values=spellings(talk)[spelling], **asked)
    assert torch.equal(found, expected)
    chunks = {"past_key_values": spellings(talk)[spelling], "prefill_chunk_size": 2}
    assert torch.equal(ours.generate(whole, **chunks, **asked), expected)


@pytest.mark.proves("G9")
def test_the_cache_is_used_and_not_computed_again(pair, talk, monkeypatch):
    ours, _ = pair
    _, _, whole, mask = talk
    executor = ours.generation_executor("eager")
    sizes = []
    step = executor.step
    monkeypatch.setattr(
        executor,
        "step",
        lambda batch, cache, **kw: (sizes.append(batch.input_ids.numel()), step(batch, cache, **kw))[1],
    )
    ours.generate(whole, attention_mask=mask, past_key_values=spellings(talk)["ours"], max_new_tokens=3, **PLAIN)
    # 17 columns, of which the cache has 12
    assert sizes == [15, 3, 3]


@pytest.mark.proves("G9")
@pytest.mark.parametrize("num_beams", [1, 2])
def test_only_the_new_tokens(pair, talk, num_beams):
    ours, theirs = pair
    _, other, whole, mask = talk
    asked = {"max_new_tokens": 6, "num_beams": num_beams, **PLAIN}
    past = copy.deepcopy(other)
    past.batch_repeat_interleave(num_beams)
    expected = quietly(theirs.generate, whole[:, -5:], attention_mask=mask, past_key_values=past, **asked)
    assert expected.size(1) == 11
    for name, cache in spellings(talk).items():
        found = ours.generate(whole[:, -5:], attention_mask=mask, past_key_values=cache, **asked)
        assert torch.equal(found, expected), name
    # a cache repeated for the beams, as transformers needs it
    past = copy.deepcopy(other)
    past.batch_repeat_interleave(num_beams)
    assert torch.equal(ours.generate(whole[:, -5:], attention_mask=mask, past_key_values=past, **asked), expected)


@pytest.mark.proves("G9")
def test_new_tokens_without_a_mask_follow_the_cache(pair):
    ours, _ = pair
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    expected = ours.generate(ids, max_new_tokens=5, **PLAIN)
    past = ours(ids[:, :6], use_cache=True).past_key_values
    found = ours.generate(ids[:, 6:], past_key_values=past, max_new_tokens=5, **PLAIN)
    assert torch.equal(found, expected[:, 6:])
    assert past.get_seq_length() == 13


@pytest.mark.proves("G9")
def test_a_caches_object_grows_as_in_transformers(pair, prompts, hf):
    ours, theirs = pair
    ids, mask = prompts
    for make in (DynamicCache, hf.module.DynamicCache):
        past, other = make(), hf.module.DynamicCache()
        for turn in range(3):
            settings = {"attention_mask": mask, "max_new_tokens": 4, **PLAIN}
            mine = ours.generate(ids, past_key_values=past, return_dict_in_generate=turn == 1, **settings)
            expected = quietly(theirs.generate, ids, past_key_values=other, **settings)
            if turn == 1:
                assert mine.past_key_values is past
                mine = mine.sequences
            assert torch.equal(mine, expected)
            assert past.get_seq_length() == other.get_seq_length() == mine.size(1) - 1
            ids = torch.cat([mine, torch.full((3, 1), 9)], dim=1)
            mask = torch.cat([mask, torch.ones(3, 5, dtype=torch.int64)], dim=1)
        ids, mask = prompts


@pytest.mark.proves("G9")
def test_rows_that_ended_early_can_be_continued(pair):
    ours, theirs = pair
    ids = torch.randint(3, 97, (3, 5), generator=torch.Generator().manual_seed(6))
    settings = {"max_new_tokens": 9, "eos_token_id": list(range(2, 97, 8)), "pad_token_id": 0}
    mine = ours.generate(ids, return_dict_in_generate=True, **settings)
    other = quietly(theirs.generate, ids, return_dict_in_generate=True, **settings)
    lengths = (mine.sequences != 0).sum(dim=1)
    assert int(lengths.min()) < int(lengths.max())
    # transformers computes the padding of rows that have ended, and so must the cache here, or a mask of ones fails
    whole = torch.cat([mine.sequences, torch.full((3, 1), 11)], dim=1)
    asked = {"attention_mask": torch.ones_like(whole), "max_new_tokens": 5, **PLAIN}
    expected = quietly(theirs.generate, whole, past_key_values=other.past_key_values, **asked)
    assert torch.equal(ours.generate(whole, past_key_values=mine.past_key_values, **asked), expected)


def test_the_returned_cache_goes_on_in_forward(pair, prompts):
    ours, _ = pair
    ids, mask = prompts
    output = ours.generate(ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, **PLAIN)
    mask = torch.cat([mask, torch.ones(3, 3, dtype=torch.int64)], dim=1)
    positions = mask.cumsum(dim=1)[:, -1:] - 1
    last = output.sequences[:, -1:]
    logits = ours(last, past_key_values=output.past_key_values, attention_mask=mask, position_ids=positions).logits
    whole = ours(output.sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(logits[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_a_cache_of_everything_computes_the_last_token_again(pair):
    ours, _ = pair
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    past = ours(ids, use_cache=True).past_key_values.to_legacy_cache()
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, **PLAIN}
    assert torch.equal(ours.generate(ids, past_key_values=past, **asked), ours.generate(ids, **asked))


@pytest.mark.proves("G9")
def test_openai_gpt_goes_on_too():
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    model = OpenAIGPTLMHeadModel(config).eval()
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    first = model.generate(ids[:, :5], max_new_tokens=4, return_dict_in_generate=True, **PLAIN)
    whole = torch.cat([first.sequences, ids], dim=1)
    expected = model.generate(whole, max_new_tokens=6, **PLAIN)
    found = model.generate(whole, past_key_values=first.past_key_values, max_new_tokens=6, **PLAIN)
    assert torch.equal(found, expected)
    embeds = model.get_input_embeddings()(whole).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=6, **PLAIN), expected[:, whole.size(1) :])


@pytest.mark.parametrize("fill", [0, 5])
def test_equal_ids_after_different_pasts_draw_their_own_numbers(pair, fill):
    ours, _ = pair
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(fill))
    past = ours(ids, use_cache=True).past_key_values.to_legacy_cache()
    new = torch.tensor([[7, 8], [7, 8]])
    asked = {"do_sample": True, "seed": 3, "max_new_tokens": 8, **PLAIN}
    both = ours.generate(new, past_key_values=past, **asked)
    for row in range(2):
        alone = tuple((keys[row : row + 1], values[row : row + 1]) for keys, values in past)
        assert torch.equal(ours.generate(new[:1], past_key_values=alone, **asked)[0], both[row])


# ---- embeddings ----------------------------------------------------------------------------------------------------


@pytest.mark.proves("G6", "G9")
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"repetition_penalty": 1.5}, {"num_beams": 2, "min_length": 9}]
)
@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_as_prompts(pair, prompts, settings, with_ids):
    ours, theirs = pair
    ids, mask = prompts
    embeds = ours.transformer.wte(ids).detach()
    asked = {"inputs_embeds": embeds, "attention_mask": mask, "max_new_tokens": 7}
    asked |= {"eos_token_id": list(range(2, 97, 9)), "pad_token_id": 0, **settings}
    asked |= {"input_ids": ids} if with_ids else {}
    expected = quietly(theirs.generate, **asked)
    found = ours.generate(**asked)
    # transformers takes the padding of embeddings off the new tokens when it looks for repetitions
    rows = [0, 2] if "repetition_penalty" in settings and not with_ids else [0, 1, 2]
    assert torch.equal(found[rows], expected[rows])
    # the new tokens alone, if there are no ids to show
    assert found.size(1) <= 7 + 7 * with_ids


@pytest.mark.proves("G9")
@pytest.mark.parametrize("length", [{"max_length": 12}, {"min_length": 12}, {}])
def test_lengths_count_the_embeddings(pair, prompts, length):
    ours, theirs = pair
    ids, mask = prompts
    asked = {"inputs_embeds": ours.transformer.wte(ids).detach(), "attention_mask": mask}
    asked |= {"eos_token_id": list(range(2, 97, 3)), "pad_token_id": 0, **length}
    assert torch.equal(quietly(ours.generate, **asked), quietly(theirs.generate, **asked))


@pytest.mark.proves("G9")
def test_embeddings_that_are_no_tokens(pair):
    ours, theirs = pair
    embeds = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)) * 0.3
    asked = {"inputs_embeds": embeds, "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    mine, other = ours.generate(**asked, **PLAIN), quietly(theirs.generate, **asked, **PLAIN)
    assert torch.equal(mine.sequences, other.sequences)
    for a, b in zip(mine.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for (keys, values), (other_keys, other_values, *_) in zip(mine.past_key_values, other.past_key_values, strict=True):
        torch.testing.assert_close(keys, other_keys, rtol=1e-4, atol=5e-5)
        torch.testing.assert_close(values, other_values, rtol=1e-4, atol=5e-5)
    # a row alone, and a sample
    sampled = {"inputs_embeds": embeds, "max_new_tokens": 8, "do_sample": True, "seed": 1, **PLAIN}
    both = ours.generate(**sampled)
    alone = ours.generate(**{**sampled, "inputs_embeds": embeds[1:]})
    assert torch.equal(both[1:], alone)


def test_blocks_are_free_after_continuing(pair, talk, pools):
    ours, _ = pair
    _, _, whole, mask = talk
    for settings in ({}, {"num_beams": 3}):
        ours.generate(
            whole, attention_mask=mask, past_key_values=spellings(talk)["ours"], max_new_tokens=4, **PLAIN, **settings
        )
    ours.generate(inputs_embeds=torch.zeros(2, 17, 48), max_new_tokens=9, num_beams=2, **PLAIN)
    assert len(pools) == 3
    assert all(pool.num_free == pool.num_blocks for pool in pools)


# ---- what is said about the cache ----------------------------------------------------------------------------------


@pytest.mark.proves("G10")
@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "max_cache_len": 17},
        {"cache_implementation": "paged"},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 3},
        {"prefill_chunk_size": 100},
        {"disable_compile": True},
        {"compile_config": {"mode": "max-autotune"}},
    ],
    ids=str,
)
def test_settings_of_the_cache_change_no_bit(pair, prompts, settings):
    ours, _ = pair
    ours.generation_executor("cpu")
    ids, mask = prompts
    asked = {"attention_mask": mask, "max_new_tokens": 11, "return_dict_in_generate": True, "output_logits": True}
    expected, found = ours.generate(ids, **asked, **PLAIN), ours.generate(ids, **asked, **PLAIN, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@pytest.mark.proves("G10")
def test_chunks_bound_the_tokens_of_a_step(pair, monkeypatch):
    ours, _ = pair
    executor = ours.generation_executor("eager")
    longest = []
    step = executor.step
    monkeypatch.setattr(
        executor, "step", lambda batch, cache, **kw: (longest.append(batch.max_query_len), step(batch, cache, **kw))[1]
    )
    ours.generate([[5] * 11, [6] * 4, [7] * 9], prefill_chunk_size=4, max_new_tokens=2, **PLAIN)
    assert longest == [4, 4, 3, 1]


def test_max_cache_len_without_a_static_cache_is_said_to_be_idle(pair):
    with pytest.warns(UserWarning, match="max_cache_len only matters with cache_implementation='static'"):
        pair[0].generate([[5]], max_cache_len=40, max_new_tokens=2, **PLAIN)


# ---- other arguments -----------------------------------------------------------------------------------------------


def test_positions_that_are_counted_anyway_are_accepted(pair, prompts):
    ours, theirs = pair
    ids, mask = prompts
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    asked = {"attention_mask": mask, "position_ids": positions, "max_new_tokens": 5, **PLAIN}
    assert torch.equal(ours.generate(ids, **asked), quietly(theirs.generate, ids, **asked))
    # what stands at padding says nothing
    other = positions.masked_fill(mask == 0, 1)
    assert torch.equal(ours.generate(ids, **{**asked, "position_ids": other}), ours.generate(ids, **asked))
    with pytest.raises(RequestError, match="position_ids must number"):
        ours.generate(ids, **{**asked, "position_ids": positions + 1})


@pytest.mark.proves("G2", "O7")
@pytest.mark.parametrize("executor", ["cpu", "eager"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_token_types_go_on_with_the_last(pair, prompts, settings, executor):
    ours, theirs = pair
    ours.generation_executor(executor)
    ids, mask = prompts
    types = (torch.arange(7) > 3).long().expand(3, -1)
    asked = {"attention_mask": mask, "max_new_tokens": 8, "return_dict_in_generate": True, **PLAIN, **settings}
    asked |= {"output_hidden_states": True, "token_type_ids": types}
    mine, other = ours.generate(ids, **asked), quietly(theirs.generate, ids, **asked)
    assert torch.equal(mine.sequences, other.sequences)
    plain = ours.generate(ids, attention_mask=mask, max_new_tokens=8, **PLAIN, **settings)
    assert not torch.equal(mine.sequences, plain)
    torch.testing.assert_close(mine.hidden_states[4][-1], other.hidden_states[4][-1], rtol=1e-4, atol=2e-4)
    embeds = ours.transformer.wte(ids).detach()
    found = ours.generate(inputs_embeds=embeds, **{**asked, "output_hidden_states": False})
    assert torch.equal(found.sequences, mine.sequences[:, 7:])


@pytest.mark.proves("G13")
def test_a_loop_of_ones_own_is_called_as_transformers_calls_it(pair, prompts):
    ours, theirs = pair
    ids, mask = prompts
    seen = []

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, flavour=None, **model_kwargs):
        seen.append((flavour, generation_config.max_new_tokens, sorted(model_kwargs), model_kwargs["use_cache"]))
        attention_mask = model_kwargs["attention_mask"]
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        while not bool(done.all()):
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = model(input_ids, attention_mask=attention_mask, position_ids=positions).logits[:, -1]
            # the second best, after the processors of the call
            token = logits_processor(input_ids, logits.float()).topk(2).indices[:, 1]
            input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(token[:, None])], dim=1)
            done = done | stopping_criteria(input_ids, None)
        return input_ids

    asked = {"attention_mask": mask, "max_new_tokens": 5, "custom_generate": loop, "flavour": "mint", "pad_token_id": 0}
    asked |= {"repetition_penalty": 1.3, "bad_words_ids": [[5]]}
    mine, expected = ours.generate(ids, **asked), quietly(theirs.generate, ids, **asked)
    assert mine.size(1) > 7
    assert torch.equal(mine, expected)
    (flavour, count, names, use_cache), theirs_saw = seen
    assert (flavour, count, use_cache) == ("mint", 5, True)
    assert set(names) == set(theirs_saw[2])


def test_a_loop_gets_the_streamer_and_the_assistant_if_it_names_them(model):
    def plain(model, input_ids, **others):
        raise AssertionError

    def full(model, input_ids, streamer=None, assistant_model=None, **others):
        return streamer, assistant_model, sorted(others)

    for name, value in (("streamer", object()), ("assistant_model", model)):
        with pytest.raises(RequestError, match=f"custom_generate has no parameter {name}"):
            model.generate([[5, 6]], custom_generate=plain, **{name: value})
    streamer = object()
    shown, assistant, others = model.generate(
        [[5, 6]], custom_generate=full, streamer=streamer, assistant_model=model, max_new_tokens=3
    )
    assert shown is streamer
    assert assistant is model
    assert "streamer" not in others
    assert model.generate([[5, 6]], custom_generate=full, max_new_tokens=3)[:2] == (None, None)


def test_a_loop_gets_our_lists(model):
    def loop(model, input_ids, logits_processor, stopping_criteria, **others):
        assert isinstance(logits_processor, LogitsProcessorList)
        assert isinstance(stopping_criteria, StoppingCriteriaList)
        assert isinstance(others["past_key_values"], DynamicCache)
        assert others["attention_mask"] is None
        return len(logits_processor), input_ids

    count, ids = model.generate(
        [[5, 6]], custom_generate=loop, do_sample=True, top_k=4, num_return_sequences=3, logits_processor=[max]
    )
    assert count == 2
    assert ids.tolist() == [[5, 6]] * 3
