"""The ragged layout of a padded batch: against masks as they are defined, and shared beginnings against none."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2rt
from gpt2rt import ops
from gpt2rt.models.ragged import RaggedLayout

H, D = 2, 8


def masked_attention(q, k, v, kept):
    """[N, H, S, D] by the definition, in float64; zeros where nothing may be seen."""
    seq_len = q.size(2)
    visible = kept[:, None, None, :] & torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    dead = ~visible.any(-1, keepdim=True)
    scores = (q.double() * 0.3) @ k.double().transpose(-1, -2)
    probabilities = torch.softmax(scores.masked_fill(~(visible | dead), float("-inf")), -1)
    return (probabilities @ v.double()).masked_fill(dead, 0.0)


@st.composite
def batches(draw):
    batch, seq_len = draw(st.integers(1, 4)), draw(st.integers(2, 50))
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=batch * seq_len, max_size=batch * seq_len)))
    kept = kept.view(batch, seq_len)
    style = draw(st.sampled_from(["any", "all", "left", "right"]))
    if style == "all":
        kept[:] = True
    elif style in ("left", "right"):
        pads = torch.tensor(draw(st.lists(st.integers(0, seq_len), min_size=batch, max_size=batch)))
        places = torch.arange(seq_len)
        kept = places >= pads[:, None] if style == "left" else places < seq_len - pads[:, None]
    tokens = torch.randint(0, 3, (batch, seq_len), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    for row in range(1, batch):
        common = draw(st.integers(0, seq_len))
        tokens[row, :common] = tokens[row - 1, :common]
        if draw(st.booleans()):
            kept[row, :common] = kept[row - 1, :common]
    return kept, tokens


@settings(deadline=None, max_examples=120)
@given(batches())
def test_attention_over_a_layout_is_attention_under_the_mask(data):
    kept, tokens = data
    batch, seq_len = kept.shape
    same = (tokens[1:] == tokens[:-1]) & (kept[1:] == kept[:-1])
    layout = RaggedLayout.of(kept, batch, seq_len, same)
    # a token's vectors depend on all that came before it in its row, as hidden states do
    history = torch.zeros(batch, seq_len, dtype=torch.int64)
    for column in range(seq_len):
        before = history[:, column - 1] if column else 0
        history[:, column] = (before * 31 + tokens[:, column] * 2 + kept[:, column]) % 1009
    qkv = torch.randn(1009, 3, H, D, generator=torch.Generator().manual_seed(0))[history]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    expected = masked_attention(q, k, v, kept)

    flat = layout.gather(qkv.reshape(batch, seq_len, -1)).view(-1, 3, H, D)
    layout._storage = torch.full((2, layout.num_blocks, H, 16, D), torch.nan)
    if layout.has_dead:
        layout._storage[:, -1].zero_()
    out = layout.spread(layout.attend(*flat.unbind(1), 0.3).reshape(1, -1, H * D))
    out = out.view(batch, seq_len, H, D).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-5)


def test_common_beginnings_are_computed_once():
    tokens = torch.arange(40).repeat(3, 1)
    tokens[1, 35:] += 100
    tokens[2, 20:] += 200
    layout = RaggedLayout.of(None, 3, 40, tokens[1:] == tokens[:-1])
    # whole blocks of 16: 32 of the 35 common tokens, then 16 of the 20
    assert layout.computed.numel() == 40 + 8 + 24
    assert torch.equal(tokens.flatten()[layout.computed][layout.places], tokens.flatten())
    assert layout.block_table.tolist() == [[0, 1, 2], [0, 1, 5], [0, 7, 8]]


def test_nothing_in_common_costs_nothing():
    layout = RaggedLayout.of(None, 2, 40, torch.zeros(1, 40, dtype=torch.bool))
    assert layout.computed is None
    assert layout.places is None
    x = torch.randn(2, 40, 5)
    assert layout.gather(x) is x


@pytest.fixture
def choices():
    """A model with both heads, and [2, 4, 48] tokens whose choices begin alike."""
    torch.manual_seed(0)
    config = gpt2rt.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=64)
    model = gpt2rt.GPT2DoubleHeadsModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 100, (2, 4, 48))
    ids[:, :, :35] = ids[:, :1, :35]
    return model, ids


@pytest.mark.parametrize("pads", [0, 3])
def test_shared_choices_equal_choices_alone(choices, pads):
    model, ids = choices
    mask = torch.ones_like(ids)
    mask[:, :, 48 - pads :] = 0
    types = torch.randint(0, 100, (2, 1, 48)).expand(2, 4, 48)
    with torch.no_grad():
        together = model(ids, attention_mask=mask, token_type_ids=types, use_cache=True)
        for choice in range(4):
            part = slice(choice, choice + 1)
            alone = model(ids[:, part], attention_mask=mask[:, part], token_type_ids=types[:, part], use_cache=True)
            assert torch.equal(alone.logits[:, 0], together.logits[:, choice])
            assert torch.equal(alone.mc_logits[:, 0], together.mc_logits[:, choice])
            for layer, (keys, values) in enumerate(alone.past_key_values):
                assert torch.equal(keys, together.past_key_values[layer][0].view(2, 4, 4, 48, 8)[:, choice])
                assert torch.equal(values, together.past_key_values[layer][1].view(2, 4, 4, 48, 8)[:, choice])
        trunk = model.transformer(ids, attention_mask=mask, token_type_ids=types)
    assert trunk.shared_rows.rows.size(0) == 2 * (48 + 3 * 16)


def test_what_differs_is_not_shared(choices):
    model, ids = choices
    ids = ids[:, :1].expand(2, 4, 48)
    # the same tokens, but every choice has types, positions or a mask of its own
    types = torch.arange(4)[None, :, None].expand(2, 4, 48)
    positions = torch.arange(48) + torch.arange(4)[None, :, None].expand(2, 4, 1)
    mask = torch.ones_like(ids)
    mask[:, :, 0] = torch.tensor([1, 0, 1, 0])
    for arguments in ({"token_type_ids": types}, {"position_ids": positions}, {"attention_mask": mask}):
        with torch.no_grad():
            out = model(ids, **arguments)
            assert model.transformer(ids, **arguments).shared_rows is None
        # where gradients are recorded every layer runs in torch
        plain = model(ids, **arguments).logits.detach()
        torch.testing.assert_close(out.logits, plain, atol=2e-5, rtol=1e-4)
        assert not torch.equal(out.logits[:, 0], out.logits[:, 1])


def test_a_cache_that_was_shared_goes_on(choices):
    model, ids = choices
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[..., :40], use_cache=True).past_key_values
        rest = model(ids[..., 40:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[..., 40:, :], atol=2e-5, rtol=1e-4)


def test_the_reference_path_has_no_layout(choices, monkeypatch):
    model, ids = choices
    with torch.no_grad():
        fast = model(ids).logits
        missing = ops.ExtensionStatus(False, None, "not built")
        monkeypatch.setattr(ops, "extension_status", lambda: missing)
        slow = model(ids).logits
        assert model.transformer(ids).shared_rows is None
    torch.testing.assert_close(slow, fast, atol=2e-5, rtol=1e-4)


def test_probabilities_of_dead_queries_are_no_numbers_from_elsewhere():
    # left padding without the mask's help: the first queries see nothing and must read zeros, not old memory
    kept = torch.tensor([[False] * 20 + [True] * 5])
    layout = RaggedLayout.of(kept, 1, 25)
    assert layout.has_dead
    q = torch.randn(25, H, D)
    out = layout.attend(q, q, q, 1.0)
    assert torch.equal(out[:20], torch.zeros(20, H, D))
    expected = F.scaled_dot_product_attention(*(q[20:].transpose(0, 1),) * 3, is_causal=True, scale=1.0)
    torch.testing.assert_close(out[20:], expected.transpose(0, 1), atol=2e-6, rtol=2e-5)
