"""forward against transformers, on both of its paths."""

import pytest
import torch

from gpt2rt.models import GPT2Model

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}

SHAPES = {
    "tiny": {},
    "25_heads_of_64": {"n_embd": 1600, "n_head": 25, "n_layer": 1, "n_positions": 16},
    "vocab_50257": {"vocab_size": 50257, "n_embd": 32, "n_head": 2, "n_layer": 1},
    "n_inner_50": {"n_inner": 50},
    "1_layer_1_head": {"n_layer": 1, "n_head": 1},
    "head_dim_48": {"n_embd": 96, "n_head": 2},
    "head_dim_80": {"n_embd": 160, "n_head": 2},
    "head_dim_1": {"n_embd": 6, "n_head": 6},
}

FLAGS = {
    "no_scale": {"scale_attn_weights": False},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "all_flags": {
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
    },
    "untied": {"tie_word_embeddings": False},
    "epsilon": {"layer_norm_epsilon": 0.1},
}


def assert_same(ours, theirs):
    # without an encoder transformers returns an empty tuple of cross attentions where we return none
    names = [name for name, value in theirs.items() if value != ()]
    assert list(ours.keys()) == names
    for name in names:
        if name != "past_key_values":
            torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE)


@pytest.mark.proves("F1", "H1")
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_odd_sizes(pair, path, ids, shape):
    ours, theirs = pair(**SHAPES[shape])
    assert_same(ours(ids), theirs(ids))


@pytest.mark.proves("F10", "F11", "F12", "F13", "D4", "D5", "H1")
@pytest.mark.parametrize("flag", FLAGS)
def test_everything_returned_under_config_flags(pair, path, ids, flag):
    ours, theirs = pair(**FLAGS[flag])
    wanted = {"labels": ids, "output_attentions": True, "output_hidden_states": True}
    assert_same(ours(ids, **wanted), theirs(ids, **wanted))


@pytest.mark.proves("F17")
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "relu", "silu"])
def test_activations(pair, path, ids, activation):
    ours, theirs = pair(activation_function=activation, n_layer=1)
    assert_same(ours(ids), theirs(ids))


@pytest.mark.proves("F10")
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"add_cross_attention": True}], ids=str)
def test_state_dict_keys_and_shapes_are_those_of_transformers(pair, overrides):
    ours, theirs = pair(**overrides)
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    modules = {name for name, _ in theirs.named_modules()}
    assert {name for name, _ in ours.named_modules()} == modules


@pytest.mark.proves("F1")
def test_bare_model(pair, path, ids):
    ours, theirs = pair()
    wanted = {"output_attentions": True, "output_hidden_states": True}
    assert isinstance(ours.transformer, GPT2Model)
    assert_same(ours.transformer(ids, **wanted), theirs.transformer(ids, **wanted))


@pytest.mark.proves("F4", "F6")
@pytest.mark.parametrize("mask_kind", ["left", "right", "holes"])
@pytest.mark.parametrize("with_positions", [False, True])
def test_padded_batches(pair, path, ids, mask_kind, with_positions):
    ours, theirs = pair()
    mask = torch.ones_like(ids)
    if mask_kind == "left":
        mask[0, :4] = 0
    elif mask_kind == "right":
        mask[0, 5:] = 0
    else:
        mask[0, 2:4] = mask[1, 6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if with_positions else None
    got = ours(ids, attention_mask=mask, position_ids=positions).logits
    want = theirs(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], **TOLERANCE)
    if with_positions and mask_kind == "left":
        alone = ours(ids[:1, 4:]).logits
        torch.testing.assert_close(got[:1, 4:], alone, **TOLERANCE)


@pytest.mark.proves("F8")
@pytest.mark.parametrize("new_tokens", [1, 4])
@pytest.mark.parametrize("mask_past", [False, True])
def test_past_and_mask(pair, path, ids, new_tokens, mask_past):
    ours, theirs = pair()
    split = ids.size(1) - new_tokens
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    first = {"attention_mask": mask[:, :split]} if mask_past else {}
    second = {"attention_mask": mask} if mask_past else {}
    past_ours = ours(ids[:, :split], **first).past_key_values
    past_theirs = theirs(ids[:, :split], **first).past_key_values
    got = ours(ids[:, split:], past_key_values=past_ours, **second)
    assert_same(got, theirs(ids[:, split:], past_key_values=past_theirs, **second))
    assert got.past_key_values is past_ours
    assert past_ours.get_seq_length() == ids.size(1)
    if not mask_past:
        torch.testing.assert_close(got.logits, ours(ids).logits[:, split:], **TOLERANCE)


@pytest.mark.proves("F8")
def test_past_keys_and_values(pair, path, ids):
    ours, theirs = pair()
    for got, want in zip(ours(ids).past_key_values, theirs(ids).past_key_values, strict=True):
        torch.testing.assert_close(got[0], want[0], **TOLERANCE)
        torch.testing.assert_close(got[1], want[1], **TOLERANCE)


@pytest.mark.proves("F4", "F5")
def test_embeddings_in_token_types_and_positions(pair, path, ids):
    ours, theirs = pair()
    types = torch.zeros_like(ids)
    types[:, 4:] = 3
    positions = torch.arange(20, 29).unsqueeze(0)
    embeds = ours.transformer.wte(ids)
    given = {"token_type_ids": types, "position_ids": positions}
    want = theirs(ids, **given)
    assert_same(ours(ids, **given), want)
    assert_same(ours(inputs_embeds=embeds, **given), want)


@pytest.mark.proves("F5")
def test_type_zero_adds_the_embedding_of_token_zero(model, path, ids):
    plain = model(inputs_embeds=model.transformer.wte(ids) + model.transformer.wte.weight[0]).logits
    torch.testing.assert_close(model(ids, token_type_ids=torch.zeros_like(ids)).logits, plain, **TOLERANCE)


def test_embeddings_with_past_and_mask(pair, path, ids):
    ours, theirs = pair()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    results = []
    for model in (ours, theirs):
        past = model(ids[:, :5], attention_mask=mask[:, :5]).past_key_values
        embeds = model.transformer.wte(ids[:, 5:])
        results.append(model(inputs_embeds=embeds, past_key_values=past, attention_mask=mask))
    assert_same(*results)


@pytest.mark.proves("F7")
def test_packed_sequences(pair, path, ids):
    """transformers packs only without a cache; we do with ``use_cache`` as well (which is the default)."""
    ours, theirs = pair()
    jump = torch.tensor([[0, 1, 2, 7, 8, 9, 10, 20, 21], [3, 4, 5, 6, 7, 8, 9, 10, 11]])
    want = theirs(ids, position_ids=jump, use_cache=False).logits
    torch.testing.assert_close(ours(ids, position_ids=jump).logits, want, **TOLERANCE)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    want = theirs(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(ours(ids, position_ids=positions).logits, want, **TOLERANCE)
    torch.testing.assert_close(ours(ids, position_ids=positions, use_cache=False).logits, want, **TOLERANCE)
    torch.testing.assert_close(ours(ids[:, 4:6]).logits, want[:, 4:6], **TOLERANCE)
    probs = ours(ids, position_ids=positions, output_attentions=True).attentions[0]
    assert probs[:, :, 4:, :4].count_nonzero() == 0


@pytest.mark.proves("F7")
def test_a_packed_row_may_be_longer_than_n_positions(pair, path):
    ours, _ = pair()
    ids = torch.arange(90).unsqueeze(0)
    positions = torch.arange(45).repeat(2).unsqueeze(0)
    logits = ours(ids, position_ids=positions).logits
    torch.testing.assert_close(logits[:, 45:], ours(ids[:, 45:]).logits, **TOLERANCE)


@pytest.mark.proves("F3")
@pytest.mark.parametrize("leading", [(), (1,), (3, 2), (2, 1, 2)])
def test_leading_dimensions(model, path, leading):
    ids = torch.randint(0, 97, (*leading, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[..., 5:] = 0
    flat = model(ids.view(-1, 7), attention_mask=mask.view(-1, 7)).logits
    positions = torch.arange(7).expand_as(ids)
    got = model(ids, attention_mask=mask, position_ids=positions, token_type_ids=None)
    torch.testing.assert_close(got.logits, flat.view(*leading, 7, 97), **TOLERANCE)
    embeds = model.transformer.wte(ids)
    got = model(inputs_embeds=embeds, attention_mask=mask, labels=ids)
    torch.testing.assert_close(got.logits, flat.view(*leading, 7, 97), **TOLERANCE)
    assert got.loss.dim() == 0


@pytest.mark.proves("F3")
def test_choices_as_transformers_shapes_them(pair, path):
    ours, theirs = pair()
    ids = torch.randint(0, 97, (2, 3, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 1, 3:] = 0
    given = {"attention_mask": mask, "output_hidden_states": True}
    got, want = ours.transformer(ids, **given), theirs.transformer(ids, **given)
    real = mask.bool()
    torch.testing.assert_close(got[0][real], want[0][real], **TOLERANCE)
    assert [s.shape for s in got.hidden_states] == [s.shape for s in want.hidden_states]


@pytest.mark.proves("F14")
@pytest.mark.parametrize(
    "keep",
    [
        0,
        1,
        4,
        50,
        torch.tensor([0, 5, 2]),
        torch.tensor([-1, 3]),
        torch.tensor([[1, 8], [0, 0]]),
        torch.tensor([[True] * 3 + [False] * 6, [False] * 8 + [True]]),
        torch.tensor([True] * 2 + [False] * 7),
    ],
    ids=["all", "last", "last_4", "more_than_there_are", "1d", "1d_negative", "2d", "2d_bool", "1d_bool"],
)
def test_logits_to_keep(pair, path, ids, keep):
    ours, theirs = pair()
    assert_same(ours(ids, logits_to_keep=keep), theirs(ids, logits_to_keep=keep))


@pytest.mark.proves("F14")
def test_logits_to_keep_counts_from_the_end_in_each_row(model, path, ids):
    got = model(ids, logits_to_keep=torch.tensor([[-1], [0]])).logits
    full = model(ids).logits
    torch.testing.assert_close(got[:, 0], torch.stack([full[0, -1], full[1, 0]]), **TOLERANCE)


@pytest.mark.proves("F15")
@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_losses(pair, path, ids, num_items):
    ours, theirs = pair()
    labels = ids.clone()
    labels[0, 3:6] = -100
    kwargs = {} if num_items is None else {"num_items_in_batch": num_items}
    assert_same(ours(ids, labels=labels, **kwargs), theirs(ids, labels=labels, **kwargs))
    shifted = torch.roll(labels, 2, dims=1)
    want = theirs(ids, labels=labels, shift_labels=shifted, **kwargs)
    assert_same(ours(ids, labels=labels, shift_labels=shifted, **kwargs), want)
    assert_same(ours(ids, shift_labels=shifted, **kwargs), want)


@pytest.mark.proves("F11")
@pytest.mark.parametrize("selection", [True, False, 0, -1, [0, 2], [1, -1]], ids=str)
def test_selected_hidden_states(pair, path, ids, selection):
    ours, theirs = pair()
    got = ours(ids, output_hidden_states=selection).hidden_states
    if selection is False:
        assert got is None
        return
    for ours_state, theirs_state in zip(
        got, theirs(ids, output_hidden_states=selection if selection != 0 else [0]).hidden_states, strict=True
    ):
        assert (ours_state is None) == (theirs_state is None)
        if ours_state is not None:
            torch.testing.assert_close(ours_state, theirs_state, **TOLERANCE)


@pytest.mark.proves("F11")
def test_last_hidden_state_is_the_last_of_hidden_states(model, path, ids):
    out = model.transformer(ids, output_hidden_states=True)
    assert out.hidden_states[-1] is out.last_hidden_state
    assert len(out.hidden_states) == 3


@pytest.mark.proves("F13")
def test_tuples_and_config_defaults(pair, build, hf, path, ids):
    ours, theirs = pair()
    wanted = {"labels": ids, "output_attentions": True, "output_hidden_states": True, "return_dict": False}
    got, want = ours(ids, **wanted), theirs(ids, **wanted)
    assert isinstance(got, tuple)
    assert len(got) == len(want[:5]) == 5
    for i in (0, 1, 3, 4):
        torch.testing.assert_close(got[i], want[i], **TOLERANCE)
    assert len(ours.transformer(ids, return_dict=False, use_cache=False)) == 1

    quiet = build(return_dict=False, use_cache=False, output_attentions=True, output_hidden_states=True)
    logits, states, attentions = quiet(ids)
    assert (len(states), len(attentions)) == (3, 2)
    assert torch.equal(quiet(ids, return_dict=True).logits, logits)


@pytest.mark.proves("F12", "D4")
def test_attentions_are_returned_with_every_kind_of_mask(model, path, ids):
    """transformers returns an empty tuple with its default attention."""
    for mask in (None, torch.ones_like(ids), torch.zeros(2, 1, 9, 9)):
        attentions = model(ids, attention_mask=mask, output_attentions=True).attentions
        assert [a.shape for a in attentions] == [(2, 3, 9, 9)] * 2
        torch.testing.assert_close(attentions[1].sum(-1), torch.ones(2, 3, 9))
    torch.testing.assert_close(model(ids, output_attentions=True).logits, model(ids).logits, **TOLERANCE)


@pytest.mark.proves("F15")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(hf, build, path, ids, dtype):
    """Against transformers in float32 with the same rounded weights: 16-bit rounding is all that may differ."""
    ours = build().to(dtype)
    theirs = hf.copy_of(ours).float()
    got = ours(ids, labels=ids, output_attentions=True)
    want = theirs(ids, labels=ids, output_attentions=True)
    assert got.logits.dtype == dtype
    assert got.attentions[0].dtype == dtype
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.logits.float(), want.logits, rtol=0.0, atol=2e-2)
    torch.testing.assert_close(got.attentions[1].float(), want.attentions[1], rtol=0.0, atol=2e-2)
    torch.testing.assert_close(got.loss, want.loss, rtol=0.0, atol=2e-2)
    past = ours(ids[:, :6]).past_key_values
    assert past[0][0].dtype == dtype
    torch.testing.assert_close(
        ours(ids[:, 6:], past_key_values=past).logits.float(), want.logits[:, 6:], rtol=0.0, atol=2e-2
    )
