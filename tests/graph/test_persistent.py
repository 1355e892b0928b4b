"""Which plans the persistent kernel takes, and a plan's steps by it, emulated, against the eager executor."""

import dataclasses
import types

import pytest
import torch
from cuda_persistent_host import emulating, register
from cuda_rows_host import why_not

from gpt2rt import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel, quantize_model
from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.graph import StepBatch, make_executor
from gpt2rt.graph.persistent import PersistentStep, unsupported

if why_not() is not None:
    pytest.skip(str(why_not()), allow_module_level=True)

SIZES = {"n_layer": 2, "n_embd": 48, "n_head": 3, "n_positions": 96, "vocab_size": 61}


@pytest.fixture(scope="module", autouse=True)
def op_on_the_host():
    return register()


def gpt2(dtype=torch.float16, **options):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=None, **{**SIZES, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype)


def plan_of(model):
    return model.generation_executor("eager").plan


def one_row(plan):
    """The buffers of a step of one token."""
    rows = types.SimpleNamespace(
        size=types.SimpleNamespace(num_tokens=1, num_seqs=1, num_logits=1, num_splits=4),
        logits=torch.full((1, plan.vocab_size), torch.nan),
        hidden=torch.full((1, plan.n_embd), torch.nan),
    )
    return rows


def run_step(step, plan, batch, cache, *, hidden=True):
    buffers = one_row(plan)
    for name in ("input_ids", "position_ids", "slot_mapping", "seq_lens", "block_table"):
        setattr(buffers, name, getattr(batch, name))
    assert step.serves(buffers, cache)
    step.run(buffers, cache, hidden=hidden)
    return buffers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}], ids=str
)
def test_steps_of_a_model_are_those_of_the_eager_executor(options, dtype):
    plan = plan_of(gpt2(dtype=dtype, **options))
    # in float32 on the very same weights: in 16 bits the eager executor rounds between its ops
    wide = make_executor(plan_of(gpt2(dtype=dtype, **options).float()), "eager")
    step, eager = (
        PersistentStep(plan, {plan.nodes[4].activation: plan.nodes[4].activation}),
        make_executor(plan, "eager"),
    )
    caches = [PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 8, dtype=kind) for kind in (dtype, torch.float32)]
    sequences = [Sequence(cache) for cache in caches]
    ids = torch.randint(0, 61, (70,)).tolist()
    eager.step(StepBatch.build([ids], sequences[:1]), caches[0])
    wide.step(StepBatch.build([ids], sequences[1:]), caches[1])
    # both go on from the same numbers
    caches[1].data.copy_(caches[0].data)
    for token in (7, 60, 0):
        with emulating(blocks=5):
            found = run_step(step, plan, StepBatch.build([[token]], sequences[:1]), caches[0])
        expected = wide.step(StepBatch.build([[token]], sequences[1:]), caches[1], return_hidden=True)
        # keys and values are rounded to the dtype of the cache
        unit = torch.finfo(dtype).eps
        for name in ("logits", "hidden"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert (ours - theirs).abs().max() <= 2 * unit * theirs.abs().max()
        blocks, length = torch.tensor(sequences[0].blocks)[None], sequences[0].length
        ours, theirs = (cache.read(blocks, length, torch.float32) for cache in caches)
        assert (ours - theirs).abs().max() <= 2 * unit * theirs.abs().max()


def test_other_positions_share_the_weights():
    plan = plan_of(gpt2())
    step = PersistentStep(plan, {"gelu_new": "gelu_new"})
    wpe = torch.randn(200, plan.n_embd).half()
    other = step.with_positions(dataclasses.replace(plan, n_positions=200), wpe)
    assert other.weights is step.weights
    cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 16, dtype=torch.float16)
    cache.data.normal_()
    # beyond the splits that the first has room for
    sequence = Sequence(cache)
    sequence.append(150)
    batch = StepBatch.build([[5]], [sequence])
    assert run_step(other, plan, batch, cache).logits.isfinite().all()
    assert run_step(step, plan, batch, cache).logits.isnan().all()


def test_only_single_steps_with_a_cache_of_the_same_dtype():
    plan = plan_of(gpt2())
    step = PersistentStep(plan, {"gelu_new": "gelu_new"})
    caches = {
        dtype: PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 2, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8)
    }
    buffers = one_row(plan)
    assert [dtype for dtype, cache in caches.items() if step.serves(buffers, cache)] == [torch.float16]
    for name, value in (("num_splits", 0), ("num_tokens", 2), ("num_seqs", 2), ("num_logits", 2)):
        changed = one_row(plan)
        setattr(changed.size, name, value)
        assert not step.serves(changed, caches[torch.float16])


def changed_eps(plan):
    head = plan.nodes[-1]
    return dataclasses.replace(
        plan, nodes=(*plan.nodes[:-1], dataclasses.replace(head, norm=dataclasses.replace(head.norm, eps=0.1)))
    )


def without_head(plan):
    return dataclasses.replace(plan, nodes=(*plan.nodes[:-1], dataclasses.replace(plan.nodes[-1], linear=None)))


def changed_dtype(plan):
    head = plan.nodes[-1]
    linear = dataclasses.replace(head.linear, weight=head.linear.weight.float())
    return dataclasses.replace(plan, nodes=(*plan.nodes[:-1], dataclasses.replace(head, linear=linear)))


def openai_gpt():
    config = OpenAIGPTConfig(n_layer=1, n_embd=48, n_head=3, vocab_size=61, n_positions=32)
    return OpenAIGPTLMHeadModel(config).eval().half()


def quantised():
    model = gpt2(n_embd=64, n_head=4)
    quantize_model(model, "int8", progress=False)
    return model


REFUSED = {
    "the weights are torch.float32": lambda: plan_of(gpt2(dtype=torch.float32)),
    "its norms stand behind the residual additions": lambda: plan_of(openai_gpt()),
    "it has no output layer": lambda: without_head(plan_of(gpt2())),
    "its weights are quantised": lambda: plan_of(quantised()),
    "its weights have other dtypes": lambda: changed_dtype(plan_of(gpt2())),
    "differ in eps": lambda: changed_eps(plan_of(gpt2())),
    "head_dim is 12": lambda: plan_of(gpt2(n_head=4)),
    "head_dim is 136": lambda: plan_of(gpt2(n_head=1, n_embd=136)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_cannot_run_is_refused_with_the_reason(reason):
    plan = REFUSED[reason]()
    assert reason in unsupported(plan)
    with pytest.raises(ValueError, match=f"cannot run this model: .*{reason}"):
        PersistentStep(plan, {"gelu_new": "gelu_new"})


def test_what_it_can_run():
    for options in ({}, {"n_head": 6}, {"n_embd": 256, "n_head": 2}, {"n_inner": 77}):
        assert unsupported(plan_of(gpt2(**options))) == ""
