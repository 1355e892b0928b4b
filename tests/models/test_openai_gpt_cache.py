"""The first key-value cache for OpenAI GPT: what it returns, and that it changes no number."""

import pytest
import torch
from openai_gpt_models import copy_of, left_padded, make, random_ids

from gpt2rt import (
    DynamicCache,
    EncoderDecoderCache,
    InputRangeError,
    OpenAIGPTDoubleHeadsModel,
    OpenAIGPTForSequenceClassification,
    OpenAIGPTModel,
)

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
pytestmark = pytest.mark.proves("O3")


@pytest.fixture
def ids():
    return random_ids(2, 12)


def test_transformers_results_come_without_a_cache(hf, path, ids):
    model = make()
    assert "past_key_values" not in model(ids)
    assert "past_key_values" not in model(ids, use_cache=False)
    assert model(ids).past_key_values is None
    assert len(model(ids, return_dict=False)) == 1
    # asked for or not, transformers has none
    assert "past_key_values" not in copy_of(hf, model)(ids, use_cache=True)


@pytest.mark.parametrize("steps", [[12], [11, 1], [5, 7], [1] * 12, [3, 4, 1, 4]], ids=str)
def test_steps_with_a_cache_are_the_whole_forward(path, ids, steps):
    model = make()
    full = model(ids, output_attentions=True)
    cache, logits, start = None, [], 0
    for step in steps:
        part = ids[:, start : start + step]
        out = model(part, past_key_values=cache, use_cache=True, output_attentions=True)
        assert list(out) == ["logits", "attentions", "past_key_values"]
        assert cache is None or out.past_key_values is cache
        cache, start = out.past_key_values, start + step
        logits.append(out.logits)
        for got, want in zip(out.attentions, full.attentions, strict=True):
            torch.testing.assert_close(got, want[:, :, start - step : start, :start], **TOLERANCE)
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(logits, dim=1), full.logits, **TOLERANCE)


def test_steps_with_a_cache_are_transformers_forward(hf, path, ids):
    model = make()
    want = copy_of(hf, model)(ids).logits
    past = model(ids[:, :9], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, 9:], past_key_values=past).logits, want[:, 9:], **TOLERANCE)


def test_padding_and_a_cache(path, ids):
    model = make()
    mask = left_padded([12, 7], 12)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    full = model(ids, attention_mask=mask, position_ids=positions).logits
    first = model(ids[:, :8], attention_mask=mask[:, :8], position_ids=positions[:, :8], use_cache=True)
    second = model(
        ids[:, 8:], attention_mask=mask, position_ids=positions[:, 8:], past_key_values=first.past_key_values
    )
    torch.testing.assert_close(second.logits, full[:, 8:], **TOLERANCE)
    # a pad may look ahead no further than its own call, and nobody looks at it
    real = mask[:, :8].bool()
    torch.testing.assert_close(first.logits[real], full[:, :8][real], **TOLERANCE)


def test_masks_per_query_over_a_past(path, ids):
    model = make()
    flags = torch.ones(12, 12, dtype=torch.bool).tril()
    flags[8:, 1:3] = False
    full = model(ids, attention_mask=flags.expand(2, 12, 12)).logits
    past = model(ids[:, :8], use_cache=True).past_key_values
    got = model(ids[:, 8:], past_key_values=past, attention_mask=flags[8:].expand(2, 4, 12)).logits
    torch.testing.assert_close(got, full[:, 8:], **TOLERANCE)


@pytest.mark.parametrize("kind", ["legacy tuple", "transformers", "static"])
def test_caches_of_other_makers(hf, path, ids, kind):
    model = make()
    full = model(ids).logits
    past = model(ids[:, :9], use_cache=True).past_key_values
    assert [tuple(keys.shape) for keys, _ in past] == [(2, 4, 9, 8)] * 2
    if kind == "legacy tuple":
        given = past.to_legacy_cache()
    elif kind == "transformers":
        given = hf.module.DynamicCache(past.to_legacy_cache())
    else:
        given = hf.module.StaticCache(hf.module.GPT2Config(n_layer=2, n_head=4, n_embd=32), max_cache_len=20)
        model(ids[:, :9], past_key_values=given)
    out = model(ids[:, 9:], past_key_values=given)
    torch.testing.assert_close(out.logits, full[:, 9:], **TOLERANCE)
    assert out.past_key_values.get_seq_length() == 12
    if kind == "legacy tuple":
        assert given[0][0].size(2) == 9


def test_a_cache_given_is_returned_unless_refused(ids):
    model = make()
    past = model(ids, use_cache=True).past_key_values
    one = torch.tensor([[1], [2]])
    assert model(one, past_key_values=past).past_key_values is past
    assert "past_key_values" not in model(one, past_key_values=past, use_cache=False)
    # it stands last, so that the places of the others do not change
    as_tuple = model(one, past_key_values=past, output_hidden_states=True, return_dict=False)
    assert as_tuple[-1] is past
    assert len(as_tuple[1]) == 3
    assert past.get_seq_length() == 15


def test_every_class_takes_a_cache(path, ids):
    for kind, field in (
        (OpenAIGPTModel, "last_hidden_state"),
        (OpenAIGPTDoubleHeadsModel, "logits"),
        (OpenAIGPTForSequenceClassification, "logits"),
    ):
        model = make(kind, pad_token_id=0)
        past = model(ids[:, :9], use_cache=True).past_key_values
        got, want = model(ids[:, 9:], past_key_values=past), model(ids)
        expected = want[field] if kind is OpenAIGPTForSequenceClassification else want[field][:, 9:]
        torch.testing.assert_close(got[field], expected, **TOLERANCE)
        if kind is OpenAIGPTDoubleHeadsModel:
            torch.testing.assert_close(got.mc_logits, want.mc_logits, **TOLERANCE)


def test_choices_share_a_cache(path):
    model = make(OpenAIGPTDoubleHeadsModel)
    ids = random_ids(2, 3, 10)
    want = model(ids)
    past = model(ids[..., :6], use_cache=True).past_key_values
    got = model(ids[..., 6:], past_key_values=past)
    torch.testing.assert_close(got.logits, want.logits[:, :, 6:], **TOLERANCE)
    torch.testing.assert_close(got.mc_logits, want.mc_logits, **TOLERANCE)


def test_cut_reorder_and_copy(path, ids):
    model = make()
    full = model(ids).logits
    past = model(ids, use_cache=True).past_key_values
    twin = DynamicCache.from_legacy_cache(past.to_legacy_cache())
    past.crop(7)
    torch.testing.assert_close(model(ids[:, 7:], past_key_values=past).logits, full[:, 7:], **TOLERANCE)
    twin.crop(7)
    twin.reorder_cache(torch.tensor([1, 1]))
    swapped = model(ids[[1, 1], 7:], past_key_values=twin).logits
    torch.testing.assert_close(swapped, full[[1, 1], 7:], **TOLERANCE)


def test_gradients_flow_through_the_cache(ids):
    model = make(initializer_range=0.1)
    past = model(ids[:, :5], use_cache=True).past_key_values
    model(ids[:, 5:], past_key_values=past, logits_to_keep=1).logits.square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids, logits_to_keep=1).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(path, ids, dtype):
    model = make(initializer_range=0.1).to(dtype)
    full = model(ids).logits
    past = model(ids[:, :9], use_cache=True).past_key_values
    assert past[0][0].dtype == dtype
    torch.testing.assert_close(model(ids[:, 9:], past_key_values=past).logits, full[:, 9:], rtol=0.0, atol=2e-2)


@pytest.mark.proves("D9")
def test_too_long_with_the_past(ids):
    model = make(n_positions=14)
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(InputRangeError, match=r"3 tokens after 12 in past_key_values need 15 positions"):
        model(ids[:, :3], past_key_values=past)
    assert past.get_seq_length() == 12


def test_caches_that_do_not_fit(ids):
    model = make()
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use the cache with the batch it was made from"):
        model(ids[:1], past_key_values=past)
    with pytest.raises(ValueError, match="3 entries, but the model has 2 blocks"):
        model(ids, past_key_values=(*past, past[0]))
    with pytest.raises(ValueError, match="OpenAI GPT has no cross attention"):
        model(ids, past_key_values=EncoderDecoderCache(past, DynamicCache()))
    with pytest.raises(ValueError, match="covers 1 keys, but 12 past and 1 new tokens make 13"):
        model(ids[:, :1], past_key_values=past, attention_mask=torch.ones(2, 1))
