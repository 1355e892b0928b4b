"""What ``generate`` returns besides tokens, against transformers."""

import warnings

import pytest
import torch

from gpt2rt import DynamicCache, GPT2Config, GPT2DoubleHeadsModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gpt2rt.errors import RequestError
from gpt2rt.generation.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}


def quietly(generate, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return generate(*args, **kwargs)


@pytest.fixture(scope="module")
def pairs(make_model, hf):
    """GPT-2 and OpenAI GPT in both libraries."""
    gpt2 = make_model()
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    gpt1 = OpenAIGPTLMHeadModel(config).eval()
    theirs = hf.module.OpenAIGPTConfig(**config.to_dict(), attn_implementation="eager")
    copy = hf.module.OpenAIGPTLMHeadModel(theirs).eval()
    copy.load_state_dict(gpt1.state_dict())
    return {"gpt2": (gpt2, hf.copy_of(gpt2)), "openai-gpt": (gpt1, copy)}


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of 7, 4 and 7 tokens, padded on the left, and their mask."""
    ids = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids.masked_fill(mask == 0, 0), mask


def assert_steps_equal(mine, theirs, mask):
    """Values are equal but for the queries that are padding; shapes are equal for all."""
    assert len(mine) == len(theirs)
    for ours, others in zip(mine, theirs, strict=True):
        assert len(ours) == len(others)
        for a, b in zip(ours, others, strict=True):
            assert a.shape == b.shape
            queries = a.size(-2)
            if queries > 1:
                kept = mask.repeat_interleave(len(a) // len(mask), dim=0) != 0
                kept = torch.cat([kept, kept.new_ones(len(kept), queries - mask.size(1))], dim=1)
                a, b = (x.transpose(1, 2)[kept] if x.dim() == 4 else x[kept] for x in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)


def assert_caches_equal(mine, theirs, mask):
    for (keys, values, *_), (other_keys, other_values, *_) in zip(mine, theirs, strict=True):
        assert keys.shape == other_keys.shape
        kept = mask.repeat_interleave(len(keys) // len(mask), dim=0) != 0
        kept = torch.cat([kept, kept.new_ones(len(keys), keys.size(2) - mask.size(1))], dim=1)
        for a, b in ((keys, other_keys), (values, other_values)):
            torch.testing.assert_close(a.transpose(1, 2)[kept], b.transpose(1, 2)[kept], rtol=1e-4, atol=5e-5)
            assert not bool(a.transpose(1, 2)[~kept].any())


CALLS = {
    "greedy": {"max_new_tokens": 8},
    "rows end early": {"max_new_tokens": 9, "eos_token_id": list(range(2, 97, 9))},
    "one token": {"max_new_tokens": 1},
    "beams": {"max_new_tokens": 8, "num_beams": 3},
    "beams of one token": {"max_new_tokens": 1, "num_beams": 2},
    "up to the last position": {"max_new_tokens": 41},
    "no cache": {"max_new_tokens": 6, "use_cache": False},
    "beams without a cache": {"max_new_tokens": 6, "use_cache": False, "num_beams": 2},
}


@pytest.mark.proves("G6")
@pytest.mark.parametrize("name", ["gpt2", "openai-gpt"])
@pytest.mark.parametrize("call", CALLS)
def test_everything(pairs, prompts, name, call):
    ours, theirs = pairs[name]
    ids, mask = prompts
    settings = {"attention_mask": mask, "eos_token_id": None, "pad_token_id": 0, **CALLS[call]}
    mine, other = ours.generate(ids, **EVERYTHING, **settings), quietly(theirs.generate, ids, **EVERYTHING, **settings)
    assert torch.equal(mine.sequences, other.sequences)
    assert_steps_equal(mine.attentions, other.attentions, mask)
    assert_steps_equal(mine.hidden_states, other.hidden_states, mask)
    if name == "gpt2":
        # transformers' OpenAI GPT has no cache, and each of its steps holds the whole row
        assert mine.keys() == list(other.keys())
        if mine.past_key_values is not None:
            assert_caches_equal(mine.past_key_values, other.past_key_values, mask)
    assert all(a.shape == b.shape for a, b in zip(mine.scores, other.scores, strict=True))


@pytest.mark.proves("G6")
def test_beams_that_are_done_keep_the_shapes(pairs, prompts):
    ours, theirs = pairs["gpt2"]
    ids, mask = prompts
    settings = {"num_beams": 3, "max_new_tokens": 9, "eos_token_id": list(range(2, 97, 9)), "early_stopping": True}
    settings |= {"attention_mask": mask, "pad_token_id": 0, "num_return_sequences": 2}
    mine, other = ours.generate(ids, **EVERYTHING, **settings), quietly(theirs.generate, ids, **EVERYTHING, **settings)
    assert isinstance(mine, GenerateBeamDecoderOnlyOutput)
    assert mine.keys() == list(other.keys())
    assert torch.equal(mine.sequences, other.sequences)
    assert torch.equal(mine.beam_indices, other.beam_indices)
    for name in ("attentions", "hidden_states"):
        for a, b in zip(mine[name], other[name], strict=True):
            assert [x.shape for x in a] == [x.shape for x in b]
    shapes = [(keys.shape, values.shape) for keys, values in mine.past_key_values]
    assert shapes == [(keys.shape, values.shape) for keys, values, *_ in other.past_key_values]


@pytest.mark.proves("G6")
def test_sampled_rows_have_their_own_attentions(pairs, prompts):
    ours, _ = pairs["gpt2"]
    ids, mask = prompts
    settings = {"do_sample": True, "seed": 1, "num_return_sequences": 2, "max_new_tokens": 5, "eos_token_id": None}
    output = ours.generate(ids, attention_mask=mask, **EVERYTHING, **settings)
    positions = (torch.cat([mask, torch.ones(3, 4, dtype=torch.int64)], 1).cumsum(1) - 1).clamp(min=0)
    whole = ours(
        output.sequences[:, :-1],
        attention_mask=torch.cat([mask, torch.ones(3, 4, dtype=torch.int64)], 1).repeat_interleave(2, dim=0),
        position_ids=positions.repeat_interleave(2, dim=0),
        output_attentions=True,
        output_hidden_states=True,
    )
    for layer, probs in enumerate(whole.attentions):
        torch.testing.assert_close(output.attentions[4][layer], probs[:, :, -1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.attentions[2][layer], probs[:, :, 8:9, :9], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.hidden_states[1][2], whole.hidden_states[2][:, 7:8], rtol=1e-4, atol=1e-5)


def test_a_model_in_training_mode_is_left_as_it_was(make_model):
    model = make_model(attn_pdrop=0.9, resid_pdrop=0.9, embd_pdrop=0.9)
    expected = model.generate([[5, 6, 7]], max_new_tokens=4, **EVERYTHING)
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    found = model.generate([[5, 6, 7]], max_new_tokens=4, **EVERYTHING)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(found.attentions[3][1], expected.attentions[3][1])


@pytest.mark.proves("G6")
def test_double_heads_generate_too(hf):
    torch.manual_seed(1)
    model = GPT2DoubleHeadsModel(GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=4)).eval()
    output = model.generate([[5, 6, 7]], max_new_tokens=3, eos_token_id=None, pad_token_id=0, **EVERYTHING)
    expected = quietly(
        hf.copy_of(model).generate, torch.tensor([[5, 6, 7]]), max_new_tokens=3, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(output.sequences, expected)
    assert output.attentions[2][0].shape == (1, 4, 1, 5)
    assert isinstance(output.past_key_values, DynamicCache)


def test_no_cache_is_returned_without_one(model):
    output = model.generate([[5, 6]], max_new_tokens=3, use_cache=False, return_dict_in_generate=True)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert output.past_key_values is None
    assert output.keys() == ["sequences"]
    assert output.get("scores", 5) == 5
    with pytest.raises(KeyError, match="scores"):
        output["scores"]


def test_all_blocks_are_free_when_the_cache_is_returned(model, pools):
    for settings in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}):
        model.generate([[5, 6], [7]], max_new_tokens=9, return_dict_in_generate=True, pad_token_id=0, **settings)
    assert len(pools) == 3
    assert all(pool.num_free == pool.num_blocks for pool in pools)


@pytest.mark.proves("G6")
def test_speculation_returns_the_same_cache(make_model):
    model, draft = make_model(), make_model(seed=5)
    model.generation_executor("cpu")
    settings = {"max_new_tokens": 15, "eos_token_id": list(range(2, 97, 9)), "pad_token_id": 0}
    ids = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(3))
    plain = model.generate(ids, **EVERYTHING, **settings)
    for source in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        assisted = model.generate(ids, **EVERYTHING, **settings, **source)
        assert torch.equal(assisted.sequences, plain.sequences)
        for mine, other in zip(assisted.past_key_values, plain.past_key_values, strict=True):
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])


# ---- transition scores ---------------------------------------------------------------------------------------------


@pytest.mark.proves("G6")
@pytest.mark.parametrize("normalize_logits", [False, True])
def test_transition_scores_of_greedy_rows(pairs, prompts, normalize_logits):
    ours, theirs = pairs["gpt2"]
    ids, mask = prompts
    settings = {"attention_mask": mask, "max_new_tokens": 6, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    mine, other = ours.generate(ids, **settings), quietly(theirs.generate, ids, **settings)
    found = ours.compute_transition_scores(mine.sequences, mine.scores, normalize_logits=normalize_logits)
    expected = theirs.compute_transition_scores(other.sequences, other.scores, normalize_logits=normalize_logits)
    assert found.shape == (3, 6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_transition_scores_of_something_else(model):
    with pytest.raises(RequestError, match="scores is empty; call generate with"):
        model.compute_transition_scores(torch.zeros(2, 3, dtype=torch.int64), ())
    with pytest.raises(RequestError, match="sequences has 2 rows, scores has 6"):
        model.compute_transition_scores(torch.zeros(2, 3, dtype=torch.int64), (torch.zeros(6, 97),))
    with pytest.raises(RequestError, match="beam_indices has 4 steps, scores 1"):
        model.compute_transition_scores(
            torch.zeros(2, 3, dtype=torch.int64), (torch.zeros(6, 97),), torch.zeros(2, 4, dtype=torch.int32)
        )
