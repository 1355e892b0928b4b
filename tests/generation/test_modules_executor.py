"""generate() of models whose modules a caller has hooked, replaced or computed: what forward gives, step by step."""

import warnings

import pytest
import torch
from openai_gpt_models import make as make_openai_gpt
from torch import nn
from torch.nn.utils import parametrize, prune

from gpt2rt import GPT2LMHeadModel
from gpt2rt.errors import RequestError

PROMPTS = [[5, 6, 7, 8], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
WARNING = r"runs modules one by one"


def steer(module, args, output):
    """A hook on a block, for tensors as GPT-2 gives them and tuples as OpenAI GPT does."""
    hidden = output[0] if isinstance(output, tuple) else output
    hidden = hidden + torch.linspace(-2.0, 2.0, hidden.size(-1))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class Adapted(nn.Module):
    """A layer with a low-rank addition that was not merged."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        torch.manual_seed(7)
        self.down = nn.Linear(base.nx, rank, bias=False)
        self.up = nn.Linear(rank, base.nf, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


def greedy_by_forward(model, prompt, count):
    """Whole texts through forward, nothing kept between steps."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
        {"prefill_chunk_size": 2},
        {"do_sample": True, "seed": 3, "num_return_sequences": 2},
        {"context_policy": "sliding", "max_new_tokens": 60},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["gpt2", "openai-gpt"])
def test_it_gives_the_tokens_of_the_graph(make_model, family, settings, pools):
    model = make_model(eos_token_id=None) if family == "gpt2" else make_openai_gpt(n_positions=48)
    settings = {"max_new_tokens": 9, "pad_token_id": 0, **settings}
    model.generation_executor("eager")
    expected = model.generate(PROMPTS, **settings)
    assert model.generation_executor("modules").name == "modules"
    assert torch.equal(model.generate(PROMPTS, **settings), expected)
    assert all(pool.num_free == pool.num_blocks for pool in pools)


@pytest.mark.parametrize("family", ["gpt2", "openai-gpt"])
@pytest.mark.parametrize("change", ["hook", "adapter", "pruned", "parametrized", "forward", "subclass"])
def test_what_a_caller_changed_takes_part(make_model, family, change):
    model = make_model(eos_token_id=None) if family == "gpt2" else make_openai_gpt()
    plain = model.generate(PROMPTS, max_new_tokens=8, pad_token_id=0)
    block = model.transformer.h[1]
    if change == "hook":
        block.register_forward_hook(steer)
    elif change == "adapter":
        block.attn.c_attn = Adapted(block.attn.c_attn)
    elif change == "pruned":
        prune.l1_unstructured(block.mlp.c_fc, "weight", 0.7)
    elif change == "parametrized":
        parametrize.register_parametrization(block.mlp.c_proj, "weight", Twice())
    elif change == "forward":
        mlp_forward = block.mlp.forward
        block.mlp.forward = lambda x: mlp_forward(x) * 3
    else:

        class Louder(type(model)):
            def forward(self, *args, **kwargs):
                out = super().forward(*args, **kwargs)
                out.logits = out.logits.roll(3, dims=-1)
                return out

        model.__class__ = Louder
    with pytest.warns(UserWarning, match=WARNING):
        changed = model.generate(PROMPTS, max_new_tokens=8, pad_token_id=0)
    assert not torch.equal(changed, plain)
    for row, prompt in zip(changed.tolist(), PROMPTS, strict=True):
        assert row[len(row) - 8 - len(prompt) :] == greedy_by_forward(model, prompt, 8)


def test_a_steered_model_generates_as_transformers_does(hf, make_model):
    model = make_model(eos_token_id=None)
    theirs = hf.copy_of(model)
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 3]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for one in (model, theirs):
        one.transformer.h[0].register_forward_hook(steer)
    with pytest.warns(UserWarning, match=WARNING):
        got = model.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(got, theirs.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False))


def test_the_graph_comes_back_and_each_change_is_said_once(make_model):
    model = make_model()
    fast = model.generation_executor().name
    assert fast != "modules"
    for _ in range(2):
        handle = model.transformer.h[1].register_forward_hook(steer)
        with pytest.warns(UserWarning, match=r"transformer\.h\.1 has hooks.*" + WARNING):
            model.generate([[5]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate([[5]])
            assert model.generation_executor().name == "modules"
            handle.remove()
            model.generate([[5]])
        assert model.generation_executor().name == fast


def test_the_graph_can_be_asked_for_all_the_same(make_model):
    model = make_model(eos_token_id=None)
    plain = model.generate([[5, 6]], max_new_tokens=6)
    model.transformer.h[0].register_forward_hook(steer)
    model.generation_executor("eager")
    assert torch.equal(model.generate([[5, 6]], max_new_tokens=6), plain)


def test_a_choice_that_cannot_run_the_model_is_not_kept(make_model):
    model = make_model(activation_function="mish", eos_token_id=None)
    expected = model.generate([[5, 6]], max_new_tokens=4)
    with pytest.raises(ValueError, match="the cpu executor cannot run this model"):
        model.generation_executor("cpu")
    assert torch.equal(model.generate([[5, 6]], max_new_tokens=4), expected)


def test_dropout_stays_out_and_the_mode_is_kept(make_model):
    model = make_model(eos_token_id=None, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = model.generate([[5, 6]], max_new_tokens=6)
    model.generation_executor("modules")
    model.train()
    assert torch.equal(model.generate([[5, 6]], max_new_tokens=6), expected)
    assert model.training
    assert model.transformer.h[0].mlp.dropout.training


def test_what_needs_the_graph_is_refused(make_model):
    model = make_model()
    model.generation_executor("modules")
    with pytest.raises(RequestError, match="assistant_early_exit runs the first layers of the model's graph"):
        model.generate([[5]], assistant_early_exit=1)
    with pytest.raises(RequestError, match="token_type_ids cannot be given"):
        model.generate(torch.tensor([[5]]), token_type_ids=torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"choose one of eager, cpu, cuda, modules"):
        model.generation_executor("module")


def test_the_model_is_not_kept_alive(make_model):
    import gc
    import weakref

    model = make_model()
    model.generation_executor("modules")
    model.generate([[5]], max_new_tokens=2)
    gone = weakref.ref(model)
    assert isinstance(gone(), GPT2LMHeadModel)
    del model
    gc.collect()
    assert gone() is None
