"""OpenAI GPT's masks: transformers' numbers for every position, those that may see nothing included; and bad input."""

import math

import pytest
import torch
from openai_gpt_models import copy_of, left_padded, make, random_ids

from gpt2rt import InputRangeError, OpenAIGPTDoubleHeadsModel, OpenAIGPTLMHeadModel
from gpt2rt.models.attention import AttentionMask, attend

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
WIDTH = 9


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


MASKS = {
    "left": left_padded([9, 5, 1], WIDTH),
    "right": left_padded([9, 5, 1], WIDTH).flip(-1),
    "holes": torch.tensor([[1, 1, 0, 0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0, 0, 1, 0]]),
    "a row of pads": torch.tensor([[0] * 9, [1] * 9, [0, 0, 0, 0, 1, 1, 1, 1, 1]]),
}


@pytest.fixture
def ids():
    return random_ids(3, WIDTH)


@pytest.mark.proves("O2", "O7")
@pytest.mark.parametrize("with_positions", [False, True], ids=["counted", "positions"])
@pytest.mark.parametrize("name", MASKS)
def test_every_position_of_a_padded_batch_is_transformers(hf, path, ids, name, with_positions):
    """A pad on the left sees nothing. transformers adds -1e4 to later keys and the lowest float to masked ones, so that
    it sees the later keys, alike; and in a row of pads every token sees all of them, alike."""
    ours = make()
    theirs = copy_of(hf, ours)
    mask = MASKS[name]
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if with_positions else None
    given = {"attention_mask": mask, "position_ids": positions}
    want = theirs(ids, output_attentions=True, **given)
    got = ours(ids, output_attentions=True, **given)
    torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)
    torch.testing.assert_close(got.attentions, want.attentions, **TOLERANCE)
    torch.testing.assert_close(ours(ids, **given).logits, want.logits, **TOLERANCE)


@pytest.mark.proves("O2")
@pytest.mark.parametrize("length", [2, 17, 40])
def test_random_masks_are_transformers(hf, path, length):
    """Of long rows too, where the kernels lay the keys out in blocks; some rows see nothing at first, some never."""
    ours = make()
    theirs = copy_of(hf, ours)
    generator = torch.Generator().manual_seed(length)
    ids = random_ids(8, length)
    for share in (0.1, 0.5, 0.9):
        mask = (torch.rand(8, length, generator=generator) < share).long()
        want = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(ours(ids, attention_mask=mask).logits, want, **TOLERANCE)
        # without a row that sees nothing other kernels run
        mask[:, 0] = 1
        want = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(ours(ids, attention_mask=mask).logits, want, **TOLERANCE)


@pytest.mark.proves("O7")
def test_left_padding_needs_position_ids_and_then_changes_nothing(path, ids):
    model = make()
    mask = left_padded([9, 5, 1], WIDTH)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    without = model(ids, attention_mask=mask).logits
    for row, length in enumerate((9, 5, 1)):
        alone = model(ids[row : row + 1, WIDTH - length :]).logits[0]
        torch.testing.assert_close(padded[row, WIDTH - length :], alone, **TOLERANCE)
        assert length == 9 or (without[row, WIDTH - length :] - alone).abs().max() > 1e-2


@pytest.mark.proves("O2")
def test_what_a_token_that_may_see_nothing_attends_to():
    query, key, value = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    flags = torch.tensor([False, False, True, True]).view(1, 1, 1, 4)
    mask = AttentionMask.leveled(flags & causal(4), flags)
    for want_probs in (False, True):
        out, probs = attend(query, key, value, mask, 0.5, want_probs=want_probs)
        torch.testing.assert_close(out[0, :, :2], value[0, :, 2:].mean(1, keepdim=True).expand(2, 2, 8))
        assert torch.equal(out[0, :, 2], value[0, :, 2])
    assert torch.equal(probs[0, 0, 0], torch.tensor([0.0, 0.0, 0.5, 0.5]))
    nothing = torch.zeros(1, 1, 1, 4, dtype=torch.bool)
    out, _ = attend(query, key, value, AttentionMask.leveled(nothing & causal(4), nothing), 0.5)
    torch.testing.assert_close(out[0], value[0].mean(1, keepdim=True).expand(2, 4, 8))


@pytest.mark.proves("O2", "fault:F43")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["left", "a row of pads"])
def test_no_mask_gives_nan_in_any_dtype(path, ids, name, dtype):
    model = make().to(dtype)
    flags = MASKS[name]
    per_query = causal(WIDTH) & flags.bool().unsqueeze(1)
    additive = torch.zeros(3, 1, WIDTH, WIDTH).masked_fill(~per_query.unsqueeze(1), -math.inf)
    for mask in (flags, flags.bool(), flags.to(dtype), per_query, per_query.unsqueeze(1), additive):
        for wanted in (False, True):
            assert model(ids, attention_mask=mask, output_attentions=wanted).logits.isfinite().all()


@pytest.mark.proves("O2")
def test_gradients_with_tokens_that_may_see_nothing(hf, ids):
    ours = make(initializer_range=0.1)
    theirs = copy_of(hf, ours)
    mask = MASKS["left"]
    for model in (ours, theirs):
        model(ids, attention_mask=mask).logits.square().mean().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad.isfinite().all()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=5e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.proves("D8", "O6")
def test_masks_per_query_and_per_choice(path, ids):
    """transformers reads only [batch, seq_len] and breaks on every other shape."""
    model = make()
    flags = MASKS["holes"].clone()
    flags[:, 0] = 1
    want = model(ids, attention_mask=flags).logits
    per_query = causal(WIDTH) & flags.bool().unsqueeze(1)
    additive = torch.zeros(3, 1, WIDTH, WIDTH).masked_fill(~per_query.unsqueeze(1), torch.finfo(torch.float32).min)
    for mask in (per_query, per_query.long(), per_query.unsqueeze(1), additive, additive.expand(3, 4, WIDTH, WIDTH)):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, want, **TOLERANCE)
    # keys beyond the causal ones: a mask per query is all there is
    both_ways = torch.ones(3, WIDTH, WIDTH, dtype=torch.bool)
    probs = model(ids, attention_mask=both_ways, output_attentions=True).attentions[0]
    assert (probs > 0).all()

    choices = make(OpenAIGPTDoubleHeadsModel)
    grouped = random_ids(2, 3, WIDTH)
    mask = torch.stack([MASKS["left"], MASKS["right"]])
    flat = choices(grouped.view(6, WIDTH), attention_mask=mask.view(6, WIDTH))
    got = choices(grouped, attention_mask=mask)
    torch.testing.assert_close(got.logits, flat.logits.view(2, 3, WIDTH, 100), **TOLERANCE)
    torch.testing.assert_close(got.mc_logits, flat.mc_logits.view(2, 3), **TOLERANCE)


def test_a_bias_per_head_is_added_to_the_scores(path, ids):
    model = make()
    distance = -0.3 * (torch.arange(WIDTH)[:, None] - torch.arange(WIDTH)).abs().float()
    bias = distance.masked_fill(~causal(WIDTH), -math.inf).expand(3, 4, WIDTH, WIDTH).clone()
    bias[:, 1, :, 0] -= 1.0
    got = model(ids, attention_mask=bias, output_attentions=True)
    plain = model(ids, output_attentions=True).attentions[0]
    # a bias multiplies a probability by its exponential
    want = (plain * bias.exp()) / (plain * bias.exp()).sum(-1, keepdim=True)
    torch.testing.assert_close(got.attentions[0], want, **TOLERANCE)
    torch.testing.assert_close(model(ids, attention_mask=bias).logits, got.logits, **TOLERANCE)


@pytest.mark.proves("fault:F43")
@pytest.mark.parametrize(
    ("mask", "numbers"),
    [
        (torch.ones(3, 8), ["8 keys", "0 past and 9 new", "make 9"]),
        (torch.ones(2, 9), ["[2, 9]", "[3, 9]"]),
        (torch.ones(3, 5, 9), ["[3, 5, 9]", "[3, 9, 9]"]),
        (torch.ones(3, 3, 9, 9), ["[3, 3, 9, 9]", "[3, 4 or 1, 9, 9]"]),
        (torch.ones(9), ["[9]"]),
    ],
    ids=lambda value: str(list(value.shape)) if isinstance(value, torch.Tensor) else "",
)
def test_masks_that_do_not_fit(ids, mask, numbers):
    with pytest.raises(ValueError, match=r"attention.mask") as error:
        make()(ids, attention_mask=mask)
    for number in numbers:
        assert number in str(error.value)


@pytest.mark.proves("D9", "fault:F35", "fault:F43")
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "either input_ids or inputs_embeds"),
        ({"input_ids": [[1]], "inputs_embeds": torch.zeros(1, 1, 32)}, ValueError, "both input_ids and inputs_embeds"),
        ({"input_ids": [[1, -1]]}, InputRangeError, "input_ids holds -1"),
        ({"input_ids": [[1, 100]]}, InputRangeError, "the vocabulary has 100 rows"),
        ({"input_ids": [[1.5]]}, TypeError, "must be int64 or int32"),
        ({"input_ids": [[True]]}, TypeError, "must be int64 or int32"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, ValueError, "input_ids is empty"),
        ({"input_ids": [[5] * 65]}, InputRangeError, "65 tokens need 65 positions, and the model has n_positions = 64"),
        ({"input_ids": [[1, 2]], "position_ids": [[0, 64]]}, InputRangeError, "position_ids holds 64"),
        ({"input_ids": [[1, 2]], "position_ids": [[0, 1, 2]]}, ValueError, r"position_ids has shape \[1, 3\]"),
        ({"input_ids": [[1, 2]], "token_type_ids": [[0, 100]]}, InputRangeError, "token_type_ids holds 100"),
        ({"inputs_embeds": torch.zeros(1, 2, 31)}, ValueError, r"expected \[..., seq_len, 32\]"),
        ({"inputs_embeds": torch.zeros(1, 2, 32, dtype=torch.bfloat16)}, ValueError, r"to\(model.dtype\)"),
        ({"input_ids": [[1, 2]], "head_mask": torch.ones(3)}, ValueError, r"head_mask has shape \[3\]"),
        ({"input_ids": [[1, 2]], "output_hidden_states": [3]}, ValueError, "asks for 3"),
        ({"input_ids": [[1, 2]], "labels": [[1, 100]]}, InputRangeError, "labels hold 100"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, ValueError, "labels of shape"),
        ({"input_ids": [[1, 2]], "past_key_values": 3}, TypeError, "past_key_values is a int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(given, error, message):
    given = {name: torch.tensor(value) if isinstance(value, list) and name != "output_hidden_states" else value
             for name, value in given.items()}  # fmt: skip
    with pytest.raises(error, match=message):
        make(OpenAIGPTLMHeadModel)(**given)
