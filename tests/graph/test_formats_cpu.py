"""The cpu executor with weights of every format: its numbers, and its bits in other company."""

import dataclasses

import pytest
import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.config import GPT2Config
from gpt2rt.graph import StepBatch, build_plan, make_executor
from gpt2rt.graph.cpu import CpuExecutor
from gpt2rt.graph.plan import Embed, Head, Linear
from gpt2rt.models import GPT2LMHeadModel
from gpt2rt.models.layers import ACT2FN
from gpt2rt.quantization import QuantizedWeight, quantize_rtn, resolve_quantization

pytestmark = pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEMES = ["int8", "int4-g32", "int4-g64", "int4-g128", "int4-zeros", "nf4", "fp4"]
FORMATS = [*FLOATS, *SCHEMES]
SHAPES = {
    # whole panels and groups: rows are handed on in the format of the next product
    "even": dict(vocab_size=130, n_positions=320, n_embd=128, n_head=2, n_layer=2),
    # cut panels, cut groups, an odd number of inputs
    "odd": dict(vocab_size=97, n_positions=320, n_embd=99, n_head=3, n_layer=2, n_inner=161),
}
KINDS = [(f, a) for f in FORMATS for a in ("exact", "fast")]


def quantised(weight, scheme):
    config = resolve_quantization("int4" if scheme.startswith("int4") else scheme)
    if scheme.startswith("int4-g"):
        config = dataclasses.replace(config, group_size=int(scheme.removeprefix("int4-g")))
    elif scheme == "int4-zeros":
        config = dataclasses.replace(config, symmetric=False)
    return quantize_rtn(weight.detach().float(), config)


def map_weights(plan, change):
    """The plan with ``change`` applied to its matrices; the tied table stays one object."""
    embed, head = plan.nodes[0], plan.nodes[-1]
    assert isinstance(embed, Embed)
    assert isinstance(head, Head)
    table = change(embed.wte)
    nodes = [dataclasses.replace(embed, wte=table)]
    for node in plan.nodes[1:-1]:
        if hasattr(node, "linear"):
            linear = Linear(change(node.linear.weight), node.linear.bias)
            node = dataclasses.replace(node, linear=linear)
        nodes.append(node)
    nodes.append(dataclasses.replace(head, linear=Linear(table, None)))
    return dataclasses.replace(plan, nodes=tuple(nodes))


def new_plan(shape, name, seed=0):
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **SHAPES[shape])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    model = model.to(FLOATS.get(name, torch.float32))
    plan = build_plan(model.config, model.graph_weights(), ACT2FN["gelu_new"])
    return plan if name in FLOATS else map_weights(plan, lambda weight: quantised(weight, name))


def as_float32(plan):
    """The same numbers as float32 weights."""
    plan = map_weights(plan, lambda w: w.dequantize() if isinstance(w, QuantizedWeight) else w.float())

    def widen(value):
        if isinstance(value, Tensor):
            return value.float()
        if dataclasses.is_dataclass(value):
            return dataclasses.replace(
                value, **{f.name: widen(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
            )
        return value

    return dataclasses.replace(plan, nodes=tuple(widen(node) for node in plan.nodes), dtype=torch.float32)


def new_cache(plan, dtype=torch.float32):
    cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 64, dtype=dtype)
    cache.data.fill_(float("nan"))
    return cache


def run(executor, prompts, chunk=None, cache_dtype=torch.float32):
    """Logits of every token of every prompt, in one step or in chunks of the prompts."""
    cache = new_cache(executor.plan, cache_dtype)
    sequences = [Sequence(cache) for _ in prompts]
    pieces = [[] for _ in prompts]
    longest = max(map(len, prompts))
    for start in range(0, longest, chunk or longest):
        rows = [(i, p[start : start + (chunk or longest)]) for i, p in enumerate(prompts)]
        rows = [(i, ids) for i, ids in rows if ids]
        batch = StepBatch.build([ids for _, ids in rows], [sequences[i] for i, _ in rows], all_logits=True)
        logits = executor.step(batch, cache).logits
        for (i, ids), part in zip(rows, logits.split([len(ids) for _, ids in rows]), strict=True):
            assert part.shape[0] == len(ids)
            pieces[i].append(part)
    return [torch.cat(part) for part in pieces]


def prompt(length, seed=0):
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_exact_arithmetic_gives_the_numbers_of_the_weights(shape, name):
    plan = new_plan(shape, name)
    expected = run(CpuExecutor(as_float32(plan), arithmetic="exact"), [prompt(21), prompt(3, 1)])
    for got, want in zip(run(CpuExecutor(plan, arithmetic="exact"), [prompt(21), prompt(3, 1)]), expected, strict=True):
        assert float((got - want).abs().max()) < 2e-5 * float(want.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_fast_arithmetic_is_near(shape, name):
    plan = new_plan(shape, name)
    expected = run(CpuExecutor(as_float32(plan), arithmetic="exact"), [prompt(21)])[0]
    got = run(CpuExecutor(plan, arithmetic="fast"), [prompt(21)])[0]
    error = float((got - expected).norm() / expected.norm())
    assert error < 0.02
    if name in ("float32", "float16", "nf4", "fp4"):
        assert torch.equal(got, run(CpuExecutor(plan, arithmetic="exact"), [prompt(21)])[0])
    elif name != "bfloat16":
        # it does quantise
        assert error > 1e-4


@pytest.mark.parametrize("name", ["int8", "int4-g64", "int4-zeros", "nf4"])
def test_the_eager_executor_agrees(name):
    plan = new_plan("even", name)
    expected = run(make_executor(plan, "eager"), [prompt(21)])[0]
    got = run(CpuExecutor(plan), [prompt(21)])[0]
    # both quantise activations alike, but a rounding may fall the other way
    assert float((got - expected).norm() / expected.norm()) < (2e-5 if name == "nf4" else 5e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_what_keys_and_values_are_stored_in(name):
    """Of each executor: the plan's dtype, but for integers in fast arithmetic where there is the instruction."""
    plan = new_plan("even", name)
    rounded = name.startswith("int") and ops.has_bfloat16_products()
    assert CpuExecutor(plan, arithmetic="fast").cache_dtype == (torch.bfloat16 if rounded else plan.dtype)
    assert CpuExecutor(plan, arithmetic="exact").cache_dtype == plan.dtype
    assert make_executor(plan, "eager").cache_dtype == plan.dtype


def test_one_layer_with_float_activations_keeps_the_plans_dtype():
    changed = 0

    def change(weight):
        nonlocal changed
        changed += 1
        quantized = quantised(weight, "int8")
        # the table is the first
        return dataclasses.replace(quantized, activations="float32") if changed == 3 else quantized

    assert CpuExecutor(map_weights(new_plan("even", "float32"), change)).cache_dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4-g64"])
def test_a_bfloat16_cache_is_near_and_its_bits_do_not_depend_on_company(shape, name):
    plan = new_plan(shape, name)
    executor = CpuExecutor(plan, num_threads=1)
    first = prompt(280)
    alone = run(executor, [first], cache_dtype=torch.bfloat16)[0]
    full = run(executor, [first])[0]
    assert 1e-4 < float((alone - full).norm() / full.norm()) < 0.02
    company = [prompt(9, 1), first, *(prompt(5, s) for s in range(2, 9))]
    assert torch.equal(run(executor, company, cache_dtype=torch.bfloat16)[1], alone)
    for chunk, threads in ((1, 1), (7, 2), (64, 3), (100, 1)):
        other = CpuExecutor(plan, num_threads=threads)
        assert torch.equal(run(other, [first], chunk, torch.bfloat16)[0], alone), f"chunks of {chunk}"
    # in exact arithmetic only the rounding of keys and values is left
    exact = CpuExecutor(plan, arithmetic="exact")
    error = float((run(exact, [first], cache_dtype=torch.bfloat16)[0] - run(exact, [first])[0]).norm() / full.norm())
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "arithmetic"), KINDS)
def test_bits_do_not_depend_on_company(shape, name, arithmetic):
    """A row alone, among others, in chunks, on any number of threads."""
    plan = new_plan(shape, name)
    executor = CpuExecutor(plan, num_threads=1, arithmetic=arithmetic)
    first = prompt(37)
    alone = run(executor, [first])[0]
    assert torch.equal(run(executor, [prompt(9, 1), first, *(prompt(5, s) for s in range(2, 9))])[1], alone)
    for chunk in (1, 6, 7, 16):
        assert torch.equal(run(executor, [first], chunk)[0], alone), f"chunks of {chunk}"
    for threads in (2, 3):
        other = CpuExecutor(plan, num_threads=threads, arithmetic=arithmetic)
        assert torch.equal(run(other, [first])[0], alone), f"{threads} threads"
        assert torch.equal(run(other, [first], 8)[0], alone), f"{threads} threads, chunks"


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4-g64", "nf4"])
def test_other_company_in_the_weights_is_seen(name):
    """The negative control: another order of the same sum gives other bits, which the comparison notices."""
    plan = new_plan("even", name)
    alone = run(CpuExecutor(plan), [prompt(37)])[0]
    head = plan.nodes[-1]
    swapped = [*plan.nodes]
    weight = head.linear.weight
    dense = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()
    norm = dataclasses.replace(head.norm, weight=head.norm.weight * (1 + 2**-7))
    swapped[-1] = dataclasses.replace(head, linear=Linear(dense.to(plan.dtype), None), norm=norm)
    other = run(CpuExecutor(dataclasses.replace(plan, nodes=tuple(swapped))), [prompt(37)])[0]
    assert not torch.equal(other, alone)


def test_a_table_that_is_also_the_head_is_packed_once():
    plan = new_plan("even", "int8")
    executor = CpuExecutor(plan)
    twice = dataclasses.replace(
        plan, nodes=(dataclasses.replace(plan.nodes[0], wte=dataclasses.replace(plan.nodes[0].wte)), *plan.nodes[1:])
    )
    table = ops.packed_quantized_bytes(130, 128, bits=8, group_size=128, has_zeros=False, has_codebook=False)
    assert CpuExecutor(twice).packed_bytes == executor.packed_bytes + table


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_table_may_have_a_dtype_of_its_own(dtype):
    plan = new_plan("odd", "float32")
    narrow = plan.nodes[0].wte.detach().to(dtype)
    nodes = list(plan.nodes)
    nodes[0] = dataclasses.replace(nodes[0], wte=narrow)
    nodes[-1] = dataclasses.replace(nodes[-1], linear=Linear(narrow, None))
    plan = dataclasses.replace(plan, nodes=tuple(nodes))
    got = run(CpuExecutor(plan, arithmetic="exact"), [prompt(21)])[0]
    expected = run(CpuExecutor(as_float32(plan), arithmetic="exact"), [prompt(21)])[0]
    assert float((got - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    eager = run(make_executor(plan, "eager"), [prompt(21)])[0]
    assert float((eager - expected).abs().max()) < 2e-4 * float(expected.abs().max())


def test_profile_names_every_phase():
    plan = new_plan("even", "int8")
    executor = CpuExecutor(plan)
    for length, with_rows in ((3, False), (40, True)):
        cache = new_cache(plan)
        batch = StepBatch.build([prompt(length)], [Sequence(cache)])
        phases = executor.profile(batch, cache)
        assert [p.node for p in phases] == sorted(p.node for p in phases)
        assert {p.node for p in phases} == set(range(len(plan.nodes)))
        assert all(p.seconds >= 0 for p in phases)
        names = {p.name for p in phases}
        assert {"embed", "linear", "attention", "head"} <= names
        assert ("rows" in names) == with_rows
        # the profiled step is the step
        again = new_cache(plan)
        executor.step(StepBatch.build([prompt(length)], [Sequence(again)]), again)
        assert torch.equal(again.data.nan_to_num(), cache.data.nan_to_num())


def test_arithmetic_is_checked(monkeypatch):
    plan = new_plan("odd", "float32")
    with pytest.raises(ValueError, match="arithmetic must be one of fast, exact"):
        CpuExecutor(plan, arithmetic="slow")
    monkeypatch.setenv("GPT2RT_CPU_ARITHMETIC", "exact")
    assert CpuExecutor(plan).arithmetic == "exact"
    monkeypatch.setenv("GPT2RT_CPU_ARITHMETIC", "quick")
    with pytest.raises(ValueError, match="GPT2RT_CPU_ARITHMETIC is 'quick'"):
        CpuExecutor(plan)
