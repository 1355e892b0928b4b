"""Attention masks of every shape, and what fully masked rows give."""

import math

import pytest
import torch

from gpt2rt.models.attention import AttentionMask, attend

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


@pytest.mark.proves("F6")
def test_an_additive_mask_goes_through_unchanged(pair, path, ids):
    """Not only -inf and 0: a bias over distance, as ALiBi has, on top of a mask that is not causal."""
    ours, theirs = pair()
    distance = -0.3 * (torch.arange(9)[:, None] - torch.arange(9)).abs().float()
    mask = distance.expand(2, 1, 9, 9).clone()
    mask[0, :, :, 7:] = torch.finfo(torch.float32).min
    want = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits, want, **TOLERANCE)
    by_head = mask.repeat(1, 3, 1, 1)
    by_head[:, 1, :, 0] -= 1.0
    want = theirs(ids, attention_mask=by_head, output_attentions=True)
    torch.testing.assert_close(ours(ids, attention_mask=by_head).logits, want.logits, **TOLERANCE)
    got = ours(ids, attention_mask=by_head, output_attentions=True)
    torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)
    torch.testing.assert_close(got.attentions, want.attentions, **TOLERANCE)


def test_a_bias_is_not_rounded_to_the_dtype_of_the_model(build, path, ids):
    """In bfloat16 1024 and 1025 are the same number; softmax only sees the difference, so rounding would undo it."""
    model = build().bfloat16()
    bias = torch.where(causal(9), 1024.0, -math.inf).expand(2, 1, 9, 9).clone()
    bias[..., 2] += 1.0
    small = bias - 1024.0
    torch.testing.assert_close(
        model(ids, attention_mask=bias).logits, model(ids, attention_mask=small).logits, rtol=0.0, atol=1e-2
    )


@pytest.mark.proves("F6", "D8")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("shape", ["BSS", "B1SS", "BHSS", "11SS"])
def test_a_mask_with_queries_says_everything(pair, path, ids, dtype, shape):
    """transformers reads a (B, S, S) mask as (B, S * S), and adds booleans to the scores."""
    ours, theirs = pair()
    flags = causal(9)
    flags[5:, 1] = False
    flags[0, 3] = True  # sees the future: causality is not added
    additive = torch.where(flags, 0.0, -math.inf).expand(2, 1, 9, 9)
    want = theirs(ids, attention_mask=additive).logits
    mask = additive if dtype == torch.float32 else flags.to(dtype).expand(2, 1, 9, 9)
    mask = {"BSS": mask[:, 0], "B1SS": mask, "BHSS": mask.expand(2, 3, 9, 9), "11SS": mask[:1]}[shape]
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits, want, **TOLERANCE)


@pytest.mark.proves("F6")
@pytest.mark.parametrize("dims", [3, 4])
def test_masks_with_queries_over_a_past(model, path, ids, dims):
    flags = causal(9)
    flags[6:, 1:3] = False
    full = model(ids, attention_mask=flags.expand(2, 9, 9)).logits
    past = model(ids[:, :6]).past_key_values
    mask = flags[6:].expand(2, 3, 9)
    got = model(ids[:, 6:], past_key_values=past, attention_mask=mask if dims == 3 else mask.unsqueeze(1)).logits
    torch.testing.assert_close(got, full[:, 6:], **TOLERANCE)


@pytest.mark.proves("F6")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_flags_per_key_of_any_dtype(model, path, ids, dtype):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    want = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, want)


@pytest.mark.proves("F6", "D8")
def test_a_mask_like_the_choices_is_per_key_and_one_like_the_rows_per_query(model, path):
    """(2, 3, 3) for ids of (2, 3, 3) has the shape of the ids: one flag per key. For 6 rows it is (6, 3, 3)."""
    ids = torch.arange(18).view(2, 3, 3)
    per_key = torch.ones(2, 3, 3, dtype=torch.long)
    per_key[1, 2, 2] = 0
    want = model(ids.view(6, 3), attention_mask=per_key.view(6, 3)).logits
    torch.testing.assert_close(model(ids, attention_mask=per_key).logits.view(6, 3, 97), want, **TOLERANCE)
    per_query = causal(3) & per_key.bool().view(6, 1, 3)
    got = model(ids, attention_mask=per_query).logits.view(6, 3, 97)
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.proves("F6", "fault:F43")
@pytest.mark.parametrize("want_attentions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["flags", "lowest", "inf", "3d"])
def test_rows_that_see_nothing_get_zeros(build, path, ids, kind, dtype, want_attentions):
    """Left padding makes them (the first pad sees only itself), and softmax over nothing is NaN."""
    model = build().to(dtype)
    mask = torch.ones_like(ids)
    mask[0] = 0
    mask[1, :3] = 0
    if kind != "flags":
        mask = causal(9) & mask.bool().unsqueeze(1)
    if kind in ("lowest", "inf"):
        low = torch.finfo(dtype).min if kind == "lowest" else -math.inf
        mask = torch.zeros(2, 1, 9, 9).masked_fill(~mask.unsqueeze(1), low)
    out = model(ids, attention_mask=mask, output_attentions=want_attentions)
    assert out.logits.isfinite().all()
    if want_attentions:
        probs = out.attentions[0].float()
        assert probs[0].count_nonzero() == 0
        assert probs[1, :, :3].count_nonzero() == 0
        torch.testing.assert_close(probs[1, :, 3:].sum(-1), torch.ones(3, 6), rtol=0.0, atol=1e-2)
    if kind == "flags" and not want_attentions:
        alone = model(ids[1:, 3:], position_ids=torch.arange(3, 9).unsqueeze(0)).logits
        torch.testing.assert_close(out.logits[1:, 3:], alone, rtol=0.0, atol=1e-2 if dtype.itemsize < 4 else 2e-5)


@pytest.mark.proves("F6")
def test_attention_of_a_row_that_sees_nothing_is_exactly_zero(path):
    query, key, value = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    allowed = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    allowed[..., 2, :] = False
    for bias in (None, torch.zeros(1, 1, 4, 4)):
        for want_probs in (False, True):
            out, _ = attend(query, key, value, AttentionMask.of(allowed, bias), 0.5, want_probs=want_probs)
            assert out[0, :, 2].count_nonzero() == 0
            assert out[0, :, 3].count_nonzero() == 16


def test_gradients_stay_finite_where_a_row_sees_nothing(build, ids):
    model = build()
    mask = torch.ones_like(ids)
    mask[0] = 0
    mask[1, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for wanted in (False, True):
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels, output_attentions=wanted).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert model.transformer.h[0].attn.c_attn.weight.grad.count_nonzero() > 0


@pytest.mark.proves("D5")
def test_autocast_leaves_scores_and_softmax_in_float32():
    query, key, value = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = AttentionMask(causal=True)
    want, want_probs = attend(query, key, value, mask, 0.5, want_probs=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, got_probs = attend(query, key, value, mask, 0.5, want_probs=True)
    assert torch.equal(got, want)
    assert torch.equal(got_probs, want_probs)


@pytest.mark.proves("D5")
def test_large_scores_do_not_overflow_in_float16():
    """q.k reaches 1.6e6 here, past float16's 65504, before the scale brings it down."""
    query = torch.full((1, 1, 3, 64), 160.0, dtype=torch.float16)
    value = torch.arange(3 * 64, dtype=torch.float16).view(1, 1, 3, 64)
    for want_probs in (False, True):
        out, _ = attend(query, query, value, AttentionMask(causal=True), 0.125, want_probs=want_probs)
        torch.testing.assert_close(out[0, 0, 2].float(), value[0, 0].float().mean(0), rtol=1e-3, atol=0.0)


@pytest.mark.proves("F6", "fault:F43")
@pytest.mark.parametrize(
    ("mask", "numbers"),
    [
        (torch.ones(2, 8), ["8 keys", "0 past and 9 new", "make 9"]),
        (torch.ones(2, 9, 8), ["8 keys", "9"]),
        (torch.ones(2, 1, 9, 10), ["10 keys", "9"]),
        (torch.ones(3, 9), ["[3, 9]", "[2, 9]"]),
        (torch.ones(1, 9), ["[1, 9]", "[2, 9]"]),
        (torch.ones(2, 5, 9), ["[2, 5, 9]", "[2, 9, 9]"]),
        (torch.ones(2, 2, 9, 9), ["[2, 2, 9, 9]", "[2, 3 or 1, 9, 9]"]),
        (torch.ones(9), ["[9]"]),
        (torch.ones(1, 1, 2, 9, 9), ["[1, 1, 2, 9, 9]"]),
    ],
    ids=lambda value: str(list(value.shape)) if isinstance(value, torch.Tensor) else "",
)
def test_masks_that_do_not_fit(model, path, ids, mask, numbers):
    with pytest.raises(ValueError, match=r"attention.mask") as error:
        model(ids, attention_mask=mask)
    for number in numbers:
        assert number in str(error.value)


@pytest.mark.proves("fault:F43")
def test_a_mask_that_forgets_the_past_says_both_lengths(model, path, ids):
    past = model(ids[:, :6]).past_key_values
    with pytest.raises(ValueError, match="covers 3 keys, but 6 past and 3 new tokens make 9"):
        model(ids[:, 6:], past_key_values=past, attention_mask=torch.ones(2, 3))
    assert past.get_seq_length() == 6
