"""The cache that forward takes and returns."""

import copy

import pytest
import torch

from gpt2rt.models import DynamicCache
from gpt2rt.models.cache import DynamicLayer

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}


def kv(length, batch=2, start=0.0):
    x = torch.arange(batch * 3 * length * 4, dtype=torch.float32).view(batch, 3, length, 4) + start
    return x, -x


@pytest.mark.parametrize("steps", [[5], [5, 1], [1] * 20, [3, 4, 1, 7]])
def test_updates_append(steps):
    whole_keys, whole_values = kv(sum(steps))
    layer = DynamicLayer()
    done = 0
    for step in steps:
        part = slice(done, done + step)
        keys, values = layer.update(whole_keys[:, :, part], whole_values[:, :, part])
        done += step
        assert torch.equal(keys, whole_keys[:, :, :done])
        assert torch.equal(values, whole_values[:, :, :done])
        assert torch.equal(layer.keys, keys)
        assert layer.get_seq_length() == done


def test_growth_moves_old_tokens_rarely():
    layer = DynamicLayer(max_length=1000)
    buffers = set()
    for _ in range(1000):
        layer.update(*kv(1))
        buffers.add(layer._keys.data_ptr())
    assert layer.get_seq_length() == 1000
    # 1, 4, 10, 22, 46, 94, 190, 382, 766, 1000: doubling, and never past max_length
    assert len(buffers) <= 10
    assert layer._keys.size(2) == 1000


def test_gradients_flow_through_an_update():
    layer = DynamicLayer()
    first, second = (torch.ones(1, 1, 2, 4, requires_grad=True) for _ in range(2))
    layer.update(first, first)
    keys, _ = layer.update(second, second)
    (keys * torch.arange(4.0).view(1, 1, 4, 1)).sum().backward()
    assert first.grad[0, 0, :, 0].tolist() == [0.0, 1.0]
    assert second.grad[0, 0, :, 0].tolist() == [2.0, 3.0]


def test_tensors_handed_out_do_not_change_when_the_cache_is_cut_and_goes_on():
    cache = DynamicCache()
    for _ in range(3):
        cache.update(*kv(2), 0)
    kept = cache.to_legacy_cache()
    before = kept[0][0].clone()
    cache.crop(3)
    cache.update(*kv(2, start=1000.0), 0)
    assert torch.equal(kept[0][0], before)
    restarted = DynamicCache.from_legacy_cache(kept)
    restarted.update(*kv(1, start=5000.0), 0)
    assert torch.equal(kept[0][0], before)
    assert cache.get_seq_length() == 5
    assert restarted.get_seq_length() == 7


@pytest.mark.parametrize(("argument", "left"), [(4, 4), (99, 6), (0, 0), (-2, 4), (-99, 0)])
def test_crop(argument, left):
    cache = DynamicCache()
    cache.update(*kv(6), 0)
    cache.update(*kv(6), 1)
    cache.crop(argument)
    assert [cache.get_seq_length(i) for i in (0, 1, 2)] == [left, left, 0]
    assert torch.equal(cache[1][0], kv(6)[0][:, :, :left])


def test_reorder_selects_repeats_and_drops_rows():
    cache = DynamicCache()
    cache.update(*kv(3), 0)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(cache[0][0], kv(3)[0][[1, 1, 0]])
    cache.update(*kv(1, batch=3), 0)
    assert cache[0][1].shape == (3, 3, 4, 4)


def test_reads_like_the_older_tuples():
    data = [kv(3), kv(3, start=7.0)]
    cache = DynamicCache(data)
    assert len(cache) == 2
    for (keys, values), (want_keys, want_values) in zip(cache, data, strict=True):
        assert torch.equal(keys, want_keys)
        assert torch.equal(values, want_values)
    assert cache[1][0] is not None
    assert cache.get_seq_length() == 3
    assert DynamicCache()
    assert len(DynamicCache()) == 0
    with pytest.raises(IndexError):
        cache[2]
    twin = copy.deepcopy(cache)
    twin.update(*kv(1), 0)
    assert cache.get_seq_length() == 3


def test_a_cache_made_in_inference_mode_can_be_continued_outside(model, ids):
    with torch.inference_mode():
        past = model(ids[:, :4]).past_key_values
        past = model(ids[:, 4:5], past_key_values=past).past_key_values
    with torch.no_grad():
        got = model(ids[:, 5:], past_key_values=past).logits
    torch.testing.assert_close(got, model(ids).logits[:, 5:], **TOLERANCE)


def test_other_shapes_and_dtypes_are_refused():
    cache = DynamicCache()
    cache.update(*kv(3), 0)
    with pytest.raises(ValueError, match=r"\[2, 3, 3, 4\].*\[1, 3, 1, 4\]"):
        cache.update(*kv(1, batch=1), 0)
    with pytest.raises(ValueError, match=r"float32.*float16"):
        cache.update(*(x.half() for x in kv(1)), 0)
    with pytest.raises(ValueError, match="must both be"):
        DynamicCache([(torch.ones(2, 3), torch.ones(2, 3))])
    assert cache.get_seq_length() == 3


@pytest.mark.proves("F8")
def test_one_token_at_a_time_equals_all_at_once(model, path, ids):
    cache = DynamicCache(config=model.config)
    rows = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9)]
    torch.testing.assert_close(torch.cat(rows, 1), model(ids).logits, **TOLERANCE)
    assert cache.get_seq_length() == 9


def test_use_cache_decides_what_is_returned(model, path, ids):
    assert isinstance(model(ids).past_key_values, DynamicCache)
    assert model(ids, use_cache=False).past_key_values is None
    past = model(ids[:, :5]).past_key_values
    out = model(ids[:, 5:], past_key_values=past, use_cache=False)
    assert out.past_key_values is None
    torch.testing.assert_close(out.logits, model(ids).logits[:, 5:], **TOLERANCE)


@pytest.mark.proves("F8")
@pytest.mark.parametrize("kind", ["tuple", "list", "stacked"])
def test_tuples_of_keys_and_values(model, path, ids, kind):
    """transformers 4 took them, and its oldest checkpoints' code stacks keys and values into one tensor."""
    past = model(ids[:, :5]).past_key_values.to_legacy_cache()
    given = {
        "tuple": past,
        "list": [list(entry) for entry in past],
        "stacked": tuple(torch.stack(entry) for entry in past),
    }[kind]
    out = model(ids[:, 5:], past_key_values=given)
    torch.testing.assert_close(out.logits, model(ids).logits[:, 5:], **TOLERANCE)
    assert isinstance(out.past_key_values, DynamicCache)
    assert out.past_key_values.get_seq_length() == 9
    assert past[0][0].size(2) == 5


@pytest.mark.proves("F8")
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_of_transformers(pair, hf, ids, kind):
    ours, theirs = pair()
    make = {
        "dynamic": lambda: hf.module.DynamicCache(config=theirs.config),
        "static": lambda: hf.module.StaticCache(config=theirs.config, max_cache_len=20),
    }[kind]
    with torch.no_grad():
        cache = make()
        rows = [ours(ids[:, :5], past_key_values=cache).logits]
        mask = torch.ones(2, 8)
        out = ours(ids[:, 5:8], past_key_values=cache, attention_mask=mask)
        rows += [out.logits, ours(ids[:, 8:], past_key_values=cache).logits]
        assert out.past_key_values is cache
        assert int(cache.get_seq_length()) == 9
        torch.testing.assert_close(torch.cat(rows, 1), theirs(ids).logits, **TOLERANCE)


@pytest.mark.proves("F8")
def test_a_cache_filled_by_transformers_goes_on_here(pair, path, ids):
    ours, theirs = pair()
    past = theirs(ids[:, :5]).past_key_values
    got = ours(ids[:, 5:], past_key_values=past)
    assert got.past_key_values is past
    torch.testing.assert_close(got.logits, theirs(ids).logits[:, 5:], **TOLERANCE)


@pytest.mark.proves("F8")
@pytest.mark.parametrize(
    ("past", "error", "message"),
    [
        ("text", TypeError, "past_key_values is a str"),
        (torch.ones(2, 3), TypeError, "past_key_values is a Tensor"),
        ((kv(3),), ValueError, "1 entries, but the model has 2 blocks"),
        ((kv(3), kv(3)), ValueError, r"\[2, 3, 'seq_len', 16\], got \[2, 3, 3, 4\]"),
        (((torch.ones(1, 3, 4, 16),) * 2,) * 2, ValueError, r"got \[1, 3, 4, 16\]"),
        (((torch.ones(2, 3, 4, 16),) * 3,) * 2, ValueError, "got 3 items"),
    ],
)
def test_pasts_that_do_not_fit(model, path, ids, past, error, message):
    with pytest.raises(error, match=message):
        model(ids, past_key_values=past)
