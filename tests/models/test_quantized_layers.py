"""Quantised layers: products against the definition, gradients, dtypes, state dicts, and what torch does to them."""

import copy
import pickle

import pytest
import torch
from quantized_models import numbers, product
from torch import nn

from gpt2rt.models import Conv1D, QuantizedConv1D, QuantizedEmbedding, QuantizedLinear, replace_with_quantized
from gpt2rt.models.quantized import float_form, quantized_form
from gpt2rt.quantization import QuantizationConfig, QuantizedWeight, quantize_rtn
from gpt2rt.quantization.codebooks import pack_4bit

SCHEMES = {
    "int8": QuantizationConfig("int8"),
    "int8-exact": QuantizationConfig("int8", activations="float32"),
    "int4": QuantizationConfig("int4", 32),
    "int4-zeros": QuantizationConfig("int4", 64, symmetric=False),
    "int4-exact": QuantizationConfig("int4", 128, activations="float32"),
    "nf4": QuantizationConfig("nf4"),
    "fp4": QuantizationConfig("fp4", 32),
}


@pytest.fixture(params=SCHEMES)
def config(request):
    return SCHEMES[request.param]


def draw(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def layer(config, rows=24, columns=96, bias=True, kind=QuantizedLinear):
    given = nn.Parameter(draw(1, rows, 1)[0]) if bias else None
    return kind(quantize_rtn(draw(rows, columns), config), given).eval()


def close(found, expected, rtol=1e-4):
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max().item()
    assert error <= rtol * expected.abs().max().item(), error


@pytest.mark.parametrize(("rows", "columns"), [(24, 96), (1, 64), (5, 77), (130, 160)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_definition(config, rows, columns, bias):
    module = layer(config, rows, columns, bias)
    x = draw(7, columns, 2)
    x[3] = 0.0
    x[4, : columns // 2] *= 100.0
    expected = product(x, module.quantized, module.bias)
    with torch.no_grad():
        close(module(x), expected)
        close(module(x.view(7, 1, 1, columns)).view(7, rows), expected)
    # with gradients the numbers are the same
    close(module(x.requires_grad_()).detach(), expected)


def test_a_row_that_is_not_finite_is_nan_and_no_other(config):
    module = layer(config)
    x = draw(4, 96)
    x[1, 5], x[2, 90] = torch.nan, torch.inf
    with torch.no_grad():
        y = module(x)
        assert torch.equal(y[[0, 3]], module(x[[0, 3]]))
    assert y[1].isnan().all()
    # infinity times weights of both signs, or of scale nothing
    assert not y[2].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_round_once(config, dtype):
    module = layer(config).to(dtype)
    x = draw(5, 96, 3).to(dtype)
    expected = product(x.float(), module.quantized, module.bias)
    with torch.no_grad():
        y = module(x)
    assert y.dtype == dtype
    close(y, expected, rtol=1.5 * torch.finfo(dtype).eps)


def test_float64_is_computed_in_float64():
    module = layer(SCHEMES["nf4"]).double()
    x = draw(5, 96, 3).double()
    expected = x.numpy() @ numbers(module.quantized).T + module.bias.detach().numpy()
    with torch.no_grad():
        close(module(x), torch.from_numpy(expected), rtol=1e-7)


def test_gradients_are_those_of_the_dequantised_weight(config):
    module, x = layer(config), draw(5, 96, 4).requires_grad_()
    upstream = draw(5, 24, 5)
    module(x).backward(upstream)
    close(x.grad, upstream.double() @ module.dequantize().double(), rtol=1e-5)
    close(module.bias.grad, upstream.double().sum(0), rtol=1e-5)
    assert [name for name, _ in module.named_parameters()] == ["bias"]


def test_second_derivatives_and_torch_func(config):
    module, x = layer(config), draw(1, 96, 4)
    weight = module.dequantize()

    def loss(x):
        return module(x).pow(2).sum()

    hessian = torch.autograd.functional.hessian(loss, x).view(96, 96)
    close(hessian, 2 * (weight.T.double() @ weight.double()), rtol=1e-4)
    # torch.func takes the plain functions
    gradient = torch.func.grad(loss)(x)
    batched = torch.func.vmap(module)(x.expand(3, 1, 96))
    x.requires_grad_()
    loss(x).backward()
    close(gradient, x.grad.double())
    close(batched[2], module(x).detach().double())


def test_autocast_casts_the_inputs_as_a_linear_layer_does(config):
    module, x = layer(config), draw(5, 96, 6)
    plain = nn.Linear(96, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert y.dtype == plain(x).dtype == torch.bfloat16
    close(y.detach(), product(x.bfloat16().float(), module.quantized, module.bias), rtol=0.02)


@pytest.mark.parametrize("name", ["int8", "int4-zeros", "nf4"])
def test_compiled_and_exported_layers_give_the_same(name):
    module, x = layer(SCHEMES[name]), draw(5, 96, 7)
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(torch.export.export(module, (x,)).module()(x), expected)


def test_a_change_of_dtype_leaves_codes_and_scales(config):
    module = layer(config, kind=QuantizedConv1D)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for changed in (
        module.half(),
        module.float(),
        module.to(torch.bfloat16),
        module.type(torch.float64),
        module.double(),
    ):
        for name, buffer in changed.named_buffers():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer, before[name])
    assert module.bias.dtype == torch.float64
    moved = module.to("meta")
    assert {b.device.type for b in moved.buffers()} == {"meta"}
    assert moved.quantized.codes.device.type == "meta"


def test_embeddings_look_rows_up_in_the_dtype_of_the_model(config):
    weight = quantize_rtn(draw(19, 96), config)
    table = QuantizedEmbedding(weight)
    ids = torch.tensor([[3, 0], [18, 3]])
    rows = torch.from_numpy(numbers(weight))[ids]
    close(table(ids), rows, rtol=1e-6)
    assert table(ids).dtype == torch.float32
    half = copy.deepcopy(table).bfloat16()
    assert half(ids).dtype == torch.bfloat16
    assert torch.equal(half(ids), table(ids).bfloat16())
    assert list(table.state_dict()) == list(QuantizedLinear(weight).state_dict())
    with pytest.raises(IndexError):
        table(torch.tensor([19]))


def test_narrow_floats_keep_their_dtype():
    values = draw(9000, 16).half()
    table, head = QuantizedEmbedding(values), QuantizedLinear(values)
    table.float(), head.float()
    assert table.weight.dtype == head.weight.dtype == torch.float16
    x = draw(3, 16, 1)
    with torch.no_grad():
        close(head(x), x.double() @ values.double().T, rtol=1e-5)
    assert torch.equal(table(torch.tensor([5])), values[5:6].float())
    assert table(torch.tensor([5])).dtype == torch.float32
    with pytest.raises(TypeError, match="Conv1D takes a QuantizedWeight"):
        quantized_form(Conv1D(9000, 16), values, torch.float32)


def test_a_weight_is_one_object_until_its_tensors_change(config):
    module = layer(config)
    first = module.quantized
    assert module.quantized is first
    module.weight = module.weight.clone()
    second = module.quantized
    assert second is not first
    assert second.codes is module.weight
    assert (second.scheme, second.group_size, second.activations) == (first.scheme, first.group_size, first.activations)


def test_state_dicts_copies_and_pickles(config):
    module, other = layer(config), layer(config)
    other.quantized = quantize_rtn(draw(24, 96, 9), config)
    state = module.state_dict()
    names = ["weight", "weight_scales", *(["weight_zeros"] if module.weight_zeros is not None else []), "bias"]
    assert sorted(state) == sorted(names)
    other.load_state_dict(state)
    x = draw(2, 96)
    with torch.no_grad():
        for copied in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(copied(x), module(x))
        other.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        assert torch.equal(other(x), module(x))


def test_floats_are_not_cast_to_codes(config):
    module = layer(config)
    before = module.weight.clone()
    with pytest.raises(RuntimeError, match=r"weight is torch.float32, but the layer holds .* load float weights"):
        module.load_state_dict({**module.state_dict(), "weight": module.weight.float()})
    assert torch.equal(module.weight, before)


def test_float_layers_and_back(config):
    for plain in (Conv1D(24, 96), nn.Linear(96, 24), nn.Embedding(24, 96)):
        matrix = plain.weight.detach().t() if isinstance(plain, Conv1D) else plain.weight.detach()
        weight = quantize_rtn(matrix, config)
        form = quantized_form(plain, weight, torch.float32)
        assert torch.equal(form.dequantize(), weight.dequantize())
        back = float_form(form, torch.float32)
        assert type(back) is type(plain)
        assert back.weight.shape == plain.weight.shape
        x = torch.arange(24) if isinstance(plain, nn.Embedding) else draw(3, 96)
        with torch.no_grad():
            expected = back(x)
        if isinstance(plain, nn.Embedding):
            assert torch.equal(form(x), expected)
        else:
            assert back.bias is form.bias is plain.bias
    with pytest.raises(ValueError, match=r"shape \[24, 96\], but Linear needs \[96, 24\]"):
        quantized_form(nn.Linear(24, 96), weight, torch.float32)
    with pytest.raises(TypeError, match="LayerNorm cannot be quantised"):
        quantized_form(nn.LayerNorm(24), weight, torch.float32)


def test_groups_without_a_kernel_are_dequantised():
    codes = torch.randint(0, 16, (6, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weight = QuantizedWeight("nf4", (6, 40), 8, pack_4bit(codes), draw(6, 5).abs(), activations="float32")
    module, x = QuantizedLinear(weight), draw(3, 40)
    with torch.no_grad():
        close(module(x), product(x, weight, None), rtol=1e-5)


def test_what_a_layer_says_of_itself():
    assert repr(layer(SCHEMES["int4"])) == "QuantizedLinear(96 -> 24, int4, group_size=32)"
    assert repr(layer(SCHEMES["int8"], kind=QuantizedConv1D)) == "QuantizedConv1D(96 -> 24, int8)"
    conv = layer(SCHEMES["int8"], kind=QuantizedConv1D)
    assert (conv.nf, conv.nx) == (24, 96)
    linear = layer(SCHEMES["nf4"])
    assert (linear.out_features, linear.in_features) == (24, 96)


def test_replace_refuses_before_it_changes_anything(build):
    model = build(n_embd=64, n_head=2)
    config = SCHEMES["int8"]
    good = quantize_rtn(model.transformer.h[0].attn.c_proj.weight.detach().t(), config)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"lm_head is tied to transformer.wte; give the weight of transformer.wte"):
        replace_with_quantized(model, {"lm_head": quantize_rtn(model.lm_head.weight.detach(), config)})
    with pytest.raises(ValueError, match="needs"):
        replace_with_quantized(model, {"transformer.h.0.attn.c_proj": good, "transformer.h.0.attn.c_attn": good})
    assert all(model.get_submodule(name) is module for name, module in before.items())
    replace_with_quantized(model, {"transformer.h.0.attn.c_proj": good}, config)
    assert isinstance(model.transformer.h[0].attn.c_proj, QuantizedConv1D)
    assert model.config.quantization_config is config
