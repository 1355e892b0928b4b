"""Models that also attend to an encoder."""

import pytest
import torch

from gpt2rt.models import DynamicCache, EncoderDecoderCache

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
CONFIG = {"add_cross_attention": True}


@pytest.fixture
def encoder():
    return torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(4))


@pytest.mark.proves("F9", "F10")
def test_against_transformers(pair, path, ids, encoder):
    ours, theirs = pair(**CONFIG)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    given = {"encoder_hidden_states": encoder, "encoder_attention_mask": mask, "output_attentions": True}
    got, want = ours(ids, labels=ids, **given), theirs(ids, labels=ids, **given)
    assert list(got) == list(want)
    for name in ("loss", "logits", "attentions", "cross_attentions"):
        torch.testing.assert_close(got[name], want[name], **TOLERANCE)
    given["output_attentions"] = False
    torch.testing.assert_close(ours(ids, **given).logits, want.logits, **TOLERANCE)
    torch.testing.assert_close(
        ours(ids, encoder_hidden_states=encoder).logits, theirs(ids, encoder_hidden_states=encoder).logits, **TOLERANCE
    )
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **TOLERANCE)


def test_the_inverse_layer_scale_holds_for_cross_attention_too(pair, path, ids, encoder):
    ours, theirs = pair(**CONFIG, scale_attn_by_inverse_layer_idx=True)
    want = theirs(ids, encoder_hidden_states=encoder).logits
    torch.testing.assert_close(ours(ids, encoder_hidden_states=encoder).logits, want, **TOLERANCE)


@pytest.mark.proves("F9")
def test_the_encoders_keys_are_computed_once(pair, path, ids, encoder):
    ours, theirs = pair(**CONFIG)
    first = ours(ids[:, :5], encoder_hidden_states=encoder)
    cache = first.past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    assert cache.get_seq_length() == 5
    assert cache.cross_attention_cache.get_seq_length() == 5
    assert len(cache.to_legacy_cache()[0]) == 4
    # other states are not looked at any more, as in transformers
    second = ours(ids[:, 5:], past_key_values=cache, encoder_hidden_states=encoder * 100)
    assert second.past_key_values is cache
    want = theirs(ids, encoder_hidden_states=encoder).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), want, **TOLERANCE)
    assert cache.cross_attention_cache.get_seq_length() == 5


def test_other_forms_of_the_cache(pair, path, ids, encoder):
    ours, theirs = pair(**CONFIG)
    given = {"encoder_hidden_states": encoder}
    want = theirs(ids, **given).logits[:, 5:]
    legacy = ours(ids[:, :5], **given).past_key_values.to_legacy_cache()
    for past in (
        legacy,
        tuple(entry[:2] for entry in legacy),
        DynamicCache(entry[:2] for entry in legacy),
        theirs(ids[:, :5], **given).past_key_values,
    ):
        out = ours(ids[:, 5:], past_key_values=past, **given)
        torch.testing.assert_close(out.logits, want, **TOLERANCE)
        assert out.past_key_values.get_seq_length() == 9


def test_reorder_and_crop(pair, path, ids, encoder):
    ours, _ = pair(**CONFIG)
    cache = ours(ids, encoder_hidden_states=encoder).past_key_values
    swap = torch.tensor([1, 0])
    cache.reorder_cache(swap)
    cache.crop(6)
    got = ours(ids[swap][:, 6:], past_key_values=cache, encoder_hidden_states=encoder[swap]).logits
    want = ours(ids[swap], encoder_hidden_states=encoder[swap]).logits[:, 6:]
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.proves("F9")
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_masks_over_the_encoder(pair, path, ids, encoder, dims):
    ours, _ = pair(**CONFIG)
    cut = ours(ids[:1], encoder_hidden_states=encoder[:1, :3]).logits
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    mask = {2: mask, 3: mask.unsqueeze(1).expand(2, 9, 5), 4: mask[:, None, None]}[dims]
    got = ours(ids, encoder_hidden_states=encoder, encoder_attention_mask=mask).logits
    torch.testing.assert_close(got[:1], cut, **TOLERANCE)
    # a row that may see no state gets the bias of the output projection alone
    assert got.isfinite().all()
    torch.testing.assert_close(
        got[1:],
        ours(ids[1:], encoder_hidden_states=encoder[1:] * 3, encoder_attention_mask=torch.zeros(1, 5)).logits,
        **TOLERANCE,
    )


@pytest.mark.proves("F9")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoder_hidden_states": torch.ones(3, 5, 48)}, r"\[3, 5, 48\], expected \[2, encoder_len, 48\]"),
        ({"encoder_hidden_states": torch.ones(2, 5, 40)}, r"\[2, 5, 40\]"),
        ({"encoder_hidden_states": torch.ones(2, 5, 48).bfloat16()}, "bfloat16"),
        (
            {"encoder_hidden_states": torch.ones(2, 5, 48), "encoder_attention_mask": torch.ones(2, 4)},
            "covers 4 states, but encoder_hidden_states has 5",
        ),
        (
            {"encoder_hidden_states": torch.ones(2, 5, 48), "encoder_attention_mask": torch.ones(3, 5)},
            r"shape \[3, 5\]; use \[2, 5\]",
        ),
    ],
)
def test_what_does_not_fit(pair, ids, given, message):
    ours, _ = pair(**CONFIG)
    with pytest.raises(ValueError, match=message):
        ours(ids, **given)
