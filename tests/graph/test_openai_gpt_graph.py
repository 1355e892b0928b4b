"""OpenAI GPT's plan on both executors: transformers' logits, and the same bits in any company."""

import pytest
import torch
from openai_gpt_models import copy_of, make

from gpt2rt import OpenAIGPTDoubleHeadsModel, OpenAIGPTForSequenceClassification, OpenAIGPTModel, ops
from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.graph import StepBatch, build_openai_gpt_plan, make_executor
from gpt2rt.graph.plan import Head, LinearResidual, NormLinearAct, NormQKV, NormResidual

needs_cpp = pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")
EXECUTORS = ["eager", pytest.param("cpu", marks=needs_cpp)]

CASES = {
    "tiny": {},
    "untied": {"tie_word_embeddings": False},
    "one head": {"n_head": 1, "n_layer": 3},
    "head_dim 5": {"n_embd": 35, "n_head": 7, "vocab_size": 33},
    "relu": {"afn": "relu"},
    "silu": {"afn": "silu"},
    "epsilon": {"layer_norm_epsilon": 0.1},
}


def new_cache(model, num_blocks=40, dtype=None):
    config = model.config
    head_dim = config.n_embd // config.n_head
    cache = PagedKVCache(config.n_layer, config.n_head, head_dim, num_blocks, dtype=dtype or model.dtype)
    cache.data.fill_(float("nan"))
    return cache


def prompt(model, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (count,), generator=generator).tolist()


def run(executor, cache, prompts, chunk=None):
    """Logits of every token of every prompt, computed in one step or in chunks."""
    sequences = [Sequence(cache) for _ in prompts]
    pieces = [[] for _ in prompts]
    longest = max(map(len, prompts))
    for start in range(0, longest, chunk or longest):
        rows = [(i, p[start : start + (chunk or longest)]) for i, p in enumerate(prompts) if p[start:]]
        batch = StepBatch.build([ids for _, ids in rows], [sequences[i] for i, _ in rows], all_logits=True)
        logits = executor.step(batch, cache).logits
        for (i, _), part in zip(rows, logits.split([len(ids) for _, ids in rows]), strict=True):
            pieces[i].append(part)
    return [torch.cat(parts) for parts in pieces]


@pytest.mark.proves("O1", "O3")
@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(hf, name, case):
    model = make(**{"initializer_range": 0.2, **CASES[case]})
    theirs = copy_of(hf, model)
    executor = make_executor(model.build_graph(), name)
    prompts = [prompt(model, 21, 1), prompt(model, 1, 2), prompt(model, 40, 3)]
    for chunk in (None, 7):
        for ids, logits in zip(prompts, run(executor, new_cache(model), prompts, chunk), strict=True):
            expected = theirs(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(logits, expected, rtol=0.0, atol=2e-5)


@pytest.mark.proves("O1")
def test_the_norms_stand_after_the_additions_and_nothing_before_the_head():
    model = make()
    plan = model.build_graph()
    block = [NormQKV, "Attention", LinearResidual, NormResidual, NormLinearAct, LinearResidual, NormResidual]
    kinds = [type(node) for node in plan.nodes]
    assert [getattr(kind, "__name__", kind) for kind in kinds[1:8]] == [getattr(k, "__name__", k) for k in block]
    assert len(kinds) == 1 + 2 * 7 + 1
    assert all(node.norm is None for node in plan.nodes if isinstance(node, NormQKV | NormLinearAct | Head))
    # views of the model's own weights
    weight = model.transformer.h[1].mlp.c_fc.weight
    assert plan.nodes[12].linear.weight.data_ptr() == weight.data_ptr()
    assert (plan.vocab_size, plan.n_positions, plan.dtype) == (100, 64, torch.float32)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bit_equal_whatever_batch_chunk_and_threads(dtype):
    model = make().to(dtype)
    plan = model.build_graph()
    prompts = [prompt(model, n, seed) for seed, n in enumerate((33, 1, 17, 64, 2, 8, 30, 5, 16))]
    one = make_executor(plan, "cpu", num_threads=1)
    alone = [run(one, new_cache(model), [ids])[0] for ids in prompts]
    for threads in (1, 2):
        executor = make_executor(plan, "cpu", num_threads=threads)
        for chunk in (None, 1, 16):
            together = run(executor, new_cache(model), prompts, chunk)
            for mine, theirs in zip(together, alone, strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(hf, name, dtype):
    model = make(initializer_range=0.1).to(dtype)
    ids = prompt(model, 30)
    expected = copy_of(hf, model).float()(torch.tensor([ids])).logits[0]
    (logits,) = run(make_executor(model.build_graph(), name), new_cache(model), [ids])
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=2e-2)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("kind", [OpenAIGPTModel, OpenAIGPTForSequenceClassification, OpenAIGPTDoubleHeadsModel])
def test_the_trunk_of_every_class(name, kind):
    model = make(kind)
    cache = new_cache(model)
    ids = prompt(model, 12)
    batch = StepBatch.build([ids], [Sequence(cache)], all_logits=True)
    output = make_executor(model.build_graph(), name).step(batch, cache, return_hidden=True)
    with torch.no_grad():
        expected = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(output.hidden, expected, rtol=2e-5, atol=2e-5)
    assert (output.logits is None) == (kind is not OpenAIGPTDoubleHeadsModel)


@needs_cpp
def test_an_activation_that_cpp_lacks_runs_eagerly():
    plan = make(afn="mish").build_graph()
    assert make_executor(plan).name == "eager"
    with pytest.raises(ValueError, match="no activation 'mish'"):
        make_executor(plan, "cpu")


def test_mixed_dtypes_are_refused():
    model = make()
    weights = model.graph_weights()
    weights["h.1.ln_2.bias"] = weights["h.1.ln_2.bias"].half()
    with pytest.raises(ValueError, match=r"h\.1\.ln_2\.bias is torch\.float16"):
        build_openai_gpt_plan(model.config, weights, model.transformer.h[0].mlp.act)
