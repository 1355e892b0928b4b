"""Quantised models of both families: numbers, every output, generation, gradients, sizes, ties and the way back."""

import copy
import pickle

import openai_gpt_models
import pytest
import torch
from quantized_models import EXACT, FORMATS, greedy, plain_logits, product
from torch import nn

from gpt2rt import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    OpenAIGPTDoubleHeadsModel,
    OpenAIGPTForSequenceClassification,
    OpenAIGPTLMHeadModel,
    OpenAIGPTModel,
    QuantizationConfig,
    QuantizedWeight,
    quantize_model,
)
from gpt2rt.graph import make_executor
from gpt2rt.models.quantized import QuantizedConv1D, QuantizedEmbedding, QuantizedLayer, QuantizedLinear

GPT2_KINDS = (
    GPT2Model,
    GPT2LMHeadModel,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2ForQuestionAnswering,
)
GPT1_KINDS = (OpenAIGPTModel, OpenAIGPTLMHeadModel, OpenAIGPTDoubleHeadsModel, OpenAIGPTForSequenceClassification)


@pytest.fixture
def quantized(build):
    """``quantized(format, kind=GPT2LMHeadModel, **config)``: a small quantised model of either family."""

    def make(form, kind=GPT2LMHeadModel, **fields):
        make_one = openai_gpt_models.make if kind.__name__.startswith("OpenAI") else build
        model = make_one(kind=kind, **{"n_embd": 64, "n_head": 2, **fields})
        return quantize_model(model, FORMATS.get(form, form), progress=False)

    return make


def ids_for(model, rows=2, length=9):
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, OpenAIGPTLMHeadModel])
@pytest.mark.parametrize("form", FORMATS)
def test_logits_are_those_of_the_definition(quantized, form, kind):
    model = quantized(form, kind)
    ids = ids_for(model)
    seen = {}
    handles = [
        layer.register_forward_hook(lambda module, x, y: seen.update({module: (x[0].flatten(0, -2), y.flatten(0, -2))}))
        for layer in model.modules()
        if isinstance(layer, QuantizedConv1D | QuantizedLinear) and isinstance(layer.quantized, QuantizedWeight)
    ]
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    # every product, from what it was given
    assert len(seen) == len(handles) > 0
    for layer, (x, y) in seen.items():
        expected = product(x, layer.quantized, layer.bias)
        assert (y.double() - expected).abs().max() <= 1e-4 * expected.abs().max()
    with torch.no_grad():
        # and without hooks, where layers may be fused
        assert torch.equal(model(ids).logits, logits)
    with torch.no_grad():
        plain = plain_logits(copy.deepcopy(model).dequantize(torch.float32), ids)
    error = (logits.double() - plain).abs().max().item()
    if form in EXACT:
        assert error <= 2e-5 * max(1.0, plain.abs().max().item())
    else:
        # the activations are rounded to 8 bits
        assert 1e-5 < error < 0.1 * plain.abs().max().item()


# greedy tokens with keys and values in float32, as forward has them: generate would round them with int8 activations
AS_FORWARD = {"do_sample": False, "eos_token_id": None, "kv_cache_dtype": "float32"}


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, OpenAIGPTLMHeadModel])
@pytest.mark.parametrize("form", FORMATS)
def test_the_graph_computes_what_forward_does(quantized, monkeypatch, form, kind):
    if form in EXACT:
        # or a table of bfloat16 would meet bfloat16 activations
        monkeypatch.setenv("GPT2RT_CPU_ARITHMETIC", "exact")
    model = quantized(form, kind)
    plan = model.build_graph()
    embed, head = plan.nodes[0], plan.nodes[-1]
    if form == "nf4-double":
        # a float table is a parameter, of which the plan has views
        assert embed.wte.data_ptr() == head.linear.weight.data_ptr()
    else:
        assert embed.wte is head.linear.weight
    assert plan.dtype == torch.float32
    inner = [node.linear.weight for node in plan.nodes[:-1] if hasattr(node, "linear")]
    assert len(inner) == 8
    assert all(isinstance(weight, QuantizedWeight) for weight in inner)
    prompt = ids_for(model, 1, 5)
    expected = greedy(model, prompt, 12)
    for name in ("cpu", "eager", "modules"):
        model.generation_executor(name)
        found = model.generate(prompt, max_new_tokens=12, **AS_FORWARD)
        assert torch.equal(found, expected), name


def test_a_padded_batch_gives_what_its_rows_give_alone(quantized):
    model = quantized("int4")
    ids = ids_for(model, 3, 40)
    ids[1, :33] = ids[0, :33]
    mask = torch.ones_like(ids)
    mask[2, 30:] = 0
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, length in ((0, 40), (1, 40), (2, 30)):
            alone = model(ids[row : row + 1, :length]).logits[0]
            assert torch.equal(together[row, :length], alone)


# ---- every class, every output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*GPT2_KINDS, *GPT1_KINDS])
@pytest.mark.parametrize("form", ["int4", "nf4"])
def test_every_class_gives_every_output(quantized, form, kind):
    model = quantized(form, kind, num_labels=3)
    floats = copy.deepcopy(model).dequantize()
    ids = ids_for(model)[:1]
    arguments = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}
    if kind in (GPT2ForTokenClassification, GPT2ForQuestionAnswering, *GPT1_KINDS[2:]):
        del arguments["use_cache"]
    with torch.no_grad():
        found, expected = model(ids, **arguments), floats(ids, **arguments)
        trained = model(ids, **arguments)
    assert found.keys() == expected.keys()
    assert len(found.hidden_states) == model.config.n_layer + 1
    tolerance = 2e-5 if form == "nf4" else 0.2
    for name in found:
        for a, b in zip(_tensors(found[name]), _tensors(expected[name]), strict=True):
            assert a.shape == b.shape, name
            assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), name
    for a, b in zip(_tensors(found[0]), _tensors(trained[0]), strict=True):
        assert torch.equal(a, b)
    # heads of tasks stay floats
    own = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert own == {name for name, module in floats.named_modules() if type(module) is nn.Linear} - {"lm_head"}


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)]


def test_cross_attention_and_inputs_embeds(quantized):
    model = quantized("nf4", add_cross_attention=True)
    assert isinstance(model.transformer.h[0].crossattention.q_attn, QuantizedConv1D)
    floats = copy.deepcopy(model).dequantize()
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    embeds = model.get_input_embeddings()(ids_for(model))
    with torch.no_grad():
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                found = model(inputs_embeds=embeds, encoder_hidden_states=states).logits
                expected = floats(inputs_embeds=embeds, encoder_hidden_states=states).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nf4", "int8-exact"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dequantised_model(quantized, form, checkpointing):
    model = quantized(form, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
    floats = copy.deepcopy(model).dequantize()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = ids_for(model)
    losses = []
    for one in (model, floats):
        loss = one(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    theirs = dict(floats.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=name)
    # what is quantised is no parameter, so an optimiser never sees it
    assert not any("c_attn.weight" in name or "wte" in name for name, _ in model.named_parameters())


def test_an_adapter_learns_over_a_quantised_model(quantized):
    model = quantized("int4").requires_grad_(False)
    target = model.transformer.h[0].mlp.c_proj
    down, up = nn.Linear(256, 4, bias=False), nn.Linear(4, 64, bias=False)
    nn.init.zeros_(up.weight)
    target.register_forward_hook(lambda module, x, y: y + up(down(x[0])))
    ids = ids_for(model)
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters()], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.requires_grad_(True)
    assert all(parameter.is_floating_point() for parameter in model.parameters())


# ---- what a model says of itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("int4", 4), ("nf4", 4), ("fp4", 4)])
def test_what_a_model_says_of_itself(quantized, build, form, bits):
    model = quantized(form)
    floats = build(n_embd=64, n_head=2)
    assert model.is_quantized
    assert not floats.is_quantized
    assert (model.quantization_method, floats.quantization_method) == ("gpt2rt", None)
    assert model.quantization_scheme == form
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (bits == 4, bits == 8)
    assert (floats.is_loaded_in_4bit, floats.is_loaded_in_8bit) == (False, False)
    assert isinstance(model.config.quantization_config, QuantizationConfig)
    assert model.config.to_dict()["quantization_config"]["scheme"] == form
    assert model.dtype == torch.float32
    assert model.num_parameters() == floats.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == floats.num_parameters(exclude_embeddings=True)
    assert (
        model.num_parameters(only_trainable=True)
        == sum(p.numel() for p in floats.parameters() if p.dim() == 1) + 64 * 64
    )


@pytest.mark.parametrize("form", FORMATS)
def test_the_footprint_counts_each_byte_once(quantized, form):
    model = quantized(form)
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storages[tensor.untyped_storage().data_ptr()] = tensor.nbytes
    assert model.get_memory_footprint() == sum(storages.values())
    assert model.get_memory_footprint(return_buffers=False) == model.get_memory_footprint()
    before = model.get_memory_footprint()
    assert before < copy.deepcopy(model).dequantize().get_memory_footprint()


# ---- ties ------------------------------------------------------------------------------------------------------------


def is_tied(model):
    head, table = model.lm_head, model.get_input_embeddings()
    assert isinstance(table, QuantizedEmbedding)
    return (
        head.weight is table.weight and head.weight_scales is table.weight_scales and head.quantized is table.quantized
    )


@pytest.mark.parametrize("form", ["int8", "int4-g32-zeros", "fp4"])
def test_tied_layers_stay_tied(quantized, form):
    model = quantized(form)
    assert is_tied(model)
    for changed in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model).half(),
        copy.deepcopy(model).to("meta"),
        copy.deepcopy(model).to_empty(device="cpu"),
    ):
        assert is_tied(changed)
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    assert is_tied(other)


def test_an_untied_output_layer_has_codes_of_its_own(quantized):
    model = quantized("int8", tie_word_embeddings=False)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.weight is not model.transformer.wte.weight
    model.float()
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_other_embeddings_bring_the_output_layer_along(quantized):
    model = quantized("int8")
    model.set_input_embeddings(nn.Embedding(97, 64))
    model.tie_weights()
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = ids_for(model)
    with torch.no_grad():
        assert model(ids).logits.shape == (2, 9, 97)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("form", ["int8", "int4-g32-zeros", "int4-g128-exact"])
@pytest.mark.parametrize("count", [90, 101])
def test_another_number_of_tokens(quantized, form, tie, count):
    model = quantized(form, tie_word_embeddings=tie)
    before, head = model.transformer.wte.dequantize(), model.lm_head.dequantize()
    assert model.resize_token_embeddings(count) is model.transformer.wte
    kept = min(97, count)
    for old, layer in ((before, model.transformer.wte), (head, model.lm_head)):
        assert layer.shape == (count, 64)
        now = layer.dequantize()
        assert torch.equal(now[:kept], old[:kept])
        mean = old.mean(0).expand(count - kept, -1)
        assert count == 90 or (now[kept:] - mean).abs().max() <= 0.15 * mean.abs().max()
    assert is_tied(model) == tie
    assert model.config.vocab_size == count
    ids = ids_for(model)
    with torch.no_grad():
        assert model(ids).logits.shape == (2, 9, count)
    assert model.generate(ids[:1], max_new_tokens=2, do_sample=False).shape[1] == 11


def test_new_rows_can_be_drawn(quantized):
    model = quantized("int8")
    model.resize_token_embeddings(130, mean_resizing=False)
    rows = model.transformer.wte.dequantize()[97:]
    assert rows.std() == pytest.approx(0.02, rel=0.2)


# ---- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_dequantize(quantized, build, form):
    model, floats = quantized(form), build(n_embd=64, n_head=2)
    values = {name: layer.dequantize() for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    assert model.dequantize() is model
    assert not model.is_quantized
    assert model.quantization_method is None
    assert "quantization_config" not in model.config.to_dict()
    assert [*model.state_dict()] == [*floats.state_dict()]
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, value in values.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight.t() if weight.shape != value.shape or "h." in name else weight, value)
        assert weight.requires_grad
    half = quantized(form).dequantize(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="no layer of this GPT2LMHeadModel is quantised; load it with quantization="):
        model.dequantize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(quantized, dtype):
    for form in ("int8", "int4", "nf4"):
        model = quantized(form)
        ids = ids_for(model)
        with torch.no_grad():
            full = model(ids).logits
            model.to(dtype)
            assert model.dtype == dtype
            half = model(ids).logits
        assert half.dtype == dtype
        assert (half.float() - full).abs().max() < 0.1 * full.abs().max()
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_generation_notices_other_codes(quantized):
    model = quantized("int8", tie_word_embeddings=False)
    prompt = ids_for(model, 1)
    first = model.generate(prompt, max_new_tokens=6, **AS_FORWARD)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
        model.lm_head.weight_scales.copy_(model.lm_head.weight_scales.flip(0))
    second = model.generate(prompt, max_new_tokens=6, **AS_FORWARD)
    assert not torch.equal(first, second)
    assert torch.equal(second, greedy(model, prompt, 6))
    # changes that torch does not count are seen too
    model.lm_head.weight.data.neg_()
    third = model.generate(prompt, max_new_tokens=6, **AS_FORWARD)
    assert torch.equal(third, greedy(model, prompt, 6))
    assert not torch.equal(second, third)


def test_a_hook_on_a_quantised_layer_is_seen_by_generate(quantized):
    model = quantized("int4")
    prompt = ids_for(model, 1)
    handle = model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda module, x, y: y * 0.0)
    with pytest.warns(UserWarning, match=r"h.1.mlp.c_fc has hooks"):
        hooked = model.generate(prompt, max_new_tokens=6, **AS_FORWARD)
    assert torch.equal(hooked, greedy(model, prompt, 6))
    handle.remove()
    assert torch.equal(model.generate(prompt, max_new_tokens=6, **AS_FORWARD), greedy(model, prompt, 6))


def test_both_executors_take_the_plan(quantized):
    model = quantized("int4")
    assert make_executor(model.build_graph(), "cpu").name == "cpu"
    assert make_executor(model.build_graph(), "eager").name == "eager"
    model.transformer.h[0].ln_1.bfloat16()
    with pytest.raises(ValueError, match=r"h.0.ln_1.weight is torch.bfloat16 on cpu, but wpe.weight is torch.float32"):
        model.build_graph()


@pytest.mark.parametrize("form", ["int8-exact", "nf4-double", "fp4"])
def test_generation_with_token_types_and_embeddings(quantized, monkeypatch, form):
    monkeypatch.setenv("GPT2RT_CPU_ARITHMETIC", "exact")
    model = quantized(form)
    ids = ids_for(model, 1, 6)
    types = torch.tensor([[5, 5, 5, 9, 9, 9]])
    found = model.generate(ids, token_type_ids=types, max_new_tokens=8, **AS_FORWARD)
    for _ in range(8):
        with torch.no_grad():
            logits = model(ids, token_type_ids=types).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        types = torch.cat([types, torch.tensor([[9]])], dim=1)
    assert torch.equal(found, ids)
    prompt = ids_for(model, 1, 6)
    embeds = model.get_input_embeddings()(prompt)
    given = model.generate(inputs_embeds=embeds, max_new_tokens=8, **AS_FORWARD)
    assert torch.equal(given, greedy(model, prompt, 8)[:, 6:])
