"""``quantize_model`` on whole models, and what it costs the embedded one on text it was not trained on."""

import hashlib
import re

import pytest
import torch

from gpt2rt import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    OpenAIGPTLMHeadModel,
    QuantizationConfig,
    quantize_model,
)
from gpt2rt.checkpoint.resolve import embedded_folder
from gpt2rt.models import quantize as module
from gpt2rt.quantization import quantize_rtn

EMBEDDED = "gpt2rt/tiny-gpt2"
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def build():
    """``build(kind=GPT2LMHeadModel, **config)``: a small random model."""

    def build(kind=GPT2LMHeadModel, **overrides):
        torch.manual_seed(0)
        sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 48, "n_layer": 2, "n_head": 3, **overrides}
        config = kind.config_class(**sizes)
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5.0)
        return model

    return build


def ids_of(count, vocab_size=61):
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(0))


# ---- each weight on its own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp4"])
def test_rounding_takes_every_layer(build, scheme):
    model, floats = build(), build()
    config = QuantizationConfig(scheme)
    assert quantize_model(model, scheme, progress=False) is model
    for name in [f"transformer.h.{i}.{part}" for i in (0, 1) for part in LINEAR]:
        expected = quantize_rtn(floats.get_submodule(name).weight.t(), config)
        assert torch.equal(model.get_submodule(name).quantized.codes, expected.codes)
    embedding = quantize_rtn(floats.transformer.wte.weight, config, scheme="int8")
    assert torch.equal(model.transformer.wte.quantized.codes, embedding.codes)
    # the output layer is tied to it
    assert model.lm_head.quantized is model.transformer.wte.quantized
    assert model.config.quantization_config == config
    assert model.get_memory_footprint() < 0.6 * floats.get_memory_footprint()


def test_layers_to_leave_alone(build):
    model = build()
    config = QuantizationConfig("int8", embeddings="none", skip_modules=("h.1", "c_attn"))
    quantize_model(model, config, progress=False)
    quantized = {name for name, layer in model.named_modules() if hasattr(layer, "quantized")}
    assert quantized == {f"transformer.h.0.{part}" for part in LINEAR if "c_attn" not in part}


def test_other_heads_and_dtypes(build):
    model = quantize_model(build(GPT2ForSequenceClassification), "int4-g32", progress=False)
    assert isinstance(model.score, torch.nn.Linear)
    assert model.transformer.h[0].mlp.c_fc.quantized.group_size == 32
    half = quantize_model(build().to(torch.bfloat16), QuantizationConfig("int8", embeddings="float16"), progress=False)
    assert half.transformer.wte.quantized.dtype == torch.float16
    assert half(ids_of(8).unsqueeze(0)).logits.dtype == torch.bfloat16


# ---- with a calibration text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, OpenAIGPTLMHeadModel])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_layers_fit_what_they_see(build, kind, scheme):
    """The error of a layer's output, on the inputs that the quantised model gives it, is smaller than by rounding."""
    floats, ids = build(kind), ids_of(16 * 40)
    config = QuantizationConfig(scheme, embeddings="none", method="gptq", activations="float32")
    model = quantize_model(build(kind), config, calibration=ids, progress=False)
    assert model.config.quantization_config == config
    better = []
    for name, layer in floats.named_modules():
        if not name.endswith(LINEAR):
            continue
        inputs = []
        hook = model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, inputs=inputs: inputs.append(args[0].reshape(-1, args[0].size(-1)))
        )
        with torch.no_grad():
            model(ids.view(-1, 16))
        hook.remove()
        weight = layer.weight.detach().t()
        rounded = quantize_rtn(weight, config)
        errors = [
            (inputs[0] @ (q.dequantize() - weight).t()).square().sum().item()
            for q in (model.get_submodule(name).quantized, rounded)
        ]
        better.append(errors[0] / errors[1])
    assert len(better) == 8
    assert max(better) < 0.95


def test_every_block_sees_the_quantised_ones_before_it(build, monkeypatch):
    """The inputs gathered for the last layer are those of a model whose other layers are quantised."""
    seen = {}
    gather = module._gather

    def spy(block, layer, batches):
        hessian = gather(block, layer, batches)
        seen[id(layer)] = hessian.matrix.clone()
        return hessian

    monkeypatch.setattr(module, "_gather", spy)
    model, ids = build(), ids_of(16 * 8)
    last = model.transformer.h[1].mlp.c_proj
    config = QuantizationConfig("int4", method="gptq", activations="float32")
    quantize_model(model, config, calibration=ids, progress=False)
    assert len(seen) == 8
    inputs = []
    model.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(ids.view(-1, 16))
        rows = inputs[0].reshape(-1, 192)
        found = seen[id(last)].float()
        torch.testing.assert_close(found, rows.t() @ rows, rtol=1e-3, atol=1e-3 * found.abs().max().item())
        # and not those of the float model
        floats = build()
        floats.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
        floats(ids.view(-1, 16))
        others = inputs[1].reshape(-1, 192)
    assert (found - others.t() @ others).abs().max() > 0.01 * found.abs().max()


def test_calibration_may_be_texts_or_ids(build):
    tokenizer = GPT2Tokenizer.from_pretrained(EMBEDDED)
    text = "To be, or not to be, that is the question:\n" * 4
    ids = tokenizer.encode(text)
    config = QuantizationConfig("int4", method="gptq", embeddings="none")
    results = []
    for calibration, keywords in (
        ([text], {"tokenizer": tokenizer}),
        (text, {"tokenizer": tokenizer}),
        (torch.tensor(ids), {}),
        ([ids[:9], torch.tensor([ids[9:]])], {}),
        (ids, {}),
    ):
        model = build(vocab_size=2048, n_layer=1)
        quantize_model(model, config, calibration=calibration, progress=False, **keywords)
        results.append(model.transformer.h[0].mlp.c_fc.quantized.codes)
    assert all(torch.equal(codes, results[0]) for codes in results)
    # fewer tokens than positions are one window; later tokens are not looked at
    short = [build(vocab_size=2048, n_layer=1) for _ in range(2)]
    quantize_model(short[0], config, calibration=ids[:7], progress=False)
    quantize_model(short[1], config, calibration=ids, max_calibration_tokens=7, progress=False)
    assert torch.equal(*(m.transformer.h[0].mlp.c_fc.quantized.codes for m in short))
    assert not torch.equal(short[0].transformer.h[0].mlp.c_fc.quantized.codes, results[0])


def test_training_mode_and_gradients_are_left_as_they_were(build):
    model = build().train()
    quantize_model(model, QuantizationConfig("int4", method="gptq"), calibration=ids_of(64), progress=False)
    assert model.training
    assert all(layer.training for layer in model.modules())
    assert not [hook for layer in model.modules() for hook in layer._forward_pre_hooks]


# ---- refusals --------------------------------------------------------------------------------------------------------


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "keywords", "message"),
    [
        ("int3", {}, "quantization = 'int3' is not known"),
        ("int4", {"calibration": [1, 2]}, "a calibration text has no use with method='rtn'"),
        (QuantizationConfig("int4", method="gptq"), {}, "method='gptq' needs a calibration"),
        (QuantizationConfig("int4", method="gptq"), {"calibration": ["text"]}, "needs the model's tokenizer"),
        (QuantizationConfig("int4", method="gptq"), {"calibration": []}, "the calibration has no tokens"),
        (QuantizationConfig("int4", method="gptq"), {"calibration": [0.5]}, "token ids, got numbers of torch.float32"),
        (
            QuantizationConfig("int4", method="gptq"),
            {"calibration": [5, 61]},
            "token ids from 5 to 61, but the vocabulary has ids 0 to 60",
        ),
        (
            QuantizationConfig("int4", method="gptq"),
            {"calibration": [5], "max_calibration_tokens": 0},
            "max_calibration_tokens = 0, but it must be an integer >= 1",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before(build, config, keywords, message):
    model = build()
    before = state_of(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize_model(model, config, progress=False, **keywords)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_failure_leaves_the_model_as_it_was(build, method):
    model = build()
    with torch.no_grad():
        # the last one that is quantised
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = float("inf")
    before, layers = state_of(model), list(model.modules())
    calibration = ids_of(64) if method == "gptq" else None
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_proj\.weight cannot be quantised: 1 of 9216 weights are NaN"):
        quantize_model(model, QuantizationConfig("int4", method=method), calibration=calibration, progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(model.modules()) == layers
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.is_quantized
    assert getattr(model.config, "quantization_config", None) is None


def test_a_model_is_quantised_once(build):
    model = quantize_model(build(), "int8", progress=False)
    with pytest.raises(ValueError, match="quantised already; load its float checkpoint"):
        quantize_model(model, "int4", progress=False)
    quantize_model(model.dequantize(), "int4", progress=False)
    assert model.transformer.h[0].attn.c_attn.quantized.scheme == "int4"


def test_layers_that_plain_text_does_not_reach(build):
    model = build(add_cross_attention=True)
    config = QuantizationConfig("int4", method="gptq")
    with pytest.raises(ValueError, match="3 of 7 layers of a block do not run on plain text, such as those of cross"):
        quantize_model(model, config, calibration=ids_of(64), progress=False)
    config = QuantizationConfig("int4", method="gptq", skip_modules=("crossattention",))
    quantize_model(model, config, calibration=ids_of(64), progress=False)
    assert model.is_quantized


def test_the_bar_counts_the_weights(build, capsys):
    quantize_model(build(), "int8", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    quantize_model(build(), "int8", progress=False)
    assert capsys.readouterr().err == ""
    with module._bar(9, True) as advance:
        for _ in range(9):
            advance()


# ---- the embedded model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out():
    """Text that the embedded models were not trained on."""
    return (embedded_folder() / "held-out.txt").read_text(encoding="utf-8")


def test_the_held_out_text_is_that_of_the_model_card(held_out, test_data):
    whole = (test_data / "text" / "tinyshakespeare.txt").read_bytes()
    card = (embedded_folder() / "tiny-gpt2" / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(whole).hexdigest() in card
    text = whole.decode("utf-8")
    # as examples/train_tiny.py cuts it
    assert text[text.index("\n\n", int(0.9 * len(text))) + 2 :] == held_out


@pytest.fixture(scope="module")
def embedded(held_out):
    """The float model, its tokenizer, and ids of the held-out text: some to calibrate with, others to measure on."""
    tokenizer = GPT2Tokenizer.from_pretrained(EMBEDDED)
    ids = torch.tensor(tokenizer.encode(held_out[:30000], verbose=False))
    model = GPT2LMHeadModel.from_pretrained(EMBEDDED)
    return model, ids[:4096], ids[-2048:].view(-1, 512)


@torch.no_grad()
def cost(before, after, windows):
    """(perplexity of the second over that of the first, mean KL divergence in nats)."""
    first, second = (model(windows).logits.float().log_softmax(-1) for model in (before, after))
    likely = [x[:, :-1].gather(2, windows[:, 1:, None]).mean() for x in (first, second)]
    return (likely[0] - likely[1]).exp().item(), (first.exp() * (first - second)).sum(-1).mean().item()


def test_int8_costs_less_than_half_a_percent(embedded):
    model, _, windows = embedded
    quantized = quantize_model(GPT2LMHeadModel.from_pretrained(EMBEDDED), "int8", progress=False)
    perplexity, divergence = cost(model, quantized, windows)
    assert 0.995 < perplexity < 1.005
    assert 0 < divergence < 0.001


@pytest.mark.parametrize(("group_size", "symmetric"), [(32, True), (128, False)])
def test_compensation_beats_rounding_on_text_it_has_not_seen(embedded, group_size, symmetric):
    model, calibration, windows = embedded
    divergences = []
    for method in ("rtn", "gptq"):
        config = QuantizationConfig("int4", group_size, symmetric=symmetric, method=method, embeddings="none")
        quantized = GPT2LMHeadModel.from_pretrained(EMBEDDED)
        keywords = {"calibration": calibration} if method == "gptq" else {}
        # as floats: the numbers of the weights are what is asked about
        quantize_model(quantized, config, progress=False, **keywords).dequantize()
        perplexity, divergence = cost(model, quantized, windows)
        assert 0.98 < perplexity < 1.02
        divergences.append(divergence)
    assert divergences[1] < 0.7 * divergences[0]


def test_fewer_bits_cost_more(embedded):
    model, _, windows = embedded
    divergences = []
    for name in ("int8", "int4-g32", "int4-g128"):
        quantized = quantize_model(GPT2LMHeadModel.from_pretrained(EMBEDDED), name, progress=False).dequantize()
        divergences.append(cost(model, quantized, windows)[1])
    assert divergences == sorted(divergences)
