"""Callers who watch, replace, run and transform the modules of a model, as they do with transformers' ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import gpt2rt
from gpt2rt.models import DynamicCache, EncoderDecoderCache

FAMILIES = {
    "gpt2": (gpt2rt.GPT2Config, gpt2rt.GPT2LMHeadModel),
    "openai-gpt": (gpt2rt.OpenAIGPTConfig, gpt2rt.OpenAIGPTLMHeadModel),
}
LAYERS = ("", "drop", "h.0", "h.1.attn", "h.1.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp", "h.1.mlp.c_fc", "h.1.ln_1")


@pytest.fixture(params=FAMILIES)
def lm(request):
    """A language model of either family with random weights, to change at will."""
    config_class, model_class = FAMILIES[request.param]
    torch.manual_seed(0)
    model = model_class(config_class(n_layer=2, n_embd=32, n_head=4, vocab_size=97, n_positions=64)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def alike():
    """[3, 20] token ids of which the first 17 are the same in every row: 16 of them are computed once."""
    ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(2))
    ids[:, :17] = ids[0, :17]
    return ids


def first(output):
    """The tensor among what a module gives."""
    return output if isinstance(output, torch.Tensor) else output[0]


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


class Halved(nn.Module):
    """Runs another module on halved input, which must have the batch of the caller."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        assert x.size(0) == 3
        return self.inner(x * 0.5)


# ---- hooks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_a_hook_sees_the_callers_batch(hf, lm, alike, name):
    theirs = hf.copy_of(lm)
    seen = []
    for model in (lm, theirs):
        model.transformer.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(first(out)))
        with torch.no_grad():
            model(alike)
    assert seen[0].shape == seen[1].shape
    close(seen[0], seen[1])


def test_patching_activations_between_rows(hf, lm, alike):
    def patch(module, args, out):
        x = first(out)
        x[1, 10] = x[0, 19]

    for model in (lm, theirs := hf.copy_of(lm)):
        model.transformer.h[0].register_forward_hook(patch)
    with torch.no_grad():
        close(lm(alike).logits, theirs(alike).logits)


def test_a_hook_on_a_gpt2_block_gets_and_gives_a_tensor(hf, build, alike):
    model = build()
    theirs = hf.copy_of(model)
    for each in (model, theirs):
        each.transformer.h[0].register_forward_hook(lambda module, args, out: out * 2)
    for attentions in (False, True):
        with torch.no_grad():
            got, want = (m(alike, output_attentions=attentions) for m in (model, theirs))
        close(got.logits, want.logits)
    close(got.attentions[1], want.attentions[1])


def test_the_head_reads_what_a_hook_or_a_wrapper_made_of_the_hidden_states(lm, alike):
    def double(module, args, out):
        out.last_hidden_state = out.last_hidden_state * 2
        return out

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return double(self, args, self.inner(*args, **kwargs))

    with torch.no_grad():
        want = lm(alike).logits * 2
        wrapped = copy.deepcopy(lm)
        wrapped.transformer = Wrapper(wrapped.transformer)
        close(wrapped(alike).logits, want)
        lm.transformer.register_forward_hook(double)
        close(lm(alike).logits, want)


# ---- replaced parts --------------------------------------------------------------------------------------------------


def test_a_module_of_ones_own_gets_the_callers_batch(hf, lm, alike):
    theirs = hf.copy_of(lm)
    for model in (lm, theirs):
        model.transformer.h[0].mlp = Halved(model.transformer.h[0].mlp)
    with torch.no_grad():
        close(lm(alike).logits, theirs(alike).logits)


def test_a_forward_given_to_one_object_runs(hf, lm, alike):
    theirs = hf.copy_of(lm)
    for model in (lm, theirs):
        block = model.transformer.h[0]
        attn, mlp = block.attn.forward, block.mlp.forward

        def attend(*args, attn=attn, **kwargs):
            out, *rest = attn(*args, **kwargs)
            return [out * 0.5, *rest]

        block.attn.forward = attend
        # takes nothing but its input: a fused form would hand it more
        block.mlp.forward = lambda x, mlp=mlp: mlp(x) * 2
    with torch.no_grad():
        close(lm(alike).logits, theirs(alike).logits)


class Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("change", ["replaced", "removed", "pruned", "parametrized", "head", "bias", "pruned head"])
def test_the_graph_refuses_what_it_would_not_run(lm, change):
    name = "lm_head" if change in ("head", "bias", "pruned head") else "h.1.mlp.c_fc"
    mlp = lm.transformer.h[1].mlp
    if change == "replaced":
        mlp.c_fc = Halved(mlp.c_fc)
    elif change == "removed":
        mlp.c_fc = nn.Identity()
    elif change == "pruned":
        prune.l1_unstructured(mlp.c_fc, "weight", 0.5)
    elif change == "parametrized":
        parametrize.register_parametrization(mlp.c_fc, "weight", Twice())
    elif change == "pruned head":
        prune.random_unstructured(lm.lm_head, "weight", 0.5)
    else:
        lm.lm_head = nn.Linear(32, 97) if change == "bias" else nn.Sequential(lm.lm_head)
    with pytest.raises(ValueError, match=f"^{name} is not the layer"):
        lm.build_graph()


# ---- layers that do not run on the kernels beside layers that do ----------------------------------------------------


@pytest.mark.parametrize("trained", ["h.1.", "h.0.mlp", "ln_", "wte", "tokens_embed", "lm_head"])
def test_rows_that_begin_alike_below_and_above_a_trained_layer(hf, lm, alike, trained):
    theirs = hf.copy_of(lm)
    gradients = []
    for model in (lm, theirs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        out = model(alike, labels=alike)
        if any(p.requires_grad for p in model.parameters()):
            out.loss.backward()
        gradients.append((out.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    close(gradients[0], gradients[1])


def test_rows_that_begin_alike_with_one_block_in_training_mode(hf, lm, alike):
    theirs = hf.copy_of(lm)
    for model in (lm, theirs):
        for module in model.transformer.h[1].train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    with torch.no_grad():
        close(lm(alike).logits, theirs(alike).logits)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_transform_over_one_block_alone(lm, alike):
    name = "transformer.h.1.attn.c_attn.weight"
    weight = lm.get_parameter(name).detach()
    with torch.no_grad():
        call = torch.func.vmap(lambda w: torch.func.functional_call(lm, {name: w}, (alike,)).logits)
        got = call(torch.stack([weight, -weight]))
        close(got[0], lm(alike).logits)


# ---- parts by themselves ---------------------------------------------------------------------------------------------


def test_blocks_run_one_by_one(hf, lm, path):
    theirs = hf.copy_of(lm, attn_implementation="sdpa" if isinstance(lm, gpt2rt.GPT2LMHeadModel) else "eager")
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    got = want = x
    for ours, other in zip(lm.transformer.h, theirs.transformer.h, strict=True):
        got, want = first(ours(got)), first(other(want))
        close(got, want)
    close(lm.transformer.h[0].attn(x)[0], theirs.transformer.h[0].attn(x)[0])


def test_a_block_takes_a_mask_of_four_dimensions(hf, build, path):
    model = build()
    theirs = hf.copy_of(model)
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1))
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    allowed[5:, 2] = False
    mask = torch.zeros(2, 1, 9, 9).masked_fill(~allowed, torch.finfo(torch.float32).min)
    block, other = model.transformer.h[0], theirs.transformer.h[0]
    close(block(x, attention_mask=mask), other(x, attention_mask=mask))
    close(block(x, attention_mask=allowed[None, None]), other(x, attention_mask=mask))
    for bad in (mask[..., :8], mask[:, 0]):
        with pytest.raises(ValueError, match="attention mask has shape"):
            block(x, attention_mask=bad)


# ---- torch's transforms ----------------------------------------------------------------------------------------------


def loss_of(model):
    def loss(parameters, row):
        given = {"labels": row[None]}
        return torch.func.functional_call(model, parameters, (row[None],), given).loss

    return loss


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample(lm):
    ids = torch.randint(0, 97, (3, 7), generator=torch.Generator().manual_seed(3))
    parameters = {name: p.detach() for name, p in lm.named_parameters()}
    together = torch.func.vmap(torch.func.grad(loss_of(lm)), in_dims=(None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        lm.zero_grad()
        lm(row[None], labels=row[None]).loss.backward()
        for name, p in lm.named_parameters():
            torch.testing.assert_close(together[name][i], p.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_ensemble_in_one_call(lm, alike):
    models = [lm, other := copy.deepcopy(lm)]
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.mul_(-1)
        parameters, _ = torch.func.stack_module_state(models)
        call = torch.func.vmap(lambda p: torch.func.functional_call(lm, p, (alike,)).logits)
        got = call(parameters)
        for logits, model in zip(got, models, strict=True):
            close(logits, model(alike).logits)


def test_tangents_flow_through_a_frozen_model(lm):
    lm.requires_grad_(False)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    step = 1e-3
    plus, minus = (lm.double()(inputs_embeds=(x + s * direction).double()).logits for s in (step, -step))
    want = ((plus - minus) / (2 * step)).float()
    lm.float()
    # the only one of torch's forms that knows forward-mode differentiation
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, direction)
            tangent = torch.autograd.forward_ad.unpack_dual(lm(inputs_embeds=dual).logits).tangent
        _, again = torch.func.jvp(lambda e: lm(inputs_embeds=e).logits, (x,), (direction,))
    torch.testing.assert_close(tangent, want, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(again, tangent)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_traced_model_serves_other_tokens(lm, alike):
    class Logits(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids, mask):
            return self.inner(ids, attention_mask=mask, return_dict=False)[0]

    mask = torch.ones_like(alike)
    with torch.no_grad():
        traced = torch.jit.trace(Logits(lm).eval(), (alike[:2], mask[:2]))
        assert "gpt2rt::" not in str(traced.inlined_graph)
        other = (alike[1:] * 3 + 1) % 97
        mask[1, 4:9] = 0
        close(traced(other, mask[:2]), lm(other, attention_mask=mask[:2]).logits)


# ---- what else transformers' models answer ---------------------------------------------------------------------------


def test_adapters_below_reentrant_checkpointing_get_gradients(hf, build, ids):
    def gradient(model):
        model.requires_grad_(False)
        weight = model.transformer.h[0].mlp.c_fc.weight.requires_grad_()
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        return weight.grad

    model = build(**dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0))
    close(gradient(model), gradient(hf.copy_of(model)))
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()._forward_hooks
    assert not model.get_input_embeddings()(ids).requires_grad


def test_size_in_bytes_and_the_names_of_attention(hf, lm):
    theirs = hf.copy_of(lm)
    assert lm.get_memory_footprint(return_buffers=False) == theirs.get_memory_footprint(return_buffers=False)
    assert lm.half().get_memory_footprint() == 2 * lm.num_parameters()
    assert lm.get_decoder() is lm.transformer is lm.transformer.get_decoder()
    lm.set_attn_implementation("eager")
    assert lm.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="attn_implementation = 'flash_attention_2'"):
        lm.set_attn_implementation("flash_attention_2")


def test_a_composite_model_of_transformers_keeps_our_weights(hf, build, ids):
    transformers = hf.module
    decoder = build(add_cross_attention=True)
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    ).eval()
    source = torch.arange(12).view(2, 6)
    with torch.no_grad():
        states = encoder(source).last_hidden_state
        want = decoder(ids, encoder_hidden_states=states).logits
        both = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
        close(both(input_ids=source, decoder_input_ids=ids).logits, want)


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
def test_transformers_makes_a_cache_for_our_config(hf, model, ids, kind):
    arguments = {"max_cache_len": 32} if kind == "StaticCache" else {}
    cache = getattr(hf.module, kind)(config=model.config, **arguments)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache, use_cache=True)
        close(model(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, 5:])


def test_rows_of_a_cache_are_repeated_selected_and_forgotten(build, ids):
    model = build(add_cross_attention=True)
    states = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    for given, kind in (({}, DynamicCache), ({"encoder_hidden_states": states}, EncoderDecoderCache)):
        with torch.no_grad():
            want = model(ids, **given).logits[:, -1]
            past = model(ids[:, :-1], use_cache=True, **given).past_key_values
            cache = past if kind is EncoderDecoderCache else past.self_attention_cache
            assert type(cache) is kind
            rows = torch.tensor([0, 0, 1, 1])
            cache.batch_repeat_interleave(2)
            repeated = {name: x[rows] for name, x in given.items()}
            close(model(ids[rows, -1:], past_key_values=cache, **repeated).logits[:, -1], want[rows])
            cache.crop(-1)
            rows = torch.tensor([2, 0, 3])
            cache.batch_select_indices(rows)
            chosen = {name: x[rows // 2] for name, x in given.items()}
            close(model(ids[rows // 2, -1:], past_key_values=cache, **chosen).logits[:, -1], want[rows // 2])
            cache.reset()
            assert cache.get_seq_length() == 0
            close(model(ids, past_key_values=cache, **given).logits[:, -1], want)


def test_probabilities_keep_their_gradients_under_checkpointing(build, ids):
    def gradient(on):
        model = build(**dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)).train()
        if on:
            model.gradient_checkpointing_enable()
        out = model(ids, use_cache=False, output_attentions=True)
        out.attentions[1].square().sum().backward()
        return model.transformer.h[0].attn.c_attn.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))
