"""Small models with weights large enough that every part of them shows in the logits."""

import pytest
import torch

from gpt2rt.config import GPT2Config
from gpt2rt.models import GPT2LMHeadModel

TINY = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 3}
_MODELS: dict = {}
_COPIES: dict = {}


def make_model(seed=0, kind=GPT2LMHeadModel, **overrides):
    """A GPT2LMHeadModel, or another ``kind``, in eval mode; norms and biases are random too."""
    torch.manual_seed(seed)
    model = kind(GPT2Config(**{**TINY, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if ".ln_" in name and "weight" in name else 0.0, std=0.1)
            elif "wte" not in name and "lm_head" not in name:
                torch.nn.init.normal_(parameter, std=0.5 * parameter.size(0) ** -0.5)
    return model


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread and lose much where other processes want the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def build():
    """``build(kind=GPT2LMHeadModel, **config)``: a fresh model, to change at will."""
    return make_model


@pytest.fixture
def model():
    """The tiny model; shared by all tests, not to be changed."""
    return cached_model()


def cached_model(**overrides):
    key = tuple(sorted(overrides.items()))
    if key not in _MODELS:
        _MODELS[key] = make_model(**overrides)
    return _MODELS[key]


@pytest.fixture
def pair(hf):
    """``pair(kind=GPT2LMHeadModel, **config)``: a model and transformers' copy, both shared and not to be changed."""

    def make(**overrides):
        model = cached_model(**overrides)
        if id(model) not in _COPIES:
            _COPIES[id(model)] = hf.copy_of(model)
        return model, _COPIES[id(model)]

    return make


@pytest.fixture(params=["kernels", "torch"])
def path(request):
    """Run the test without gradients (``gpt2rt.ops``) and with them (torch's differentiable functions)."""
    with torch.set_grad_enabled(request.param == "torch"):
        yield request.param


@pytest.fixture
def ids():
    """[2, 9] token ids of the tiny vocabulary."""
    return torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
