"""Bad input to forward: one clear sentence, before any work."""

import pytest
import torch

from gpt2rt.config import GPT2Config
from gpt2rt.models import GPT2LMHeadModel, InputRangeError

IDS = torch.zeros(2, 9, dtype=torch.long)
TOO_HIGH = torch.tensor([[0, 5, 97]])

BAD = {
    "both": ({"input_ids": IDS, "inputs_embeds": torch.ones(2, 9, 48)}, ValueError, "You cannot specify both"),
    "neither": ({}, ValueError, "You have to specify either input_ids or inputs_embeds"),
    "a_list": ({"input_ids": [[1, 2]]}, TypeError, r"input_ids must be a tensor, got list; use torch.tensor"),
    "floats": ({"input_ids": IDS.float()}, TypeError, r"input_ids must be int64 or int32, got torch.float32"),
    "bools": ({"input_ids": IDS.bool()}, TypeError, r"got torch.bool"),
    "no_tokens": ({"input_ids": IDS[:, :0]}, ValueError, r"input_ids is empty: its shape is \[2, 0\]"),
    "no_rows": ({"input_ids": IDS[:0]}, ValueError, r"input_ids is empty: its shape is \[0, 9\]"),
    "a_scalar": ({"input_ids": torch.tensor(3)}, ValueError, r"input_ids is empty: its shape is \[\]"),
    "id_too_high": ({"input_ids": TOO_HIGH}, InputRangeError, "input_ids holds 97, but the vocabulary has 97 rows"),
    "id_negative": ({"input_ids": IDS - 1}, InputRangeError, "holds -1, .* use values from 0 to 96"),
    "id_huge": ({"input_ids": IDS + 2**40}, InputRangeError, f"holds {2**40}"),
    "type_too_high": ({"input_ids": IDS, "token_type_ids": IDS + 97}, InputRangeError, "token_type_ids holds 97"),
    "type_shape": ({"input_ids": IDS, "token_type_ids": IDS[:, 1:]}, ValueError, r"token_type_ids .* \[2, 8\]"),
    "position_too_high": ({"input_ids": IDS, "position_ids": IDS + 64}, InputRangeError, "position_ids holds 64"),
    "position_negative": ({"input_ids": IDS, "position_ids": IDS - 3}, InputRangeError, "position_ids holds -3"),
    "position_shape": ({"input_ids": IDS, "position_ids": IDS[:, :4]}, ValueError, r"position_ids has shape \[2, 4\]"),
    "position_rows": ({"input_ids": IDS, "position_ids": IDS[:1].expand(3, 9)}, ValueError, r"expected \[2, 9\]"),
    "position_float": ({"input_ids": IDS, "position_ids": IDS.float()}, TypeError, "position_ids must be int64"),
    "embeds_width": ({"inputs_embeds": torch.ones(2, 9, 47)}, ValueError, r"\[2, 9, 47\], expected \[..., seq_len, 48"),
    "embeds_flat": ({"inputs_embeds": torch.ones(48)}, ValueError, r"inputs_embeds has shape \[48\]"),
    "embeds_ints": ({"inputs_embeds": IDS}, TypeError, "token ids go to input_ids"),
    "embeds_dtype": (
        {"inputs_embeds": torch.ones(2, 9, 48).half()},
        ValueError,
        r"float16.*torch.float32; use .*\.to\(",
    ),
    "too_long": ({"input_ids": IDS.new_zeros(1, 65)}, InputRangeError, "65 tokens need 65 positions.*n_positions = 64"),
    "head_mask": (
        {"input_ids": IDS, "head_mask": torch.ones(2)},
        ValueError,
        r"head_mask has shape \[2\].*\[3\]",
    ),
    "states_index": ({"input_ids": IDS, "output_hidden_states": 3}, ValueError, r"asks for 3.*-3\.\.2"),
    "states_kind": ({"input_ids": IDS, "output_hidden_states": "all"}, TypeError, "a bool, an int or a list"),
    "encoder": ({"input_ids": IDS, "encoder_hidden_states": torch.ones(2, 4, 48)}, ValueError, "add_cross_attention"),
}

BAD_FOR_THE_HEAD = {
    "label_too_high": ({"labels": IDS + 97}, InputRangeError, "labels hold 97, but the vocabulary has 97 tokens"),
    "label_negative": ({"labels": IDS - 7}, InputRangeError, "labels hold -7.*or -100"),
    "label_length": ({"labels": IDS[:, 1:]}, ValueError, r"labels of shape \[2, 8\] do not match logits of shape"),
    "labels_flat": ({"labels": IDS.flatten()}, ValueError, r"labels of shape \[18\] do not match"),
    "labels_float": ({"labels": IDS.float()}, TypeError, "labels must be integers, got torch.float32"),
    "shift_labels_length": ({"shift_labels": IDS[:, 1:]}, ValueError, r"labels of shape \[2, 8\]"),
    "labels_and_few_logits": ({"labels": IDS, "logits_to_keep": 1}, ValueError, r"shape \[2, 1, 97\]"),
    "keep_negative": ({"logits_to_keep": -1}, ValueError, "logits_to_keep = -1"),
    "keep_beyond": ({"logits_to_keep": torch.tensor([9])}, InputRangeError, "positions go from 0 to 8"),
    "keep_rows": ({"logits_to_keep": torch.zeros(3, 2, dtype=torch.long)}, ValueError, r"\[3, 2\], expected \[n\]"),
    "keep_mask": ({"logits_to_keep": torch.ones(2, 8).bool()}, ValueError, r"\[2, 8\], expected \[2, 9\]"),
    "keep_float": ({"logits_to_keep": torch.ones(2)}, TypeError, "logits_to_keep must be an int"),
    "keep_list": ({"logits_to_keep": [1]}, TypeError, "got list"),
}


@pytest.mark.proves("F1", "F2", "F9", "fault:F35", "fault:F43")
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(model, path, case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        model.transformer(**arguments)


@pytest.mark.proves("F14", "F15")
@pytest.mark.parametrize("case", BAD_FOR_THE_HEAD)
def test_bad_arguments_of_the_language_model(model, path, case):
    arguments, error, message = BAD_FOR_THE_HEAD[case]
    with pytest.raises(error, match=message):
        model(IDS, **arguments)


@pytest.mark.proves("F16", "fault:F35")
def test_out_of_range_is_caught_as_transformers_raises_it_and_as_a_bad_value(model):
    for family in (IndexError, ValueError):
        with pytest.raises(family):
            model(TOO_HIGH)


@pytest.mark.proves("F1", "D7")
@pytest.mark.parametrize(
    ("given", "near"),
    [
        ({"atention_mask": 1}, "'attention_mask'"),
        ({"input_id": IDS}, "'input_ids'"),
        ({"head_masks": 1}, "'head_mask'"),
    ],
)
def test_unknown_arguments_name_the_nearest_and_all_there_are(model, given, near):
    """transformers ignores them, a misspelt mask with them."""
    for part in (model, model.transformer):
        with pytest.raises(TypeError, match=f"no argument '{next(iter(given))}'. Did you mean {near}") as error:
            part(IDS, **given)
        assert "position_ids" in str(error.value)
        assert ("logits_to_keep" in str(error.value)) == (part is model)
    with pytest.raises(TypeError, match=r"no argument 'foo'\. It accepts input_ids, past_key_values"):
        model(IDS, foo=1)


@pytest.mark.proves("F16", "D9", "fault:F36")
def test_the_limit_counts_past_tokens(model, path):
    past = model(torch.zeros(1, 60, dtype=torch.long)).past_key_values
    with pytest.raises(InputRangeError, match="5 tokens after 60 in past_key_values need 65 positions"):
        model(torch.zeros(1, 5, dtype=torch.long), past_key_values=past)
    assert past.get_seq_length() == 60
    assert model(torch.zeros(1, 4, dtype=torch.long), past_key_values=past).logits.shape == (1, 4, 97)


def test_nothing_is_kept_of_a_call_that_failed(model, path):
    past = model(IDS).past_key_values
    for bad in ({"token_type_ids": IDS + 97}, {"attention_mask": torch.ones(2, 9)}, {"position_ids": IDS + 64}):
        with pytest.raises(ValueError, match=r"holds|covers"):
            model(IDS, past_key_values=past, **bad)
    assert [past.get_seq_length(i) for i in (0, 1)] == [9, 9]


def test_int32_ids_and_strided_views(model, path, ids):
    want = model(ids).logits
    assert torch.equal(model(ids.int()).logits, want)
    strided = torch.stack([ids, ids], dim=-1).flatten(1)[:, ::2]
    assert not strided.is_contiguous()
    assert torch.equal(model(strided, position_ids=torch.arange(18)[::2] // 2).logits, want)
    assert torch.equal(model(strided[0]).logits, model(ids[0]).logits)


@pytest.mark.proves("fault:F18")
@pytest.mark.parametrize("field", ["n_embd", "activation_function"])
def test_a_broken_config_builds_nothing(field):
    config = GPT2Config(n_embd=48, n_head=3, n_layer=1)
    setattr(config, field, {"n_embd": 47, "activation_function": "gelu_neu"}[field])
    with pytest.raises(ValueError, match=field):
        GPT2LMHeadModel(config)
