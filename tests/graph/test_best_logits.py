"""The cpu executor's steps that return the best logits only."""

import dataclasses

import pytest
import torch

from gpt2rt import GPT2Config, GPT2LMHeadModel, GPT2Model, ops
from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.graph import StepBatch, build_plan
from gpt2rt.graph.cpu import CpuExecutor
from gpt2rt.graph.plan import Linear
from gpt2rt.models.layers import ACT2FN
from gpt2rt.quantization import quantize_rtn, resolve_quantization

pytestmark = pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")


def make(kind=GPT2LMHeadModel, head="float32", **options):
    """An executor of a small random model with a table of a format of its own."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=96, n_head=3, vocab_size=300, n_positions=40, bos_token_id=0, eos_token_id=0)
    model = kind(config).eval()
    if head in ("bfloat16", "float16"):
        model = model.to(getattr(torch, head))
    plan = build_plan(config, model.graph_weights(), ACT2FN[config.activation_function])
    if head in ("int8", "int4", "nf4"):
        table = quantize_rtn(plan.nodes[0].wte.detach(), resolve_quantization(head))
        first = dataclasses.replace(plan.nodes[0], wte=table)
        last = dataclasses.replace(plan.nodes[-1], linear=Linear(table, None))
        plan = dataclasses.replace(plan, nodes=(first, *plan.nodes[1:-1], last))
    return CpuExecutor(plan, **options)


def step(executor, num_rows=2, **options):
    cache = PagedKVCache(2, 3, 32, num_rows)
    prompts = [[5, 6, 7], *([row % 300] for row in range(1, num_rows))]
    batch = StepBatch.build(prompts, [Sequence(cache) for _ in prompts])
    return executor.step(batch, cache, **options), batch, cache


@pytest.mark.parametrize(("head", "count"), [("argmax", 1), (("topk", 1), 1), (("topk", 7), 7), (("topk", 300), 300)])
def test_best_logits(head, count):
    executor = make()
    logits = step(executor)[0].logits
    found, _, _ = step(executor, head=head, return_hidden=True)
    assert found.logits is None
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found.top_ids, ids[:, :count])
    assert torch.equal(found.top_logits, values[:, :count])
    assert torch.equal(found.hidden, step(executor, return_hidden=True)[0].hidden)


@pytest.mark.parametrize(("num_rows", "num_threads"), [(1, 1), (8, 2), (9, 1), (40, 3)])
@pytest.mark.parametrize("head", ["float32", "bfloat16", "float16", "int8", "int4", "nf4"])
def test_every_format_of_the_head(head, num_rows, num_threads):
    executor = make(head=head, num_threads=num_threads)
    logits = step(executor, num_rows)[0].logits
    found, _, _ = step(executor, num_rows, head=("topk", 30))
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found.top_ids, ids[:, :30])
    assert torch.equal(found.top_logits, values[:, :30])


def test_a_step_can_be_run_again():
    executor = make()
    expected, _, kept = step(executor)
    found, batch, cache = step(executor, head="argmax")
    # only blocks in use are defined
    blocks = batch.block_table.flatten().long()
    assert torch.equal(cache.data[:, :, blocks, :, 0], kept.data[:, :, blocks, :, 0])
    again = executor.step(batch, cache)
    assert again.top_ids is None
    assert torch.equal(again.logits, expected.logits)
    assert torch.equal(cache.data[:, :, blocks, :, 0], kept.data[:, :, blocks, :, 0])
    assert torch.equal(again.logits.argmax(-1), found.top_ids[:, 0])


@pytest.mark.parametrize("head", ["best", ("topk", 0), ("topk", 301), ("topk", 2.0), ("argmax", 1), ("topk",), None])
def test_other_heads_are_refused(head):
    with pytest.raises(ValueError, match=r'head must be "logits", "argmax" or .* k from 1 to 300'):
        step(make(), head=head)


def test_a_model_without_output_layer_has_none():
    with pytest.raises(ValueError, match="no output layer"):
        step(make(GPT2Model), head="argmax")


def test_profile_names_the_phases():
    executor = make()
    cache = PagedKVCache(2, 3, 32, 8)
    batch = StepBatch.build([[5, 6, 7]], [Sequence(cache)])
    names = [phase.name for phase in executor.profile(batch, cache, head="argmax")]
    assert names[-2:] == ["head", "head top"]
    assert "head top" not in [phase.name for phase in executor.profile(batch, cache)]
