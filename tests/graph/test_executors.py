"""Executors against transformers, against each other, and against themselves in other company."""

import dataclasses

import pytest
import torch

from gpt2rt import ops
from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.config import GPT2Config
from gpt2rt.errors import OutOfBlocksError
from gpt2rt.graph import StepBatch, build_plan, executor_names, make_executor
from gpt2rt.graph.plan import Head, LinearResidual, NormLinearAct, NormQKV, NormResidual
from gpt2rt.models import GPT2LMHeadModel
from gpt2rt.models.layers import ACT2FN

needs_cpp = pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")
EXECUTORS = ["eager", pytest.param("cpu", marks=needs_cpp)]

SIZES = {
    "25 heads of 64": dict(vocab_size=97, n_positions=64, n_embd=1600, n_head=25, n_layer=1),
    "vocab 50257": dict(vocab_size=50257, n_positions=64, n_embd=64, n_head=2, n_layer=2),
    "n_inner 50, head_dim 48": dict(vocab_size=97, n_positions=64, n_embd=96, n_head=2, n_layer=3, n_inner=50),
    "head_dim 80": dict(vocab_size=130, n_positions=64, n_embd=160, n_head=2, n_layer=2),
    "head_dim 5": dict(vocab_size=33, n_positions=64, n_embd=35, n_head=7, n_layer=2, n_inner=129),
}
SMALL = SIZES["n_inner 50, head_dim 48"]
FLAGS = {
    "unscaled": dict(scale_attn_weights=False),
    "inverse layer": dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "untied": dict(tie_word_embeddings=False),
    "relu": dict(activation_function="relu"),
    "erf gelu": dict(activation_function="gelu"),
    "silu": dict(activation_function="silu"),
    "quick gelu": dict(activation_function="quick_gelu"),
}
CASES = SIZES | {name: {**SMALL, **fields} for name, fields in FLAGS.items()}


def new_model(seed=0, dtype=torch.float32, std=0.15, **fields):
    torch.manual_seed(seed)
    fields = {"bos_token_id": 0, "eos_token_id": 0, **fields}
    model = GPT2LMHeadModel(GPT2Config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std)
        for name, parameter in model.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.to(dtype)


def new_plan(model):
    return build_plan(model.config, model.graph_weights(), ACT2FN[model.config.activation_function])


def new_cache(model, num_blocks=24, dtype=None):
    config = model.config
    cache = PagedKVCache(
        config.n_layer, config.n_head, config.n_embd // config.n_head, num_blocks, dtype=dtype or model.dtype
    )
    cache.data.fill_(float("nan"))
    return cache


def random_ids(model, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (count,), generator=generator).tolist()


def run(executor, cache, prompts, chunk=None, sequences=None):
    """Logits of every token of every prompt, computed in one step or in chunks."""
    sequences = sequences or [Sequence(cache) for _ in prompts]
    pieces = [[] for _ in prompts]
    longest = max(map(len, prompts))
    for start in range(0, longest, chunk or longest):
        rows = [(i, p[start : start + (chunk or longest)]) for i, p in enumerate(prompts)]
        rows = [(i, ids) for i, ids in rows if ids]
        batch = StepBatch.build([ids for _, ids in rows], [sequences[i] for i, _ in rows], all_logits=True)
        logits = executor.step(batch, cache).logits
        for (i, _), part in zip(rows, logits.split([len(ids) for _, ids in rows]), strict=True):
            pieces[i].append(part)
    return [torch.cat(parts) for parts in pieces]


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_equal_transformers(name, case, hf):
    # four times the published initialisation: attention is far from uniform, logits stay of order one
    model = new_model(std=0.08, **CASES[case])
    # in float64: in float32 their own error is as large as the bound
    theirs = hf.copy_of(model).double()
    for block in theirs.transformer.h:
        # it insists on float32
        block.attn.reorder_and_upcast_attn = False
    executor = make_executor(new_plan(model), name)
    prompts = [random_ids(model, 21, 1), random_ids(model, 1, 2), random_ids(model, 40, 3)]
    for ids, logits in zip(prompts, run(executor, new_cache(model), prompts), strict=True):
        expected = theirs(torch.tensor([ids])).logits[0]
        assert (logits - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_as_torch(name, dtype):
    model = new_model(**SMALL)
    low = new_model(**SMALL).to(dtype)
    exact = new_model(**SMALL)
    exact.load_state_dict(low.state_dict())
    ids = random_ids(model, 30)
    with torch.no_grad():
        expected = exact(torch.tensor([ids])).logits[0]
        plain = hf_free_error(low, ids, expected)
    (logits,) = run(make_executor(new_plan(low), name), new_cache(low), [ids])
    assert (logits - expected).abs().max() <= 2 * plain + 1e-5


def hf_free_error(model, ids, expected):
    """The error of the same model run op by op in plain torch in its own dtype."""
    with torch.enable_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return (logits.detach().float() - expected).abs().max()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_rows_are_bit_equal_alone_in_a_batch_in_chunks_and_on_other_threads(dtype):
    model = new_model(**SMALL, dtype=dtype)
    plan = new_plan(model)
    prompts = [random_ids(model, n, seed) for seed, n in enumerate((33, 1, 17, 64, 2, 8, 30, 5, 16))]
    one = make_executor(plan, "cpu", num_threads=1)
    alone = [run(one, new_cache(model), [ids])[0] for ids in prompts]
    for threads in (1, 2, 3):
        executor = make_executor(plan, "cpu", num_threads=threads)
        for chunk in (None, 1, 7, 16):
            together = run(executor, new_cache(model, num_blocks=40), prompts, chunk=chunk)
            for mine, theirs in zip(together, alone, strict=True):
                assert torch.equal(mine, theirs)


@needs_cpp
def test_the_comparison_can_fail():
    """Negative control: plain torch, whose matrix product blocks by batch size, is not bit-equal to itself."""
    torch.manual_seed(0)
    x, w = torch.randn(64, 768), torch.randn(2304, 768)
    rows = torch.cat([torch.nn.functional.linear(x[i : i + 1], w) for i in range(64)])
    assert not torch.equal(rows, torch.nn.functional.linear(x, w))
    ours = torch.cat([ops.linear(x[i : i + 1], w) for i in range(64)])
    assert torch.equal(ours, ops.linear(x, w))


@needs_cpp
def test_physical_blocks_do_not_matter():
    model = new_model(**SMALL)
    executor = make_executor(new_plan(model), "cpu")
    ids = random_ids(model, 50)
    (expected,) = run(executor, new_cache(model), [ids])
    cache = new_cache(model)
    held = cache.pool.allocate(11)
    cache.pool.free(held[::2])
    (scattered,) = run(executor, cache, [ids])
    assert torch.equal(scattered, expected)


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_fork_continues_like_its_parent(name):
    model = new_model(**SMALL)
    executor = make_executor(new_plan(model), name)
    cache = new_cache(model)
    ids, first, second = random_ids(model, 21), random_ids(model, 6, 1), random_ids(model, 6, 2)
    parent = Sequence(cache)
    run(executor, cache, [ids], sequences=[parent])
    child = parent.fork()
    mine, theirs = run(executor, cache, [first, second], chunk=1, sequences=[parent, child])
    for tail, logits in ((first, mine), (second, theirs)):
        (expected,) = run(executor, new_cache(model), [ids + tail])
        torch.testing.assert_close(logits, expected[len(ids) :], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", EXECUTORS)
def test_hidden_rows_are_the_final_norm(name):
    model = new_model(**SMALL)
    executor = make_executor(new_plan(model), name)
    cache = new_cache(model)
    ids = random_ids(model, 12)
    output = executor.step(StepBatch.build([ids], [Sequence(cache)], all_logits=True), cache, return_hidden=True)
    with torch.no_grad():
        expected = model.transformer(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(output.hidden, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(output.logits, expected @ model.lm_head.weight.T, rtol=2e-5, atol=2e-5)


def post_norm_plan(model):
    """The same weights in the order of models that normalise after the residual addition, and with no final norm."""
    plan = new_plan(model)
    nodes = []
    for node in plan.nodes:
        match node:
            case NormQKV() | NormLinearAct():
                norm = node.norm
                nodes.append(dataclasses.replace(node, norm=None))
            case LinearResidual():
                nodes += [node, NormResidual(norm)]
            case Head():
                nodes.append(Head(None, node.linear))
            case _:
                nodes.append(node)
    return dataclasses.replace(plan, nodes=tuple(nodes))


@needs_cpp
def test_post_norm_plans_run_alike_on_both_executors():
    model = new_model(**SMALL)
    plan = post_norm_plan(model)
    prompts = [random_ids(model, 30, 1), random_ids(model, 3, 2)]
    outputs = [run(make_executor(plan, name), new_cache(model), prompts, chunk=8) for name in ("eager", "cpu")]
    for eager, cpu in zip(*outputs, strict=True):
        torch.testing.assert_close(cpu, eager, rtol=2e-5, atol=2e-5)


@needs_cpp
def test_a_plan_without_a_head_gives_hidden_rows_only():
    model = new_model(**SMALL)
    plan = new_plan(model)
    headless = dataclasses.replace(plan, nodes=(*plan.nodes[:-1], Head(plan.nodes[-1].norm, None)))
    ids = random_ids(model, 9)
    rows = []
    for name in ("eager", "cpu"):
        cache = new_cache(model)
        batch = StepBatch.build([ids], [Sequence(cache)])
        output = make_executor(headless, name).step(batch, cache, return_hidden=True)
        assert output.logits is None
        rows.append(output.hidden)
    torch.testing.assert_close(rows[0], rows[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("token", [-1, 97, 2**40])
def test_a_bad_token_is_refused_and_nothing_is_written(name, token):
    model = new_model(**SMALL)
    executor = make_executor(new_plan(model), name)
    cache = new_cache(model)
    batch = StepBatch.build([[1, token, 2]], [Sequence(cache)])
    with pytest.raises((RuntimeError, IndexError, ValueError), match=str(token)):
        executor.step(batch, cache)
    assert cache.data.isnan().all()


def test_a_batch_that_does_not_fit_the_pool_leaves_every_sequence_as_it_was():
    cache = PagedKVCache(1, 1, 4, 3)
    sequences = [Sequence(cache), Sequence(cache)]
    with pytest.raises(OutOfBlocksError):
        StepBatch.build([[1] * 20, [1] * 30], sequences)
    assert [sequence.length for sequence in sequences] == [0, 0]
    assert cache.pool.num_free == 3


def test_empty_rows_are_refused():
    cache = PagedKVCache(1, 1, 4, 3)
    with pytest.raises(ValueError, match="at least one token"):
        StepBatch.build([[1], []], [Sequence(cache), Sequence(cache)])


@pytest.mark.parametrize("name", EXECUTORS)
def test_what_does_not_belong_to_the_plan_is_refused(name):
    model = new_model(**SMALL)
    executor = make_executor(new_plan(model), name)
    other = PagedKVCache(1, 2, 48, 8)
    with pytest.raises(ValueError, match="the cache is for 1 layers"):
        executor.step(StepBatch.build([[1]], [Sequence(other)]), other)
    cache = new_cache(model)
    with pytest.raises(ValueError, match="65 tokens exceeds the model's n_positions=64"):
        executor.step(StepBatch.build([[1] * 65], [Sequence(cache)]), cache)


def test_executors_are_chosen_by_name():
    plan = new_plan(new_model(**SMALL))
    assert executor_names() == ("eager", "cpu", "cuda")
    with pytest.raises(ValueError, match="no executor 'gpu'; choose one of eager, cpu, cuda"):
        make_executor(plan, "gpu")
    with pytest.raises(ValueError, match=r"the cuda executor cannot run this model: .*; use the eager executor"):
        make_executor(plan, "cuda")
    if ops.extension_status().loaded:
        assert make_executor(plan).name == "cpu"
        with pytest.raises(ValueError, match="num_threads"):
            make_executor(plan, "cpu", num_threads=-1)


@needs_cpp
def test_an_activation_that_cpp_lacks_runs_eagerly_and_says_so():
    model = new_model(**SMALL, activation_function="mish")
    plan = new_plan(model)
    assert make_executor(plan).name == "eager"
    with pytest.raises(ValueError, match="no activation 'mish'"):
        make_executor(plan, "cpu")


def test_mixed_dtypes_are_refused():
    model = new_model(**SMALL)
    weights = model.graph_weights()
    weights["ln_f.bias"] = weights["ln_f.bias"].half()
    with pytest.raises(ValueError, match=r"ln_f\.bias is torch\.float16"):
        build_plan(model.config, weights, ACT2FN["gelu_new"])


def test_cross_attention_is_refused():
    config = GPT2Config(**SMALL, add_cross_attention=True, bos_token_id=0, eos_token_id=0)
    with pytest.raises(ValueError, match="add_cross_attention"):
        build_plan(config, {}, ACT2FN["gelu_new"])
