"""Gradients, dropout, checkpointing, initialisation, and moving between dtypes."""

import math

import pytest
import torch

from gpt2rt.models import GPT2LMHeadModel

CONFIGS = {
    "tiny": {},
    "untied": {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
    "cross": {"add_cross_attention": True, "activation_function": "gelu", "n_inner": 50},
}


def gradients(model, ids, **given):
    model.zero_grad()
    model(ids, labels=ids, **given).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", ["plain", "padded", "attentions", "train"])
def test_the_gradient_of_every_parameter(hf, build, ids, config, case):
    overrides = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0) if case == "train" else {}
    ours = build(**CONFIGS[config], **overrides)
    theirs = hf.copy_of(ours)
    given = {}
    if config == "cross":
        given["encoder_hidden_states"] = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(4))
    if case == "padded":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, 6:] = 0
    if case == "attentions":
        given["output_attentions"] = True
    if case == "train":
        ours.train()
        theirs.train()
    want = gradients(theirs, ids, **given)
    got = gradients(ours, ids, **given)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert gradient.count_nonzero() > 0
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=2e-6)


def test_gradients_reach_embeddings_given_from_outside(pair, ids):
    ours, theirs = pair()
    results = []
    for model in (ours, theirs):
        embeds = model.transformer.wte(ids).detach().requires_grad_(True)
        model(inputs_embeds=embeds, labels=ids).loss.backward()
        results.append(embeds.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=2e-6)


def test_gradients_flow_through_the_cache(build, ids):
    model = build()
    past = model(ids[:, :5]).past_key_values
    split = model(ids[:, 5:], past_key_values=past, logits_to_keep=1).logits.square().sum()
    split.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids, logits_to_keep=1).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=2e-6)


def test_a_few_steps_lower_the_loss(build, ids):
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_dropout_acts_in_training_only(build, ids):
    model = build()
    with torch.no_grad():
        still = model(ids).logits
        model.train()
        torch.manual_seed(0)
        first, second = model(ids).logits, model(ids).logits
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(model(ids).logits, first)
        probs = model(ids, output_attentions=True).attentions[0]
        dropped = (probs == 0) & torch.ones(9, 9).tril().bool()
        assert 0 < dropped.count_nonzero() < 2 * 3 * 45 / 3
        assert torch.equal(model.eval()(ids).logits, still)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}], ids=["default", "reentrant"])
def test_gradient_checkpointing_changes_nothing_but_memory(build, ids, kwargs):
    model = build(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
    want = gradients(model, ids)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(kwargs)
    assert model.is_gradient_checkpointing
    runs = []
    model.transformer.h[0].attn.register_forward_hook(lambda *_: runs.append(1))
    got = gradients(model, ids, use_cache=False)
    assert len(runs) == 2
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)
    with pytest.warns(UserWarning, match="use_cache=True has no effect"):
        assert model(ids, use_cache=True).past_key_values is None
    past = model.eval()(ids).past_key_values
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.train()(ids, past_key_values=past)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert model(ids).past_key_values is not None


def test_initial_weights_follow_the_paper(build):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(build(n_embd=96, n_layer=8, initializer_range=0.05).config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            expected = 1.0 if name.endswith("weight") else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, expected)), name
        else:
            std = 0.05 / math.sqrt(16) if "c_proj" in name else 0.05
            assert abs(parameter.std().item() / std - 1) < 0.05, name
            assert abs(parameter.mean().item()) < std / 20, name
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("shape", ["n_head", "n_layer_n_head"])
def test_head_mask_scales_the_probabilities_of_each_head(build, path, ids, shape):
    """Dropped by transformers 5; as in transformers 4 here. A head with factor 0 is the same as one pruned away."""
    model = build()
    factors = torch.tensor([1.0, 0.0, 0.5])
    mask = factors if shape == "n_head" else torch.stack([factors, torch.ones(3)])
    out = model(ids, head_mask=mask, output_attentions=True)
    sums = out.attentions[0].sum(-1)
    torch.testing.assert_close(sums, factors.view(1, 3, 1).expand(2, 3, 9))
    torch.testing.assert_close(
        out.attentions[1].sum(-1), (mask if shape == "n_head" else mask[1]).view(1, 3, 1).expand(2, 3, 9)
    )
    torch.testing.assert_close(model(ids, head_mask=mask).logits, out.logits, rtol=0.0, atol=2e-5)

    # the same by hand: the rows of c_proj that read a head, times its factor
    with torch.no_grad():
        for i, block in enumerate(model.transformer.h):
            scale = factors if shape == "n_head" or i == 0 else torch.ones(3)
            block.attn.c_proj.weight *= scale.repeat_interleave(16).unsqueeze(1)
    torch.testing.assert_close(model(ids).logits, out.logits, rtol=0.0, atol=2e-5)
    torch.testing.assert_close(build()(ids, head_mask=torch.ones(3)).logits, build()(ids).logits, rtol=0.0, atol=2e-5)


def test_float64_computes_in_float64(build, path, ids):
    model = build()
    single = model(ids, output_attentions=True)
    double = model.double()(ids, output_attentions=True)
    assert double.logits.dtype == double.attentions[0].dtype == torch.float64
    error = (single.logits.double() - double.logits).abs().max().item()
    assert 0 < error < 2e-5


def test_autocast_gives_bfloat16_and_close_numbers(build, path, ids):
    model = build()
    want = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        for wanted in (False, True):
            got = model(ids, output_attentions=wanted).logits
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got.float(), want, rtol=0.0, atol=2e-2)
        past = model(ids[:, :5]).past_key_values
        got = model(ids[:, 5:], past_key_values=past).logits
        torch.testing.assert_close(got.float(), want[:, 5:], rtol=0.0, atol=2e-2)


def test_graph_weights_are_the_published_names(build):
    model = build(add_cross_attention=True)
    weights = model.graph_weights()
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    assert weights.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(weights[name], tensor)
        assert not weights[name].requires_grad
    assert weights["lm_head.weight"].data_ptr() == weights["wte.weight"].data_ptr()
    assert {"wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.1.mlp.c_proj.bias", "ln_f.bias"} <= weights.keys()
    untied = build(tie_word_embeddings=False).graph_weights()
    assert untied["lm_head.weight"].data_ptr() != untied["wte.weight"].data_ptr()


def test_compiled_forward_equals_eager(build, ids):
    """The aot_eager backend traces and functionalises everything that inductor would see, and needs no compiler."""
    model = build()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}, {"labels": ids}):
            want, got = model(ids, **given), compiled(ids, **given)
            assert list(got) == list(want)
            torch.testing.assert_close(got.logits, want.logits, rtol=0.0, atol=2e-5)
        past = compiled(ids[:, :5]).past_key_values
        got = compiled(ids[:, 5:], past_key_values=past).logits
        torch.testing.assert_close(got, model(ids).logits[:, 5:], rtol=0.0, atol=2e-5)
