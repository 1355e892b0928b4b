"""Conv1D, the activations, and the choice between kernels and torch."""

import pytest
import torch
from torch import nn

from gpt2rt import ops
from gpt2rt.config import ACTIVATIONS
from gpt2rt.models import ACT2FN, Conv1D, get_activation
from gpt2rt.models import layers as layers_module
from gpt2rt.models.layers import LayerNorm, project, runs_kernels


@pytest.fixture
def calls(monkeypatch):
    """Names of the ops called, in order."""
    made = []
    for name in (
        "linear",
        "linear_gelu_new",
        "linear_residual",
        "layer_norm",
        "embedding",
        "write_kv",
        "paged_prefill_attention",
    ):
        op = getattr(layers_module.ops, name)

        def record(*args, _name=name, _op=op):
            made.append(_name)
            return _op(*args)

        monkeypatch.setattr(layers_module.ops, name, record)
    return made


@pytest.mark.proves("F10")
def test_conv1d_is_a_linear_layer_with_its_weight_transposed(path):
    conv = Conv1D(5, 3)
    assert (conv.nf, conv.nx) == (5, 3)
    assert conv.weight.shape == (3, 5)
    linear = nn.Linear(3, 5)
    linear.weight.data, linear.bias.data = conv.weight.data.t(), conv.bias.data
    conv.eval()
    for shape in [(3,), (4, 3), (2, 4, 3), (2, 0, 3)]:
        x = torch.randn(shape)
        torch.testing.assert_close(conv(x), linear(x))
    strided = torch.randn(3, 4).t()
    torch.testing.assert_close(conv(strided), linear(strided))


@pytest.mark.proves("F17")
def test_the_table_holds_every_plain_activation_of_transformers(hf):
    from transformers.activations import ACT2CLS
    from transformers.activations import ACT2FN as THEIRS

    with_weights = {"prelu", "xielu"}
    assert set(ACT2CLS) - with_weights == set(ACT2FN)
    assert set(ACT2FN) == ACTIVATIONS
    x = torch.cat([torch.linspace(-12.0, 12.0, 97), torch.tensor([0.0, -0.0, 1e-6, -50.0, 50.0])])
    for name in ACT2FN:
        torch.testing.assert_close(get_activation(name)(x), THEIRS[name](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gelu_neu", "prelu", "GELU", ""])
def test_unknown_activations_are_named_with_what_there_is(name):
    with pytest.raises(ValueError, match=f"activation '{name}' is not known; use one of gelu, "):
        get_activation(name)


def test_kernels_run_exactly_when_no_gradient_is_needed(model, build, ids, calls):
    with torch.no_grad():
        model(ids)
    # without the extension attention is torch's own
    attention = ["write_kv", "paged_prefill_attention"] if ops.extension_status().loaded else []
    per_block = ["layer_norm", "linear", *attention, "linear_residual"]
    per_block += ["layer_norm", "linear_gelu_new", "linear_residual"]
    everything = ["embedding", *per_block * 2, "layer_norm", "linear"]
    assert calls == everything

    calls.clear()
    model(ids)
    assert calls == []

    frozen = build().requires_grad_(False)
    frozen(ids)
    assert calls == everything

    calls.clear()
    with torch.no_grad():
        frozen.train()(ids)
    assert calls == []

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert frozen.eval()(ids).logits.dtype == torch.bfloat16
    with torch.no_grad():
        assert frozen.double()(ids).logits.dtype == torch.float64
    assert calls == []


def test_a_frozen_trunk_below_a_trainable_head_runs_on_kernels(build, ids, calls):
    model = build(tie_word_embeddings=False)
    model.transformer.requires_grad_(False)
    model(ids, labels=ids).loss.backward()
    # all but the output layer
    assert len(calls) == 2 * (8 if ops.extension_status().loaded else 6) + 2
    assert calls[-1] == "layer_norm"
    assert model.lm_head.weight.grad.count_nonzero() > 0


def test_hooks_see_every_layer_on_both_paths(build, path, ids):
    model = build()
    seen = set()
    for name, module in model.named_modules():
        if not name.endswith(("drop", "dropout", "h")):
            module.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(ids)
    expected = {name for name, _ in model.named_modules() if not name.endswith(("drop", "dropout", "h"))}
    assert seen == expected


def test_a_hook_can_change_what_an_inner_layer_gives(build, path, ids):
    model = build()
    before = model(ids).logits
    handle = model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, output: output * 0)
    assert not torch.allclose(model(ids).logits, before)
    handle.remove()
    torch.testing.assert_close(model(ids).logits, before, rtol=0.0, atol=2e-5)


def test_both_ways_of_a_layer_agree():
    x = torch.randn(2, 3, 16)
    for module in (LayerNorm(16).eval(), Conv1D(8, 16).eval()):
        with torch.no_grad():
            assert runs_kernels(module, x, module.weight)
            fast = module(x)
        assert not runs_kernels(module, x, module.weight)
        torch.testing.assert_close(fast, module(x), rtol=0.0, atol=2e-6)
    for bias in (False, True):
        head = nn.Linear(16, 9, bias=bias).eval()
        with torch.no_grad():
            torch.testing.assert_close(project(head, x), head(x), rtol=0.0, atol=2e-6)
        assert project(head, x).requires_grad
